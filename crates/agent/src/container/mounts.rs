//! Mounts of a container: made detached, configured, and only then attached, to a target that is held by its descriptor.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::CWD;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags};

use crate::sys::{self, MountAttr};

use super::copy_up;
use super::options::Options;
use super::plan::{MountPlan, MountSource};
use super::report::{ChildError, During, Step};
use super::root::{self, Root};

/// File systems without a device, whose superblock need not be read-only for a read-only mount.
const VIRTUAL: [&[u8]; 9] =
    [b"proc", b"sysfs", b"tmpfs", b"mqueue", b"devpts", b"cgroup2", b"ramfs", b"devtmpfs", b"bpf"];

/// The kernel takes no longer value for one parameter by fsconfig(2).
const PARAMETER_MAX: usize = 255;

/// Where the container's cgroup is, and whether it has a cgroup namespace of its own.
#[derive(Clone, Copy, Debug)]
pub struct CgroupView<'a> {
    /// Path in the guest.
    pub path: &'a CStr,
    /// The file system then begins at the container's cgroup by itself.
    pub own_namespace: bool,
}

/// Makes one of the container's mounts.
///
/// # Errors
/// Those of the mount system calls, with the destination.
pub fn mount(mount: &MountPlan, root: &Root, cgroup: CgroupView<'_>) -> Result<(), ChildError> {
    let context = || describe(mount);
    let tree = match &mount.source {
        MountSource::Bind(path) => clone_tree(CWD, path, mount.options.bind == Some(true)),
        MountSource::New(kind, source) => return new_on(mount, kind, source, root),
        MountSource::Cgroup if cgroup.own_namespace => return new_on(mount, c"cgroup2", c"cgroup", root),
        MountSource::Cgroup => clone_tree(CWD, cgroup.path, true),
    }
    .during(Step::Mounts, context)?;
    set(tree.as_fd(), false, &mount.options.mount).during(Step::Mounts, context)?;
    attach(&tree, mount, root).during(Step::Mounts, context)
}

fn new_on(mount: &MountPlan, kind: &CStr, source: &CStr, root: &Root) -> Result<(), ChildError> {
    let context = || describe(mount);
    let made = match mount.options.copy_up {
        true => new_with_content(mount, kind, source, root),
        false => new(kind, source, &mount.options),
    };
    let tree = made.during(Step::Mounts, context)?;
    attach(&tree, mount, root).during(Step::Mounts, context)
}

/// A new file system with what is in the directory that it will hide.
fn new_with_content(mount: &MountPlan, kind: &CStr, source: &CStr, root: &Root) -> std::io::Result<OwnedFd> {
    let tree = new(kind, source, &mount.options.writable())?;
    copy_up::copy(root.directory(&mount.destination)?, &tree)?;
    set(tree.as_fd(), false, &mount.options.mount)?;
    Ok(tree)
}

fn describe(mount: &MountPlan) -> String {
    let what = match &mount.source {
        MountSource::Bind(path) => path.to_string_lossy(),
        MountSource::New(kind, _) => kind.to_string_lossy(),
        MountSource::Cgroup => "cgroup".into(),
    };
    format!("mounting {what} on {}", mount.destination.to_string_lossy())
}

/// A detached copy of what is mounted at `path`.
///
/// # Errors
/// Those of open_tree(2).
pub fn clone_tree(dir: impl AsFd, path: &CStr, recursive: bool) -> rustix::io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    if path.is_empty() {
        flags |= OpenTreeFlags::AT_EMPTY_PATH;
    }
    rustix::mount::open_tree(dir, path, flags)
}

/// A detached mount of a new file system.
///
/// # Errors
/// Those of fsopen(2), fsconfig(2) and fsmount(2).
pub fn new(kind: &CStr, source: &CStr, options: &Options) -> std::io::Result<OwnedFd> {
    let fs = rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&fs, c"source", source)?;
    for (flag, name) in [
        (libc::MS_SYNCHRONOUS, c"sync"),
        (libc::MS_DIRSYNC, c"dirsync"),
        (libc::MS_LAZYTIME, c"lazytime"),
        (libc::MS_MANDLOCK, c"mand"),
    ] {
        if options.superblock & flag != 0 {
            rustix::mount::fsconfig_set_flag(&fs, name)?;
        }
    }
    let attributes = options.attributes();
    if attributes.contains(MountAttrFlags::MOUNT_ATTR_RDONLY) && !VIRTUAL.contains(&kind.to_bytes()) {
        rustix::mount::fsconfig_set_flag(&fs, c"ro")?;
    }
    for option in &options.data {
        match option.split_once('=') {
            Some((_, value)) if value.len() > PARAMETER_MAX => {
                return Err(std::io::Error::from(rustix::io::Errno::NAMETOOLONG));
            }
            Some((key, value)) => rustix::mount::fsconfig_set_string(&fs, key, value)?,
            None => rustix::mount::fsconfig_set_flag(&fs, option.as_str())?,
        }
    }
    rustix::mount::fsconfig_create(&fs)?;
    Ok(rustix::mount::fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?)
}

