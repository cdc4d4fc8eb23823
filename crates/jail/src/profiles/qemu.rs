//! QEMU's jail.

use std::path::Path;

use crate::error::Result;
use crate::filters;
use crate::jail::{Jail, Resource};

/// Enough for the disks, sockets, event descriptors and KVM's, many times over.
const OPEN_FILES: u64 = 1024;

/// QEMU's jail: the program with its libraries and firmware, and its filter. Arguments, disks, sockets, limits that depend on
/// the machine and the identity are the caller's to add.
///
/// # Errors
/// When QEMU is not there, or a library of it.
pub fn qemu(program: &Path) -> Result<Jail> {
    // In Debian TCG is a module of its own.
    let tcg = Path::new("/usr/lib/x86_64-linux-gnu/qemu/accel-tcg-x86_64.so");
    let plugins: &[&Path] = if tcg.exists() { &[tcg] } else { &[] };
    let mut jail = Jail::new("qemu")
        .program_with_plugins(program, plugins)?
        .rlimit(Resource::OpenFiles, OPEN_FILES)
        .seccomp(filters::qemu()?);
    for firmware in ["/usr/share/qemu", "/usr/share/seabios"] {
        if Path::new(firmware).is_dir() {
            jail = jail.bind_ro(firmware, firmware);
        }
    }
    Ok(jail)
}
