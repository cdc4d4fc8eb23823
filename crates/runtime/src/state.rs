//! What this command line knows of its containers: one directory each below the engine's `--root`.
//!
//! An engine's id is a name in its root and nothing more. The sandbox behind it has a directory of its own below kapsel's state
//! directory, whose path is short enough for sockets whatever the engine's root is.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use kapsel_sandbox::{
    engine::Named,
    owner::{self, Owner},
    paths::{Bundle, Id, Paths},
    record::{Record, Status as RecordStatus},
};
use oci_spec::runtime::Hooks;
use serde::{Deserialize, Serialize};

/// The version of the file that this program writes and the newest that it reads.
const VERSION: u32 = 1;
/// The file in a container's directory.
const FILE: &str = "kapsel.json";
/// The longest id: it is a directory's name.
const ID_MAX: usize = 255;

/// A container, as it was created.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    version: u32,
    /// The engine's id.
    pub id: String,
    /// The sandbox behind it.
    pub sandbox: Id,
    /// The engine's bundle.
    pub bundle: PathBuf,
    /// The root file system.
    pub rootfs: PathBuf,
    /// The process that stands for it.
    pub pid: u32,
    /// When that process began, so that a reused number is not taken for it (`/proc/PID/stat`, field 22).
    pub pid_started: u64,
    /// Nanoseconds since 1970.
    pub created_at: u64,
    /// `ociVersion` of its specification.
    pub oci_version: String,
    /// All that the engine gave.
    pub annotations: HashMap<String, String>,
    /// For `start` and `delete`.
    #[serde(default)]
    pub hooks: Option<Hooks>,
    /// `linux.cgroupsPath`, for `exec`, `update` and `delete`.
    #[serde(default)]
    pub cgroup: Option<String>,
}

/// Where a container is in its life, in the OCI specification's words and runc's "paused".
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its program was not started.
    Created,
    /// Its program runs.
    Running,
    /// It is frozen.
    Paused,
    /// It ended.
    Stopped,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        })
    }
}

/// What `state` prints and hooks read.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown<'a> {
    oci_version: &'a str,
    id: &'a str,
    /// 0 for a stopped one, as runc has it.
    pub pid: u32,
    status: String,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: String,
    annotations: &'a HashMap<String, String>,
}

impl Shown<'_> {
    /// What `list` shows of it.
    pub fn row(&self) -> [String; 5] {
        let bundle = self.bundle.display().to_string();
        [self.id.into(), self.pid.to_string(), self.status.clone(), bundle, self.created.clone()]
    }
}

impl Container {
    /// A container that its stand-in has made.
    pub fn new(id: &str, sandbox: Id, pid: u32) -> anyhow::Result<Self> {
        let pid_started = started(pid).with_context(|| format!("process {pid} is gone"))?;
        Ok(Self {
            version: VERSION,
            id: id.into(),
            sandbox,
            bundle: PathBuf::new(),
            rootfs: PathBuf::new(),
            pid,
            pid_started,
            created_at: kapsel_sandbox::record::now(),
            oci_version: String::new(),
            annotations: HashMap::new(),
            hooks: None,
            cgroup: None,
        })
    }

    /// The sandbox's own directory.
    pub fn sandbox_bundle(&self, paths: &Paths) -> Bundle {
        paths.bundle(&self.sandbox)
    }

    /// The cgroup of its processes on the host, if its engine named one.
    pub fn cgroup(&self) -> Option<Named> {
        // It was checked when the container was created.
        self.cgroup.as_ref().and_then(|name| name.parse().ok())
    }

    /// Where it is in its life: as its shim noted it, as long as shim and stand-in live.
    pub fn status(&self, paths: &Paths) -> Status {
        let bundle = self.sandbox_bundle(paths);
        if !self.stand_in_lives() || !matches!(owner::of(&bundle), Owner::Shim(_)) {
            return Status::Stopped;
        }
        match Record::read(&bundle).map(|record| record.status) {
            Ok(RecordStatus::Created) => Status::Created,
            Ok(RecordStatus::Running) => Status::Running,
            Ok(RecordStatus::Paused) => Status::Paused,
            Ok(RecordStatus::Exited) | Err(_) => Status::Stopped,
        }
    }

    /// Whether the process that stands for it has not ended.
    pub fn stand_in_lives(&self) -> bool {
        started(self.pid) == Some(self.pid_started)
    }

    /// What others see of it.
    pub fn shown(&self, status: impl ToString) -> Shown<'_> {
        let at = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(self.created_at);
        let status = status.to_string();
        Shown {
            oci_version: &self.oci_version,
            id: &self.id,
            pid: if status == "stopped" { 0 } else { self.pid },
            status,
            bundle: &self.bundle,
            rootfs: &self.rootfs,
            created: humantime::format_rfc3339_nanos(at).to_string(),
            annotations: &self.annotations,
        }
    }
}

/// When a process began; `None` when there is none or it is a zombie.
fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The program's name may contain anything, also brackets and spaces.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    (fields.next()? != "Z").then_some(())?;
    fields.nth(18)?.parse().ok()
}

/// The containers of one engine.
#[derive(Clone, Debug)]
pub struct Containers {
    root: PathBuf,
}

/// A place that is taken for a container which does not exist yet. It is given back unless the container comes to be.
pub struct Claim {
    dir: PathBuf,
    kept: bool,
}

impl Containers {
    /// Those below `root`, or below kapsel's own place for engines that name none.
    pub fn below(root: Option<&Path>, paths: &Paths) -> anyhow::Result<Self> {
        let root = root.map_or_else(|| paths.state().join("oci"), Path::to_owned);
        let root =
            std::path::absolute(&root).with_context(|| format!("cannot use --root {}", root.display()))?;
        Ok(Self { root })
    }

