//! Mounts: what is on the host must be there, and be something that a file server can serve.

use std::{
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use oci_spec::runtime::{Mount, Spec};

use super::{
    Role,
    refusal::{Refusal, Why, refuse},
};

/// Of a file system in memory (statfs(2)).
const TMPFS_MAGIC: i64 = 0x0102_1994;
/// Where POSIX shared memory is.
const SHM: &str = "/dev/shm";

/// Makes sources of binds absolute, and shared memory the guest's own. A pod's is that of all its containers: its source tells which.
pub fn translate(spec: &mut Spec, dir: &Path, role: Role) -> Result<(), Refusal> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in mounts.iter_mut().filter(|mount| is_bind(mount)) {
        let at = mount.destination().clone();
        let source = mount.source().clone().filter(|source| !source.as_os_str().is_empty());
        let source = dir.join(source.why(&format!("the mount at {} has no source", at.display()))?);
        let source = fs::canonicalize(&source).why(&format!(
            "cannot mount {} at {}",
            source.display(),
            at.display()
        ))?;
        check(&source, &at)?;
        match shared_memory(&source, &at) {
            Some(size) if role == Role::Alone => to_tmpfs(mount, "shm".into(), size),
            Some(size) if role == Role::PodSandbox => to_tmpfs(mount, source, size),
            _ => drop(mount.set_source(Some(source))),
        }
    }
    spec.set_mounts(Some(mounts));
    Ok(())
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || mount.options().iter().flatten().any(|option| option == "bind" || option == "rbind")
}

fn check(source: &Path, at: &Path) -> Result<(), Refusal> {
    let typ = fs::metadata(source).why(&format!("cannot mount {}", source.display()))?.file_type();
    let what = if typ.is_socket() {
        "a socket, whose other end is a process of the host"
    } else if typ.is_fifo() {
        "a named pipe, whose other end is a process of the host"
    } else if typ.is_block_device() || typ.is_char_device() {
        "a device of the host's kernel"
    } else {
        return Ok(());
    };
    refuse!(
        "cannot mount {} at {}: it is {what}, which the guest cannot reach",
        source.display(),
        at.display()
    )
}

/// The size of the memory that an engine prepares for this container's processes to share, when the mount is that: they are all
/// in the guest, and so is the memory then.
fn shared_memory(source: &Path, at: &Path) -> Option<u64> {
    if at != Path::new(SHM) || source == Path::new(SHM) {
        return None;
    }
    let statfs = rustix::fs::statfs(source).ok()?;
    let empty = fs::read_dir(source).ok()?.next().is_none();
    (statfs.f_type as i64 == TMPFS_MAGIC && empty)
        .then(|| statfs.f_blocks.saturating_mul(u64::try_from(statfs.f_bsize).unwrap_or(0)))
}

fn to_tmpfs(mount: &mut Mount, source: PathBuf, size: u64) {
    let kept = ["nosuid", "noexec", "nodev", "rprivate", "private", "rslave", "slave"];
    let mut options: Vec<String> = mount.options().clone().unwrap_or_default();
    options.retain(|option| kept.contains(&option.as_str()));
    options.push("mode=1777".into());
    options.push(format!("size={size}"));
    mount.set_typ(Some("tmpfs".into())).set_source(Some(source)).set_options(Some(options));
}
