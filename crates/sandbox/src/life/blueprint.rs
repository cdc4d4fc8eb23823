//! What machine a sandbox gets: decided from its wishes, the configuration and what this host can do.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use kapsel_guest::{Initramfs, Kernel, KernelSource};
use kapsel_jail::Identity as JailIdentity;
use kapsel_machine::{Accel, Disk, Identity, JailOptions, MachineSpec, Monitor};

use super::{
    Error,
    guest_spec::{ROOTFS_DISK, SCRATCH_DISK},
    resources::check_memory,
};
use crate::{
    annotations::Wishes,
    config::{Config, Isolation},
    host::{self, Needs},
    paths::Paths,
    programs,
};

/// The capacity in bytes of every disk: one shape for all sandboxes, so that one template serves them all.
pub const DISK_CAPACITY: u64 = 64 << 30;

/// A machine that can be built.
pub struct Blueprint {
    /// What builds it.
    pub monitor: Arc<dyn Monitor>,
    /// What to ask for to get the same kind of machine again.
    pub isolation: Isolation,
    /// Why this one.
    pub reason: String,
    /// What it shall be.
    pub spec: MachineSpec,
    /// Of the guest's kernel.
    pub release: String,
}

/// Who the machine is for.
pub struct Occupant<'a> {
    /// For messages and the process list.
    pub name: &'a str,
    /// The machine's own directory.
    pub dir: PathBuf,
    /// Where the console is logged.
    pub console: Option<PathBuf>,
    /// The root file system's disk; `None`: an empty one holds its place.
    pub rootfs: Option<PathBuf>,
    /// The scratch disk.
    pub scratch: Option<PathBuf>,
    /// How many directories of the host it shares.
    pub shares: usize,
    /// Whether it has a network.
    pub network: bool,
    /// Its cgroup.
    pub cgroup: Option<kapsel_jail::Cgroup>,
}

/// Where the guest's kernel comes from, as the configuration says.
pub fn kernel_source(config: &Config) -> KernelSource {
    config.kernel().map_or(KernelSource::Debian, KernelSource::Path)
}

/// Draws up the machine of a sandbox.
///
/// # Errors
/// When something is missing on this host, or asked for that it cannot give.
pub fn draw(
    paths: &Paths,
    config: &Config,
    wishes: &Wishes,
    occupant: Occupant<'_>,
) -> Result<Blueprint, Error> {
    let memory = wishes.memory.unwrap_or_else(|| config.memory());
    check_memory(memory)?;
    let memory_mib = u32::try_from(memory.div_ceil(1 << 20)).map_err(|_| {
        Error::Resources("that much memory no machine has; ask for less with --memory".into())
    })?;
    let vcpus = wishes.cpus.unwrap_or_else(|| config.cpus());
    let wanted = wishes.isolation.unwrap_or_else(|| config.isolation());
    let (shares, network) = (occupant.shares, occupant.network);
    let needs = Needs { shares, network, vcpus, memory_mib };
    let choice = host::choose(paths, config, wanted, &needs).map_err(|e| Error::Missing(e.to_string()))?;
    let kernel = Kernel::ensure(paths.data(), &kernel_source(config), &mut |_| ())
        .map_err(|e| Error::Missing(e.to_string()))?;
    let agent = programs::find(programs::AGENT, config).map_err(|e| Error::Missing(e.to_string()))?;
    let initramfs =
        Initramfs::build(paths.data(), &agent, &kernel).map_err(|e| Error::Missing(e.to_string()))?;
    for file in [&kernel.vmlinux, &initramfs].into_iter().chain(&occupant.rootfs) {
        readable(file)
            .map_err(|e| Error::Missing(format!("cannot let the monitor read {}: {e}", file.display())))?;
    }
    let rootfs = match occupant.rootfs {
        Some(path) => path,
        None => {
            placeholder(paths).map_err(|e| Error::Resources(format!("cannot make an empty disk: {e}")))?
        }
    };
    let mut disks = vec![Disk { serial: ROOTFS_DISK.into(), path: rootfs, read_only: true }];
    disks.extend(occupant.scratch.map(|path| Disk { serial: SCRATCH_DISK.into(), path, read_only: false }));
    let identity = match JailIdentity::for_sandbox(occupant.name) {
        JailIdentity::Ids { uid, gid } => Identity::User { uid, gid },
        JailIdentity::Current => Identity::Current,
    };
    let spec = MachineSpec {
        name: occupant.name.into(),
        dir: occupant.dir,
        kernel: kernel.vmlinux,
        initramfs,
        cmdline: config.kernel_args().into(),
        vcpus,
        memory_mib,
        disks,
        shares: Vec::new(),
        nics: Vec::new(),
        accel: choice.accel(),
        console: occupant.console,
        template: false,
        memory_dir: None,
        jail: JailOptions { identity, cgroup: occupant.cgroup },
    };
    let (monitor, isolation, reason) = (choice.monitor, choice.isolation, choice.reason);
    Ok(Blueprint { monitor, isolation, reason, spec, release: kernel.release })
}

