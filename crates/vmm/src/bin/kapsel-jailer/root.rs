//! The jail's root directory.
//!
//! A jail of the same name may have been there before, and its monitor may have put links where directories were. So each
//! directory is opened relative to the one above it, links are not followed, and files are made anew.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, CWD, Dev, FileType, Gid, Mode, OFlags, Uid, major, makedev, minor};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

/// In the jail's directory, beside which a jailer's caller may put what is not for the monitor.
const ROOT: &str = "root";
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
const PRIVATE: Mode = Mode::RWXU;
const DEVICE: Mode = Mode::RUSR.union(Mode::WUSR);

/// Makes `<base>/<name>/<id>/root`, or what of it is not there, and opens it.
pub fn make(base: &Path, name: &str, id: &str) -> Result<OwnedFd> {
    let mut path = base.to_owned();
    let opened = rustix::fs::open(base, DIRECTORY, Mode::empty());
    let mut directory = opened.with_context(|| format!("cannot open {}", base.display()))?;
    for part in [name, id, ROOT] {
        path.push(part);
        directory = enter_directory(&directory, part).with_context(|| {
            format!("cannot make the jail's directory {}; is something else there?", path.display())
        })?;
    }
    Ok(directory)
}

fn enter_directory(parent: impl AsFd, name: &str) -> io::Result<OwnedFd> {
    match rustix::fs::mkdirat(&parent, name, PRIVATE) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(rustix::fs::openat(&parent, name, DIRECTORY, Mode::empty())?)
}

/// A new file, in place of whatever had its name.
fn create(directory: impl AsFd, name: &str, mode: Mode) -> io::Result<File> {
    remove(&directory, name)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(&directory, name, flags, mode)?.into())
}

fn remove(directory: impl AsFd, name: &str) -> io::Result<()> {
    match rustix::fs::unlinkat(&directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Copies the monitor into its root.
pub fn copy_program(root: &OwnedFd, program: &Path, name: &str) -> Result<()> {
    let copy = || {
        let mut from = File::open(program)?;
        let mode = Mode::RUSR | Mode::XUSR | Mode::RGRP | Mode::XGRP | Mode::ROTH | Mode::XOTH;
        let mut to = create(root, name, mode)?;
        io::copy(&mut from, &mut to)
    };
    copy().map(drop).with_context(|| format!("cannot copy {} into the jail", program.display()))
}

/// From now on mounts are this process's own. Before the root is opened, or it could not be mounted.
pub fn own_mounts() -> Result<()> {
    // SAFETY: mounts are of no concern to the memory and the descriptors of this process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }
        .context("cannot make a mount namespace")?;
    let propagation = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    rustix::mount::mount_change("/", propagation).context("cannot keep mounts to the jail")
}

/// Makes the directory the root of this process, which sees no other files from then on.
pub fn enter(root: &OwnedFd) -> Result<()> {
    let pivot = || {
        // A root has to be a mount. What is mounted in it is taken along.
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH
            | OpenTreeFlags::AT_RECURSIVE;
        let tree = rustix::mount::open_tree(root, "", flags)?;
        let here = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        rustix::mount::move_mount(&tree, "", root, "", here)?;
        rustix::process::fchdir(&tree)?;
        // The old root comes to lie on the new one, and goes.
        rustix::process::pivot_root(".", ".")?;
        rustix::mount::unmount(".", UnmountFlags::DETACH)?;
        rustix::process::chdir("/")
    };
    pivot().context("cannot make the jail's directory its root")
}

/// The number of the host's device for page faults, if it has one.
pub fn fault_device() -> Result<Option<Dev>> {
    const PATH: &str = "/dev/userfaultfd";
    match rustix::fs::stat(PATH) {
        Ok(found) => Ok(Some(makedev(major(found.st_rdev), minor(found.st_rdev)))),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot look at {PATH}")),
    }
}

/// Puts into the root, which was entered, what a monitor needs, and gives it to its user.
pub fn fill(root: &OwnedFd, uid: u32, gid: u32, faults: Option<Dev>) -> Result<()> {
    let (uid, gid) = (Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)));
    let directory = |parent: &OwnedFd, name: &'static str| {
        let make = || {
            let made = enter_directory(parent, name)?;
            rustix::fs::fchown(&made, uid, gid)?;
            Ok::<_, io::Error>(made)
        };
        make().with_context(|| {
            format!("cannot make the directory {name} in the jail; is something else there?")
        })
    };
    let device = |parent: &OwnedFd, name: &'static str, number: Dev| {
        let make = || {
            remove(parent, name)?;
            rustix::fs::mknodat(parent, name, FileType::CharacterDevice, DEVICE, number)?;
            Ok::<_, io::Error>(rustix::fs::chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?)
        };
        make().with_context(|| format!("cannot make the device {name} in the jail"))
    };
    directory(root, "run")?;
    let dev = directory(root, "dev")?;
    let net = directory(&dev, "net")?;
    // Numbers from Documentation/admin-guide/devices.txt; that of userfaultfd is given out as the host boots.
    device(&dev, "kvm", makedev(10, 232))?;
    device(&net, "tun", makedev(10, 200))?;
    device(&dev, "urandom", makedev(1, 9))?;
    faults.map_or(Ok(()), |number| device(&dev, "userfaultfd", number))?;
    rustix::fs::fchown(root, uid, gid).context("cannot give the jail's root to its user")
}

/// Says in the jail which process the monitor is.
pub fn write_pid(name: &str, pid: u32) -> Result<()> {
    let file = format!("{name}.pid");
    let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
    create(CWD, &file, mode)
        .and_then(|mut pids| write!(pids, "{pid}"))
        .with_context(|| format!("cannot write {file} in the jail"))
}
