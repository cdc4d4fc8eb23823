//! The data area: contents of regular files, written as the layers are read.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use super::layout::{BLOCK_SIZE, EXTENDED_INODE, xattr_size};
use crate::error::{IoContext, Result};
use crate::layer::ContentSink;
use crate::tree::{Content, Xattr};
use crate::{DISK_CAPACITY, Error};

/// Bytes gathered before they are written.
const BUFFER: usize = 1 << 20;
/// The longest tail that goes beside its inode. A longer one fills most of a block of its own, and would leave a hole
/// of about its size among the inodes.
pub(super) const MAX_INLINE_TAIL: u64 = BLOCK_SIZE / 2;

/// Appends file contents to the output file, from block 1 on.
pub(crate) struct DataArea<'f> {
    file: &'f File,
    path: PathBuf,
    /// Bytes for the file at `offset`.
    buffer: Vec<u8>,
    offset: u64,
    /// Tails that will stand beside their inodes, one after the other. In a file, because there may be millions.
    tails: BufWriter<File>,
    tails_size: u64,
    current: Current,
}

/// The file that is being written.
#[derive(Default)]
struct Current {
    content: Content,
    position: u64,
    /// Where the inline tail begins.
    inline_from: u64,
}

impl<'f> DataArea<'f> {
    /// Writes to `file`, which is new and empty and called `path` in errors. `staging` is another new file.
    pub(crate) fn new(file: &'f File, path: PathBuf, staging: File) -> DataArea<'f> {
        DataArea {
            file,
            path,
            buffer: Vec::with_capacity(BUFFER),
            offset: BLOCK_SIZE,
            tails: BufWriter::with_capacity(BUFFER, staging),
            tails_size: 0,
            current: Current::default(),
        }
    }

    /// The first byte after what has been appended.
    pub(super) fn position(&self) -> u64 {
        self.offset + self.buffer.len() as u64
    }

    /// Appends bytes.
    pub(super) fn append(&mut self, data: &[u8]) -> Result<()> {
        if self.buffer.len() + data.len() > BUFFER {
            self.flush()?;
            if data.len() >= BUFFER / 4 {
                self.file.write_all_at(data, self.offset).context("write", &self.path)?;
                self.offset += data.len() as u64;
                return Ok(());
            }
        }
        self.buffer.extend_from_slice(data);
        Ok(())
    }

    /// Appends zeros; many of them become a hole of the output file.
    pub(super) fn append_zeros(&mut self, length: u64) -> Result<()> {
        match usize::try_from(length) {
            Ok(length) if self.buffer.len() + length <= BUFFER => {
                self.buffer.resize(self.buffer.len() + length, 0)
            }
            _ => {
                self.flush()?;
                self.offset += length;
            }
        }
        Ok(())
    }

    /// Appends zeros up to the next block.
    pub(super) fn align(&mut self) -> Result<()> {
        self.append_zeros(self.position().wrapping_neg() % BLOCK_SIZE)
    }

    /// Writes what is gathered.
    pub(super) fn flush(&mut self) -> Result<()> {
        self.file.write_all_at(&self.buffer, self.offset).context("write", &self.path)?;
        self.offset += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Makes zeros of the blocks of files that a later layer removed. They stay part of the file system, unused, and
    /// take no space where holes can be made.
    pub(crate) fn discard(&mut self, dropped: &[Content]) -> Result<()> {
        self.flush()?;
        let zeros = vec![0; BUFFER];
        for content in dropped {
            let start = u64::from(content.block) * BLOCK_SIZE;
            let length = blocks(content) * BLOCK_SIZE;
            if length == 0 {
                continue;
            }
            use rustix::fs::FallocateFlags;
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(self.file, hole, start, length).is_ok() {
                continue;
            }
            // The bytes must be the same on every file system, so where no hole can be made, zeros are written.
            let mut done = 0;
            while done < length {
                let piece = (length - done).min(BUFFER as u64);
                let zeros = &zeros[..piece as usize];
                self.file.write_all_at(zeros, start + done).context("write", &self.path)?;
                done += piece;
            }
        }
        Ok(())
    }

    /// No more tails come: they can be read.
    pub(super) fn flush_tails(&mut self) -> Result<()> {
        self.tails.flush().context("write a temporary file for", &self.path)
    }

    /// Reads a tail back.
    pub(super) fn read_tail(&self, offset: u64, tail: &mut [u8]) -> Result<()> {
        self.tails.get_ref().read_exact_at(tail, offset).context("read a temporary file for", &self.path)
    }

    /// Writes the superblock, at last.
    pub(super) fn write_first_block(&mut self, block: &[u8]) -> Result<()> {
        self.file.write_all_at(block, 0).context("write", &self.path)
    }
}

/// Data blocks that a file has.
pub(super) fn blocks(content: &Content) -> u64 {
    match content.tail {
        Some(_) => content.size / BLOCK_SIZE,
        None => content.size.div_ceil(BLOCK_SIZE),
    }
}

impl ContentSink for DataArea<'_> {
    fn begin(&mut self, size: u64, xattrs: &[Xattr]) -> Result<()> {
        let start = self.position();
        let end = start.saturating_add(size);
        if end > DISK_CAPACITY {
            return Err(Error::TooLarge { size: end, capacity: DISK_CAPACITY });
        }
        let tail = size % BLOCK_SIZE;
        // The tail must not cross a block's end, so inode, attributes and tail must fit into one block.
        let inline =
            tail > 0 && tail <= MAX_INLINE_TAIL && EXTENDED_INODE + xattr_size(xattrs) + tail <= BLOCK_SIZE;
        let has_blocks = size >= BLOCK_SIZE || !inline && size > 0;
        self.current = Current {
            content: Content {
                size,
                // Fits: the disk's capacity is far less than 2^32 blocks.
                block: if has_blocks { (start / BLOCK_SIZE) as u32 } else { 0 },
                tail: inline.then_some(self.tails_size),
            },
            position: 0,
            inline_from: if inline { size - tail } else { size },
        };
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> Result<()> {
        let left = self.current.inline_from.saturating_sub(self.current.position);
        let (area, tail) =
            data.split_at(usize::try_from(left).map_or(data.len(), |left| left.min(data.len())));
        if !area.is_empty() {
            self.append(area)?;
        }
        self.tails.write_all(tail).context("write a temporary file for", &self.path)?;
        self.tails_size += tail.len() as u64;
        self.current.position += data.len() as u64;
        Ok(())
    }

    fn hole(&mut self, length: u64) -> Result<()> {
        let area = self.current.inline_from.saturating_sub(self.current.position).min(length);
        self.append_zeros(area)?;
        self.current.position += area;
        // What remains is in the tail: less than a block.
        let tail = [0; BLOCK_SIZE as usize];
        if length > area {
            self.write(&tail[..(length - area) as usize])?;
        }
        Ok(())
    }

    fn end(&mut self) -> Result<Content> {
        self.align()?;
        Ok(self.current.content)
    }
}
