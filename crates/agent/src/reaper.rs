//! Process 1's duty: waiting for every child, its own and the orphans that it inherits.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use rustix::process::WaitOptions;
use tokio::sync::watch;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// 0 to 255, or 128 + n after signal n.
    pub code: u32,
    /// CLOCK_REALTIME in nanoseconds.
    pub at_ns: u64,
}

/// Hands the end of each child to whoever watches it.
#[derive(Debug, Default)]
pub struct Reaper(Mutex<HashMap<i32, watch::Sender<Option<Exit>>>>);

impl Reaper {
    /// Watches a child. Must be called before anything is awaited after its birth, so that its end cannot come first.
    pub fn watch(&self, pid: i32) -> watch::Receiver<Option<Exit>> {
        let (sender, receiver) = watch::channel(None);
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(pid, sender);
        receiver
    }

    /// Reaps for ever. `signals` is of [`crate::sys::child_signals`].
    ///
    /// # Errors
    /// When the descriptor cannot be watched.
    pub async fn run(self: Arc<Self>, signals: OwnedFd) -> io::Result<()> {
        let signals = crate::sys::in_event_loop(signals, tokio::io::Interest::READABLE)?;
        loop {
            let mut guard = signals.readable().await?;
            // Several signals become one, so its content says nothing; reading it takes it away.
            let mut info = [0; 128];
            if let Err(rustix::io::Errno::AGAIN) = rustix::io::read(guard.get_inner(), &mut info) {
                guard.clear_ready();
            }
            self.reap();
        }
    }

    fn reap(&self) {
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let code = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => code as u32,
                (None, Some(signal)) => 128 + signal as u32,
                // Stopped or continued: not asked for.
                (None, None) => continue,
            };
            let watcher =
                self.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&pid.as_raw_nonzero().get());
            if let Some(watcher) = watcher {
                watcher.send_replace(Some(Exit { code, at_ns: realtime_ns() }));
            }
        }
    }
}

/// CLOCK_REALTIME in nanoseconds.
pub fn realtime_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}
