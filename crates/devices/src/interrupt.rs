//! How a device calls for its driver's attention.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use vmm_sys_util::eventfd::EventFd;

/// A used buffer is in a queue (virtio 1.2, section 4.2.2, InterruptStatus bit 0).
pub const USED_BUFFER: u32 = 1;
/// The configuration changed (bit 1).
pub const CONFIGURATION: u32 = 2;

/// The interrupt line of one device: an event that the hypervisor turns into an interrupt, and the reason for it.
#[derive(Debug, Clone)]
pub struct Interrupt {
    status: Arc<AtomicU32>,
    line: Arc<EventFd>,
}

impl Interrupt {
    /// A line that signals `line`.
    pub fn new(line: EventFd) -> Self {
        Interrupt { status: Arc::new(AtomicU32::new(0)), line: Arc::new(line) }
    }

    /// The event behind the line, for the hypervisor.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Says that a queue has used buffers.
    pub fn used_buffer(&self) {
        self.raise(USED_BUFFER);
    }

    /// Says that the configuration or the device's status changed.
    pub fn configuration(&self) {
        self.raise(CONFIGURATION);
    }

    /// The reasons that the driver has not acknowledged.
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    pub(crate) fn acknowledge(&self, reasons: u32) {
        self.status.fetch_and(!reasons, Ordering::SeqCst);
    }

    pub(crate) fn raise(&self, reason: u32) {
        self.status.fetch_or(reason, Ordering::SeqCst);
        // The event's counter is full only when nobody consumed 2^64-2 earlier interrupts, so one is pending anyway.
        if let Err(error) = self.line.write(1) {
            tracing::debug!(%error, "an interrupt was not signalled");
        }
    }
}
