//! Cgroups: one per sandbox, in every hierarchy that matters.
//!
//! A sandbox of kapsel's own has `kapsel/<id>` where there is the memory, cpu or pids controller. An engine names its container's
//! cgroup itself ([`Named`]), and looks for it in every hierarchy. Works with v2, with v1 (one hierarchy per controller), and with
//! hybrids of both. Without root it needs a subtree that systemd has delegated to the user; where there is none, sandboxes run
//! without a cgroup, and [`obstacles`] says why.
//!
//! | file | idea |
//! | --- | --- |
//! | `hierarchy` | where hierarchies are, and where in them we may work |
//! | `place` | a cgroup in one of them |
//! | `limits` | limits in the words of both versions |
//! | `named` | cgroups that an engine names |
//! | `scope` | those of them that systemd makes |

mod hierarchy;
mod limits;
mod named;
mod place;
mod scope;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use crate::error::{Error, Result};
use hierarchy::{Controller, Hierarchy, PARENT, Survey, Version, Wanted};
pub use limits::Limits;
pub use named::{BadName, Named};
use place::Place;

/// A sandbox's cgroup, in all the hierarchies that it is in. Clones are handles of the same one; it stays until it is removed.
#[derive(Debug, Clone)]
pub struct Cgroup {
    places: Vec<Place>,
    unenforced: Vec<&'static str>,
}

/// Open descriptors through which a child enters a cgroup.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    /// The v2 directory, for `CLONE_INTO_CGROUP`.
    pub v2: Option<OwnedFd>,
    /// The `tasks` files of the v1 hierarchies.
    pub v1: Vec<OwnedFd>,
}

/// Why sandboxes get no cgroup here, or not all controllers; empty when nothing is in the way.
#[must_use]
pub fn obstacles() -> Vec<String> {
    Survey::take(Wanted::Limits).obstacles
}

/// The ids of all sandboxes' cgroups that exist, whether their sandboxes live or not.
#[must_use]
pub fn list() -> BTreeSet<String> {
    let parents = Survey::take(Wanted::Limits).usable.into_iter().map(|h| h.base.join(PARENT));
    let entries = parents.filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
    entries
        .filter(|e| e.file_type().is_ok_and(|t| t.is_dir()))
        .filter_map(|e| e.file_name().into_string().ok())
        .collect()
}

impl Cgroup {
    /// Creates the cgroup of sandbox `id` and sets its limits; `None` where this process may create none (see [`obstacles`]). A limit
    /// whose controller is not available is listed in [`Cgroup::unenforced`].
    ///
    /// # Errors
    /// When it exists already, or a limit is refused. Nothing is left behind then.
    pub fn create(id: &str, limits: &Limits) -> Result<Option<Cgroup>> {
        check_id(id)?;
        let places = own(id);
        if places.is_empty() {
            return Ok(None);
        }
        if let Some(place) = places.iter().find(|place| place.dir.exists()) {
            return Err(failed(&place.dir, "create", io::ErrorKind::AlreadyExists.into()));
        }
        let mut cgroup = Cgroup { places, unenforced: Vec::new() };
        cgroup.make(limits)?;
        cgroup.places.iter().for_each(Place::die_together);
        Ok(Some(cgroup))
    }

    /// Makes what is missing of it and limits it, or leaves nothing.
    fn make(&mut self, limits: &Limits) -> Result<()> {
        let made = self.places.iter().try_for_each(Place::make).and_then(|()| self.limit(limits));
        made.inspect_err(|_| {
            for place in &self.places {
                // The first error is the one to tell; an empty cgroup does no harm.
                let _ = place.remove_empty();
            }
        })
    }

    /// The cgroup of sandbox `id`, if it exists in any hierarchy.
    ///
    /// # Errors
    /// When the id is none.
    pub fn open(id: &str) -> Result<Option<Cgroup>> {
        check_id(id)?;
        Ok(Cgroup::existing(own(id)))
    }

    fn existing(mut places: Vec<Place>) -> Option<Cgroup> {
        places.retain(|place| place.dir.is_dir());
        (!places.is_empty()).then_some(Cgroup { places, unenforced: Vec::new() })
    }

