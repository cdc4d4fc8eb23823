//! Mount options, as mount(8) and the OCI specification name them.

use rustix::mount::MountAttrFlags;

use crate::sys::MountAttr;

const PRIVATE: u64 = libc::MS_PRIVATE;
const SHARED: u64 = libc::MS_SHARED;
const SLAVE: u64 = libc::MS_SLAVE;
const UNBINDABLE: u64 = libc::MS_UNBINDABLE;

/// What a list of options asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// For the mount itself.
    pub mount: MountAttr,
    /// For the mount and all below it.
    pub recursive: MountAttr,
    /// Propagation changes, in order: the flag, and whether for all below too.
    pub propagation: Vec<(u64, bool)>,
    /// `bind` (false) or `rbind` (true).
    pub bind: Option<bool>,
    /// MS_* flags of the file system rather than the mount (`sync`, `dirsync`, `mand`, `lazytime`, `silent`).
    pub superblock: u64,
    /// `tmpcopyup`: what is in the directory below is copied into the new file system.
    pub copy_up: bool,
    /// All else is the file system's own: `key` or `key=value`.
    pub data: Vec<String>,
}

/// An option that is known and cannot be honoured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("mount option {0:?} is not supported in the guest")]
pub struct Unsupported(pub String);

impl Options {
    /// Sorts a list of options. Later ones win over earlier ones.
    ///
    /// # Errors
    /// For options that are known and cannot be honoured; those that are not known go to the file system.
    pub fn parse<S: AsRef<str>>(options: &[S]) -> Result<Self, Unsupported> {
        let mut parsed = Self::default();
        for option in options.iter().flat_map(|o| o.as_ref().split(',')) {
            parsed.add(option)?;
        }
        Ok(parsed)
    }

    fn add(&mut self, option: &str) -> Result<(), Unsupported> {
        match option {
            "" | "defaults" => {}
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "sync" => self.superblock |= libc::MS_SYNCHRONOUS,
            "async" => self.superblock &= !libc::MS_SYNCHRONOUS,
            "dirsync" => self.superblock |= libc::MS_DIRSYNC,
            "mand" => self.superblock |= libc::MS_MANDLOCK,
            "nomand" => self.superblock &= !libc::MS_MANDLOCK,
            "lazytime" => self.superblock |= libc::MS_LAZYTIME,
            "nolazytime" => self.superblock &= !libc::MS_LAZYTIME,
            "silent" => self.superblock |= libc::MS_SILENT,
            "loud" => self.superblock &= !libc::MS_SILENT,
            "acl" => self.superblock |= libc::MS_POSIXACL,
            "noacl" => self.superblock &= !libc::MS_POSIXACL,
            "iversion" => self.superblock |= libc::MS_I_VERSION,
            "noiversion" => self.superblock &= !libc::MS_I_VERSION,
            "tmpcopyup" => self.copy_up = true,
            "remount" | "idmap" | "ridmap" => return Err(Unsupported(option.to_owned())),
            _ => self.add_attribute(option),
        }
        Ok(())
    }

    /// The same for a mount that is still to be written to.
    pub fn writable(&self) -> Self {
        let read_only = u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits());
        let mut options = self.clone();
        options.mount.set &= !read_only;
        options.recursive.set &= !read_only;
        options
    }

    fn add_attribute(&mut self, option: &str) {
        if let Some((flag, recursive)) = propagation(option) {
            self.propagation.push((flag, recursive));
        } else if let Some((set, clear)) = attribute(option) {
            change(&mut self.mount, set, clear);
        } else if let Some((set, clear)) = option.strip_prefix('r').and_then(attribute) {
            change(&mut self.recursive, set, clear);
        } else {
            self.data.push(option.to_owned());
        }
    }

    /// The attributes of a new mount: everything that is set for it, one way or the other.
    pub fn attributes(&self) -> MountAttrFlags {
        MountAttrFlags::from_bits_retain(
            ((self.mount.set | self.recursive.set) & !self.recursive.clear) as u32,
        )
    }
}

