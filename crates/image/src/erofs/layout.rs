//! The on-disk structures, little-endian, as `fs/erofs/erofs_fs.h` of Linux 6.1 has them.

use crate::tree::Xattr;

/// Bytes of a block.
pub(crate) const BLOCK_SIZE: u64 = 4096;
/// Inodes stand at multiples of this; an inode's number (nid) is its place in the metadata area divided by it.
pub(super) const SLOT: u64 = 32;
pub(super) const COMPACT_INODE: u64 = 32;
pub(super) const EXTENDED_INODE: u64 = 64;
pub(super) const DIRENT: usize = 12;

const MAGIC: u32 = 0xe0f5_e1e2;
const SUPERBLOCK_OFFSET: usize = 1024;
const FEATURE_COMPAT_SB_CHKSUM: u32 = 0x1;
const FEATURE_COMPAT_MTIME: u32 = 0x2;
const XATTR_HEADER: u64 = 12;

pub(super) const S_IFIFO: u16 = 0o010_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFLNK: u16 = 0o120_000;

/// Where an inode's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DataLayout {
    /// In whole blocks (`EROFS_INODE_FLAT_PLAIN`).
    Plain = 0,
    /// The last, partial block behind the inode, the rest in whole blocks (`EROFS_INODE_FLAT_INLINE`).
    Inline = 2,
}

/// The fields of an inode that differ between inodes.
pub(super) struct RawInode {
    pub extended: bool,
    pub layout: DataLayout,
    pub xattr_size: u64,
    /// File type and permissions.
    pub mode: u16,
    pub links: u32,
    pub size: u64,
    /// First data block, or device number.
    pub union: u32,
    /// Serial number, for 32-bit `st_ino`.
    pub ino: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u64,
    pub mtime_nsec: u32,
}

impl RawInode {
    /// Appends the inode. A compact one has 16-bit owner and links and a 32-bit size, and no time of its own.
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        let format = u16::from(self.extended) | (self.layout as u16) << 1;
        let xattr_count = match self.xattr_size {
            0 => 0,
            size => ((size - XATTR_HEADER) / 4 + 1) as u16,
        };
        out.extend_from_slice(&format.to_le_bytes());
        out.extend_from_slice(&xattr_count.to_le_bytes());
        out.extend_from_slice(&self.mode.to_le_bytes());
        if self.extended {
            out.extend_from_slice(&[0; 2]);
            out.extend_from_slice(&self.size.to_le_bytes());
            out.extend_from_slice(&self.union.to_le_bytes());
            out.extend_from_slice(&self.ino.to_le_bytes());
            out.extend_from_slice(&self.uid.to_le_bytes());
            out.extend_from_slice(&self.gid.to_le_bytes());
            out.extend_from_slice(&self.mtime.to_le_bytes());
            out.extend_from_slice(&self.mtime_nsec.to_le_bytes());
            out.extend_from_slice(&self.links.to_le_bytes());
            out.extend_from_slice(&[0; 16]);
        } else {
            out.extend_from_slice(&(self.links as u16).to_le_bytes());
            out.extend_from_slice(&(self.size as u32).to_le_bytes());
            out.extend_from_slice(&[0; 4]);
            out.extend_from_slice(&self.union.to_le_bytes());
            out.extend_from_slice(&self.ino.to_le_bytes());
            out.extend_from_slice(&(self.uid as u16).to_le_bytes());
            out.extend_from_slice(&(self.gid as u16).to_le_bytes());
            out.extend_from_slice(&[0; 4]);
        }
    }
}

/// Bytes that the attributes take behind the inode.
pub(crate) fn xattr_size(xattrs: &[Xattr]) -> u64 {
    let entries = xattrs.iter().filter_map(|x| Some(4 + xattr_name(&x.name)?.1.len() + x.value.len()));
    match entries.map(|length| length.next_multiple_of(4) as u64).sum() {
        0 => 0,
        size => XATTR_HEADER + size,
    }
}

