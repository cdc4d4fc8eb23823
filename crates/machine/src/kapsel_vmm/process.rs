//! kapsel-vmm's process, and what is in its jail.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kapsel_jail::{Jail, profiles};

use super::api::{Api, Socket};
use super::{NAME, SHARES, TAPS, config, paths};
use crate::error::Context;
use crate::process::{Output, Process, give, identity, pair};
use crate::{Error, MachineSpec, Result};

/// How long it may take until its API is there.
const UP: Duration = Duration::from_secs(20);

/// How the machine starts.
#[derive(Debug, Clone, Copy)]
pub(super) enum From<'a> {
    /// Its kernel boots.
    Kernel,
    /// It continues what is saved in this directory.
    Snapshot(&'a Path),
}

/// Starts kapsel-vmm, and waits for its API.
pub(super) async fn start(program: &Path, spec: &MachineSpec, from: From<'_>) -> Result<(Process, Api)> {
    let sockets = sockets(spec)?;
    let mut jail = jail(program, spec)?.bind_rw(&sockets, paths::SOCKETS).args([
        "--api-sock",
        paths::API,
        "--level",
        "Warn",
        "--id",
        &id(&spec.name),
    ]);
    jail = match from {
        From::Kernel => jail
            .bind_ro(&spec.kernel, paths::KERNEL)
            .bind_ro(&spec.initramfs, paths::INITRAMFS)
            .bind_ro(description(spec)?, paths::CONFIG)
            .args(["--config-file", paths::CONFIG]),
        From::Snapshot(dir) => jail
            .bind_ro(dir.join("state"), paths::SAVED_STATE)
            .bind_ro(dir.join("memory"), paths::SAVED_MEMORY),
    };
    for disk in &spec.disks {
        let inside = paths::disk(&disk.serial);
        jail =
            if disk.read_only { jail.bind_ro(&disk.path, inside) } else { jail.bind_rw(&disk.path, inside) };
    }
    for (n, nic) in spec.nics.iter().enumerate() {
        let tap = nic.tap.try_clone().context(|| "cannot duplicate a descriptor".into())?;
        jail = jail.fd(tap, TAPS + n as i32);
    }
    for (n, share) in spec.shares.iter().enumerate() {
        let connection = share.socket.try_clone().context(|| "cannot duplicate a descriptor".into())?;
        jail = jail.fd(connection, SHARES + n as i32);
    }
    if spec.template {
        jail = jail
            .bind_rw(saved_file(spec, "state")?, paths::STATE)
            .bind_rw(saved_file(spec, "memory")?, paths::MEMORY);
    }
    let ((console, console_end), (stderr, stderr_end)) = (pair()?, pair()?);
    jail = jail.stdout(console_end.into()).stderr(stderr_end.into());
    let (vsock, api) = (sockets.join("vsock"), Api::at(Socket(sockets.join("api"))));
    let process = Process::start(NAME, jail, spec, Output { console, stderr }, vsock).await?;
    let up = tokio::select! {
        biased;
        up = tokio::time::timeout(UP, api.appears()) => up,
        exit = process.exit() => return Err(process.ended(exit)),
    };
    let up = up.map_err(|_| process.late("kapsel-vmm's API to appear", UP))?;
    up.map_err(|error| Error::Control { name: spec.name.clone(), what: error.to_string() })?;
    Ok((process, api))
}

fn jail(program: &Path, spec: &MachineSpec) -> Result<Jail> {
    let error = |source| Error::Jail { name: spec.name.clone(), source };
    let mut jail = profiles::kapsel_vmm(program).map_err(error)?.identity(identity(spec));
    if let Some(cgroup) = &spec.jail.cgroup {
        jail = jail.cgroup(cgroup);
    }
    Ok(jail)
}

/// An empty directory for the sockets, which the monitor's user may write to.
fn sockets(spec: &MachineSpec) -> Result<PathBuf> {
    let path = spec.dir.join("vmm");
    // Left by one that could not be started.
    let _ = fs::remove_dir_all(&path);
    let made = fs::DirBuilder::new().mode(0o700).create(&path);
    made.context(|| format!("cannot create {}", path.display()))?;
    give(&path, spec)?;
    Ok(path)
}

/// The file that describes the machine.
fn description(spec: &MachineSpec) -> Result<PathBuf> {
    let path = spec.dir.join("machine.json");
    let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&path);
    let written = file.and_then(|mut file| file.write_all(config::whole(spec).to_string().as_bytes()));
    written.context(|| format!("cannot write {}", path.display()))?;
    give(&path, spec)?;
    Ok(path)
}

/// Where a file of a machine that is to be saved is until it is.
pub(super) fn saved(spec: &MachineSpec, name: &str) -> PathBuf {
    spec.memory_dir.as_ref().unwrap_or(&spec.dir).join(name)
}

/// Makes it, for the monitor's user to write.
fn saved_file(spec: &MachineSpec, name: &str) -> Result<PathBuf> {
    let path = saved(spec, name);
    let made = File::options().write(true).create_new(true).mode(0o600).open(&path);
    made.context(|| format!("cannot create {}", path.display()))?;
    give(&path, spec)?;
    Ok(path)
}

/// A name as kapsel-vmm takes it.
fn id(name: &str) -> String {
    let plain = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    name.chars().take(64).map(plain).collect()
}
