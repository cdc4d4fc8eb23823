//! What a saved machine depends on, in one value.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use super::args::{self, Memory};
use crate::error::Context;
use crate::{Accel, MachineSpec, Result};

/// Files are identified by what changes when they do (inode, size, times) rather than by reading them: this is on the way of every start.
pub(super) fn of(program: &Path, spec: &MachineSpec) -> Result<String> {
    let mut hash = Sha256::new();
    for path in [program, &spec.kernel, &spec.initramfs] {
        let meta = fs::metadata(path).context(|| format!("cannot read {}", path.display()))?;
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update(format!(
            "\0{} {} {} {}.{}\n",
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec()
        ));
    }
    // The shape is the command line of a machine without what may differ between a saved machine and one made from it.
    let shape = MachineSpec {
        name: "x".into(),
        shares: Vec::new(),
        nics: Vec::new(),
        template: false,
        ..spec.clone()
    };
    for arg in args::build(&shape, Memory::Anonymous, args::From::Snapshot)? {
        hash.update(arg.as_encoded_bytes());
        hash.update([0]);
    }
    hash.update(processor(spec.accel));
    Ok(hex::encode(&hash.finalize()[..16]))
}

/// What the guest has seen of the host's processor. Under TCG the processor is QEMU's own.
fn processor(accel: Accel) -> String {
    if accel == Accel::Tcg {
        return String::new();
    }
    let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let first = info.split("\n\n").next().unwrap_or_default();
    let wanted = ["vendor_id", "cpu family", "model", "stepping", "microcode", "flags"];
    first
        .lines()
        .filter(|line| line.split(':').next().is_some_and(|key| wanted.contains(&key.trim())))
        .collect::<Vec<_>>()
        .join("\n")
}
