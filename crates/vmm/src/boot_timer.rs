//! A byte of device memory by which a guest says that it has booted. It is where Firecracker has it.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// What the guest writes.
const BOOTED: u8 = 123;

/// Measures from the process's start.
#[derive(Debug, Clone, Copy)]
pub struct BootTimer {
    started: Instant,
    processor: Duration,
}

impl BootTimer {
    /// A timer that counts from now.
    pub fn start() -> Self {
        BootTimer { started: Instant::now(), processor: processor_time() }
    }

    /// The guest writes to the timer's memory.
    pub fn write(&self, offset: u64, data: &[u8]) {
        if (offset, data) == (0, &[BOOTED]) {
            let (wall, processor) = (self.started.elapsed(), processor_time().saturating_sub(self.processor));
            tracing::info!(
                "Guest-boot-time = {:>6} us {} ms, {:>6} CPU us {} CPU ms",
                wall.as_micros(),
                wall.as_millis(),
                processor.as_micros(),
                processor.as_millis()
            );
        }
    }
}

/// What this process has used of the processor.
pub fn processor_time() -> Duration {
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap_or_default()
}
