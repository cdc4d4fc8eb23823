//! Templates: saved machines that are booted, from which sandboxes start in a fraction of a boot. They are empty, or hold a
//! container without its process ([`Prepared`]).
//!
//! `templates/<key>/` holds `template.json` and what the monitor saved. The key is a hash of everything that a saved machine
//! depends on, so one that does not match is never found, and is collected once nothing can match it any more.

mod build;
mod prepared;

use std::{
    fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

pub use build::{build, build_in_background, build_prepared};
pub use prepared::{CONTAINER, Held, Prepared};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    life::{Error as LifeError, blueprint::Blueprint},
    paths::{self, Paths},
};

/// The version of [`Meta`].
pub const VERSION: u32 = 1;
/// What a template says of itself.
const META: &str = "template.json";
/// The devices' saved state, as the monitor names it.
const STATE: &str = "state";
/// Templates that are kept beside the newest one.
const KEPT: usize = 8;
const MAX_META: u64 = 64 << 10;

/// Why a template cannot be used or changed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The directories are not usable.
    #[error(transparent)]
    Paths(#[from] paths::Error),
    /// Not a key of a template.
    #[error("there is no template {0:?}; `kapsel template ls` lists all")]
    NotFound(String),
    /// Several keys begin so.
    #[error("{0:?} is the beginning of several templates' keys; give more digits")]
    Ambiguous(String),
    /// Written by a newer kapsel.
    #[error("template {path} has version {found}, this kapsel reads up to {VERSION}; it is left alone")]
    Newer {
        /// The directory.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The machine could not be booted or saved.
    #[error("cannot build a template: {0}")]
    Machine(String),
    /// The content is not what was saved.
    #[error("template {path} is not usable: {reason}; `kapsel template rm` removes it")]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl Error {
    fn machine(error: impl std::fmt::Display) -> Self {
        Self::Machine(error.to_string())
    }
}

/// What kind of machine a template holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// `kapsel-vmm`, `qemu-kvm` or `tcg`.
    #[serde(alias = "accelerator")]
    pub isolation: String,
    /// The guest kernel's release.
    pub kernel: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// MiB.
    pub memory_mib: u64,
    /// Whether the machine has a scratch disk.
    pub scratch: bool,
    /// The container in it; absent: it is empty.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<Held>,
}

/// What a template says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meta {
    /// [`VERSION`].
    pub version: u32,
    /// The directory's name.
    pub key: String,
    /// What it holds.
    pub shape: Shape,
    /// Nanoseconds since 1970.
    pub created_at: u64,
    /// SHA-256 of the devices' saved state, hexadecimal. (The memory's would cost more than it protects from: the file
    /// is as private as the kernel beside it.)
    pub state_sha256: String,
}

/// A template on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    /// Its directory.
    pub dir: PathBuf,
    /// What it says of itself.
    pub meta: Meta,
    /// Bytes on disk.
    pub disk_usage: u64,
}

/// All templates, the newest first; those that cannot be read with the reason.
///
/// # Errors
/// When the directory cannot be read.
pub fn list(paths: &Paths) -> Result<Vec<Result<Template, Error>>, Error> {
    let mut found: Vec<_> = directories(paths)?.iter().map(|dir| read(dir)).collect();
    found.sort_by_key(|template| std::cmp::Reverse(template.as_ref().map_or(0, |t| t.meta.created_at)));
    Ok(found)
}

/// Removes the template whose key begins with `prefix`. Running clones keep theirs: it is mapped.
///
/// # Errors
/// When there is none, or more than one.
pub fn remove(paths: &Paths, prefix: &str) -> Result<String, Error> {
    let name = |dir: &Path| dir.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut matching = directories(paths)?;
    matching.retain(|dir| !prefix.is_empty() && name(dir).starts_with(prefix));
    match matching.as_slice() {
        [] => Err(Error::NotFound(prefix.into())),
        [dir] => {
            remove_dir(dir)?;
            Ok(name(dir))
        }
        _ => Err(Error::Ambiguous(prefix.into())),
    }
}

/// Removes all templates; returns their keys.
///
/// # Errors
/// When one cannot be removed.
pub fn remove_all(paths: &Paths) -> Result<Vec<String>, Error> {
    let mut removed = Vec::new();
    for dir in directories(paths)? {
        remove_dir(&dir)?;
        removed.push(dir.file_name().unwrap_or_default().to_string_lossy().into_owned());
    }
    Ok(removed)
}

