//! Cgroups that an engine names: `linux.cgroupsPath` of the OCI runtime specification, as runc understands it. A path is below
//! the root of each hierarchy; `SLICE:PREFIX:NAME` is the scope `PREFIX-NAME.scope` in a slice of systemd's.

use std::path::{Component, Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use super::hierarchy::{Survey, Wanted};
use super::place::Place;
use super::scope::Scope;
use super::{Cgroup, Limits, failed};
use crate::error::Result;

/// The longest path. The kernel shows a process's cgroup on a page, in which it must have room.
const PATH_MAX: usize = 2048;
/// The longest name of a directory.
const NAME_MAX: usize = 255;

/// A name that no cgroup can have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} cannot be a container's cgroup: {problem}")]
pub struct BadName {
    /// The name, or its beginning.
    pub name: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

/// The cgroup that an engine names for a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Named {
    /// Directories that we make, at this path below the root of each hierarchy.
    Path(PathBuf),
    /// A unit of systemd's.
    Scope(Scope),
}

impl FromStr for Named {
    type Err = BadName;

    fn from_str(name: &str) -> Result<Self, BadName> {
        let bad = |problem| BadName { name: name.chars().take(100).collect(), problem };
        if name.len() > PATH_MAX {
            return Err(bad("it is longer than 2048 bytes"));
        }
        if name.chars().any(char::is_control) {
            return Err(bad("it has control characters"));
        }
        if let [slice, prefix, name] = name.split(':').collect::<Vec<_>>()[..]
            && !slice.contains('/')
        {
            return Scope::new(slice, prefix, name).map(Self::Scope).map_err(bad);
        }
        let path = name.strip_prefix('/').unwrap_or(name);
        if path.is_empty() {
            return Err(bad("that is every process's; give the container one of its own"));
        }
        for part in path.split('/') {
            match part {
                "" => return Err(bad("it has an empty part (two slashes in a row, or one at the end)")),
                "." | ".." => return Err(bad("it has a part that leads elsewhere (. or ..)")),
                _ if part.len() > NAME_MAX => return Err(bad("it has a part longer than 255 bytes")),
                _ => {}
            }
        }
        Ok(Self::Path(path.into()))
    }
}

impl Named {
    /// Whether this machine can have it.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), String> {
        match self {
            Self::Scope(scope) if !Scope::possible() => Err(format!(
                "systemd does not run here, so there is no scope {}; have the engine name cgroups by paths \
                 (Podman: --cgroup-manager=cgroupfs, Docker: --exec-opt native.cgroupdriver=cgroupfs)",
                scope.unit()
            )),
            _ => Ok(()),
        }
    }

    /// Makes the cgroup and moves this process, which must have one thread, into it. An empty one that is left of a former
    /// container makes room.
    ///
    /// # Errors
    /// When there are processes in it, or it cannot be made.
    pub fn enter_new(&self) -> Result<()> {
        let places = self.places();
        if let Some(place) = places.iter().find(|place| !place.processes().is_empty()) {
            let inside = place.processes().len();
            let problem = format!("{inside} processes are in it, of another container or of the host");
            return Err(failed(&place.dir, "use", std::io::Error::other(problem)));
        }
        if let Some(left) = Cgroup::existing(places.clone()) {
            // What it has counted (memory that ran out) would be taken for the new one's.
            left.remove_empty(Duration::ZERO);
        }
        if let Self::Scope(scope) = self {
            scope.start()?;
        }
        let mut cgroup = Cgroup { places, unenforced: Vec::new() };
        if cgroup.places.is_empty() {
            let why = Survey::take(Wanted::All).obstacles.join("; ");
            return Err(failed(&self.path(), "create", std::io::Error::other(why)));
        }
        cgroup.make(&Limits::default())?;
        cgroup.enter()
    }

    /// The cgroup, if it exists in any hierarchy.
    #[must_use]
    pub fn open(&self) -> Option<Cgroup> {
        Cgroup::existing(self.places())
    }

    /// Makes what is missing of the cgroup, and puts it in force that its processes take no more than `limits`; `None` where nobody
    /// has made its scope.
    ///
    /// # Errors
    /// When it cannot be made, or a limit is refused.
    pub fn limited(&self, limits: &Limits) -> Result<Option<Cgroup>> {
        let mut cgroup = Cgroup { places: self.places(), unenforced: Vec::new() };
        match self {
            Self::Path(_) => cgroup.places.iter().try_for_each(Place::make)?,
            Self::Scope(_) if self.open().is_none() => return Ok(None),
            // It writes its own idea of the limits whenever it is reloaded: it has to know.
            Self::Scope(scope) => scope.limit(limits)?,
        }
        cgroup.limit(limits)?;
        Ok(Some(cgroup))
    }

    /// Removes the cgroup and kills who is left in it.
    ///
    /// # Errors
    /// When processes in it have not ended within `limit`.
    pub fn remove(&self, limit: Duration) -> Result<()> {
        if let Some(cgroup) = self.open() {
            cgroup.remove(limit)?;
        }
        match self {
            Self::Scope(scope) => scope.stop(),
            Self::Path(_) => Ok(()),
        }
    }

    /// Below the root of each hierarchy.
    fn path(&self) -> PathBuf {
        match self {
            Self::Path(path) => path.clone(),
            Self::Scope(scope) => scope.path(),
        }
    }

    fn places(&self) -> Vec<Place> {
        let path = self.path();
        debug_assert!(path.components().all(|part| matches!(part, Component::Normal(_))));
        let usable = Survey::take(Wanted::All).usable.into_iter();
        usable.map(|hierarchy| Place { dir: hierarchy.base.join(Path::new(&path)), hierarchy }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(name: &str) -> Result<Named, BadName> {
        name.parse()
    }

    #[test]
    fn what_engines_write_is_understood() {
        for (name, path) in [
            ("/libpod_parent/libpod-0123", "libpod_parent/libpod-0123"),
            ("/docker/0123", "docker/0123"),
            ("default/c1", "default/c1"),
            ("/a:b", "a:b"),
            ("machine.slice:libpod:0123", "machine.slice/libpod-0123.scope"),
            (":docker:0123", "system.slice/docker-0123.scope"),
            (
                "kubepods-besteffort-pod1_2.slice:cri-containerd:9",
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1_2.slice/cri-containerd-9.scope",
            ),
        ] {
            assert_eq!(parse(name).map(|named| named.path()), Ok(path.into()), "{name}");
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let long = format!("/{}", "x".repeat(256));
        let longer = "/x".repeat(1025);
        for (name, word) in [
            ("", "every process"),
            ("/", "every process"),
            ("//", "empty part"),
            ("//etc", "empty part"),
            ("/a//b", "empty part"),
            ("/a/", "empty part"),
            ("..", "elsewhere"),
            ("/../../etc", "elsewhere"),
            ("/a/./b", "elsewhere"),
            ("/a/..", "elsewhere"),
            ("/a\0b", "control"),
            ("/a\nb", "control"),
            (&long, "255"),
            (&longer, "2048"),
            ("a/b.slice:x:y/..", "elsewhere"),
            ("x:y:z", ".slice"),
            ("a--b.slice:x:y", "slice"),
            ("-a.slice:x:y", "slice"),
            ("a.slice:x:../y", "unit"),
            ("a.slice:x:", "name"),
            ("a.slice:x:y.slice", "slice"),
        ] {
            let error = parse(name).expect_err(name).to_string();
            assert!(error.contains(word), "{name:?}: {error}");
        }
    }
}