    fn dir(&self, id: &str) -> anyhow::Result<PathBuf> {
        let plain = |c: u8| c.is_ascii_alphanumeric() || b"_+-.".contains(&c);
        if id.is_empty() || id.len() > ID_MAX || !id.bytes().all(plain) || id == "." || id == ".." {
            bail!(
                "container id {id:?} is not valid: use letters, digits, '_', '+', '-' and '.', at most {ID_MAX}"
            );
        }
        Ok(self.root.join(id))
    }

    /// Takes the place of a new container.
    pub fn claim(&self, id: &str) -> anyhow::Result<Claim> {
        let dir = self.dir(id)?;
        let make = |dir: &Path, recursive| fs::DirBuilder::new().mode(0o700).recursive(recursive).create(dir);
        make(&self.root, true).with_context(|| format!("cannot create --root {}", self.root.display()))?;
        match make(&dir, false) {
            Ok(()) => Ok(Claim { dir, kept: false }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                bail!("container with id {id:?} already exists; delete it first, or choose another id")
            }
            Err(error) => Err(error).with_context(|| format!("cannot create {}", dir.display())),
        }
    }

    /// The container of this id.
    pub fn get(&self, id: &str) -> anyhow::Result<Container> {
        match self.find(id)? {
            Some(container) => Ok(container),
            // Engines look for these words.
            None => bail!("container {id:?} does not exist"),
        }
    }

    /// The container of this id, if there is one.
    pub fn find(&self, id: &str) -> anyhow::Result<Option<Container>> {
        let path = self.dir(id)?.join(FILE);
        match fs::read(&path) {
            Ok(json) => read(&path, &json).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }

    /// All that can be read, and why the others cannot.
    pub fn all(&self) -> anyhow::Result<(Vec<Container>, Vec<String>)> {
        let (mut found, mut bad) = (Vec::new(), Vec::new());
        let entries = match fs::read_dir(&self.root) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((found, bad)),
            other => other.with_context(|| format!("cannot read --root {}", self.root.display()))?,
        };
        for entry in entries {
            let name = entry?.file_name();
            match name.to_str().map(|id| self.find(id)) {
                Some(Ok(Some(container))) => found.push(container),
                Some(Ok(None)) | None => {}
                Some(Err(error)) => bad.push(format!("{error:#}")),
            }
        }
        found.sort_by_key(|container| container.created_at);
        Ok((found, bad))
    }

    /// Forgets a container, also one whose making was cut short.
    pub fn forget(&self, id: &str) -> anyhow::Result<()> {
        let dir = self.dir(id)?;
        match fs::remove_dir_all(&dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("cannot remove {}", dir.display()))
            }
            _ => Ok(()),
        }
    }
}

fn read(path: &Path, json: &[u8]) -> anyhow::Result<Container> {
    #[derive(Deserialize)]
    struct Version {
        version: u32,
    }
    let damaged = || format!("{} is damaged; `delete --force` removes the container", path.display());
    let Version { version } = serde_json::from_slice(json).with_context(damaged)?;
    if version > VERSION {
        bail!(
            "{} has version {version}, this program reads up to {VERSION}; use a newer one",
            path.display()
        );
    }
    serde_json::from_slice(json).with_context(damaged)
}

impl Claim {
    /// The container is there.
    pub fn fill(mut self, container: &Container) -> anyhow::Result<()> {
        let path = self.dir.join(FILE);
        let new = self.dir.join(format!("{FILE}.new"));
        let json = serde_json::to_vec_pretty(container)?;
        fs::write(&new, json)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("cannot write {}", path.display()))?;
        self.kept = true;
        Ok(())
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if !self.kept {
            let _ = fs::remove_dir_all(&self.dir);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn containers() -> (tempfile::TempDir, Containers) {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        (dir, Containers { root })
    }

    #[test]
    fn an_id_is_taken_once_and_given_back() {
        let (_dir, containers) = containers();
        let claim = containers.claim("c").unwrap();
        assert!(containers.claim("c").is_err());
        drop(claim);
        let claim = containers.claim("c").unwrap();
        let container = Container::new("c", Id::random(), std::process::id()).unwrap();
        claim.fill(&container).unwrap();
        assert_eq!(containers.get("c").unwrap().sandbox, container.sandbox);
        assert!(containers.get("c").unwrap().stand_in_lives());
        assert_eq!(containers.all().unwrap().0.len(), 1);
        containers.forget("c").unwrap();
        let error = containers.get("c").unwrap_err().to_string();
        assert!(error.contains("does not exist"), "{error}");
    }

    #[test]
    fn ids_are_names_and_not_paths() {
        let (_dir, containers) = containers();
        for bad in ["", ".", "..", "a/b", "../x", "a b", "é", &"a".repeat(256)] {
            assert!(containers.claim(bad).is_err(), "{bad}");
            assert!(containers.get(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_damaged_or_newer_is_told_and_can_be_removed() {
        let (_dir, containers) = containers();
        for (id, text, word) in [("d", "{", "damaged"), ("n", "{\"version\": 2}", "newer")] {
            fs::create_dir_all(containers.root.join(id)).unwrap();
            fs::write(containers.root.join(id).join(FILE), text).unwrap();
            let error = format!("{:#}", containers.get(id).unwrap_err());
            assert!(error.contains(word), "{error}");
        }
        assert_eq!(containers.all().unwrap().1.len(), 2);
        containers.forget("d").unwrap();
        assert_eq!(containers.all().unwrap().1.len(), 1);
    }

    #[test]
    fn a_reused_pid_is_not_a_stand_in() {
        let mut container = Container::new("c", Id::random(), std::process::id()).unwrap();
        assert!(container.stand_in_lives());
        container.pid_started += 1;
        assert!(!container.stand_in_lives());
    }
}