fn directories(paths: &Paths) -> Result<Vec<PathBuf>, Error> {
    let dir = paths.templates();
    let io = |source| Error::Io { what: "list", path: dir.clone(), source };
    let entries = match fs::read_dir(&dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(io(e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io)?;
        let key = entry.file_name();
        // Others are locks and unfinished builds.
        if key.len() == KEY_LENGTH && key.to_str().is_some_and(|k| k.bytes().all(|c| c.is_ascii_hexdigit())) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Hexadecimal digits of a key.
const KEY_LENGTH: usize = 32;

fn remove_dir(dir: &Path) -> Result<(), Error> {
    let io = |source| Error::Io { what: "remove", path: dir.into(), source };
    // Renamed first: whoever looks from now on sees no template rather than half of one.
    let mut gone = dir.as_os_str().to_owned();
    gone.push(".gone");
    fs::rename(dir, &gone).map_err(io)?;
    fs::remove_dir_all(&gone).map_err(io)
}

/// Reads and checks one template; does not look at what the monitor saved beyond its size and owner.
///
/// # Errors
/// When it is damaged, newer than this program, or others could have changed it.
pub fn read(dir: &Path) -> Result<Template, Error> {
    let io = |what, path: &Path, source| Error::Io { what, path: path.into(), source };
    let damaged = |reason: String| Error::Damaged { path: dir.into(), reason };
    let meta_path = dir.join(META);
    let mut disk_usage = 0;
    for entry in fs::read_dir(dir).map_err(|e| io("list", dir, e))? {
        let path = entry.map_err(|e| io("list", dir, e))?.path();
        let meta = fs::symlink_metadata(&path).map_err(|e| io("look at", &path, e))?;
        // Memory and state were written by a jailed monitor as its own user, and stay so: the monitor refuses a memory
        // file whose change time is another than it noted, and the state's checksum is in the description.
        let description = path.extension().is_some_and(|extension| extension == "json");
        let ours =
            meta.uid() == rustix::process::geteuid().as_raw() && meta.permissions().mode() & 0o022 == 0;
        if !meta.is_file() || (description && !ours) {
            return Err(damaged(format!("{} could have been changed by others", path.display())));
        }
        if path == meta_path && meta.len() > MAX_META {
            return Err(damaged(format!("{META} is too large")));
        }
        disk_usage += meta.blocks() * 512;
    }
    paths::private_dir(dir).map_err(|e| damaged(e.to_string()))?;
    let bytes = fs::read(&meta_path).map_err(|e| io("read", &meta_path, e))?;
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let Version { version } = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    if version > VERSION {
        return Err(Error::Newer { path: dir.into(), found: version });
    }
    let meta: Meta = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
    if dir.file_name().is_none_or(|name| name != meta.key.as_str()) {
        return Err(damaged("it has another template's key".into()));
    }
    Ok(Template { dir: dir.into(), meta, disk_usage })
}

/// The key of a machine: a hash of everything that its saved state depends on.
///
/// # Errors
/// When the monitor, the kernel or the initramfs cannot be read.
pub fn key(blueprint: &Blueprint) -> Result<String, LifeError> {
    let mut hash = Sha256::new();
    let mut add = |part: &str| {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    };
    add(concat!("kapsel ", env!("CARGO_PKG_VERSION")));
    add(&blueprint.monitor.fingerprint(&blueprint.spec)?);
    add(&format!("{} vcpus, {} MiB", blueprint.spec.vcpus, blueprint.spec.memory_mib));
    for disk in &blueprint.spec.disks {
        add(&format!("disk {} {}", disk.serial, disk.read_only));
    }
    Ok(hex::encode(hash.finalize())[..KEY_LENGTH].to_owned())
}

/// The template of a key, checked. `None`: there is none.
///
/// # Errors
/// When there is one that must not be used.
pub fn find(paths: &Paths, key: &str) -> Result<Option<Template>, Error> {
    let dir = paths.templates().join(key);
    if !dir.exists() {
        return Ok(None);
    }
    let template = read(&dir)?;
    let state = state_hash(&dir).map_err(|source| Error::Io { what: "read", path: dir.clone(), source })?;
    if state != template.meta.state_sha256 {
        return Err(Error::Damaged { path: dir, reason: "the saved state has another checksum".into() });
    }
    Ok(Some(template))
}

/// Takes a template away that could not be used. No other is built in its place for a while: it might be as bad, and
/// each attempt costs a boot.
pub fn mark_bad(paths: &Paths, key: &str, reason: &str) {
    let dir = paths.templates().join(key);
    if let Err(error) = remove_dir(&dir) {
        tracing::warn!(%error, "cannot remove a bad template");
    }
    let _ = fs::write(paths.templates().join(format!("{key}.bad")), reason);
}

/// Removes what no sandbox will start from any more: templates of the shape of `current` with another key (another
/// kernel, agent or monitor), the oldest beyond a few, and what crashed builds left.
fn collect(paths: &Paths, current: &str) {
    let Ok(mut found) = list(paths) else { return };
    found.retain(|template| template.as_ref().map_or(true, |t| t.meta.key != current));
    let shape = read(&paths.templates().join(current)).ok().map(|template| template.meta.shape);
    // The empty ones first: those with a container are made from them.
    let holds = |template: &Result<Template, Error>| {
        template.as_ref().is_ok_and(|t| t.meta.shape.container.is_some())
    };
    found.sort_by_key(holds);
    for (age, template) in found.iter().enumerate() {
        let dir = match template {
            Ok(template) => {
                let superseded = shape.as_ref().is_some_and(|shape| shape.same_use(&template.meta.shape));
                if !superseded && age < KEPT {
                    continue;
                }
                &template.dir
            }
            // What a newer kapsel wrote is not ours to judge.
            Err(Error::Damaged { path, .. }) => path,
            Err(_) => continue,
        };
        if let Err(error) = remove_dir(dir) {
            tracing::warn!(%error, "cannot collect a stale template");
        }
    }
}

impl Shape {
    /// Whether sandboxes with the same wishes would use both.
    fn same_use(&self, other: &Self) -> bool {
        let container = match (&self.container, &other.container) {
            (None, None) => true,
            (Some(this), Some(that)) => this.same(that),
            _ => false,
        };
        container
            && (&self.isolation, self.vcpus, self.memory_mib, self.scratch)
                == (&other.isolation, other.vcpus, other.memory_mib, other.scratch)
    }
}

fn state_hash(dir: &Path) -> io::Result<String> {
    use std::io::Read;
    let mut file = fs::File::open(dir.join(STATE))?;
    let mut hash = Sha256::new();
    let mut piece = vec![0; 64 << 10];
    loop {
        match file.read(&mut piece)? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(&piece[..n]),
        }
    }
}