impl Blueprint {
    /// Whether a template may be made of such a machine: its disks have the common shape, so that others can use it.
    pub fn is_common(&self) -> bool {
        self.spec
            .disks
            .iter()
            .all(|disk| fs::metadata(&disk.path).is_ok_and(|meta| meta.len() == DISK_CAPACITY))
    }

    /// `kvm` or `tcg`.
    pub fn accelerator(&self) -> &'static str {
        match self.spec.accel {
            Accel::Kvm => "kvm",
            Accel::Tcg => "tcg",
        }
    }
}

/// Lets the monitor's user read a file that is not secret; the directories above it keep everybody else away.
fn readable(path: &Path) -> io::Result<()> {
    const READ: u32 = 0o444;
    let mut permissions = fs::metadata(path)?.permissions();
    if permissions.mode() & READ == READ {
        return Ok(());
    }
    permissions.set_mode(permissions.mode() | READ);
    fs::set_permissions(path, permissions)
}

/// An empty disk, shared by all machines whose root file system is none.
fn placeholder(paths: &Paths) -> io::Result<PathBuf> {
    let path = paths.data().join("empty.img");
    if fs::metadata(&path).is_ok_and(|meta| meta.len() == DISK_CAPACITY) {
        return Ok(path);
    }
    sparse(&path, DISK_CAPACITY, 0o644)?;
    Ok(path)
}

/// Makes a file of `size` bytes that takes no space.
fn sparse(path: &Path, size: u64, mode: u32) -> io::Result<File> {
    let file = File::options().write(true).create(true).truncate(false).mode(mode).open(path)?;
    file.set_len(size)?;
    Ok(file)
}

/// A scratch disk on its way to a machine. Its name is removed when this is dropped; the machine has it open by then.
#[derive(Debug)]
pub struct Scratch {
    /// The disk.
    pub path: PathBuf,
}

impl Scratch {
    /// Makes an empty ext4 file system of `size` bytes on a disk of the common capacity.
    ///
    /// # Errors
    /// When the host has not so much space, or no mkfs.ext4.
    pub fn make(paths: &Paths, name: &str, size: u64) -> Result<Self, Error> {
        const MIN: u64 = 8 << 20;
        if !(MIN..=DISK_CAPACITY).contains(&size) {
            let (min, max) = (crate::config::format_size(MIN), crate::config::format_size(DISK_CAPACITY));
            return Err(Error::Invalid(format!(
                "a storage size must be {min} to {max}; give such a one with --storage"
            )));
        }
        let path = paths.scratch_disk(name);
        let dir = path.parent().unwrap_or(paths.data());
        crate::paths::private_dir(dir).map_err(|e| Error::Resources(e.to_string()))?;
        let failed =
            |e: io::Error| Error::Resources(format!("cannot make a scratch disk in {}: {e}", dir.display()));
        let free = rustix::fs::statvfs(dir).map_err(|e| failed(e.into()))?;
        let free = free.f_bavail.saturating_mul(free.f_frsize);
        if free < size {
            let (size, free) =
                (crate::config::format_size(size), crate::config::format_size(free >> 20 << 20));
            let dir = dir.display();
            return Err(Error::Resources(format!(
                "{dir} has {free} left, too little for {size} of storage; ask for less with --storage"
            )));
        }
        let scratch = Self { path: path.clone() };
        let file = sparse(&scratch.path, DISK_CAPACITY, 0o600).map_err(failed)?;
        format_ext4(&scratch.path, size)?;
        let (uid, gid) = JailIdentity::for_sandbox(name).ids();
        std::os::unix::fs::fchown(&file, Some(uid), Some(gid)).map_err(failed)?;
        Ok(scratch)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn format_ext4(path: &Path, size: u64) -> Result<(), Error> {
    let failed = |reason: String| Error::Helper { what: "mkfs.ext4 (package e2fsprogs)".into(), reason };
    let output = std::process::Command::new("mkfs.ext4")
        .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
        // The content dies with the sandbox: no journal, no reserve, nothing written that the guest can write itself.
        .args(["-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"])
        .arg(path)
        .arg(format!("{}k", size >> 10))
        .output()
        .map_err(|e| failed(e.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().into())),
    }
}
