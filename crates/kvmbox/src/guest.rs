//! What a guest in the box boots beside the kernel: an initramfs with busybox, modules, and perhaps a program.

use std::fs;
use std::io;
use std::path::Path;

use crate::{BUSYBOX, Kernel, cpio, shared_libraries};

/// Modules of a guest with virtio devices on MMIO, in the order of their dependencies.
pub const MODULES: [&str; 10] = [
    "drivers/virtio/virtio_mmio",
    "drivers/virtio/virtio_balloon",
    "drivers/block/virtio_blk",
    "drivers/char/hw_random/virtio-rng",
    "net/vmw_vsock/vsock",
    "net/vmw_vsock/vmw_vsock_virtio_transport_common",
    "net/vmw_vsock/vmw_vsock_virtio_transport",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
];

/// Where the program is in the guest.
pub const PROGRAM: &str = "/guest";

/// Beginning of the guest's process 1.
const INIT: &str = "#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin
";

/// Writes an initramfs whose process 1 mounts the usual and loads the kernel's `modules`, and then goes on with the shell's
/// `commands`. The program, if there is one, is at [`PROGRAM`] with its libraries where it looks for them.
///
/// # Errors
/// When a file cannot be read or the initramfs not be written.
pub fn initramfs(
    kernel: &Kernel,
    modules: &[&str],
    program: Option<&Path>,
    commands: &str,
    path: &Path,
) -> io::Result<()> {
    let mut archive = cpio::Archive::new(io::BufWriter::new(fs::File::create(path)?));
    archive.host_file(Path::new(BUSYBOX), Path::new("bin/busybox"))?;
    let mut init = String::from(INIT);
    for module in modules {
        let name = module.rsplit('/').next().unwrap_or(module);
        archive.host_file(&kernel.module(module), &Path::new("modules").join(name))?;
        init.push_str(&format!(
            "xzcat /modules/{name} >/module && insmod /module || echo 'cannot load {name}'\n"
        ));
    }
    archive.file(Path::new("init"), 0o755, (init + commands + "\n").as_bytes())?;
    if let Some(program) = program {
        for library in shared_libraries(program).map_err(io::Error::other)? {
            archive.host_file(&library, &library)?;
        }
        archive.host_file(program, Path::new(PROGRAM))?;
    }
    archive.finish().map(drop)
}
