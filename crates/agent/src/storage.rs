//! File systems that the agent mounts before a container is made: disks, shares, scratch space, overlays.

use std::ffi::{CStr, CString};
use std::io::{self, ErrorKind};
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use kapsel_protocol::{STORAGE_ROOT, api, limits};
use rustix::fs::CWD;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::container::mounts;
use crate::container::options::Options;
use crate::error::{Error, Result};

/// How long a disk or share that was just plugged in may take to appear.
const DEVICE_DEADLINE: Duration = Duration::from_secs(10);

/// Mounted storages, unmounted in reverse order by [`Mounted::unmount`].
#[derive(Debug, Default)]
pub struct Mounted(Vec<PathBuf>);

impl Mounted {
    /// Mounts storages in order. When one fails those before it are unmounted.
    ///
    /// # Errors
    /// With the storage that failed.
    pub async fn mount(storages: &[api::Storage]) -> Result<Self> {
        if storages.len() > limits::STORAGES_MAX {
            return Err(Error::Exhausted(format!("more than {} storages", limits::STORAGES_MAX)));
        }
        let mut mounted = Self::default();
        for storage in storages {
            match mount_one(storage).await {
                Ok(path) => mounted.0.push(path),
                Err(error) => {
                    mounted.unmount();
                    return Err(error);
                }
            }
        }
        Ok(mounted)
    }

    /// Unmounts all. What is still in use goes when its last user does.
    pub fn unmount(&mut self) {
        while let Some(path) = self.0.pop() {
            if let Err(error) = rustix::mount::unmount(&path, UnmountFlags::DETACH) {
                eprintln!("kapsel-agent: unmounting {}: {error}", path.display());
            }
            // Directories above may hold other storages.
            let _ = std::fs::remove_dir(&path);
        }
    }
}

async fn mount_one(storage: &api::Storage) -> Result<PathBuf> {
    let path = check(storage)?;
    let invalid =
        |e: &dyn std::fmt::Display| Error::Invalid(format!("storage on {}: {e}", storage.mount_point));
    let options = Options::parse(&storage.options).map_err(|e| invalid(&e))?;
    std::fs::create_dir_all(&path).map_err(|e| failed(storage, &e))?;
    let (kind, source) = resolve(storage).await?;
    if kind.as_c_str() == c"overlay" {
        make_overlay_directories(&options).map_err(|e| failed(storage, &e))?;
    }
    mount_at(&kind, &source, &options, &path).map_err(|e| failed(storage, &e))?;
    Ok(path)
}

fn failed(storage: &api::Storage, error: &dyn std::fmt::Display) -> Error {
    Error::Internal(format!(
        "mounting {} ({}) on {}: {error}",
        storage.source, storage.fstype, storage.mount_point
    ))
}

/// Sizes, and that the mount point is where storages belong.
fn check(storage: &api::Storage) -> Result<PathBuf> {
    let fields = [&storage.source, &storage.fstype, &storage.mount_point];
    if fields
        .into_iter()
        .chain(&storage.options)
        .any(|f| f.len() > limits::STORAGE_FIELD_MAX || f.contains('\0'))
    {
        return Err(Error::Invalid("a storage has a field that is too long or contains a NUL byte".into()));
    }
    let path = Path::new(&storage.mount_point);
    let below = path.strip_prefix(STORAGE_ROOT).is_ok_and(|rest| rest.components().next().is_some());
    if !below || !path.components().all(|c| matches!(c, Component::RootDir | Component::Normal(_))) {
        return Err(Error::Invalid(format!(
            "storage mount point {:?} is not below {STORAGE_ROOT}",
            storage.mount_point
        )));
    }
    Ok(path.to_owned())
}

/// The file system type and the kernel's name of the source.
async fn resolve(storage: &api::Storage) -> Result<(CString, CString)> {
    let text = |s: &str| CString::new(s).map_err(|_| Error::Invalid("a storage contains a NUL byte".into()));
    match (storage.source.split_once(':'), storage.source.as_str(), storage.fstype.as_str()) {
        (Some(("blk", serial)), ..) if !serial.is_empty() => {
            let device = wait_for(|| disk(serial)).await;
            let device = device.ok_or_else(|| failed(storage, &"no disk has that serial number"))?;
            Ok((text(&storage.fstype)?, text(&device)?))
        }
        (Some(("fs", tag)), _, "virtiofs") if !tag.is_empty() => {
            probe_slots().map_err(|e| failed(storage, &e))?;
            Ok((c"virtiofs".into(), text(tag)?))
        }
        (None, "tmpfs", "tmpfs") => Ok((c"tmpfs".into(), c"tmpfs".into())),
        (None, "overlay", "overlay") => Ok((c"overlay".into(), c"overlay".into())),
        _ => Err(Error::Invalid(format!(
            "storage source {:?} with file system {:?} is none of blk:<serial>, fs:<tag> (virtiofs), tmpfs, overlay",
            storage.source, storage.fstype
        ))),
    }
}

