//! A monitor's process: started in its jail, watched by its pidfd, its output drained.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kapsel_jail::{Exit, Jail};
use rustix::process::{Signal, WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream as AsyncStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::console::{self, Tail};
use crate::error::Context;
use crate::{Error, ExitReason, Identity, MachineSpec, Result, Stats};

/// A running monitor.
pub(crate) struct Process {
    monitor: &'static str,
    name: String,
    pid: u32,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    pub console: Tail,
    pub stderr: Tail,
    /// Where the guest's agent is reached; removed with the process.
    pub socket: PathBuf,
    readers: Vec<JoinHandle<()>>,
}

/// What a monitor writes.
pub(crate) struct Output {
    /// The guest's console.
    pub console: UnixStream,
    /// Its own messages.
    pub stderr: UnixStream,
}

impl Process {
    /// Starts `monitor` for `spec`. The guest's agent will be reached at `socket`.
    pub async fn start(
        monitor: &'static str,
        jail: Jail,
        spec: &MachineSpec,
        output: Output,
        socket: PathBuf,
    ) -> Result<Process> {
        let name = spec.name.clone();
        let log = spec.console.as_ref().map(|path| {
            File::create(path).context(|| format!("cannot create the console log {}", path.display()))
        });
        let log = log.transpose()?;
        let child = tokio::task::spawn_blocking(move || jail.spawn()).await;
        let child = child
            .map_err(|_| Error::Control { name: name.clone(), what: "the start was interrupted".into() })?;
        let child = child.map_err(|source| Error::Jail { name: name.clone(), source })?;
        let (pid, pidfd) = child.into_parts();
        let (console, stderr) = (Tail::default(), Tail::default());
        let readers = vec![
            tokio::spawn(console::drain(into_async(output.console)?, console.clone(), log)),
            tokio::spawn(console::drain(into_async(output.stderr)?, stderr.clone(), None)),
        ];
        let (tell, exit) = watch::channel(None);
        let pidfd = Arc::new(pidfd);
        tokio::spawn(reap(pidfd.clone(), tell));
        Ok(Process { monitor, name, pid, pidfd, exit, console, stderr, socket, readers })
    }

    /// The machine's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the end. What monitor and guest said last has been read then.
    pub async fn exit(&self) -> Exit {
        let mut exit = self.exit.clone();
        let exit = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        // The other ends of the pipes are closed; give the readers the moment that they need to see it.
        for _ in 0..50 {
            if self.readers.iter().all(JoinHandle::is_finished) {
                break;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        exit.unwrap_or(Exit::Signal(libc::SIGKILL))
    }

    /// An end in the terms of a machine.
    pub fn reason(&self, exit: Exit) -> ExitReason {
        match exit {
            Exit::Code(0) => self.console.panic().map_or(ExitReason::Shutdown, ExitReason::Panic),
            Exit::Signal(signal) => ExitReason::Killed(signal),
            Exit::Code(code) => ExitReason::Error { code, stderr: self.stderr.lines(10) },
        }
    }

    /// The error of what cannot be done any more because the machine has ended.
    pub fn ended(&self, exit: Exit) -> Error {
        let reason = self.reason(exit);
        let said = self.stderr.lines(10);
        let stderr = match reason {
            // Says it already; the last lines are registers.
            ExitReason::Panic(_) => String::new(),
            _ if said.is_empty() => self.console.lines(10),
            _ => said,
        };
        Error::Ended { name: self.name.clone(), monitor: self.monitor, reason: reason.to_string(), stderr }
    }

    /// The error of a wait that was too long.
    pub fn late(&self, what: &str, after: Duration) -> Error {
        Error::Deadline {
            name: self.name.clone(),
            what: what.to_owned(),
            after,
            console: self.console.lines(20),
        }
    }

    /// Memory of a machine with `guest_memory` bytes, of which it has `guest_actual` now.
    pub fn stats(&self, guest_memory: u64, guest_actual: u64) -> Result<Stats> {
        let path = format!("/proc/{}/smaps_rollup", self.pid);
        let rollup = std::fs::read_to_string(&path).context(|| format!("cannot read {path}"))?;
        let kib = |key: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
        };
        Ok(Stats { guest_memory, guest_actual, rss: kib("Rss"), pss: kib("Pss") })
    }

    /// Kills it, unless it has ended.
    pub fn kill(&self) {
        if self.exit.borrow().is_none() {
            // It may end right now, which is as well.
            let _ = rustix::process::pidfd_send_signal(&*self.pidfd, Signal::KILL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_file(&self.socket);
    }
}

async fn reap(pidfd: Arc<OwnedFd>, tell: watch::Sender<Option<Exit>>) {
    // Polled in a descriptor of its own, since tokio changes flags of what it watches.
    let watched = pidfd.try_clone().and_then(|fd| {
        // SAFETY: an `OwnedFd` stays open and keeps its number for as long as it exists.
        Ok(unsafe { AsyncFd::register_with_interest(fd, tokio::io::Interest::READABLE) }?)
    });
    if let Ok(watched) = watched {
        // Whether ready or failed, the wait below tells.
        let _ = watched.readable().await.map(drop);
    }
    let status = tokio::task::spawn_blocking(move || {
        rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)
    });
    let exit = match status.await {
        Ok(Ok(Some(status))) => match (status.exit_status(), status.terminating_signal()) {
            (Some(code), _) => Exit::Code(code),
            (None, signal) => Exit::Signal(signal.unwrap_or(libc::SIGKILL)),
        },
        _ => Exit::Signal(libc::SIGKILL),
    };
    tell.send_replace(Some(exit));
}

/// As whom the monitor runs.
pub(crate) fn identity(spec: &MachineSpec) -> kapsel_jail::Identity {
    match spec.jail.identity {
        Identity::User { uid, gid } => kapsel_jail::Identity::Ids { uid, gid },
        Identity::Current => kapsel_jail::Identity::Current,
    }
}

/// Lets another user, the monitor's, have a file.
pub(crate) fn give(path: &Path, spec: &MachineSpec) -> Result<()> {
    if let Identity::User { uid, gid } = spec.jail.identity {
        chown(path, Some(uid), Some(gid))
            .context(|| format!("cannot give {} to user {uid}", path.display()))?;
    }
    Ok(())
}

/// Two ends of a connection.
pub(crate) fn pair() -> Result<(UnixStream, UnixStream)> {
    UnixStream::pair().context(|| "cannot create a socket pair".into())
}

pub(crate) fn into_async(socket: UnixStream) -> Result<AsyncStream> {
    socket
        .set_nonblocking(true)
        .and_then(|()| AsyncStream::from_std(socket))
        .context(|| "cannot use a socket".into())
}
