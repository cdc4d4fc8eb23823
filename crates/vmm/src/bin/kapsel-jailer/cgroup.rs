//! The monitor's cgroup, in the hierarchies of the controllers that something is set for.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::options::{Setting, Version};

/// Makes `<parent>/<id>` where it is needed, writes the settings, and moves this process there.
pub fn join(
    version: Version,
    settings: &[Setting],
    parent: Option<&Path>,
    program: &str,
    id: &str,
) -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts").context("cannot read the host's mounts")?;
    let below = parent.unwrap_or(Path::new(program));
    match version {
        Version::V1 => {
            for controller in controllers(settings) {
                let mount = v1(&mounts, controller).with_context(|| {
                    format!("no cgroup v1 hierarchy with the controller {controller} is mounted")
                })?;
                let group = make_v1(&mount, &below.join(id), controller)?;
                write_all(&group, settings.iter().filter(|setting| setting.controller() == controller))?;
                write(&group, "tasks", "0")?;
            }
            Ok(())
        }
        Version::V2 if settings.is_empty() => {
            // A group that was prepared by somebody else is entered, and none is made.
            let Some(parent) = parent else { return Ok(()) };
            write(&v2(&mounts)?.join(parent), "cgroup.procs", "0")
        }
        Version::V2 => {
            let group = make_v2(&v2(&mounts)?, &below.join(id), &controllers(settings))?;
            write_all(&group, settings.iter())?;
            write(&group, "cgroup.procs", "0")
        }
    }
}

/// Each once.
fn controllers(settings: &[Setting]) -> Vec<&str> {
    let mut controllers: Vec<_> = settings.iter().map(Setting::controller).collect();
    controllers.sort_unstable();
    controllers.dedup();
    controllers
}

/// Where the hierarchy with a controller is mounted (`source point type options …`).
fn v1(mounts: &str, controller: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let words: Vec<_> = line.split(' ').collect();
        let [_, point, "cgroup", options, ..] = words[..] else { return None };
        options.split(',').any(|option| option == controller).then(|| PathBuf::from(point))
    })
}

fn v2(mounts: &str) -> Result<PathBuf> {
    let point = mounts.lines().find_map(|line| {
        let words: Vec<_> = line.split(' ').collect();
        let [_, point, "cgroup2", ..] = words[..] else { return None };
        Some(PathBuf::from(point))
    });
    point.context("no cgroup v2 hierarchy is mounted")
}

/// Every directory on the way to `path`, from the top, without the mount itself.
fn on_the_way<'a>(mount: &'a Path, path: &'a Path) -> impl Iterator<Item = PathBuf> + 'a {
    let mut at = mount.to_owned();
    path.iter().map(move |part| {
        at.push(part);
        at.clone()
    })
}

fn make(directory: &Path) -> Result<()> {
    match fs::create_dir(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(error).with_context(|| format!("cannot make the cgroup {}", directory.display()))
        }
        _ => Ok(()),
    }
}

fn make_v1(mount: &Path, path: &Path, controller: &str) -> Result<PathBuf> {
    for directory in on_the_way(mount, path) {
        make(&directory)?;
        if controller == "cpuset" {
            inherit(&directory)?;
        }
    }
    Ok(mount.join(path))
}

/// A new cpuset has no processors and no memory, and takes no process then.
fn inherit(directory: &Path) -> Result<()> {
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let own = fs::read_to_string(directory.join(file)).unwrap_or_default();
        if own.trim().is_empty() {
            let above = directory.parent().unwrap_or(directory).join(file);
            let above =
                fs::read_to_string(&above).with_context(|| format!("cannot read {}", above.display()))?;
            write(directory, file, above.trim())?;
        }
    }
    Ok(())
}

/// A controller is there only when every directory above hands it down.
fn make_v2(mount: &Path, path: &Path, controllers: &[&str]) -> Result<PathBuf> {
    let mut above = mount.to_owned();
    for directory in on_the_way(mount, path) {
        let available = fs::read_to_string(above.join("cgroup.controllers"))
            .with_context(|| format!("cannot read the controllers of {}", above.display()))?;
        for controller in controllers {
            if !available.split_whitespace().any(|other| other == *controller) {
                bail!("the cgroup {} has no controller {controller}", above.display());
            }
            write(&above, "cgroup.subtree_control", &format!("+{controller}"))?;
        }
        make(&directory)?;
        above = directory;
    }
    Ok(above)
}

fn write_all<'a>(group: &Path, settings: impl Iterator<Item = &'a Setting>) -> Result<()> {
    settings.into_iter().try_for_each(|setting| write(group, &setting.file, &setting.value))
}

fn write(group: &Path, file: &str, value: &str) -> Result<()> {
    let path = group.join(file);
    // Only into what the kernel has there.
    let written = fs::OpenOptions::new().write(true).open(&path);
    let written = written.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()));
    written.with_context(|| format!("cannot write {value:?} to {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "tmpfs /sys/fs/cgroup tmpfs rw 0 0
cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,relatime,cpu,cpuacct 0 0
cgroup /sys/fs/cgroup/systemd cgroup rw,name=systemd 0 0
cgroup2 /sys/fs/cgroup/unified cgroup2 rw,nsdelegate 0 0
";

    #[test]
    fn hierarchies_are_found_by_their_controllers() {
        assert_eq!(v1(MOUNTS, "cpuacct").unwrap(), Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(v1(MOUNTS, "cp"), None);
        assert_eq!(v1(MOUNTS, "memory"), None);
        assert_eq!(v2(MOUNTS).unwrap(), Path::new("/sys/fs/cgroup/unified"));
        assert!(v2("").is_err());
    }

    #[test]
    fn a_v2_group_gets_its_controllers_handed_down_or_a_reason() {
        let mount = tempfile::tempdir().unwrap();
        let file = |path: &str, text: &str| fs::write(mount.path().join(path), text).unwrap();
        fs::create_dir(mount.path().join("all")).unwrap();
        for directory in ["", "all/"] {
            file(&format!("{directory}cgroup.controllers"), "cpu memory\n");
            file(&format!("{directory}cgroup.subtree_control"), "");
        }
        let group = make_v2(mount.path(), Path::new("all/one"), &["cpu"]).unwrap();
        assert!(group.is_dir() && group.ends_with("all/one"));
        assert_eq!(fs::read_to_string(mount.path().join("all/cgroup.subtree_control")).unwrap(), "+cpu");
        let missing = make_v2(mount.path(), Path::new("all/two"), &["io"]).unwrap_err();
        assert!(missing.to_string().contains("no controller io"), "{missing}");
        assert!(
            write(&group, "memory.max", "1").is_err(),
            "a file that the kernel does not have is not made"
        );
    }
}