/// The device of a virtio disk, by its serial number.
fn disk(serial: &str) -> Option<String> {
    let entries = std::fs::read_dir("/sys/block").ok()?;
    entries.flatten().find_map(|entry| {
        let name = entry.file_name().into_string().ok()?;
        let is = std::fs::read_to_string(entry.path().join("serial")).ok()?;
        (is.trim_end() == serial).then(|| format!("/dev/{name}"))
    })
}

/// Asks the kernel to look again at those virtio slots that were empty when it booted: a clone's shares and network interfaces
/// come with the clone, and what its template found empty has no driver.
///
/// # Errors
/// When the slots cannot be listed.
pub fn probe_slots() -> io::Result<()> {
    const BIND: &str = "/sys/bus/platform/drivers/virtio-mmio/bind";
    for entry in std::fs::read_dir("/sys/bus/platform/devices")?.flatten() {
        let name = entry.file_name();
        // The ACPI name of a virtio-mmio slot.
        if name.as_encoded_bytes().starts_with(b"LNRO0005") && !entry.path().join("driver").exists() {
            // Fails for those that are still empty.
            let _ = std::fs::write(BIND, name.as_encoded_bytes());
        }
    }
    Ok(())
}

/// Has the kernel forget the files that nobody uses, so that the host's file server lets go of those of a container that is gone: what it
/// holds open for the guest keeps their file system mounted on the host.
pub fn forget_unused() {
    const NAMES_AND_FILES: &str = "2";
    if let Err(error) = std::fs::write("/proc/sys/vm/drop_caches", NAMES_AND_FILES) {
        eprintln!("kapsel-agent: forgetting files: {error}");
    }
}

async fn wait_for<T>(mut look: impl FnMut() -> Option<T>) -> Option<T> {
    let mut pause = Duration::from_millis(1);
    let waiting = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    };
    tokio::time::timeout(DEVICE_DEADLINE, waiting).await.ok()
}

fn make_overlay_directories(options: &Options) -> io::Result<()> {
    for option in &options.data {
        if let Some((_, dir)) =
            option.split_once('=').filter(|(key, _)| matches!(*key, "upperdir" | "workdir"))
        {
            if !Path::new(dir).starts_with(STORAGE_ROOT) {
                return Err(io::Error::new(
                    ErrorKind::InvalidInput,
                    format!("{dir} is not below {STORAGE_ROOT}"),
                ));
            }
            std::fs::create_dir_all(dir)?;
        }
    }
    Ok(())
}

fn mount_at(kind: &CStr, source: &CStr, options: &Options, path: &Path) -> io::Result<()> {
    match mounts::new(kind, source, options) {
        Ok(tree) => {
            let target = mounts::directory(CWD, path)?;
            mounts::move_onto(&tree, &target)?;
            mounts::set_all(&tree, options)
        }
        // A parameter that fsconfig(2) does not take, as the list of an overlay's many layers.
        Err(error) if error.kind() == ErrorKind::InvalidFilename => {
            let flags = MountFlags::from_bits_retain(options.superblock as u32);
            let data = CString::new(options.data.join(","))?;
            rustix::mount::mount(source, path, kind, flags, data.as_c_str())?;
            let target = mounts::directory(CWD, path)?;
            mounts::set(target.as_fd(), false, &options.mount)?;
            mounts::set_all(&target, options)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(mount_point: &str) -> Result<PathBuf> {
        check(&api::Storage { mount_point: mount_point.into(), ..Default::default() })
    }

    #[test]
    fn storages_stay_below_their_directory() {
        assert!(at("/run/kapsel/c/rootfs").is_ok());
        for outside in
            ["/run/kapsel", "/run/kapsel/../x", "/run/kapselx/y", "run/kapsel/x", "/", "", "/run/kapsel/a\0"]
        {
            assert!(at(outside).is_err(), "{outside:?}");
        }
    }
}
