//! A descriptor that becomes readable at a time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

/// A timer, which is not armed at first.
#[derive(Debug)]
pub struct Timer(OwnedFd);

impl Timer {
    /// A timer.
    ///
    /// # Errors
    /// When the host has no more descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Timer(timerfd_create(TimerfdClockId::Monotonic, flags)?))
    }

    /// Readable once, after this long.
    pub fn once(&self, after: Duration) {
        // Zero would disarm it.
        self.set(after.max(Duration::from_nanos(1)), Duration::ZERO);
    }

    /// Readable again and again; never, if the interval is zero.
    pub fn every(&self, interval: Duration) {
        self.set(interval, interval);
    }

    /// It does not become readable any more, nor is it.
    pub fn stop(&self) {
        self.set(Duration::ZERO, Duration::ZERO);
    }

    /// Takes what made it readable.
    pub fn clear(&self) {
        // There may be nothing to take.
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }

    fn set(&self, first: Duration, interval: Duration) {
        let spec =
            |duration| Timespec::try_from(duration).unwrap_or(Timespec { tv_sec: i64::MAX, tv_nsec: 0 });
        let times = Itimerspec { it_interval: spec(interval), it_value: spec(first) };
        if let Err(error) = timerfd_settime(&self.0, TimerfdTimerFlags::empty(), &times) {
            tracing::error!(%error, "a timer cannot be set");
        }
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