    /// Changes its limits. Those whose controller is not available are then listed in [`Cgroup::unenforced`].
    ///
    /// # Errors
    /// When the kernel refuses one.
    pub fn limit(&mut self, limits: &Limits) -> Result<()> {
        let there = |controller: &Controller| self.places.iter().any(|place| place.has(*controller));
        let missing = limits.controllers().into_iter().filter(|controller| !there(controller));
        self.unenforced = missing.map(Controller::name).collect();
        self.places.iter().try_for_each(|place| place.limit(limits))
    }

    /// The limits that were asked for and cannot be enforced, since no hierarchy at hand has their controller.
    #[must_use]
    pub fn unenforced(&self) -> &[&'static str] {
        &self.unenforced
    }

    /// Moves this process into it.
    ///
    /// Must be called while there is one thread: on version 1 it is the calling thread that moves.
    ///
    /// # Errors
    /// When the kernel refuses it.
    pub fn enter(&self) -> Result<()> {
        self.places.iter().try_for_each(|place| {
            let door = place.door();
            std::fs::write(&door, "0").map_err(|e| failed(&door, "enter by", e))
        })
    }

    /// The files through which a child enters between fork and exec: it writes `0` to each.
    ///
    /// # Errors
    /// When one cannot be opened.
    pub fn doors(&self) -> Result<Vec<OwnedFd>> {
        let doors = self.places.iter().map(Place::door);
        doors.map(|door| open(&door, OFlags::WRONLY)).collect()
    }

    /// The host's processes in the cgroup.
    #[must_use]
    pub fn processes(&self) -> BTreeSet<u32> {
        self.places.iter().flat_map(|place| place.processes()).collect()
    }

    /// How many processes the kernel has killed for exceeding the memory limit.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        self.places.iter().find(|place| place.has(Controller::Memory)).map_or(0, Place::oom_kills)
    }

    /// Kills every process in the cgroup.
    pub fn kill(&self) {
        for place in &self.places {
            place.kill();
        }
    }

    /// Kills what is left in the cgroup and removes it. A cgroup that has gone is no error.
    ///
    /// # Errors
    /// When processes in it have not ended within `limit`.
    pub fn remove(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        self.places.iter().try_for_each(|place| place.remove(deadline))
    }

    /// Removes the cgroup once nobody is in it; false when somebody still is after `patience`, or this process is.
    pub fn remove_empty(&self, patience: Duration) -> bool {
        if self.processes().contains(&std::process::id()) {
            return false;
        }
        let all = || self.places.iter().try_for_each(Place::remove_empty);
        retried(patience, all).is_ok()
    }

    /// Opens what a child needs to enter.
    pub(crate) fn entry(&self) -> Result<Entry> {
        let mut entry = Entry::default();
        for place in &self.places {
            match place.hierarchy.version {
                Version::V1 => entry.v1.push(open(&place.door(), OFlags::WRONLY)?),
                Version::V2 => entry.v2 = Some(open(&place.dir, OFlags::PATH | OFlags::DIRECTORY)?),
            }
        }
        Ok(entry)
    }
}

fn open(path: &Path, flags: OFlags) -> Result<OwnedFd> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty()).map_err(|e| failed(path, "open", e.into()))
}

fn own(id: &str) -> Vec<Place> {
    let place = |hierarchy: Hierarchy| Place { dir: hierarchy.base.join(PARENT).join(id), hierarchy };
    Survey::take(Wanted::Limits).usable.into_iter().map(place).collect()
}

/// The id becomes a directory's name.
fn check_id(id: &str) -> Result<()> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if (1..=128).contains(&id.len()) && id.bytes().all(plain) {
        return Ok(());
    }
    let problem = io::Error::new(io::ErrorKind::InvalidInput, "an id has 1 to 128 letters, digits, - and _");
    Err(failed(Path::new(id), "name a cgroup", problem))
}

fn failed(path: &Path, action: &'static str, source: io::Error) -> Error {
    Error::Cgroup { path: path.display().to_string(), action, source }
}

/// The longest pause between two looks at whether something has happened.
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Tries again until it succeeds, or has failed for so long.
fn retried<T>(patience: Duration, mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let deadline = Instant::now() + patience;
    let mut pause = Duration::from_millis(1);
    loop {
        match attempt() {
            Err(_) if Instant::now() < deadline => {}
            result => return result,
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_cannot_leave_the_directory() {
        for id in ["", "..", "a/b", "a.b", &"x".repeat(129)] {
            assert!(check_id(id).is_err(), "{id}");
        }
        assert!(check_id("0123abc-_").is_ok());
    }
}
