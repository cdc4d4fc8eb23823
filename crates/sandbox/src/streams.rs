//! The standard streams of a process in a sandbox, connected to those of the command that stands before it.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use rustix::io::Errno;

use crate::attach::{self, StreamKind};
use crate::paths::Bundle;
use crate::pump::{End, pump};

/// A pump needs little.
const STACK: usize = 128 << 10;

/// Connections to a process's streams, before any byte has moved.
pub struct Streams {
    /// Where standard input goes, if it is passed on.
    pub stdin: Option<UnixStream>,
    /// What comes, and this command's own stream that it goes to.
    pub outputs: Vec<(UnixStream, OwnedFd)>,
}

impl Streams {
    /// Connects to the streams of a process: with a terminal to one, else to three. From here on, nothing that it writes is missed.
    ///
    /// # Errors
    /// When the sandbox is gone or has no such process, or this command's own output cannot be used.
    pub fn open(bundle: &Bundle, exec_id: &str, stdin: bool, terminal: bool) -> Result<Self, attach::Error> {
        let open = |kind| attach::open(bundle, exec_id, kind, true);
        let own = |fd: BorrowedFd<'_>| fd.try_clone_to_owned().map_err(attach::Error::Own);
        let stdout = own(rustix::stdio::stdout())?;
        if terminal {
            let tty = open(StreamKind::Tty)?;
            let stdin = stdin.then(|| tty.try_clone()).transpose()?;
            return Ok(Self { stdin, outputs: vec![(tty, stdout)] });
        }
        let stdin = stdin.then(|| open(StreamKind::Stdin)).transpose()?;
        let stderr = own(rustix::stdio::stderr())?;
        let outputs = vec![(open(StreamKind::Stdout)?, stdout), (open(StreamKind::Stderr)?, stderr)];
        Ok(Self { stdin, outputs })
    }
}

/// Passes this command's standard input on, every byte and then the end.
pub fn pass_input(to: &UnixStream) {
    // When the process does not read its input any more there is nobody to tell.
    let _ = pump(rustix::stdio::stdin(), to, &AtomicBool::new(false));
    let _ = to.shutdown(Shutdown::Write);
}

/// Outputs on their way.
pub struct Outputs(Vec<(UnixStream, Arc<AtomicBool>)>);

impl Outputs {
    /// Starts moving them, each by a thread: all calls block, so that each goes as fast as its slower side and no faster. `done` is
    /// told how each ended.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn start(
        outputs: Vec<(UnixStream, OwnedFd)>,
        done: impl Fn(Result<End, Errno>) + Clone + Send + 'static,
    ) -> io::Result<Self> {
        let mut moving = Vec::new();
        for (from, to) in outputs {
            let holding = Arc::new(AtomicBool::new(false));
            moving.push((from.try_clone()?, holding.clone()));
            let done = done.clone();
            carry("output", move || done(pump(&from, &to, &holding)))?;
        }
        Ok(Self(moving))
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is on its way: none is waiting in a connection, none is being written.
    pub fn idle(&self) -> bool {
        self.0.iter().all(|(stream, holding)| {
            rustix::io::ioctl_fionread(stream.as_fd()).unwrap_or(0) == 0 && !holding.load(Ordering::SeqCst)
        })
    }
}

/// Starts a thread that moves bytes. It ends with the process at the latest: what it waits for may never come.
///
/// # Errors
/// Those of the system.
pub fn carry(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    thread::Builder::new().name(name.into()).stack_size(STACK).spawn(work).map(drop)
}
