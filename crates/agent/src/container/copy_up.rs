//! What a directory of the image holds, copied into the tmpfs that is mounted over it (`tmpcopyup`, as runc and Podman have it).
//!
//! The tree is the image's, which may be hostile: nothing is followed, everything is used by its descriptor, and the tmpfs's size is
//! the bound of what is copied.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Gid, Mode, OFlags, Stat, Uid};
use rustix::io::Errno;

/// Directories within each other; two descriptors are open for each.
const DEPTH_MAX: usize = 100;

/// Copies what is in the directory `from`, with owners, modes and links, into the directory `to`. Sockets are left out: nobody would
/// be behind them.
///
/// # Errors
/// Those of the file system calls: `ENOSPC` when the tmpfs is too small, `ELOOP` when directories are too deep.
pub fn copy(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    Ok(directory(&open(from, c".")?, &open(to, c".")?, 0)?)
}

/// To be read, not only to be named.
fn open(at: impl AsFd, name: &CStr) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

fn directory(from: &OwnedFd, to: &OwnedFd, depth: usize) -> rustix::io::Result<()> {
    if depth == DEPTH_MAX {
        return Err(Errno::LOOP);
    }
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name != c"." && name != c".." {
            one(from, to, name, depth)?;
        }
    }
    Ok(())
}

fn one(from: &OwnedFd, to: &OwnedFd, name: &CStr, depth: usize) -> rustix::io::Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let mode = Mode::from_raw_mode(stat.st_mode & 0o7777);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, Mode::RWXU)?;
            directory(&open(from, name)?, &open(to, name)?, depth + 1)?;
        }
        FileType::RegularFile => content(from, to, name)?,
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(target, to, name)?;
        }
        FileType::Socket => return Ok(()),
        kind => rustix::fs::mknodat(to, name, kind, mode, stat.st_rdev)?,
    }
    own(to, name, &stat)?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Symlink => Ok(()),
        // After the owner: a change of that takes set-user-ID away. What is named here was made here, and is no link.
        _ => rustix::fs::chmodat(to, name, mode, AtFlags::empty()),
    }
}

fn own(to: &OwnedFd, name: &CStr, stat: &Stat) -> rustix::io::Result<()> {
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    rustix::fs::chownat(to, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
}

fn content(from: &OwnedFd, to: &OwnedFd, name: &CStr) -> rustix::io::Result<()> {
    // Should it have become a FIFO meanwhile, this does not wait.
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let mut old = File::from(rustix::fs::openat(from, name, flags, Mode::empty())?);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut new = File::from(rustix::fs::openat(to, name, flags, Mode::RUSR | Mode::WUSR)?);
    io::copy(&mut old, &mut new).map(drop).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_tree_is_copied_as_it_is() {
        let (from, to) =
            (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        fs::create_dir_all(from.path().join("a/b")).expect("made");
        fs::write(from.path().join("a/b/file"), "x".repeat(100_000)).expect("written");
        fs::set_permissions(from.path().join("a/b/file"), fs::Permissions::from_mode(0o4755)).expect("set");
        fs::set_permissions(from.path().join("a"), fs::Permissions::from_mode(0o550)).expect("set");
        symlink("/etc/passwd", from.path().join("a/link")).expect("linked");
        let _socket = std::os::unix::net::UnixListener::bind(from.path().join("socket")).expect("bound");
        copy(File::open(from.path()).expect("open"), File::open(to.path()).expect("open")).expect("copied");
        let mode = |path: &str| to.path().join(path).symlink_metadata().expect("there").mode() & 0o7777;
        assert_eq!((mode("a"), mode("a/b/file")), (0o550, 0o4755));
        assert_eq!(fs::read(to.path().join("a/b/file")).expect("read").len(), 100_000);
        assert_eq!(fs::read_link(to.path().join("a/link")).expect("a link").to_str(), Some("/etc/passwd"));
        assert!(!to.path().join("socket").exists());
        fs::set_permissions(from.path().join("a"), fs::Permissions::from_mode(0o750)).expect("set");
        fs::set_permissions(to.path().join("a"), fs::Permissions::from_mode(0o750)).expect("set");
    }

    #[test]
    fn depth_is_bounded() {
        let (from, to) =
            (tempfile::tempdir().expect("a directory"), tempfile::tempdir().expect("a directory"));
        fs::create_dir_all(from.path().join(["d"; DEPTH_MAX + 1].join("/"))).expect("made");
        let copied = copy(File::open(from.path()).expect("open"), File::open(to.path()).expect("open"));
        assert_eq!(copied.expect_err("too deep").raw_os_error(), Some(libc::ELOOP));
    }
}
