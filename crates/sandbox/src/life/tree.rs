//! What a pod's containers share with the host: one directory, served by one file server for all of the pod's life.
//!
//! The root file system and the volumes of each container are mounted in it, at *places* that are numbered and never used again, when the
//! container is made, and unmounted when it is deleted. The directory is a shared mount, and the server's view of it a slave: mounts
//! reach the server though it can mount nothing itself. The directory itself is a small tmpfs that the server cannot write to, so no
//! guest can put anything in the way of the next mount.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use kapsel_jail::submounts;
use rustix::{
    fs::{CWD, Mode, OFlags, ResolveFlags},
    mount::{MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags},
};

use super::{
    Error,
    guest_spec::{Place, Places},
};

/// A mount point is a page at most.
const SIZE: &std::ffi::CStr = c"size=8m,nr_inodes=2k,mode=0755";

/// The directory of one pod. Its mounts end with all others below the sandbox's bundle.
#[derive(Debug)]
pub struct Tree {
    dir: PathBuf,
    /// What is in it.
    pub places: Places,
}

impl Tree {
    /// Makes an empty one.
    ///
    /// # Errors
    /// When we may not mount.
    pub fn make(dir: PathBuf) -> Result<Self, Error> {
        let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let made = crate::paths::private_dir(&dir).map_err(io::Error::other).and_then(|()| {
            rustix::mount::mount(c"kapsel-pod", &dir, c"tmpfs", safe, SIZE)?;
            Ok(rustix::mount::mount_change(&dir, MountPropagationFlags::SHARED)?)
        });
        made.map_err(|e| {
            Error::Resources(format!("cannot mount a directory for the pod at {}: {e}", dir.display()))
        })?;
        Ok(Self { places: Places::new(dir.clone()), dir })
    }

    /// Mounts what is planned and not there yet.
    ///
    /// # Errors
    /// With the first that cannot be.
    pub fn fill(&mut self) -> Result<(), Error> {
        let dir = &self.dir;
        self.places.each_new(|place| {
            mount(dir, place)
                .map_err(|e| Error::Invalid(format!("cannot give the pod {}: {e}", place.source.display())))
        })
    }

    /// Takes away what was this container's alone.
    pub fn release(&mut self, numbers: &[u32]) {
        for place in self.places.release(numbers) {
            let at = at(&self.dir, &place);
            if place.there
                && let Err(error) = rustix::mount::unmount(&at, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
            {
                tracing::warn!(%error, at = %at.display(), "cannot unmount; it ends with the pod");
                continue;
            }
            let _ = if place.file { fs::remove_file(&at) } else { fs::remove_dir(&at) };
        }
    }
}

fn at(dir: &Path, place: &Place) -> PathBuf {
    dir.join(place.number.to_string())
}

fn mount(dir: &Path, place: &Place) -> io::Result<()> {
    let source = open(&place.source)?;
    let is_dir = fs::metadata(format!("/proc/self/fd/{}", source.as_raw_fd()))?.is_dir();
    if is_dir == place.file {
        return Err(io::Error::other("it has become something else meanwhile"));
    }
    if is_dir {
        refuse_interfaces(&place.source)?;
    }
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE
        | OpenTreeFlags::AT_EMPTY_PATH;
    let tree = rustix::mount::open_tree(&source, c"", flags)?;
    restrict(&tree, place.read_only)?;
    let at = at(dir, place);
    // Nobody else writes here: what is there already is a mistake, and not to be mounted on.
    match place.file {
        true => drop(fs::File::create_new(&at)?),
        false => fs::create_dir(&at)?,
    }
    Ok(rustix::mount::move_mount(&tree, c"", CWD, &at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

/// The very object that was checked: its path has no symbolic links, and if somebody has put one there since, this fails.
fn open(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?)
}

/// The kernel's own file systems (/proc, /sys, …) would give a guest the host.
fn refuse_interfaces(source: &Path) -> io::Result<()> {
    let found = submounts::beneath_now(source)?;
    let shown = match (found.interface, found.hidden.first()) {
        (Some(kind), _) => format!("it is in a {kind} file system"),
        (None, Some(hidden)) => format!("it holds {}", hidden.display()),
        (None, None) => return Ok(()),
    };
    Err(io::Error::other(format!(
        "{shown}, an interface of the host's kernel, which no guest may have; mount the directories in it that are needed"
    )))
}

/// Before it is seen anywhere. What the host mounts beneath the source later does not appear.
fn restrict(tree: &OwnedFd, read_only: bool) -> io::Result<()> {
    let safe = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let attr = libc::mount_attr {
        attr_set: safe | if read_only { libc::MOUNT_ATTR_RDONLY } else { 0 },
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the empty path and `attr`, whose size is given, outlive the call; the kernel only reads them.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attr,
            size_of_val(&attr),
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where there may be mounts.
    fn tree() -> Option<(tempfile::TempDir, Tree)> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let tree = Tree::make(dir.path().join("pod")).unwrap();
        Some((dir, tree))
    }

    fn mounts_below(dir: &Path) -> usize {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.lines().filter(|line| line.contains(dir.to_str().unwrap())).count()
    }

    #[test]
    fn places_come_and_go_with_their_users() {
        let Some((dir, mut tree)) = tree() else { return };
        let source = dir.path().join("volume");
        fs::create_dir(&source).unwrap();
        fs::write(source.join("f"), "x").unwrap();
        let volume = tree.places.take(&source, false, false);
        let file = tree.places.take(&source.join("f"), true, true);
        tree.fill().unwrap();
        let at = |n: u32| dir.path().join("pod").join(n.to_string());
        fs::write(at(volume).join("g"), "y").unwrap();
        assert_eq!(fs::read_to_string(at(file)).unwrap(), "x");
        assert!(fs::write(at(file), "z").is_err(), "read-only");
        // Who may only read has what another may write, so that both see the same.
        assert_eq!(tree.places.take(&source, true, false), volume);
        tree.release(&[volume]);
        assert!(at(volume).join("g").exists(), "the other uses it");
        tree.release(&[volume, file]);
        assert!(!at(volume).exists() && !at(file).exists());
        assert_ne!(tree.places.take(&source, false, false), volume, "numbers are not used again");
        assert_eq!(mounts_below(dir.path()), 1);
        rustix::mount::unmount(dir.path().join("pod"), UnmountFlags::DETACH).unwrap();
    }

    #[test]
    fn no_interface_of_the_kernel_and_no_link_gets_in() {
        let Some((dir, mut tree)) = tree() else { return };
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("/etc", &link).unwrap();
        for (source, words) in [(Path::new("/proc/sys"), "proc"), (Path::new("/"), "interface"), (&link, "")]
        {
            let number = tree.places.take(source, false, false);
            let error = tree.fill().unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
            tree.release(&[number]);
        }
        assert_eq!(mounts_below(dir.path()), 1);
        rustix::mount::unmount(dir.path().join("pod"), UnmountFlags::DETACH).unwrap();
    }
}
