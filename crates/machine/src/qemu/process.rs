//! QEMU's process.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use kapsel_jail::{Jail, profiles};

use super::args::{self, Memory, fds, paths};
use super::qmp::Qmp;
use super::{NAME, tsc};
use crate::error::Context;
use crate::process::{Output, Process, identity, into_async, pair};
use crate::{Accel, Error, MachineSpec, Result};

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
    let output = Output { console, stderr };
    let process = Process::start(NAME, jail, spec, output, socket).await?;
    Ok((process, Qmp::new(into_async(control)?)))
}

fn jail(program: &Path, spec: &MachineSpec) -> Result<Jail> {
    let error = |source| Error::Jail { name: spec.name.clone(), source };
    let mut jail = profiles::qemu(program)
        .map_err(error)?
        .identity(identity(spec))
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

fn listen(path: &Path) -> Result<UnixListener> {
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path).context(|| format!("cannot listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))
        .context(|| format!("cannot protect {}", path.display()))?;
    Ok(listener)
}
