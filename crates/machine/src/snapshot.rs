//! Saved machines on disk: `memory`, `state` and `meta.json`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::Context;
use crate::{Error, MachineSpec, Result};

/// Version of the format.
const FORMAT: u32 = 1;

/// `meta.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Meta {
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
    pub(crate) fn of(spec: &MachineSpec, fingerprint: String, memory: &Path) -> Result<Meta> {
        Ok(Meta {
            version: FORMAT,
            fingerprint,
            memory_mib: spec.memory_mib,
            disks: shape(spec)?,
            memory_changed: changed(memory)?,
        })
    }

    pub(crate) fn write(&self, dir: &Path) -> Result<()> {
        let path = dir.join("meta.json");
        let text = serde_json::to_vec_pretty(self).map_err(std::io::Error::from);
        text.and_then(|text| std::fs::write(&path, text))
            .context(|| format!("cannot write {}", path.display()))
    }

    /// Reads it, and refuses what does not fit `spec`.
    pub(crate) fn read(dir: &Path, spec: &MachineSpec, fingerprint: &str) -> Result<Meta> {
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
