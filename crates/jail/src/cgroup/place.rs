//! One directory of a cgroup: the cgroup in one hierarchy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::{Pid, PidfdFlags, Signal};

use super::hierarchy::{Controller, Hierarchy, Version};
use super::limits::{Limits, settings};
use super::{failed, retried};
use crate::error::Result;

#[derive(Debug, Clone)]
pub(super) struct Place {
    pub hierarchy: Hierarchy,
    pub dir: PathBuf,
}

impl Place {
    /// Makes the directory and those above it that are missing, and has its controllers at its disposal. One that is there stays.
    pub fn make(&self) -> Result<()> {
        let base = &self.hierarchy.base;
        let mut dirs: Vec<&Path> = self.dir.ancestors().take_while(|dir| *dir != base).collect();
        dirs.reverse();
        let mut parent = base.as_path();
        for dir in dirs {
            if self.hierarchy.version == Version::V2 {
                enable(parent, &self.hierarchy.controllers);
            }
            match fs::create_dir(dir) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists || !dir.is_dir() => {
                    return Err(failed(dir, "create", error));
                }
                _ => {}
            }
            if self.hierarchy.version == Version::V1 && self.has(Controller::Cpuset) {
                inherit_cpuset(parent, dir)?;
            }
            parent = dir;
        }
        Ok(())
    }

    pub fn has(&self, controller: Controller) -> bool {
        self.hierarchy.controllers.contains(&controller)
    }

    pub fn limit(&self, limits: &Limits) -> Result<()> {
        for (file, value) in settings(self.hierarchy.version, limits) {
            let path = self.dir.join(file);
            // A file that is not there belongs to a controller that is elsewhere, or nowhere (see `unenforced`).
            if path.exists() {
                fs::write(&path, &value).map_err(|e| failed(&path, "write a limit to", e))?;
            }
        }
        Ok(())
    }

    /// A sandbox without its monitor or its file server is of no use.
    pub fn die_together(&self) {
        // A kernel before 4.19 has no such file; it kills one by one.
        let _ = fs::write(self.dir.join("memory.oom.group"), "1");
    }

    /// The file through which processes enter. In `tasks` rather than `cgroup.procs` of version 1 that moves just one thread,
    /// without the kernel-wide lock that costs a grace period.
    pub fn door(&self) -> PathBuf {
        self.dir.join(match self.hierarchy.version {
            Version::V1 => "tasks",
            Version::V2 => "cgroup.procs",
        })
    }

    pub fn processes(&self) -> Vec<u32> {
        let text = fs::read_to_string(self.dir.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.trim().parse().ok()).collect()
    }

    pub fn oom_kills(&self) -> u64 {
        let file = match self.hierarchy.version {
            Version::V1 => "memory.oom_control",
            Version::V2 => "memory.events",
        };
        let text = fs::read_to_string(self.dir.join(file)).unwrap_or_default();
        text.lines().find_map(|l| l.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
    }

    pub fn kill(&self) {
        // Linux 5.14 and newer, v2: atomic. Else one by one, as often as `remove` comes round.
        if fs::write(self.dir.join("cgroup.kill"), "1").is_ok() {
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

    pub fn remove(&self, deadline: Instant) -> Result<()> {
        retried(deadline.saturating_duration_since(Instant::now()), || {
            let removed = self.remove_empty();
            if removed.is_err() {
                self.kill();
            }
            removed
        })
    }

    /// Removes the directory and those in it, unless there are processes. One that is not there is no error.
    pub fn remove_empty(&self) -> Result<()> {
        remove_tree(&self.dir).map_err(|e| failed(&self.dir, "remove", e))
    }
}

/// A cgroup's files cannot be removed and go with it; only what is below it has to go first.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let absent = |result: io::Result<()>| match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    };
    // Mostly there is nothing below.
    if absent(fs::remove_dir(dir)).is_ok() {
        return Ok(());
    }
    for entry in fs::read_dir(dir)?.flatten() {
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    absent(fs::remove_dir(dir))
}

/// Makes the controllers available to the cgroups below `dir`. Where that is refused (a container's own root, in which processes are),
/// their files are missing below, and the limits end up in [`Cgroup::unenforced`](super::Cgroup::unenforced).
fn enable(dir: &Path, controllers: &[Controller]) {
    let file = dir.join("cgroup.subtree_control");
    let on = fs::read_to_string(&file).unwrap_or_default();
    for controller in controllers {
        if !on.split_whitespace().any(|name| name == controller.name()) {
            // One by one: writing all at once fails for all if it fails for one.
            let _ = fs::write(&file, format!("+{}", controller.name()));
        }
    }
}

/// On version 1 a new cgroup has no processors and no memory nodes, and lets nobody in without.
fn inherit_cpuset(parent: &Path, dir: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let path = dir.join(file);
        let own = fs::read_to_string(&path).map_err(|e| failed(&path, "read", e))?;
        if own.trim().is_empty() {
            let from = parent.join(file);
            let parents = fs::read_to_string(&from).map_err(|e| failed(&from, "read", e))?;
            fs::write(&path, parents.trim()).map_err(|e| failed(&path, "write", e))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that stands for a hierarchy: what is written can be read, though nobody follows it.
    fn place(version: Version, controllers: &[Controller]) -> (tempfile::TempDir, Place) {
        let dir = tempfile::tempdir().unwrap();
        let hierarchy = Hierarchy { version, base: dir.path().into(), controllers: controllers.to_vec() };
        let place = Place { dir: hierarchy.base.join("a/b/c"), hierarchy };
        (dir, place)
    }

    #[test]
    fn on_version_two_each_parent_gives_its_controllers_away() {
        let (dir, place) = place(Version::V2, &[Controller::Memory]);
        place.make().unwrap();
        for parent in ["", "a", "a/b"] {
            let control = dir.path().join(parent).join("cgroup.subtree_control");
            assert_eq!(fs::read_to_string(control).unwrap(), "+memory", "{parent}");
        }
        assert!(place.dir.is_dir() && !place.dir.join("cgroup.subtree_control").exists());
        place.make().unwrap();
    }

    #[test]
    fn what_is_below_goes_too_and_what_is_gone_is_no_error() {
        let (_dir, place) = place(Version::V1, &[Controller::Pids]);
        place.make().unwrap();
        fs::create_dir_all(place.dir.join("x/y")).unwrap();
        place.remove(Instant::now()).unwrap();
        assert!(!place.dir.exists());
        place.remove(Instant::now()).unwrap();
    }

    #[test]
    fn a_file_in_the_way_is_an_error() {
        let (dir, place) = place(Version::V1, &[Controller::Pids]);
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::write(dir.path().join("a/b"), "").unwrap();
        assert!(place.make().unwrap_err().to_string().contains("a/b"));
    }
}