/// Attaches a detached mount to its destination, which is made when missing, and gives it its final attributes.
fn attach(tree: &OwnedFd, mount: &MountPlan, root: &Root) -> std::io::Result<()> {
    let target = match root::is_directory(tree)? {
        true => root.directory(&mount.destination)?,
        false => root.file(&mount.destination)?,
    };
    move_onto(tree, &target)?;
    set_all(tree, &mount.options)
}

/// Gives an attached mount the attributes that are for all below it, and its propagation.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn set_all(tree: &OwnedFd, options: &Options) -> std::io::Result<()> {
    // Recursive attributes after the mount's own, as they win.
    set(tree.as_fd(), true, &options.recursive)?;
    for &(propagation, recursive) in &options.propagation {
        set(tree.as_fd(), recursive, &MountAttr { propagation, ..MountAttr::default() })?;
    }
    Ok(())
}

/// Opens a directory as a place to mount on.
///
/// # Errors
/// Those of open(2).
pub fn directory(dir: impl AsFd, path: &std::path::Path) -> rustix::io::Result<OwnedFd> {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::openat(dir, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Attaches a detached mount to a file or directory held by its descriptor.
///
/// # Errors
/// Those of move_mount(2).
pub fn move_onto(tree: impl AsFd, target: impl AsFd) -> rustix::io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    rustix::mount::move_mount(tree, c"", target, c"", flags)
}

/// mount_setattr(2), when there is something to change.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn set(tree: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> std::io::Result<()> {
    if attr.is_empty() { Ok(()) } else { sys::mount_setattr(tree, recursive, attr) }
}

/// Read-only, as an attribute to set.
pub fn read_only() -> MountAttr {
    MountAttr { set: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), ..MountAttr::default() }
}

/// Hides and write-protects paths of the root that is now this process's own. Those that do not exist need not be.
///
/// `null` is a detached mount of the guest's `/dev/null`: what the container has under that name may be anything.
///
/// # Errors
/// Those of the mount system calls, with the path.
pub fn protect(masked: &[CString], readonly: &[CString], null: OwnedFd) -> Result<(), ChildError> {
    for path in readonly {
        let context = || format!("making {} read-only", path.to_string_lossy());
        let Some(target) = existing(path).during(Step::Mask, context)? else { continue };
        let tree = clone_tree(&target, c"", true).during(Step::Mask, context)?;
        set(tree.as_fd(), true, &read_only()).during(Step::Mask, context)?;
        move_onto(&tree, &target).during(Step::Mask, context)?;
    }
    let (mut file, mut directory) = (Cover::Detached(null), Cover::None);
    for path in masked {
        let context = || format!("masking {}", path.to_string_lossy());
        let Some(target) = existing(path).during(Step::Mask, context)? else { continue };
        let cover = match root::is_directory(&target).during(Step::Mask, context)? {
            true => &mut directory,
            false => &mut file,
        };
        cover.put_on(&target).during(Step::Mask, context)?;
    }
    Ok(())
}

/// A mount that hides others. The first place gets it itself and the next ones copies, as only an attached mount can be copied.
enum Cover {
    None,
    Detached(OwnedFd),
    Attached(OwnedFd),
}

impl Cover {
    fn put_on(&mut self, target: &OwnedFd) -> std::io::Result<()> {
        *self = match std::mem::replace(self, Self::None) {
            Self::Attached(tree) => {
                move_onto(clone_tree(&tree, c"", false)?, target)?;
                Self::Attached(tree)
            }
            Self::Detached(tree) => {
                move_onto(&tree, target)?;
                Self::Attached(tree)
            }
            Self::None => {
                let tree = empty_directory()?;
                move_onto(&tree, target)?;
                Self::Attached(tree)
            }
        };
        Ok(())
    }
}

fn existing(path: &CStr) -> rustix::io::Result<Option<OwnedFd>> {
    use rustix::fs::{Mode, OFlags};
    match rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A read-only, empty tmpfs, detached.
fn empty_directory() -> std::io::Result<OwnedFd> {
    let options = Options {
        mount: read_only(),
        data: vec!["nr_blocks=1".into(), "nr_inodes=1".into()],
        ..Options::default()
    };
    new(c"tmpfs", c"tmpfs", &options)
}
