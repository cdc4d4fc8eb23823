//! Files by which a container's programs find names and servers: `/etc/hosts`, `/etc/hostname`, `/etc/resolv.conf`.
//!
//! They are written below the container's root, whose links lead nowhere else, and not through links that the image has in their
//! place: a resolv.conf that is a link to a service's file would be one to nothing here.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;

use kapsel_protocol::{api, limits};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::container::root::Root;
use crate::error::{Error, Result};

/// What may be written.
const NAMES: [&str; 3] = ["hosts", "hostname", "resolv.conf"];

/// Writes files of a container whose root file system is at `rootfs`.
///
/// # Errors
/// When a file is none of [`NAMES`] or too long, or the kernel refuses.
pub fn write(rootfs: &CStr, files: &[api::NamesFile]) -> Result<()> {
    if let Some(file) = files.iter().find(|file| !NAMES.contains(&file.name.as_str())) {
        return Err(Error::Invalid(format!("{:?} is none of {}", file.name, NAMES.join(", "))));
    }
    if files.iter().any(|file| file.content.len() > limits::NAMES_FILE_MAX) {
        return Err(Error::Invalid(format!("a file is longer than {} bytes", limits::NAMES_FILE_MAX)));
    }
    let root = Root::open(rootfs).map_err(|e| failed("opening the root", e))?;
    let etc = root.directory(c"/etc").map_err(|e| failed("making /etc", e))?;
    files.iter().try_for_each(|file| {
        replace(&etc, file).map_err(|e| failed(&format!("writing /etc/{}", file.name), e))
    })
}

fn failed(what: &str, errno: Errno) -> Error {
    Error::Internal(format!("{what}: {}", io::Error::from(errno)))
}

/// Puts a file in its place, whole.
fn replace(etc: &OwnedFd, file: &api::NamesFile) -> rustix::io::Result<()> {
    let name = CString::new(file.name.as_str()).map_err(|_| Errno::INVAL)?;
    if !file.former.is_empty() && !holds(etc, &name, &file.former)? {
        return Ok(());
    }
    let new = CString::new(format!(".kapsel-{}", file.name)).map_err(|_| Errno::INVAL)?;
    match rustix::fs::unlinkat(etc, &new, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(error) => return Err(error),
    }
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = rustix::fs::openat(etc, &new, flags, Mode::empty())?;
    let mut rest = file.content.as_slice();
    while !rest.is_empty() {
        rest = &rest[rustix::io::write(&fd, rest)?..];
    }
    // Whatever mask this process has.
    rustix::fs::fchmod(&fd, Mode::from_raw_mode(0o644))?;
    rustix::fs::renameat(etc, &new, etc, &name)
}

/// Whether there is a regular file with exactly this content.
fn holds(etc: &OwnedFd, name: &CStr, content: &[u8]) -> rustix::io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fd = match rustix::fs::openat(etc, name, flags, Mode::empty()) {
        Ok(fd) => fd,
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(false),
        Err(error) => return Err(error),
    };
    let stat = rustix::fs::fstat(&fd)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode) != rustix::fs::FileType::RegularFile
        || usize::try_from(stat.st_size) != Ok(content.len())
    {
        return Ok(false);
    }
    let mut found = vec![0; content.len() + 1];
    let mut length = 0;
    while length < found.len() {
        match rustix::io::read(&fd, &mut found[length..])? {
            0 => break,
            n => length += n,
        }
    }
    Ok(&found[..length] == content)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn file(name: &str, content: &str, former: &str) -> api::NamesFile {
        let (content, former) = (content.into(), former.into());
        api::NamesFile { name: name.into(), content, former, ..Default::default() }
    }

    fn wrote(root: &Path, file: api::NamesFile) -> Result<()> {
        write(&CString::new(root.to_str().expect("UTF-8")).expect("no NUL"), &[file])
    }

    #[test]
    fn what_is_there_is_replaced_and_links_are_not_followed() {
        let dir = tempfile::tempdir().expect("a directory");
        let (root, outside) = (dir.path().join("root"), dir.path().join("outside"));
        fs::create_dir_all(root.join("etc")).expect("made");
        fs::write(&outside, "untouched").expect("written");
        for link in ["resolv.conf", ".kapsel-resolv.conf"] {
            std::os::unix::fs::symlink(&outside, root.join("etc").join(link)).expect("linked");
        }
        wrote(&root, file("resolv.conf", "nameserver 192.0.2.1\n", "")).expect("written");
        assert_eq!(fs::read_to_string(&outside).expect("read"), "untouched");
        let now = root.join("etc/resolv.conf");
        assert_eq!(fs::read_to_string(&now).expect("read"), "nameserver 192.0.2.1\n");
        assert!(fs::symlink_metadata(&now).expect("there").is_file());
        assert_eq!(fs::read_dir(root.join("etc")).expect("read").count(), 1, "nothing else is left");

        // Where the image has no /etc, or one that would lead out.
        fs::remove_dir_all(root.join("etc")).expect("removed");
        std::os::unix::fs::symlink("/elsewhere", root.join("etc")).expect("linked");
        wrote(&root, file("hosts", "x", "")).expect("written");
        assert_eq!(fs::read_to_string(root.join("elsewhere/hosts")).expect("read"), "x");
    }

    #[test]
    fn what_the_container_has_changed_stays() {
        let dir = tempfile::tempdir().expect("a directory");
        wrote(dir.path(), file("hosts", "first", "")).expect("written");
        wrote(dir.path(), file("hosts", "second", "first")).expect("written");
        let hosts = dir.path().join("etc/hosts");
        assert_eq!(fs::read_to_string(&hosts).expect("read"), "second");
        fs::write(&hosts, "third!").expect("written");
        wrote(dir.path(), file("hosts", "fourth", "second")).expect("nothing to do");
        assert_eq!(fs::read_to_string(&hosts).expect("read"), "third!");
        fs::remove_file(&hosts).expect("removed");
        wrote(dir.path(), file("hosts", "fifth", "second")).expect("nothing to do");
        assert!(!hosts.exists());
    }

    #[test]
    fn nothing_else_is_written() {
        let dir = tempfile::tempdir().expect("a directory");
        for name in ["passwd", "../hosts", "", "hosts/x"] {
            assert!(matches!(wrote(dir.path(), file(name, "x", "")), Err(Error::Invalid(_))), "{name}");
        }
        let long = "x".repeat(limits::NAMES_FILE_MAX + 1);
        assert!(matches!(wrote(dir.path(), file("hosts", &long, "")), Err(Error::Invalid(_))));
    }
}
