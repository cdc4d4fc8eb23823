//! What a saved machine depends on, in one value.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::Context;
use crate::{Accel, MachineSpec, Result};

/// `shape` describes the machine in all that is the same in a saved one and in one made from it.
///
/// Files are identified by what changes when they do (inode, size, times) rather than by reading them: this is on the way of every start.
pub(crate) fn of(
    program: &Path,
    spec: &MachineSpec,
    shape: impl IntoIterator<Item = impl AsRef<[u8]>>,
) -> Result<String> {
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
    for part in shape {
        hash.update(part.as_ref());
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
