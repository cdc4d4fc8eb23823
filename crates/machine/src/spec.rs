//! What a machine shall be.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

/// How guest code is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// Hardware virtualisation.
    Kvm,
    /// QEMU's translator. QEMU's developers do not call it a security boundary; the jail around it has to hold.
    Tcg,
}

/// One virtual machine, completely.
#[derive(Debug, Clone)]
pub struct MachineSpec {
    /// For messages and the process list; the sandbox's short id.
    pub name: String,
    /// A directory of the machine's own (existing, 0700), for its sockets. Short: Unix socket paths are limited to 107 bytes.
    pub dir: PathBuf,
    /// An uncompressed kernel (`vmlinux` with PVH entry).
    pub kernel: PathBuf,
    /// The initramfs.
    pub initramfs: PathBuf,
    /// Appended to the kernel command line that the monitor needs itself.
    pub cmdline: String,
    /// Virtual processors, at least 1.
    pub vcpus: u32,
    /// Guest memory in MiB, at least 64.
    pub memory_mib: u32,
    /// Disks, in the order in which the guest sees them.
    pub disks: Vec<Disk>,
    /// Directories shared from the start. On [`crate::Monitor::restore`] they are plugged in after it.
    pub shares: Vec<Share>,
    /// Network interfaces, in the order in which the guest sees them. On [`crate::Monitor::restore`] they are plugged in after it.
    pub nics: Vec<Nic>,
    /// How guest code is executed.
    pub accel: Accel,
    /// A log file for the guest's console, cut at [`crate::CONSOLE_FILE_MAX`] bytes. `None`: only in memory.
    pub console: Option<PathBuf>,
    /// Keep the memory in a file from the start, so that [`crate::Machine::snapshot`] works.
    pub template: bool,
    /// The directory for that file; a snapshot must be made on the same file system.
    pub memory_dir: Option<PathBuf>,
    /// How the monitor is confined.
    pub jail: JailOptions,
}

/// A virtio-blk disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// The serial by which the guest finds it: `/dev/disk` names do not exist there, `/sys/block/vdX/serial` does. At most 20 bytes.
    pub serial: String,
    /// A raw image. Its size is the disk's capacity and part of the snapshot's shape: a clone may bring another file of the same size.
    pub path: PathBuf,
    /// Not writable by the guest.
    pub read_only: bool,
}

/// A directory shared by virtio-fs.
#[derive(Debug, Clone)]
pub struct Share {
    /// The tag by which the guest mounts it, at most 36 bytes.
    pub tag: String,
    /// The connection to the vhost-user back end (`kapsel-fsd`). Used once.
    pub socket: Arc<OwnedFd>,
}

/// A network interface (virtio-net).
#[derive(Debug, Clone)]
pub struct Nic {
    /// By which the guest finds it.
    pub mac: [u8; 6],
    /// A tap that was made with IFF_VNET_HDR and IFF_NO_PI.
    pub tap: Arc<OwnedFd>,
}

/// What can be plugged into a running machine.
#[derive(Debug, Clone)]
pub enum Attachment {
    /// A shared directory. The machine must have been started with shared memory (a boot or restore with at least one share, or
    /// [`JailOptions`] that allow it).
    Share(Share),
    /// A network interface. The machine must have been started with shared memory, as for a share.
    Nic(Nic),
}

/// Under whose identity the monitor runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Identity {
    /// A user and group of its own (needs root).
    User {
        /// User id.
        uid: u32,
        /// Group id.
        gid: u32,
    },
    /// The caller's, inside a user namespace.
    Current,
}

/// How the monitor is confined.
#[derive(Debug, Clone)]
pub struct JailOptions {
    /// Under whose identity the monitor runs.
    pub identity: Identity,
    /// A cgroup to start it in.
    pub cgroup: Option<kapsel_jail::Cgroup>,
}

/// What Linux starts with and no sandbox uses; a quarter of a boot under TCG. A kernel without one of them ignores its name.
///
/// The self-test of the generator of random numbers from timing (the guest has the host's), names in trace output, keys for signed
/// modules (the modules come with the kernel), types for congestion control written in BPF and for testing such things.
pub(crate) const NEEDLESS: &[&str] = &[
    "jent_mod_init",
    "trace_eval_init",
    "load_system_certificate_list",
    "bpf_tcp_ca_kfunc_init",
    "bpf_dummy_struct_ops_init",
];
