//! What is known of a sandbox while its bundle exists: `sandbox.json`.
//!
//! Written by whoever makes the bundle, then only by its shim, and by [cleanup](crate::cleanup) once the shim is gone.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    net::{Ipv4Addr, Ipv6Addr},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{
    paths::{Bundle, Id},
    publish::Publish,
};

/// The version that this program writes and the newest that it reads.
pub const VERSION: u32 = 1;
/// A record larger than this is not one of ours.
const MAX_BYTES: u64 = 8 << 20;

/// Why a record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading or writing failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The content is not a record.
    #[error("{path} is damaged ({reason}); `kapsel rm -f` removes the sandbox")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Written by a newer kapsel.
    #[error(
        "{path} has version {found}, this kapsel reads up to {VERSION}; use the newer kapsel that wrote it"
    )]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
}

/// Where a sandbox is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// The bundle exists; its container was not started.
    Created,
    /// The container runs.
    Running,
    /// The machine is stopped for a while.
    Paused,
    /// The container ended.
    Exited,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Exited => "exited",
        })
    }
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// 0..=255; 128 + n when signal n ended it.
    pub code: u32,
    /// Nanoseconds since 1970.
    pub at: u64,
    /// The kernel killed it because memory ran out.
    #[serde(default)]
    pub oom: bool,
    /// Why kapsel ended it, when it did not end by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
}

/// The machine that a sandbox got.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineInfo {
    /// `kvm` or `tcg`.
    pub accelerator: String,
    /// `kapsel-vmm`, `qemu-kvm` or `tcg`.
    #[serde(default)]
    pub isolation: String,
    /// The guest kernel's release.
    pub kernel: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in bytes.
    pub memory: u64,
    /// Whether it is a clone of a template.
    pub template: bool,
    /// Why it is this kind of machine.
    #[serde(default)]
    pub reason: String,
    /// The shim's process.
    pub shim: u32,
    /// The monitor's process.
    pub monitor: u32,
    /// The processes that serve shared directories.
    #[serde(default)]
    pub fsd: Vec<u32>,
    /// The process that carries published ports.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forward: Option<u32>,
}

/// Everything that `kapsel ps` and `kapsel inspect` know without asking the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// [`VERSION`].
    pub version: u32,
    /// The sandbox.
    pub id: Id,
    /// Unique among the sandboxes of one state directory.
    pub name: String,
    /// The image's name as the person gave it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The digest of the image's manifest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_digest: Option<String>,
    /// The root file system's source: it must not go while this sandbox exists.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rootfs: Option<PathBuf>,
    /// The person's own words on it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// What runs in it.
    pub command: Vec<String>,
    /// Nanoseconds since 1970.
    pub created_at: u64,
    /// Nanoseconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_at: Option<u64>,
    /// Where it is in its life.
    pub status: Status,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit: Option<Exit>,
    /// Whether the bundle goes when the container ends (`--rm`).
    #[serde(default)]
    pub remove: bool,
    /// Whether the container has a terminal.
    #[serde(default)]
    pub terminal: bool,
    /// Whether the container has an input (`-i`).
    #[serde(default)]
    pub stdin: bool,
    /// Its published ports, with the numbers that they have.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Publish>,
    /// Its address on kapsel's bridge.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<Ipv4Addr>,
    /// The same of IPv6.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address6: Option<Ipv6Addr>,
    /// Its machine, once there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineInfo>,
}

impl Record {
    /// A record of a sandbox that is about to be made.
    pub fn new(id: Id, name: String, command: Vec<String>) -> Self {
        Self {
            version: VERSION,
            id,
            name,
            image: None,
            image_digest: None,
            rootfs: None,
            labels: BTreeMap::new(),
            command,
            created_at: now(),
            started_at: None,
            status: Status::Created,
            exit: None,
            remove: false,
            terminal: false,
            stdin: false,
            ports: Vec::new(),
            address: None,
            address6: None,
            machine: None,
        }
    }

    /// Reads a bundle's record.
    ///
    /// # Errors
    /// When it is missing, damaged or newer than this program.
    pub fn read(bundle: &Bundle) -> Result<Self, Error> {
        let path = bundle.record();
        let io = |source| Error::Io { what: "read", path: path.clone(), source };
        let damaged = |reason: String| Error::Damaged { path: path.clone(), reason };
        let size = fs::symlink_metadata(&path).map_err(io)?.len();
        if size > MAX_BYTES {
            return Err(damaged(format!("{size} bytes")));
        }
        let bytes = fs::read(&path).map_err(io)?;
        #[derive(Deserialize)]
        struct Version {
            version: u32,
        }
        let Version { version } = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if version > VERSION {
            return Err(Error::Newer { path, found: version });
        }
        serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))
    }

    /// Replaces a bundle's record; readers see the old or the new one, never a mixture.
    ///
    /// # Errors
    /// When the directory cannot be written.
    pub fn write(&self, bundle: &Bundle) -> Result<(), Error> {
        let json = serde_json::to_vec_pretty(self)
            .map_err(|e| Error::Damaged { path: bundle.record(), reason: e.to_string() })?;
        replace(&bundle.record(), &json).map_err(|source| Error::Io {
            what: "write",
            path: bundle.record(),
            source,
        })
    }
}

/// Nanoseconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

/// Writes a private file in one step. Not synced: bundles live in memory and do not outlive a crash of the host.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let temporary = path.with_file_name(name);
    let mut file =
        fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle() -> (tempfile::TempDir, Bundle) {
        let dir = tempfile::tempdir().unwrap();
        let bundle = Bundle::at(dir.path());
        (dir, bundle)
    }

    #[test]
    fn what_is_written_is_read() {
        let (_dir, bundle) = bundle();
        let mut record = Record::new(Id::random(), "calm-otter".into(), vec!["sh".into()]);
        record.exit = Some(Exit { code: 137, at: 5, oom: true, reason: None });
        record.write(&bundle).unwrap();
        assert_eq!(Record::read(&bundle).unwrap(), record);
    }

    #[test]
    fn a_newer_version_is_refused_even_when_its_fields_are_unknown() {
        let (_dir, bundle) = bundle();
        fs::write(bundle.record(), r#"{"version": 2, "shape": "new"}"#).unwrap();
        assert!(matches!(Record::read(&bundle), Err(Error::Newer { found: 2, .. })));
    }

    #[test]
    fn damage_is_told_not_guessed_around() {
        let (_dir, bundle) = bundle();
        for text in ["", "{", "[]", r#"{"version": 1}"#] {
            fs::write(bundle.record(), text).unwrap();
            assert!(matches!(Record::read(&bundle), Err(Error::Damaged { .. })), "{text}");
        }
        fs::File::create(bundle.record()).unwrap().set_len(MAX_BYTES + 1).unwrap();
        assert!(matches!(Record::read(&bundle), Err(Error::Damaged { .. })));
    }
}