/// Appends the attributes as they stand behind the inode. Those of namespaces that Linux does not let a file system
/// keep are left out.
pub(super) fn encode_xattrs(xattrs: &[Xattr], out: &mut Vec<u8>) {
    if xattr_size(xattrs) == 0 {
        return;
    }
    out.extend_from_slice(&[0; XATTR_HEADER as usize]);
    for xattr in xattrs {
        let Some((index, name)) = xattr_name(&xattr.name) else { continue };
        out.extend_from_slice(&[name.len() as u8, index]);
        out.extend_from_slice(&(xattr.value.len() as u16).to_le_bytes());
        out.extend_from_slice(name);
        out.extend_from_slice(&xattr.value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

/// Whether the fields of the attribute's entry hold it: a name of 255 bytes after its prefix, a value of 65535.
pub(super) fn xattr_fits(xattr: &Xattr) -> bool {
    xattr_name(&xattr.name).is_none_or(|(_, name)| name.len() <= 255) && xattr.value.len() <= 0xffff
}

/// The number of the name's prefix, and the rest of the name.
fn xattr_name(name: &[u8]) -> Option<(u8, &[u8])> {
    match name {
        b"system.posix_acl_access" => return Some((2, b"")),
        b"system.posix_acl_default" => return Some((3, b"")),
        _ => {}
    }
    let prefixes: [(u8, &[u8]); 3] = [(1, b"user."), (4, b"trusted."), (6, b"security.")];
    let found = prefixes.iter().find_map(|(index, prefix)| Some((*index, name.strip_prefix(*prefix)?)));
    found.filter(|(_, rest)| !rest.is_empty())
}

/// A device number as Linux encodes it in inodes (`new_encode_dev`); `None` if it has more than 12 + 20 bits.
pub(super) fn device_number(major: u32, minor: u32) -> Option<u32> {
    (major < 1 << 12 && minor < 1 << 20).then_some((minor & 0xff) | major << 8 | (minor & !0xff) << 12)
}

/// What the superblock says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub root_nid: u16,
    pub inodes: u64,
    pub build_time: u64,
    pub build_time_nsec: u32,
    /// Blocks of the whole file system.
    pub blocks: u32,
    pub meta_blkaddr: u32,
    pub uuid: [u8; 16],
}

impl Superblock {
    /// Block 0, checksum included.
    pub(crate) fn encode(&self) -> [u8; BLOCK_SIZE as usize] {
        let mut block = [0; BLOCK_SIZE as usize];
        {
            let mut put = |offset: usize, bytes: &[u8]| {
                block[SUPERBLOCK_OFFSET + offset..][..bytes.len()].copy_from_slice(bytes);
            };
            put(0, &MAGIC.to_le_bytes());
            put(8, &(FEATURE_COMPAT_SB_CHKSUM | FEATURE_COMPAT_MTIME).to_le_bytes());
            put(12, &[BLOCK_SIZE.trailing_zeros() as u8]);
            put(14, &self.root_nid.to_le_bytes());
            put(16, &self.inodes.to_le_bytes());
            put(24, &self.build_time.to_le_bytes());
            put(32, &self.build_time_nsec.to_le_bytes());
            put(36, &self.blocks.to_le_bytes());
            put(40, &self.meta_blkaddr.to_le_bytes());
            put(48, &self.uuid);
        }
        let checksum = crc32c(&block[SUPERBLOCK_OFFSET..]);
        block[SUPERBLOCK_OFFSET + 4..][..4].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    /// Reads block 0 back; `None` if it is not what [`encode`](Superblock::encode) writes.
    pub(crate) fn decode(block: &[u8; BLOCK_SIZE as usize]) -> Option<Superblock> {
        let raw = &block[SUPERBLOCK_OFFSET..];
        let u32_at = |offset: usize| raw[offset..][..4].try_into().map(u32::from_le_bytes).ok();
        let u64_at = |offset: usize| raw[offset..][..8].try_into().map(u64::from_le_bytes).ok();
        let superblock = Superblock {
            root_nid: u16::from_le_bytes(raw[14..16].try_into().ok()?),
            inodes: u64_at(16)?,
            build_time: u64_at(24)?,
            build_time_nsec: u32_at(32)?,
            blocks: u32_at(36)?,
            meta_blkaddr: u32_at(40)?,
            uuid: raw[48..64].try_into().ok()?,
        };
        (superblock.encode() == *block).then_some(superblock)
    }
}

/// CRC-32C without the final inversion, as the kernel's `crc32c(~0, …)`. Bit by bit: it runs over one block per image.
fn crc32c(data: &[u8]) -> u32 {
    let mut crc = !0u32;
    for &byte in data {
        crc ^= u32::from(byte);
        for _ in 0..8 {
            crc = crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 };
        }
    }
    crc
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc32c_has_the_known_check_value() {
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }

    #[test]
    fn superblock_round_trips_and_notices_damage() {
        let superblock =
            Superblock { root_nid: 2, inodes: 3, blocks: 4, meta_blkaddr: 1, ..Default::default() };
        let mut block = superblock.encode();
        assert_eq!(Superblock::decode(&block), Some(superblock));
        block[1024 + 36] ^= 1;
        assert_eq!(Superblock::decode(&block), None);
    }

    #[test]
    fn device_numbers_are_linux_ones() {
        assert_eq!(device_number(1, 3), Some(0x103));
        assert_eq!(device_number(259, 0x12345), Some(0x1230_0000 | 259 << 8 | 0x45));
        assert_eq!(device_number(1 << 12, 0), None);
    }
}
