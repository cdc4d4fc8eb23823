//! Signals that reach kapsel while a container is in the foreground.

use std::io;

use nix::sys::signal::{SigSet, Signal};
use tokio::sync::mpsc;

/// Those that are not passed on: for the terminal's size, for kapsel's own children and pipes, for faults of kapsel
/// itself, and for the shell's job control.
const OURS: [Signal; 13] = [
    Signal::SIGWINCH,
    Signal::SIGCHLD,
    Signal::SIGPIPE,
    Signal::SIGURG,
    Signal::SIGSEGV,
    Signal::SIGBUS,
    Signal::SIGFPE,
    Signal::SIGILL,
    Signal::SIGABRT,
    Signal::SIGTSTP,
    Signal::SIGTTIN,
    Signal::SIGTTOU,
    Signal::SIGCONT,
];

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The terminal has another size.
    Resized,
    /// The container's process is to get this signal.
    Forward(i32),
}

/// Receives signals instead of being ended by them.
pub struct Signals(mpsc::UnboundedReceiver<Event>);

impl Signals {
    /// From here on, signals are events. Must be called before other threads are started: each thread has a mask of its
    /// own, and new ones inherit it.
    ///
    /// # Errors
    /// When the mask cannot be set or the thread that waits for signals cannot be started.
    pub fn take_over() -> io::Result<Self> {
        let mut set = SigSet::all();
        OURS.iter().filter(|signal| **signal != Signal::SIGWINCH).for_each(|signal| set.remove(*signal));
        set.thread_block()?;
        let (events, receiver) = mpsc::unbounded_channel();
        std::thread::Builder::new().name("signals".into()).spawn(move || {
            while let Ok(signal) = set.wait() {
                let event = match signal {
                    Signal::SIGWINCH => Event::Resized,
                    other => Event::Forward(other as i32),
                };
                if events.send(event).is_err() {
                    return;
                }
            }
        })?;
        Ok(Signals(receiver))
    }

    /// The next one. Never returns when no more can come.
    pub async fn next(&mut self) -> Event {
        match self.0.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}
