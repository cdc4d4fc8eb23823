//! Paths inside a root file system that may be hostile.
//!
//! Before a container's root becomes this process's own, every path in it is resolved by the kernel with the root file system
//! as its root (openat2(2), RESOLVE_IN_ROOT), so that no symbolic link and no `..` leads out of it, and not through magic
//! links. What was resolved is used by its descriptor, never by its name again.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::{Errno, Result};

/// Symbolic links that making a path may pass through, beyond those that exist completely.
const DEPTH_MAX: usize = 16;

/// The root directory of a container.
#[derive(Debug)]
pub struct Root(OwnedFd);

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Root {
    /// Opens the directory that is the root.
    ///
    /// # Errors
    /// Those of open(2).
    pub fn open(path: &CStr) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// Opens a path inside.
    ///
    /// # Errors
    /// Those of openat2(2).
    pub fn get(&self, path: &CStr, flags: OFlags) -> Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut attempts = 0;
        loop {
            match rustix::fs::openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                // Somebody renames directories while the kernel walks them.
                Err(Errno::AGAIN) if attempts < 32 => attempts += 1,
                result => return result,
            }
        }
    }

    /// Opens a directory inside (as O_PATH), and makes what is missing of it, mode 0755.
    ///
    /// # Errors
    /// Those of openat2(2) and mkdirat(2); `ELOOP` for links that go round.
    pub fn directory(&self, path: &CStr) -> Result<OwnedFd> {
        match self.get(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(Errno::NOENT) => {
                let made = self.make_directories(path.to_bytes(), 0)?;
                self.get(&made, OFlags::PATH | OFlags::DIRECTORY)
            }
            result => result,
        }
    }

    /// Opens a file inside (as O_PATH) on which another can be mounted, and makes it and the directories above when missing.
    ///
    /// # Errors
    /// As [`Self::directory`].
    pub fn file(&self, path: &CStr) -> Result<OwnedFd> {
        match self.get(path, OFlags::PATH) {
            Err(Errno::NOENT) => {}
            result => return result,
        }
        let (parent, name) = split(path.to_bytes());
        let parent = self.directory(&CString::new(parent).map_err(|_| Errno::INVAL)?)?;
        let name = CString::new(name).map_err(|_| Errno::INVAL)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&parent, &name, flags, Mode::from_raw_mode(0o644)) {
            // A dangling symbolic link; what it points to is not made for a file.
            Err(Errno::EXIST) => Err(Errno::LOOP),
            Err(error) => Err(error),
            Ok(_) => rustix::fs::openat(
                &parent,
                &name,
                OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            ),
        }
    }

    /// Opens the directory that holds `path` and tells the last component.
    ///
    /// # Errors
    /// As [`Self::directory`].
    pub fn parent(&self, path: &CStr) -> Result<(OwnedFd, CString)> {
        let (parent, name) = split(path.to_bytes());
        if name.is_empty() || name == b"." || name == b".." {
            return Err(Errno::INVAL);
        }
        let parent = CString::new(parent).map_err(|_| Errno::INVAL)?;
        Ok((self.directory(&parent)?, CString::new(name).map_err(|_| Errno::INVAL)?))
    }

    /// Makes each missing component and returns the path with the dangling links replaced by what they point to.
    fn make_directories(&self, path: &[u8], depth: usize) -> Result<CString> {
        if depth > DEPTH_MAX {
            return Err(Errno::LOOP);
        }
        let mut done = b"/".to_vec();
        for component in path.split(|&b| b == b'/').filter(|c| !c.is_empty() && *c != b".") {
            let parent = CString::new(done.clone()).map_err(|_| Errno::INVAL)?;
            let parent = self.get(&parent, OFlags::PATH | OFlags::DIRECTORY)?;
            let name = CString::new(component).map_err(|_| Errno::INVAL)?;
            let mut next = done.clone();
            next.push(b'/');
            next.extend(component);
            let whole = CString::new(next.clone()).map_err(|_| Errno::INVAL)?;
            done = match self.get(&whole, OFlags::PATH | OFlags::DIRECTORY) {
                Ok(_) => next,
                Err(Errno::NOENT) => match rustix::fs::mkdirat(&parent, &name, Mode::from_raw_mode(0o755)) {
                    Ok(()) => next,
                    Err(Errno::EXIST) => {
                        let target = rustix::fs::readlinkat(&parent, &name, Vec::new())?.into_bytes();
                        let target = match target.first() {
                            Some(b'/') => target,
                            _ => [done.as_slice(), b"/", &target].concat(),
                        };
                        self.make_directories(&target, depth + 1)?.into_bytes()
                    }
                    Err(error) => return Err(error),
                },
                Err(error) => return Err(error),
            };
        }
        CString::new(done).map_err(|_| Errno::INVAL)
    }
}

/// Everything before the last component, and that.
fn split(path: &[u8]) -> (&[u8], &[u8]) {
    let end = path.iter().rposition(|&b| b != b'/').map_or(0, |last| last + 1);
    let path = &path[..end];
    match path.iter().rposition(|&b| b == b'/') {
        Some(slash) => (&path[..slash.max(1)], &path[slash + 1..]),
        None => (b"/", path),
    }
}

/// Whether a descriptor is of a directory.
///
/// # Errors
/// Those of fstat(2).
pub fn is_directory(fd: impl AsFd) -> Result<bool> {
    let stat = rustix::fs::statat(fd, c"", AtFlags::EMPTY_PATH)?;
    Ok(rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::Directory)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn nothing_leads_out() {
        let dir = tempfile::tempdir().expect("tempdir");
        let root_path = dir.path().join("root");
        std::fs::create_dir_all(root_path.join("etc")).expect("mkdir");
        symlink("/outside/deep", root_path.join("absolute")).expect("symlink");
        symlink("../../../up", root_path.join("relative")).expect("symlink");
        symlink("b", root_path.join("a")).expect("symlink");
        symlink("a", root_path.join("b")).expect("symlink");
        symlink("missing-file", root_path.join("dangling")).expect("symlink");
        let root =
            Root::open(&CString::new(root_path.to_str().expect("utf-8")).expect("no NUL")).expect("open");

        root.directory(c"/absolute/x").expect("made inside");
        assert!(root_path.join("outside/deep/x").is_dir());
        root.directory(c"relative/y").expect("made inside");
        assert!(root_path.join("up/y").is_dir());
        assert!(!dir.path().join("up").exists());
        root.directory(c"/../../etc/new").expect("made inside");
        assert!(root_path.join("etc/new").is_dir());
        assert_eq!(root.directory(c"/a/x").expect_err("a loop"), Errno::LOOP);

        root.file(c"/etc/new/file").expect("made");
        assert!(root_path.join("etc/new/file").is_file());
        assert_eq!(root.file(c"/dangling").expect_err("not made"), Errno::LOOP);
        assert!(!root_path.join("missing-file").exists());
        assert_eq!(root.parent(c"/..").expect_err("no name"), Errno::INVAL);
    }

    #[test]
    fn paths_are_split_at_the_last_component() {
        for (path, parent, name) in
            [("/a/b", "/a", "b"), ("/a", "/", "a"), ("a", "/", "a"), ("/a/b//", "/a", "b"), ("/", "/", "")]
        {
            assert_eq!(split(path.as_bytes()), (parent.as_bytes(), name.as_bytes()), "{path}");
        }
    }
}
