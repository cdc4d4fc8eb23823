//! Saved machines on disk: `memory`, `state` and `meta.json`.
//!
//! The memory is a sparse file that the saved machine wrote to while it ran (`x-ignore-shared` keeps it out of the state). A machine that
//! continues from it gets a copy of the file's data in a memfd of its own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use rustix::fs::{MemfdFlags, SeekFrom};
use serde::{Deserialize, Serialize};

use crate::error::Context;
use crate::{Error, MachineSpec, Result};

/// Version of the format.
const FORMAT: u32 = 1;

/// `meta.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Meta {
    version: u32,
    /// [`crate::Monitor::fingerprint`] of the saved machine.
    pub fingerprint: String,
    memory_mib: u32,
    disks: Vec<(String, u64, bool)>,
    /// When the memory file was last changed, seconds and nanoseconds. A monitor that was taken over could write to the file, since
    /// The monitor that made it could write to it, but cannot set this time.
    memory_changed: (i64, i64),
}

impl Meta {
    pub(super) fn of(spec: &MachineSpec, fingerprint: String, memory: &Path) -> Result<Meta> {
        Ok(Meta {
            version: FORMAT,
            fingerprint,
            memory_mib: spec.memory_mib,
            disks: shape(spec)?,
            memory_changed: changed(memory)?,
        })
    }

    pub(super) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join("meta.json");
        let text = serde_json::to_vec_pretty(self).map_err(std::io::Error::from);
        text.and_then(|text| std::fs::write(&path, text))
            .context(|| format!("cannot write {}", path.display()))
    }

    /// Reads it, and refuses what does not fit `spec`.
    pub(super) fn read(dir: &Path, spec: &MachineSpec, fingerprint: &str) -> Result<Meta> {
        let mismatch = |what: &str| Err(Error::Mismatch { dir: dir.to_owned(), what: what.to_owned() });
        let path = dir.join("meta.json");
        let text = std::fs::read(&path).context(|| format!("cannot read {}", path.display()))?;
        let Ok(meta) = serde_json::from_slice::<Meta>(&text) else {
            return mismatch("its description is damaged");
        };
        if meta.version != FORMAT {
            return mismatch("it has another format");
        }
        if meta.fingerprint != fingerprint {
            return mismatch("monitor, kernel, initramfs, processor or shape differ");
        }
        if meta.memory_mib != spec.memory_mib || meta.disks != shape(spec)? {
            return mismatch("memory or disks differ");
        }
        if meta.memory_changed != changed(&dir.join("memory"))? {
            return mismatch("its memory was changed after it was saved");
        }
        Ok(meta)
    }
}

/// Serial, size and mode of each disk.
fn shape(spec: &MachineSpec) -> Result<Vec<(String, u64, bool)>> {
    let size = |path: &Path| {
        let meta =
            std::fs::metadata(path).context(|| format!("cannot look at the disk {}", path.display()))?;
        Ok(meta.len())
    };
    spec.disks.iter().map(|disk| Ok((disk.serial.clone(), size(&disk.path)?, disk.read_only))).collect()
}

fn changed(path: &Path) -> Result<(i64, i64)> {
    let meta = std::fs::metadata(path).context(|| format!("cannot look at {}", path.display()))?;
    Ok((meta.ctime(), meta.ctime_nsec()))
}

/// Creates a memory file of the machine's size.
pub(super) fn create_memory(path: &Path, spec: &MachineSpec) -> Result<()> {
    let file = File::options().create_new(true).read(true).write(true).open(path);
    let file = file.context(|| format!("cannot create {}", path.display()))?;
    file.set_len(u64::from(spec.memory_mib) << 20).context(|| format!("cannot size {}", path.display()))
}

/// The data of a memory file in a memfd; its holes stay holes.
pub(super) fn copy_memory(path: &Path) -> Result<OwnedFd> {
    copy(path).context(|| format!("cannot copy the memory {}", path.display()))
}

/// An empty memfd of the machine's size.
pub(super) fn empty_memory(spec: &MachineSpec) -> Result<OwnedFd> {
    memfd(u64::from(spec.memory_mib) << 20).map(OwnedFd::from).context(|| "cannot create memory".into())
}

fn memfd(size: u64) -> std::io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("kapsel-memory", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    // The monitor opens it again under its own user.
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o666))?;
    Ok(file)
}

fn copy(path: &Path) -> std::io::Result<OwnedFd> {
    let from = File::open(path)?;
    let size = from.metadata()?.len();
    let to = memfd(size)?;
    let mut at = 0;
    let mut buffer = vec![0; 1 << 20];
    while at < size {
        let Ok(data) = rustix::fs::seek(&from, SeekFrom::Data(at)) else { break };
        let end = rustix::fs::seek(&from, SeekFrom::Hole(data))?;
        at = data;
        while at < end {
            let n = buffer.len().min((end - at) as usize);
            from.read_exact_at(&mut buffer[..n], at)?;
            to.write_all_at(&buffer[..n], at)?;
            at += n as u64;
        }
    }
    Ok(to.into())
}
