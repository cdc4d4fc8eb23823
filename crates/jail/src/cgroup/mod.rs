//! Cgroups: one per sandbox, `kapsel/<id>`, in every hierarchy that has the memory, cpu or pids controller.
//!
//! Works with v2, with v1 (one hierarchy per controller), and with hybrids of both. Without root it needs a subtree that systemd
//! has delegated to the user; where there is none, sandboxes run without a cgroup, and [`obstacles`] says why.

mod hierarchy;

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::error::{Error, Result};
use hierarchy::{Controller, Hierarchy, PARENT, Survey, Version};

/// Upper bounds for all processes of a sandbox together. `None` is no limit.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Limits {
    /// Bytes of memory, page cache included.
    pub memory: Option<u64>,
    /// Processor time, in processors: 1.5 is one and a half.
    pub cpu: Option<f64>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

/// A sandbox's cgroup, in all the hierarchies that it is in. Clones are handles of the same one; it stays until it is removed.
#[derive(Debug, Clone)]
pub struct Cgroup {
    places: Vec<Place>,
    unenforced: Vec<&'static str>,
}

#[derive(Debug, Clone)]
struct Place {
    hierarchy: Hierarchy,
    dir: PathBuf,
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
    Survey::take().obstacles
}

/// The ids of all sandboxes' cgroups that exist, whether their sandboxes live or not.
#[must_use]
pub fn list() -> BTreeSet<String> {
    let parents = Survey::take().usable.into_iter().map(|h| h.base.join(PARENT));
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
        let places: Vec<Place> = places(id);
        if places.is_empty() {
            return Ok(None);
        }
        let cgroup = Cgroup { unenforced: unenforced(&places, limits), places };
        for (index, place) in cgroup.places.iter().enumerate() {
            if let Err(error) = place.create(limits) {
                for made in cgroup.places.iter().take(index) {
                    // The first error is the one to tell; an empty cgroup does no harm.
                    let _ = std::fs::remove_dir(&made.dir);
                }
                return Err(error);
            }
        }
        Ok(Some(cgroup))
    }

    /// The cgroup of sandbox `id`, if it exists in any hierarchy.
    pub fn open(id: &str) -> Result<Option<Cgroup>> {
        check_id(id)?;
        let places: Vec<Place> = places(id).into_iter().filter(|p| p.dir.is_dir()).collect();
        Ok((!places.is_empty()).then_some(Cgroup { places, unenforced: Vec::new() }))
    }

    /// The limits that were asked for and cannot be enforced, since no hierarchy at hand has their controller.
    #[must_use]
    pub fn unenforced(&self) -> &[&'static str] {
        &self.unenforced
    }

    /// The host's processes in the cgroup.
    #[must_use]
    pub fn processes(&self) -> BTreeSet<u32> {
        self.places.iter().flat_map(|place| place.processes()).collect()
    }

    /// How many processes the kernel has killed for exceeding the memory limit.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        let place = self.places.iter().find(|p| p.hierarchy.controllers.contains(&Controller::Memory));
        place.map_or(0, Place::oom_kills)
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

    /// Opens what a child needs to enter.
    pub(crate) fn entry(&self) -> Result<Entry> {
        let mut entry = Entry::default();
        for Place { hierarchy, dir } in &self.places {
            let open = |path: &Path, flags| {
                rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::empty())
                    .map_err(|e| failed(path, "open", e.into()))
            };
            match hierarchy.version {
                Version::V1 => entry.v1.push(open(&dir.join("tasks"), OFlags::WRONLY)?),
                Version::V2 => entry.v2 = Some(open(dir, OFlags::PATH | OFlags::DIRECTORY)?),
            }
        }
        Ok(entry)
    }
}

