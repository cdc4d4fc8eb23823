//! Writing EROFS file systems (Linux `fs/erofs/erofs_fs.h`), uncompressed.
//!
//! Layout of the file, in blocks of 4096 bytes:
//!
//! ```text
//! block 0         superblock (at byte 1024)
//! 1 …             data of regular files, in the order of the layers' streams
//!   …             directory blocks
//! meta_blkaddr …  inodes, each followed by its extended attributes and its inline tail
//! ```
//!
//! File data comes first because it is written while the layers are still being read; the inodes can only be written
//! when all layers are merged. Everything depends on the tree's content alone, so equal images give equal bytes.

mod data;
mod layout;
mod writer;

pub(crate) use data::DataArea;
pub(crate) use layout::{BLOCK_SIZE, Superblock};
pub(crate) use writer::write;

/// The version of this writer. Whoever changes the bytes that it writes for some image increments it, so that rootfs
/// files of an older one are made again.
pub(crate) const WRITER_VERSION: u32 = 1;