/// `rro` sets what `ro` sets, so a bare `relatime` must not be read as recursive `elatime`: names are looked up whole first.
fn attribute(option: &str) -> Option<(u64, u64)> {
    let atime = u64::from(MountAttrFlags::MOUNT_ATTR__ATIME.bits());
    let bits = |flag: MountAttrFlags| u64::from(flag.bits());
    let symlinks = libc::MOUNT_ATTR_NOSYMFOLLOW;
    Some(match option {
        "ro" => (bits(MountAttrFlags::MOUNT_ATTR_RDONLY), 0),
        "rw" => (0, bits(MountAttrFlags::MOUNT_ATTR_RDONLY)),
        "nosuid" => (bits(MountAttrFlags::MOUNT_ATTR_NOSUID), 0),
        "suid" => (0, bits(MountAttrFlags::MOUNT_ATTR_NOSUID)),
        "nodev" => (bits(MountAttrFlags::MOUNT_ATTR_NODEV), 0),
        "dev" => (0, bits(MountAttrFlags::MOUNT_ATTR_NODEV)),
        "noexec" => (bits(MountAttrFlags::MOUNT_ATTR_NOEXEC), 0),
        "exec" => (0, bits(MountAttrFlags::MOUNT_ATTR_NOEXEC)),
        "noatime" => (bits(MountAttrFlags::MOUNT_ATTR_NOATIME), atime),
        "strictatime" => (bits(MountAttrFlags::MOUNT_ATTR_STRICTATIME), atime),
        // Relative access times are the value 0 of the field.
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (0, atime),
        "nodiratime" => (bits(MountAttrFlags::MOUNT_ATTR_NODIRATIME), 0),
        "diratime" => (0, bits(MountAttrFlags::MOUNT_ATTR_NODIRATIME)),
        "nosymfollow" => (symlinks, 0),
        "symfollow" => (0, symlinks),
        _ => return None,
    })
}

fn change(attr: &mut MountAttr, set: u64, clear: u64) {
    attr.set = attr.set & !clear | set;
    attr.clear |= clear;
    // What is set after being cleared is set, except for the field of access times, which is cleared and then set.
    attr.clear &= !(set & !u64::from(MountAttrFlags::MOUNT_ATTR__ATIME.bits()));
}

/// A propagation option, and whether it is for all below too.
pub fn propagation(option: &str) -> Option<(u64, bool)> {
    Some(match option {
        "private" => (PRIVATE, false),
        "rprivate" => (PRIVATE, true),
        "shared" => (SHARED, false),
        "rshared" => (SHARED, true),
        "slave" => (SLAVE, false),
        "rslave" => (SLAVE, true),
        "unbindable" => (UNBINDABLE, false),
        "runbindable" => (UNBINDABLE, true),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn bits(flag: MountAttrFlags) -> u64 {
        u64::from(flag.bits())
    }

    #[test]
    fn dockers_options_for_a_tmpfs() {
        let o = Options::parse(&["nosuid", "strictatime", "mode=755", "size=65536k"]).expect("known");
        assert_eq!(
            o.attributes(),
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_STRICTATIME
        );
        assert_eq!(o.data, ["mode=755", "size=65536k"]);
        assert_eq!(o.bind, None);
    }

    #[test]
    fn later_options_win() {
        let o = Options::parse(&["ro,nosuid", "rw"]).expect("known");
        assert_eq!(o.attributes(), MountAttrFlags::MOUNT_ATTR_NOSUID);
        assert_eq!(o.mount.clear, bits(MountAttrFlags::MOUNT_ATTR_RDONLY));
        let o = Options::parse(&["rw", "ro"]).expect("known");
        assert_eq!((o.mount.set, o.mount.clear), (bits(MountAttrFlags::MOUNT_ATTR_RDONLY), 0));
        let o = Options::parse(&["strictatime", "noatime"]).expect("known");
        assert_eq!(o.mount.set, bits(MountAttrFlags::MOUNT_ATTR_NOATIME));
        // mount_setattr(2): the whole field must be cleared to set one of its values.
        assert_eq!(o.mount.clear, bits(MountAttrFlags::MOUNT_ATTR__ATIME));
    }

    #[test]
    fn recursive_options_are_told_from_names_that_begin_with_r() {
        let o =
            Options::parse(&["rbind", "rro", "rnosuid", "relatime", "rprivate", "private"]).expect("known");
        assert_eq!(o.bind, Some(true));
        assert_eq!(
            o.recursive.set,
            bits(MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID)
        );
        assert_eq!(o.mount.set, 0);
        assert_eq!(o.propagation, [(PRIVATE, true), (PRIVATE, false)]);
        assert!(o.data.is_empty());
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        assert_eq!(Options::parse(&["idmap"]), Err(Unsupported("idmap".into())));
    }

    proptest! {
        #[test]
        fn every_option_ends_somewhere(options in proptest::collection::vec("[a-z=,]{0,12}", 0..8)) {
            if let Ok(o) = Options::parse(&options) {
                // No attribute is both set and cleared, but for the field of access times.
                let atime = bits(MountAttrFlags::MOUNT_ATTR__ATIME);
                prop_assert_eq!(o.mount.set & o.mount.clear & !atime, 0);
                prop_assert_eq!(o.recursive.set & o.recursive.clear & !atime, 0);
            }
        }
    }
}