impl Place {
    fn create(&self, limits: &Limits) -> Result<()> {
        let parent = self.hierarchy.base.join(PARENT);
        match std::fs::create_dir(&parent) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(&parent, "create", error));
            }
            _ => {}
        }
        if self.hierarchy.version == Version::V2 {
            for dir in [&self.hierarchy.base, &parent] {
                enable(dir, &self.hierarchy.controllers);
            }
        }
        std::fs::create_dir(&self.dir).map_err(|e| failed(&self.dir, "create", e))?;
        self.limit(limits).inspect_err(|_| drop(std::fs::remove_dir(&self.dir)))
    }

    fn limit(&self, limits: &Limits) -> Result<()> {
        for (file, value) in settings(self.hierarchy.version, limits) {
            let path = self.dir.join(file);
            // A file that is not there belongs to a controller that is elsewhere, or nowhere (see `unenforced`).
            if path.exists() {
                std::fs::write(&path, &value).map_err(|e| failed(&path, "write a limit to", e))?;
            }
        }
        Ok(())
    }

    fn processes(&self) -> Vec<u32> {
        let text = std::fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.trim().parse().ok()).collect()
    }

    fn oom_kills(&self) -> u64 {
        let file = match self.hierarchy.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        let text = std::fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    fn kill(&self) {
        // Linux 5.14 and newer, v2: atomic. Else one by one, as often as `remove` comes round.
        if std::fs::write(self.dir.join("cgroup.kill"), "1").is_ok() {
            return;
        }
        for number in self.processes() {
            let Some(pid) = i32::try_from(number).ok().and_then(Pid::from_raw) else { continue };
            let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { continue };
            // The number may have been given to another process before it was opened: look again now that it is held.
            if self.processes().contains(&number) {
                let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
            }
        }
    }

    fn remove(&self, deadline: Instant) -> Result<()> {
        let mut pause = Duration::from_millis(1);
        loop {
            match std::fs::remove_dir(&self.dir) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) if Instant::now() >= deadline => return Err(failed(&self.dir, "remove", error)),
                Err(_) => self.kill(),
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}

/// Makes the controllers available to the cgroups below `dir`. Where that is refused (a container's own root, in which processes are),
/// their files are missing below, and the limits end up in [`Cgroup::unenforced`].
fn enable(dir: &Path, controllers: &[Controller]) {
    let file = dir.join("cgroup.subtree_control");
    let on = std::fs::read_to_string(&file).unwrap_or_default();
    for controller in controllers {
        if !on.split_whitespace().any(|name| name == controller.name()) {
            // One by one: writing all at once fails for all if it fails for one.
            let _ = std::fs::write(&file, format!("+{}", controller.name()));
        }
    }
}

fn places(id: &str) -> Vec<Place> {
    let place = |hierarchy: Hierarchy| Place { dir: hierarchy.base.join(PARENT).join(id), hierarchy };
    Survey::take().usable.into_iter().map(place).collect()
}

fn unenforced(places: &[Place], limits: &Limits) -> Vec<&'static str> {
    let wanted = [
        (Controller::Memory, limits.memory.is_some()),
        (Controller::Cpu, limits.cpu.is_some()),
        (Controller::Pids, limits.pids.is_some()),
    ];
    let there = |c| places.iter().any(|p| p.hierarchy.controllers.contains(c));
    wanted.iter().filter(|(c, wanted)| *wanted && !there(c)).map(|(c, _)| c.name()).collect()
}

/// The files to write, with their values.
fn settings(version: Version, limits: &Limits) -> Vec<(&'static str, String)> {
    /// Microseconds. The kernel's default.
    const PERIOD: u64 = 100_000;
    /// The kernel accepts no less.
    const MIN_QUOTA: u64 = 1_000;
    let mut settings = Vec::new();
    let v2 = version == Version::V2;
    if let Some(bytes) = limits.memory {
        settings.push((if v2 { "memory.max" } else { "memory.limit_in_bytes" }, bytes.to_string()));
        if v2 {
            // A sandbox without its monitor or its file server is of no use.
            settings.push(("memory.oom.group", "1".to_owned()));
        }
    }
    if let Some(cpus) = limits.cpu {
        let quota = ((cpus * PERIOD as f64) as u64).max(MIN_QUOTA);
        if v2 {
            settings.push(("cpu.max", format!("{quota} {PERIOD}")));
        } else {
            settings.push(("cpu.cfs_period_us", PERIOD.to_string()));
            settings.push(("cpu.cfs_quota_us", quota.to_string()));
        }
    }
    if let Some(pids) = limits.pids {
        settings.push(("pids.max", pids.to_string()));
    }
    settings
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_written_in_each_versions_terms() {
        let limits = Limits { memory: Some(1 << 20), cpu: Some(1.5), pids: Some(7) };
        let text = |version| {
            settings(version, &limits).iter().map(|(f, v)| format!("{f}={v}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            text(Version::V2),
            "memory.max=1048576 memory.oom.group=1 cpu.max=150000 100000 pids.max=7"
        );
        assert_eq!(
            text(Version::V1),
            "memory.limit_in_bytes=1048576 cpu.cfs_period_us=100000 cpu.cfs_quota_us=150000 pids.max=7"
        );
        assert!(settings(Version::V2, &Limits::default()).is_empty());
    }

    #[test]
    fn ids_cannot_leave_the_directory() {
        for id in ["", "..", "a/b", "a.b", &"x".repeat(129)] {
            assert!(check_id(id).is_err(), "{id}");
        }
        assert!(check_id("0123abc-_").is_ok());
    }
}
