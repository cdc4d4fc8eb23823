//! A running jailed process, as its parent holds it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus};

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// This signal killed it. `SIGSYS` means that it called something that its seccomp filter does not allow; the kernel's log
    /// names the call (see [`crate::denied_call`]).
    Signal(i32),
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "exit code {code}"),
            Exit::Signal(libc::SIGSYS) => {
                f.write_str("killed by SIGSYS: a system call that its filter does not allow")
            }
            Exit::Signal(signal) => write!(f, "killed by signal {signal}"),
        }
    }
}

/// A jailed child process.
///
/// Its pidfd cannot be mistaken for another process, however long it is kept. Dropping an unwaited child kills and reaps it,
/// so that an early return leaves neither a process nor a zombie; [`Child::into_parts`] hands that duty over.
#[derive(Debug)]
pub struct Child {
    pid: u32,
    pidfd: Option<OwnedFd>,
    exit: Option<Exit>,
}

impl Child {
    pub(crate) fn new(pid: u32, pidfd: OwnedFd) -> Child {
        Child { pid, pidfd: Some(pidfd), exit: None }
    }

    /// The process id in our pid namespace. For messages and /proc; to signal, use [`Child::signal`].
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The process's pidfd: becomes readable when the process ends.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.fd()
    }

    /// Sends a signal. A process that has ended already is no error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        if self.exit.is_some() {
            return Ok(());
        }
        match rustix::process::pidfd_send_signal(self.fd(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Kills the process, and with it all that it started: it is the first process of its pid namespace.
    pub fn kill(&self) -> io::Result<()> {
        self.signal(Signal::KILL)
    }

    /// How the process ended, if it has.
    pub fn try_wait(&mut self) -> io::Result<Option<Exit>> {
        self.wait_id(WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
    }

    /// Waits until the process has ended, and reaps it.
    pub fn wait(&mut self) -> io::Result<Exit> {
        loop {
            if let Some(exit) = self.wait_id(WaitIdOptions::EXITED)? {
                return Ok(exit);
            }
        }
    }

    /// Like [`Child::wait`], for at most `limit`; `None` when the process still runs then.
    pub fn wait_timeout(&mut self, limit: Duration) -> io::Result<Option<Exit>> {
        if self.exit.is_none() {
            let deadline = std::time::Instant::now() + limit;
            loop {
                let left = deadline.saturating_duration_since(std::time::Instant::now());
                let timeout = rustix::event::Timespec {
                    tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                    tv_nsec: left.subsec_nanos().into(),
                };
                let fd = self.fd();
                let mut polled = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
                match rustix::event::poll(&mut polled, Some(&timeout)) {
                    Ok(0) => return Ok(None),
                    Ok(_) => break,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        self.try_wait()
    }

    /// Gives up the handle without killing: the caller must wait for the process (by `waitid(P_PIDFD)`).
    #[must_use]
    pub fn into_parts(mut self) -> (u32, OwnedFd) {
        let fd = self.pidfd.take();
        (self.pid, fd.unwrap_or_else(|| unreachable!("the pidfd is taken only here and by drop")))
    }

    fn fd(&self) -> BorrowedFd<'_> {
        match &self.pidfd {
            Some(fd) => fd.as_fd(),
            None => unreachable!("the pidfd is taken only by into_parts and drop, which consume the child"),
        }
    }

    fn wait_id(&mut self, options: WaitIdOptions) -> io::Result<Option<Exit>> {
        if self.exit.is_none() {
            let status = loop {
                match rustix::process::waitid(WaitId::PidFd(self.fd()), options) {
                    Err(rustix::io::Errno::INTR) => {}
                    other => break other?,
                }
            };
            self.exit = status.and_then(|status| exit_of(&status));
        }
        Ok(self.exit)
    }
}

fn exit_of(status: &WaitIdStatus) -> Option<Exit> {
    status.exit_status().map(Exit::Code).or_else(|| status.terminating_signal().map(Exit::Signal))
}

impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd()
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if self.pidfd.is_some() && self.exit.is_none() && self.kill().is_ok() {
            // Ends soon: nothing can block or handle SIGKILL.
            let _ = self.wait();
        }
    }
}

/// Our own pid, for [`Pid`] arguments.
pub(crate) fn own_pid() -> Pid {
    rustix::process::getpid()
}
