//! What process 1 does before it serves: mounts, modules, cgroups, and at the very end the power.

use std::ffi::CStr;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kapsel_channel::GuestPort;
use kapsel_protocol::AGENT_PORT;
use rustix::fs::{Mode, OFlags};
use rustix::mount::MountFlags;
use rustix::system::RebootCommand;

use crate::container::cgroup;
use crate::phases::Phases;

/// The kernel modules that the guest needs, one path a line, in this order.
const MODULES: &str = "/lib/kapsel/modules";
/// The name that the host gives the agent's port.
const PORT: &str = "kapsel.0";
/// How long the port may take to appear.
const PORT_DEADLINE: Duration = Duration::from_secs(10);

/// virtio's number of a device with serial ports (QEMU's way to the host).
const SERIAL: u32 = 3;
/// virtio's number of a socket device (kapsel-vmm's way to the host).
const VSOCK: u32 = 19;
/// A machine has one way to the host, and is spared the drivers of the other.
const CHANNEL_DRIVERS: [(&str, u32); 4] = [
    ("virtio_console", SERIAL),
    ("vsock", VSOCK),
    ("vmw_vsock_virtio_transport_common", VSOCK),
    ("vmw_vsock_virtio_transport", VSOCK),
];

/// Source, target, type, flags and data.
type Mount = (&'static CStr, &'static CStr, MountFlags, &'static CStr);

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC).union(MountFlags::NODEV);
const MOUNTS: [Mount; 8] = [
    (c"proc", c"/proc", SAFE, c""),
    (c"sysfs", c"/sys", SAFE, c""),
    (c"devtmpfs", c"/dev", MountFlags::NOSUID.union(MountFlags::NOEXEC), c"mode=0755"),
    (c"devpts", c"/dev/pts", MountFlags::NOSUID.union(MountFlags::NOEXEC), c"mode=0620,ptmxmode=0666"),
    (c"tmpfs", c"/dev/shm", SAFE, c"mode=1777"),
    (c"tmpfs", c"/run", MountFlags::NOSUID.union(MountFlags::NODEV), c"mode=0755"),
    (c"tmpfs", c"/tmp", MountFlags::NOSUID.union(MountFlags::NODEV), c"mode=1777"),
    (c"cgroup2", c"/sys/fs/cgroup", SAFE, c""),
];

/// Makes the guest ready for sessions.
///
/// # Errors
/// With what could not be done; the guest is of no use then.
pub fn prepare(phases: &mut Phases) -> io::Result<()> {
    leave_initramfs().map_err(|e| context("leaving the initramfs", e))?;
    for (kind, target, flags, data) in MOUNTS {
        let result = std::fs::create_dir_all(Path::new(&*target.to_string_lossy()))
            .and_then(|()| Ok(rustix::mount::mount(kind, target, kind, flags, data)?));
        match result {
            // The kernel mounts devtmpfs itself when it is so configured.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
            result => result.map_err(|e| context(&format!("mounting {}", target.to_string_lossy()), e))?,
        }
    }
    std::fs::create_dir_all(kapsel_protocol::STORAGE_ROOT)?;
    phases.lap("mounts");
    load_modules()?;
    phases.lap("modules");
    cgroup::prepare().map_err(|e| context("preparing the cgroups", e))?;
    crate::net::loopback_up().map_err(|e| context("bringing the loopback interface up", e))?;
    phases.lap("cgroups");
    Ok(())
}

fn context(doing: &str, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{doing}: {error}"))
}

/// pivot_root(2) does not work on the kernel's first root mount. So its content is mounted once more on top of it, which
/// makes the root of this process, and of every container's first process, an ordinary mount.
fn leave_initramfs() -> io::Result<()> {
    const NEW: &CStr = c"/mnt";
    std::fs::create_dir_all("/mnt")?;
    rustix::mount::mount_bind(c"/", NEW)?;
    rustix::process::chdir(NEW)?;
    rustix::mount::mount_move(NEW, c"/")?;
    rustix::process::chroot(c".")?;
    rustix::process::chdir(c"/")?;
    Ok(())
}

fn load_modules() -> io::Result<()> {
    let list = match std::fs::read_to_string(MODULES) {
        // Everything is in the kernel.
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|e| context(MODULES, e))?,
    };
    for path in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if !is_of_use(path) {
            let _ = std::fs::remove_file(path);
            continue;
        }
        let loaded = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|file| rustix::system::finit_module(&file, c"", 0));
        match loaded {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(context(&format!("loading the module {path}"), error.into())),
        }
        // Its memory is the guest's; loaded, it is needed no more.
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

/// Whether a module has a device here, if it is for one that not all machines have.
fn is_of_use(module: &str) -> bool {
    let name = Path::new(module).file_stem().unwrap_or_default();
    CHANNEL_DRIVERS.iter().all(|(driver, device)| name != *driver || has_device(*device))
}

/// Whether the machine has a virtio device of this kind.
fn has_device(kind: u32) -> bool {
    let is_kind = |entry: std::fs::DirEntry| {
        let id = std::fs::read_to_string(entry.path().join("device")).ok()?;
        u32::from_str_radix(id.trim().strip_prefix("0x")?, 16).ok()
    };
    let devices = std::fs::read_dir("/sys/bus/virtio/devices").into_iter().flatten().flatten();
    devices.filter_map(is_kind).any(|found| found == kind)
}

/// Opens the agent's port, which on a serial device appears some time after its module was loaded.
///
/// # Errors
/// When it does not appear, or cannot be opened.
pub async fn port() -> io::Result<GuestPort> {
    let waiting = async {
        loop {
            if let Some(path) = find_port() {
                return GuestPort::open(&path);
            }
            if has_device(VSOCK) {
                return GuestPort::listen(AGENT_PORT);
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PORT_DEADLINE, waiting).await.unwrap_or_else(|_| {
        let what = format!("the machine has neither a virtio-serial port named {PORT} nor vsock");
        Err(io::Error::new(ErrorKind::NotFound, what))
    })
}

fn find_port() -> Option<PathBuf> {
    std::fs::read_dir("/sys/class/virtio-ports").ok()?.flatten().find_map(|entry| {
        let name = std::fs::read_to_string(entry.path().join("name")).ok()?;
        (name.trim_end() == PORT).then(|| Path::new("/dev").join(entry.file_name()))
    })
}

/// Writes everything to the disks and ends the machine.
pub fn power_off() -> ! {
    rustix::fs::sync();
    end_machine()
}

/// Ends the machine at once: the monitor takes a reset for the end, so that no ACPI is needed to switch a machine off.
pub fn end_machine() -> ! {
    // When even that fails, the end of process 1 makes the kernel panic, which the host sees too.
    let _ = rustix::system::reboot(RebootCommand::Restart);
    std::process::exit(1)
}
