//! `/dev` of a container: the nodes and links that every one has, and those of its specification.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid, makedev};
use rustix::io::Errno;

use super::mounts;
use super::plan::DevicePlan;
use super::report::{ChildError, During, Step};
use super::root::Root;

const DEFAULT: [(&CStr, u32, u32); 6] = [
    (c"null", 1, 3),
    (c"zero", 1, 5),
    (c"full", 1, 7),
    (c"random", 1, 8),
    (c"urandom", 1, 9),
    (c"tty", 5, 0),
];

const LINKS: [(&CStr, &CStr); 6] = [
    (c"fd", c"/proc/self/fd"),
    (c"stdin", c"/proc/self/fd/0"),
    (c"stdout", c"/proc/self/fd/1"),
    (c"stderr", c"/proc/self/fd/2"),
    (c"core", c"/proc/kcore"),
    (c"ptmx", c"pts/ptmx"),
];

/// Makes the default nodes and links in `/dev`.
///
/// # Errors
/// Those of mknodat(2) and symlinkat(2), with the name.
pub fn fill(root: &Root) -> Result<(), ChildError> {
    let dev = root.directory(c"/dev").during(Step::Devices, || "opening /dev".into())?;
    for (name, major, minor) in DEFAULT {
        node(&dev, name, libc::S_IFCHR | 0o666, makedev(major, minor))
            .during(Step::Devices, || format!("making /dev/{}", name.to_string_lossy()))?;
    }
    for (name, target) in LINKS {
        let made = match rustix::fs::symlinkat(target, &dev, name) {
            // The image or a mount has its own idea of it, as Docker too leaves it, except for the way to new terminals.
            Err(Errno::EXIST) if name != c"ptmx" => Ok(()),
            Err(Errno::EXIST) => rustix::fs::unlinkat(&dev, name, AtFlags::empty())
                .and_then(|()| rustix::fs::symlinkat(target, &dev, name)),
            result => result,
        };
        made.during(Step::Devices, || format!("linking /dev/{}", name.to_string_lossy()))?;
    }
    Ok(())
}

/// Makes the nodes of the specification.
///
/// # Errors
/// Those of mknodat(2) and chown(2), with the path.
pub fn make(devices: &[DevicePlan], root: &Root) -> Result<(), ChildError> {
    for device in devices {
        let context = || format!("making device {}", device.path.to_string_lossy());
        let (parent, name) = root.parent(&device.path).during(Step::Devices, context)?;
        node(&parent, &name, device.mode, device.device).during(Step::Devices, context)?;
        let owner = (Some(Uid::from_raw(device.uid)), Some(Gid::from_raw(device.gid)));
        if device.uid != 0 || device.gid != 0 {
            rustix::fs::chownat(&parent, &name, owner.0, owner.1, AtFlags::SYMLINK_NOFOLLOW)
                .during(Step::Devices, context)?;
        }
    }
    Ok(())
}

/// One node. What is there already under its name is replaced unless it is the same device.
fn node(dir: &OwnedFd, name: &CStr, mode: u32, device: u64) -> rustix::io::Result<()> {
    let kind = FileType::from_raw_mode(mode);
    let make = || rustix::fs::mknodat(dir, name, kind, Mode::from_raw_mode(mode & 0o7777), device);
    match make() {
        Err(Errno::EXIST) => {
            let stat = rustix::fs::statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)?;
            if FileType::from_raw_mode(stat.st_mode) == kind && stat.st_rdev == device {
                return Ok(());
            }
            rustix::fs::unlinkat(dir, name, AtFlags::empty())?;
            make()
        }
        // In a user namespace nobody makes device nodes; the guest's own one is bound instead.
        Err(Errno::PERM) => bind(dir, name),
        result => result,
    }
}

fn bind(dir: &OwnedFd, name: &CStr) -> rustix::io::Result<()> {
    let source = [b"/dev/", name.to_bytes()].concat();
    let tree = mounts::clone_tree(CWD, &CString::new(source).map_err(|_| Errno::INVAL)?, false)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(dir, name, flags, Mode::from_raw_mode(0o666))?;
    mounts::move_onto(tree.as_fd(), file.as_fd())
}
