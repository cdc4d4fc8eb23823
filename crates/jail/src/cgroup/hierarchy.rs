//! Where the cgroup hierarchies are, and where in them we may work.

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

/// The directory, in each hierarchy, that all sandboxes' cgroups are in.
pub(super) const PARENT: &str = "kapsel";

/// A controller that limits are set with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Controller {
    Memory,
    Cpu,
    Pids,
    Cpuset,
}

impl Controller {
    pub(super) const ALL: [Controller; 4] =
        [Controller::Memory, Controller::Cpu, Controller::Pids, Controller::Cpuset];

    pub(super) fn name(self) -> &'static str {
        match self {
            Controller::Memory => "memory",
            Controller::Cpu => "cpu",
            Controller::Pids => "pids",
            Controller::Cpuset => "cpuset",
        }
    }

    fn all_in<'a>(names: impl Iterator<Item = &'a str> + Clone) -> Vec<Controller> {
        Controller::ALL.into_iter().filter(|c| names.clone().any(|n| n == c.name())).collect()
    }
}

/// The interface that a hierarchy has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Version {
    V1,
    V2,
}

/// A hierarchy that we may make cgroups in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hierarchy {
    pub version: Version,
    /// The directory that [`PARENT`] goes into.
    pub base: PathBuf,
    /// Those of our controllers that it has.
    pub controllers: Vec<Controller>,
}

/// Which hierarchies matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wanted {
    /// Those that limit what a sandbox of kapsel's own takes.
    Limits,
    /// Every one: engines look for a container's processes, and count what they use, in any.
    All,
}

/// What this process can do with cgroups.
#[derive(Debug, Clone, Default)]
pub(super) struct Survey {
    pub usable: Vec<Hierarchy>,
    /// Why there is not more, in words for the person.
    pub obstacles: Vec<String>,
}

impl Survey {
    pub fn take(wanted: Wanted) -> Survey {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let root = rustix::process::geteuid().is_root();
        Survey::of(&read("/proc/self/mountinfo"), &read("/proc/self/cgroup"), root, wanted)
    }

    /// Looks at every cgroup mount. On a hybrid machine each controller is in exactly one of them.
    fn of(mountinfo: &str, own: &str, root: bool, wanted: Wanted) -> Survey {
        let mut survey = Survey::default();
        let mut seen = Vec::new();
        for mount in mountinfo.lines().filter_map(Mount::parse) {
            // A hierarchy may be mounted more than once, or at the same place again.
            if seen.contains(&mount.options) {
                continue;
            }
            seen.push(mount.options.clone());
            match mount.hierarchy(own, root, wanted) {
                Ok(Some(hierarchy)) => survey.usable.push(hierarchy),
                Ok(None) => {}
                Err(obstacle) => survey.obstacles.push(obstacle),
            }
        }
        if seen.is_empty() {
            survey.obstacles.push("no cgroup file system is mounted".to_owned());
        }
        survey
    }
}

/// A line of /proc/self/mountinfo for a cgroup file system.
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    version: Version,
    point: PathBuf,
    /// The part of the hierarchy that is visible.
    root: String,
    options: String,
}

impl Mount {
    /// `36 35 98:0 /root /point opts optional… - type source super-options`
    fn parse(line: &str) -> Option<Mount> {
        let (left, right) = line.split_once(" - ")?;
        let mut right = right.split(' ');
        let version = match right.next()? {
            "cgroup" => Version::V1,
            "cgroup2" => Version::V2,
            _ => return None,
        };
        let mut left = left.split(' ').skip(3);
        let (root, point) = (left.next()?.to_owned(), PathBuf::from(left.next()?));
        // For v2 the options say nothing that matters; there is one v2 hierarchy.
        let options = if version == Version::V2 { "v2" } else { right.nth(1)? };
        Some(Mount { version, point, root, options: options.to_owned() })
    }

