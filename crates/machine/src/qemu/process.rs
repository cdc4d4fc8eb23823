//! QEMU's process: started in its jail, watched by its pidfd.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kapsel_jail::{Exit, Jail, profiles};
use rustix::process::{Signal, WaitId, WaitIdOptions};
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream as AsyncStream;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::args::{self, Memory, fds, paths};
use super::qmp::Qmp;
use super::tsc;
use crate::console::{self, Tail};
use crate::error::Context;
use crate::{Accel, Error, Identity, MachineSpec, Result};

/// What a machine's process needs beside its spec.
#[derive(Default)]
pub(super) struct Start {
    /// The file at [`paths::MEMORY`].
    pub memory_file: Option<PathBuf>,
    /// Memory to be shared with back ends.
    pub memory_fd: Option<OwnedFd>,
    /// The saved state.
    pub state: Option<File>,
}

/// A running QEMU.
pub(super) struct Process {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    exit: watch::Receiver<Option<Exit>>,
    pub console: Tail,
    pub stderr: Tail,
    pub socket: PathBuf,
    readers: Vec<JoinHandle<()>>,
}

impl Process {
    /// Starts QEMU for `spec`, and gives the control connection with it.
    pub(super) async fn start(
        program: &Path,
        spec: &MachineSpec,
        memory: Memory,
        start: Start,
    ) -> Result<(Process, Qmp)> {
        let from = match start.state {
            Some(_) => args::From::Snapshot,
            None => args::From::Kernel { tsc_khz: tsc::khz() },
        };
        let mut jail = jail(program, spec)?.args(args::build(spec, memory, from)?);
        let pair = || UnixStream::pair().context(|| "cannot create a socket pair".into());
        let ((control, control_end), (console, console_end)) = (pair()?, pair()?);
        let (stderr, stderr_end) = pair()?;
        let socket = spec.dir.join("agent.sock");
        let listener = listen(&socket)?;
        jail = jail
            .fd(control_end.into(), fds::CONTROL)
            .fd(console_end.into(), fds::CONSOLE)
            .fd(listener.into(), fds::CHANNEL)
            .stderr(stderr_end.into());
        if let Some(state) = start.state {
            jail = jail.fd(state.into(), fds::STATE);
        }
        if let Some(file) = &start.memory_file {
            jail = jail.bind_rw(file, paths::MEMORY);
        }
        if let Some(memory) = start.memory_fd {
            jail = jail.fd(memory, fds::MEMORY).own_descriptors(paths::DESCRIPTORS);
        }
        for (n, disk) in spec.disks.iter().enumerate() {
            let file = File::options().read(true).write(!disk.read_only).open(&disk.path);
            let file = file.context(|| format!("cannot open the disk {}", disk.path.display()))?;
            jail = jail.fd(file.into(), fds::DISKS + n as i32);
        }
        for (n, share) in spec.shares.iter().enumerate() {
            let socket = share.socket.try_clone().context(|| "cannot duplicate a descriptor".into())?;
            jail = jail.fd(socket, fds::SHARES + n as i32);
        }
        for (n, nic) in spec.nics.iter().enumerate() {
            let tap = nic.tap.try_clone().context(|| "cannot duplicate a descriptor".into())?;
            jail = jail.fd(tap, fds::TAPS + n as i32);
        }
        let log = spec.console.as_ref().map(|path| {
            File::create(path).context(|| format!("cannot create the console log {}", path.display()))
        });
        let log = log.transpose()?;
        let name = spec.name.clone();
        let child = tokio::task::spawn_blocking(move || jail.spawn()).await;
        let child = child
            .map_err(|_| Error::Control { name: name.clone(), what: "the start was interrupted".into() })?;
        let (pid, pidfd) = child.map_err(|error| Error::Jail { name, source: error })?.into_parts();
        let (tail, errors) = (Tail::default(), Tail::default());
        let readers = vec![
            tokio::spawn(console::drain(into_async(console)?, tail.clone(), log)),
            tokio::spawn(console::drain(into_async(stderr)?, errors.clone(), None)),
        ];
        let (tell, exit) = watch::channel(None);
        let pidfd = Arc::new(pidfd);
        tokio::spawn(reap(pidfd.clone(), tell));
        let process = Process { pid, pidfd, exit, console: tail, stderr: errors, socket, readers };
        Ok((process, Qmp::new(into_async(control)?)))
    }

    pub(super) fn pid(&self) -> u32 {
        self.pid
    }

    /// Waits for the end. What QEMU and the guest said last has been read then.
    pub(super) async fn exit(&self) -> Exit {
        let mut exit = self.exit.clone();
        let exit = exit.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        // The other ends of the pipes are closed; give the readers the moment that they need to see it.
        for _ in 0..50 {
            if self.readers.iter().all(JoinHandle::is_finished) {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        exit.unwrap_or(Exit::Signal(libc::SIGKILL))
    }

    /// Kills it, unless it has ended.
    pub(super) fn kill(&self) {
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

fn jail(program: &Path, spec: &MachineSpec) -> Result<Jail> {
    let error = |source| Error::Jail { name: spec.name.clone(), source };
    let identity = match spec.jail.identity {
        Identity::User { uid, gid } => kapsel_jail::Identity::Ids { uid, gid },
        Identity::Current => kapsel_jail::Identity::Current,
    };
    let mut jail = profiles::qemu(program)
        .map_err(error)?
        .identity(identity)
        .bind_ro(&spec.kernel, paths::KERNEL)
        .bind_ro(&spec.initramfs, paths::INITRAMFS);
    if spec.accel == Accel::Kvm {
        jail = jail.device("/dev/kvm");
    }
    if let Some(cgroup) = &spec.jail.cgroup {
        jail = jail.cgroup(cgroup);
    }
    Ok(jail)
}

/// Lets another user, the monitor's, have a file.
pub(super) fn give(path: &Path, spec: &MachineSpec) -> Result<()> {
    if let Identity::User { uid, gid } = spec.jail.identity {
        chown(path, Some(uid), Some(gid))
            .context(|| format!("cannot give {} to user {uid}", path.display()))?;
    }
    Ok(())
}

fn listen(path: &Path) -> Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .context(|| format!("cannot protect {}", path.display()))?;
    Ok(listener)
}

fn into_async(socket: UnixStream) -> Result<AsyncStream> {
    socket
        .set_nonblocking(true)
        .and_then(|()| AsyncStream::from_std(socket))
        .context(|| "cannot use a socket".into())
}

/// The memory figures of a process.
pub(super) fn smaps_rollup(pid: u32) -> Result<String> {
    let path = format!("/proc/{pid}/smaps_rollup");
    std::fs::read_to_string(&path).context(|| format!("cannot read {path}"))
}
