//! What is mounted beneath a directory that is to be shared with a guest.
//!
//! A shared directory is shown with the file systems that are mounted in it, as a person expects; but never with the kernel's own
//! interfaces: a guest that could write to a /proc/sys or a cgroup's release_agent would own the host, and one that could
//! read /proc would know everything. So only file systems that hold files are shown, by a list of their types.

use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// Types that hold people's files. FUSE comes as `fuse`, `fuseblk` and `fuse.name`; `rootfs` is the root of a system that runs from its
/// initramfs.
#[rustfmt::skip]
const FILES: [&str; 43] = [
    "9p", "afs", "apfs", "aufs", "bcachefs", "btrfs", "ceph", "cifs", "ecryptfs", "erofs", "exfat", "ext2", "ext3", "ext4",
    "f2fs", "fuse", "fuseblk", "gfs2", "hfs", "hfsplus", "iso9660", "jfs", "lustre", "minix", "msdos", "nfs", "nfs4",
    "nilfs2", "ntfs", "ntfs3", "ocfs2", "overlay", "ramfs", "reiserfs", "rootfs", "smb3", "squashfs", "tmpfs", "udf", "vfat",
    "virtiofs", "xfs", "zfs",
];

/// What a look at the mount table said about a directory.
#[derive(Debug, PartialEq, Eq)]
pub struct Beneath {
    /// The type of the file system that the directory itself is in, if it is none to share.
    pub interface: Option<String>,
    /// Mount points beneath it, relative to it, that must be hidden.
    pub hidden: Vec<PathBuf>,
}

/// Looks at what is mounted now at, above and beneath `source`, which must be canonical.
///
/// # Errors
/// When the mount table cannot be read.
pub fn beneath_now(source: &Path) -> std::io::Result<Beneath> {
    Ok(beneath(source, &mountinfo()?))
}

/// Looks at what is mounted at, above and beneath `source`, which must be canonical.
pub(crate) fn beneath(source: &Path, mountinfo: &str) -> Beneath {
    let mounts: Vec<(PathBuf, &str)> = mountinfo.lines().filter_map(parse).collect();
    // The deepest mount that contains it; of several at one place the last.
    let own = mounts
        .iter()
        .filter(|(point, _)| source.starts_with(point))
        .max_by_key(|(p, _)| p.components().count());
    let interface = own.map(|(_, kind)| *kind).filter(|kind| !holds_files(kind)).map(str::to_owned);
    let inside = |(point, _): &&(PathBuf, &str)| point != source && point.starts_with(source);
    let unwanted = mounts.iter().filter(inside).filter(|(_, kind)| !holds_files(kind));
    let mut hidden: Vec<PathBuf> =
        unwanted.filter_map(|(point, _)| point.strip_prefix(source).ok().map(Path::to_owned)).collect();
    hidden.sort();
    // What is in a hidden tree is hidden with it.
    hidden.dedup_by(|later, kept| later.starts_with(kept));
    Beneath { interface, hidden }
}

fn holds_files(kind: &str) -> bool {
    FILES.contains(&kind) || kind.starts_with("fuse.")
}

/// The mount point and type of a line of mountinfo.
fn parse(line: &str) -> Option<(PathBuf, &str)> {
    let (left, right) = line.split_once(" - ")?;
    Some((unescape(left.split(' ').nth(4)?), right.split(' ').next()?))
}

/// Undoes the kernel's `\040` for space, tab, newline and backslash.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        let octal = tail.get(..3).and_then(|d| u8::from_str_radix(std::str::from_utf8(d).ok()?, 8).ok());
        match (first, octal) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = tail.get(3..).unwrap_or_default();
            }
            _ => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}

/// The mount table of this process.
pub(crate) fn mountinfo() -> std::io::Result<String> {
    // Mount points may be any bytes; the kernel escapes only white space and backslashes.
    std::fs::read("/proc/self/mountinfo").map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    const TABLE: &str = "\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
22 27 0:21 / /proc rw,relatime - proc proc rw
23 27 0:22 / /sys rw,relatime - sysfs sysfs rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime shared:4 - cgroup cgroup rw,cpu
40 27 0:40 / /home/a\\040b rw,relatime - fuse.sshfs host: rw
41 40 0:41 / /home/a\\040b/p rw,relatime - binfmt_misc x rw
50 27 254:0 /run/netns /run/netns rw shared:1 - ext4 /dev/vda rw
";

    #[test]
    fn kernel_interfaces_are_hidden_and_files_are_not() {
        let of = |path| beneath(Path::new(path), TABLE);
        let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
        assert_eq!(of("/").hidden, paths(&["home/a b/p", "proc", "sys"]));
        assert_eq!(of("/").interface, None);
        assert_eq!(of("/home").hidden, paths(&["a b/p"]));
        assert_eq!(of("/home/a b"), Beneath { interface: None, hidden: paths(&["p"]) });
        assert_eq!(of("/usr"), Beneath { interface: None, hidden: Vec::new() });
    }

    #[test]
    fn a_kernel_interface_itself_is_recognised() {
        let of = |path| beneath(Path::new(path), TABLE).interface;
        assert_eq!(of("/proc/sys").as_deref(), Some("proc"));
        assert_eq!(of("/sys/fs/cgroup/cpu/x").as_deref(), Some("cgroup"));
        // The tmpfs that cgroups are mounted in is one, and harmless.
        assert_eq!(of("/sys/fs/cgroup").as_deref(), None);
        assert_eq!(beneath(Path::new("/sys/fs/cgroup"), TABLE).hidden, [PathBuf::from("cpu")]);
        assert_eq!(beneath(Path::new("/"), "1 1 0:2 / / rw - rootfs rootfs rw").interface, None);
    }

    #[test]
    fn escapes() {
        assert_eq!(unescape(r"/a\040b\134c"), PathBuf::from(r"/a b\c"));
        assert_eq!(unescape(r"/a\04"), PathBuf::from(r"/a\04"));
        assert_eq!(unescape("/ü").as_os_str().as_bytes(), "/ü".as_bytes());
    }
}
