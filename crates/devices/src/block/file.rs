//! The file behind a disk.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FallocateFlags;

use super::{Error, SECTOR};
use crate::chain::Buffers;

/// Zeroes are written in pieces of this size where the file system cannot make them itself.
static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// Read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the file into the guest's memory.
    Read,
    /// From the guest's memory into the file.
    Write,
}

/// An open regular file or block device of a known size.
#[derive(Debug)]
pub struct Backing {
    file: File,
    /// The size in sectors of 512 bytes.
    pub sectors: u64,
}

impl Backing {
    /// Opens `path`.
    ///
    /// # Errors
    /// [`Error::Open`] when it cannot be opened as wanted, [`Error::Kind`] when it is neither a file nor a block device.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        // A FIFO would hold up the open call; it is refused just below.
        let file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed)?;
        Self::new(file, path)
    }

    fn new(mut file: File, path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Open { path: path.to_owned(), source };
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Kind(path.to_owned()));
        }
        let bytes = io::Seek::seek(&mut file, io::SeekFrom::End(0)).map_err(failed)?;
        if bytes % SECTOR != 0 {
            tracing::warn!(path = %path.display(), bytes, "the part of the disk after its last whole sector is not used");
        }
        Ok(Backing { file, sectors: bytes / SECTOR })
    }

    /// Moves all of the buffers' bytes at `offset` of the file. A file that has become shorter gives an error.
    pub fn transfer(
        &self,
        direction: Direction,
        mut offset: u64,
        mut buffers: Buffers<'_>,
    ) -> io::Result<()> {
        while !buffers.is_empty() {
            let vectors = buffers.iovecs();
            if let Direction::Read = direction {
                buffers.mark_written(buffers.len());
            }
            let at = libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let call = match direction {
                Direction::Read => libc::preadv,
                Direction::Write => libc::pwritev,
            };
            // SAFETY: the descriptor is open, and each vector is a range of guest memory that `buffers` checked and keeps
            // mapped for its lifetime. The guest may change the bytes meanwhile; only the kernel reads or writes them.
            let moved =
                unsafe { call(self.file.as_raw_fd(), vectors.as_ptr(), vectors.len() as libc::c_int, at) };
            match u64::try_from(moved) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => {
                    offset += moved;
                    buffers = buffers.split_off(moved).map_err(io::Error::other)?;
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
        Ok(())
    }

    /// Makes everything written so far durable.
    pub fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the space of a range back, where the file system can. What is read from it then is zero or unchanged.
    pub fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        match self.punch(offset, length) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            other => other,
        }
    }

    /// Makes a range read as zeroes; its space may be given back if `unmap` says so.
    pub fn write_zeroes(&self, offset: u64, length: u64, unmap: bool) -> io::Result<()> {
        let zeroed = if unmap {
            self.punch(offset, length)
        } else {
            let flags = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, flags, offset, length).map_err(io::Error::from)
        };
        match zeroed {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.write_zeroes_by_hand(offset, length)
            }
            other => other,
        }
    }

    fn punch(&self, offset: u64, length: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, flags, offset, length)?)
    }

    pub(super) fn write_zeroes_by_hand(&self, mut offset: u64, length: u64) -> io::Result<()> {
        let end = offset + length;
        while offset < end {
            let part = (end - offset).min(ZEROES.len() as u64);
            std::os::unix::fs::FileExt::write_all_at(&self.file, &ZEROES[..part as usize], offset)?;
            offset += part;
        }
        Ok(())
    }
}