    fn hierarchy(&self, own: &str, root: bool, wanted: Wanted) -> Result<Option<Hierarchy>, String> {
        let useful = |controllers: &[Controller]| {
            wanted == Wanted::All || controllers.iter().any(|c| *c != Controller::Cpuset)
        };
        let controllers = match self.version {
            Version::V1 => Controller::all_in(self.options.split(',')),
            // What the base really has is read below.
            Version::V2 => Controller::ALL.to_vec(),
        };
        if !useful(&controllers) {
            return Ok(None);
        }
        let base = if root { self.for_root() } else { self.delegated(own) }?;
        let controllers = match self.version {
            Version::V1 => controllers,
            Version::V2 => {
                let names = std::fs::read_to_string(base.join("cgroup.controllers")).unwrap_or_default();
                Controller::all_in(names.split_whitespace())
            }
        };
        // A hybrid machine's v2 hierarchy has no controller: then it is of no use here.
        Ok(useful(&controllers).then_some(Hierarchy { version: self.version, base, controllers }))
    }

    fn for_root(&self) -> Result<PathBuf, String> {
        writable(&self.point)
            .map_err(|error| format!("{} cannot be written to: {error}", self.point.display()))?;
        Ok(self.point.clone())
    }

    /// The topmost cgroup above our own that belongs to us. A process can only be moved within such a subtree.
    fn delegated(&self, own: &str) -> Result<PathBuf, String> {
        let refused = || {
            format!(
                "no cgroup below {} is delegated to this user (log in by systemd, or run kapsel with \
                 `systemd-run --user --scope -p Delegate=yes`)",
                self.point.display()
            )
        };
        let line = own.lines().find_map(|l| self.own_path(l)).ok_or_else(refused)?;
        let inside = line.strip_prefix(self.root.trim_end_matches('/')).unwrap_or(line);
        let uid = rustix::process::geteuid().as_raw();
        let own = self.point.join(inside.trim_start_matches('/'));
        let ours = |dir: &&Path| {
            dir.metadata().is_ok_and(|m| m.uid() == uid)
                && writable(dir).is_ok()
                && writable(&dir.join("cgroup.procs")).is_ok()
        };
        let above = own.ancestors().take_while(|dir| dir.starts_with(&self.point));
        above.filter(ours).last().map(Path::to_owned).ok_or_else(refused)
    }

    /// Our path from a line of /proc/self/cgroup (`id:controllers:path`), if the line is about this hierarchy.
    fn own_path<'a>(&self, line: &'a str) -> Option<&'a str> {
        let mut parts = line.splitn(3, ':');
        let (id, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let ours = match self.version {
            Version::V2 => id == "0",
            Version::V1 => {
                controllers.split(',').all(|c| self.options.split(',').any(|o| o == c)) && id != "0"
            }
        };
        ours.then_some(path)
    }
}

fn writable(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::access(path, Access::WRITE_OK)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_lines_are_understood() {
        let v1 =
            "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct";
        let mount = Mount::parse(v1).unwrap();
        assert_eq!((mount.version, mount.options.as_str()), (Version::V1, "rw,cpu,cpuacct"));
        assert_eq!(mount.own_path("4:cpu,cpuacct:/user.slice"), Some("/user.slice"));
        assert_eq!(mount.own_path("5:memory:/user.slice"), None);
        let v2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot";
        let mount = Mount::parse(v2).unwrap();
        assert_eq!((mount.version, mount.point.as_path()), (Version::V2, Path::new("/sys/fs/cgroup")));
        assert_eq!(mount.own_path("0::/user.slice/a:b"), Some("/user.slice/a:b"));
        assert_eq!(Mount::parse("22 27 0:21 / /proc rw - proc proc rw"), None);
        assert_eq!(Mount::parse("nonsense"), None);
    }

    #[test]
    fn without_cgroups_or_delegation_it_says_why() {
        assert_eq!(Survey::of("", "", true, Wanted::Limits).obstacles, ["no cgroup file system is mounted"]);
        let v2 = "30 23 0:26 / /nowhere rw - cgroup2 cgroup2 rw";
        let survey = Survey::of(v2, "0::/session.scope\n", false, Wanted::Limits);
        assert!(survey.usable.is_empty());
        assert!(survey.obstacles[0].contains("delegated"), "{:?}", survey.obstacles);
        let survey = Survey::of(v2, "", true, Wanted::All);
        assert!(survey.obstacles[0].contains("/nowhere cannot be written to"), "{:?}", survey.obstacles);
    }
}
