//! Landlock: the file tree's permissions a second time, enforced at another place in the kernel.
//!
//! The mounts already say what can be written and executed. Landlock says it again without trusting the mount table, and adds what mounts
//! cannot: no TCP (or only towards others, where a jail says so), no abstract Unix socket and no signal to a process outside. Kernels without it (or with an
//! older one) get the part that they know.

use std::os::fd::{FromRawFd, OwnedFd};

use landlock::{ABI, Access as _, AccessFs, BitFlags};

use crate::jail::Access;
use crate::sys;

/// The newest version of the interface that this module asks for.
const NEWEST: i32 = 6;

/// `struct landlock_ruleset_attr`, as of version 6.
#[repr(C)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `struct landlock_path_beneath_attr`.
#[repr(C, packed)]
pub(crate) struct PathBeneath {
    pub allowed_access: u64,
    pub parent_fd: i32,
}

const CREATE_VERSION: usize = 1;
const NET_BIND_TCP: u64 = 1;
const NET_CONNECT_TCP: u64 = 2;
const SCOPE_ABSTRACT_UNIX_SOCKET: u64 = 1;
const SCOPE_SIGNAL: u64 = 2;

/// A ruleset without rules: it denies all that it handles.
#[derive(Debug)]
pub(crate) struct Ruleset {
    pub fd: OwnedFd,
    abi: ABI,
}

/// The version of Landlock that jails use on this kernel; 0 where it is absent or not enabled.
#[must_use]
pub fn landlock_version() -> u32 {
    version().unwrap_or(0).unsigned_abs()
}

fn version() -> Option<i32> {
    // SAFETY: with this flag and no attributes the call only returns the version.
    let version = unsafe { sys::call(libc::SYS_landlock_create_ruleset, [0, 0, CREATE_VERSION, 0, 0, 0]) };
    Some(i32::try_from(version.ok()?).ok()?.min(NEWEST))
}

impl Ruleset {
    /// An empty ruleset that handles all that this kernel's Landlock can, but for connecting by TCP where that is `connect`; `None` where
    /// there is none.
    pub fn new(connect: bool) -> Option<Ruleset> {
        let version = version()?;
        let abi = ABI::from(version);
        let attr = RulesetAttr {
            handled_access_fs: AccessFs::from_all(abi).bits(),
            handled_access_net: match version {
                ..4 => 0,
                _ if connect => NET_BIND_TCP,
                _ => NET_BIND_TCP | NET_CONNECT_TCP,
            },
            scoped: if version >= 6 { SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL } else { 0 },
        };
        // Older kernels know a shorter structure, and accept a longer one only while the rest is zero, which it is.
        let args = [&raw const attr as usize, size_of::<RulesetAttr>(), 0, 0, 0, 0];
        // SAFETY: `attr` is a valid attribute structure of that size.
        let fd = unsafe { sys::call(libc::SYS_landlock_create_ruleset, args) }.ok()?;
        // SAFETY: the call returned a new descriptor that nobody else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(i32::try_from(fd).ok()?) };
        Some(Ruleset { fd, abi })
    }

    /// The rights of a bind mount.
    pub fn rights(&self, access: Access, is_dir: bool) -> u64 {
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let rights: BitFlags<AccessFs> = match access {
            Access::Read => read,
            Access::Execute => read | AccessFs::Execute,
            Access::Write => AccessFs::from_all(self.abi) & !BitFlags::from(AccessFs::Execute),
        };
        let possible = if is_dir { AccessFs::from_all(self.abi) } else { AccessFs::from_file(self.abi) };
        (rights & possible).bits()
    }

    /// The rights of a device node.
    pub fn device_rights(&self) -> u64 {
        let rights = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::IoctlDev;
        (rights & AccessFs::from_file(self.abi)).bits()
    }
}
