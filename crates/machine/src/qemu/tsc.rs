//! The frequency of the host's time stamp counter.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// How long it is watched. The error is that of two clock readings, some 50 ns, in this.
const WATCHED: Duration = Duration::from_millis(10);

/// In kHz; measured once.
pub(super) fn khz() -> u64 {
    static KHZ: OnceLock<u64> = OnceLock::new();
    *KHZ.get_or_init(measure)
}

fn measure() -> u64 {
    let (time, count) = now();
    std::thread::sleep(WATCHED);
    let (later, more) = now();
    let nanoseconds = (later - time).as_nanos().max(1);
    u64::try_from(u128::from(more.wrapping_sub(count)) * 1_000_000 / nanoseconds).unwrap_or(u64::MAX)
}

/// Clock and counter at the same moment: of a few tries the one that took least.
fn now() -> (Instant, u64) {
    let read = || {
        let begun = Instant::now();
        // SAFETY: every x86-64 processor has the instruction, and Linux lets user space execute it.
        let count = unsafe { std::arch::x86_64::_rdtsc() };
        (begun.elapsed(), begun, count)
    };
    let tries: [_; 5] = std::array::from_fn(|_| read());
    let (_, time, count) = tries.into_iter().min_by_key(|(took, ..)| *took).unwrap_or_else(read);
    (time, count)
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_measurements_agree() {
        let (a, b) = (super::measure() as f64, super::measure() as f64);
        assert!(a > 100_000.0 && (a / b - 1.0).abs() < 0.01, "{a} {b}");
    }
}
