//! The shim's side of a log.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IoSlice, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use super::{HEADER, MAX_ENTRY, Stream, rotated};

/// Appends entries and rotates.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    file: File,
    size: u64,
    half: u64,
}

impl Writer {
    /// Opens or makes the log; together with its older half it takes at most `bound` bytes.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(path: &Path, bound: u64) -> io::Result<Self> {
        let file = open(path)?;
        let size = file.metadata()?.len();
        // Room for one entry at least, or nothing could ever be written.
        let half = (bound / 2).max((HEADER + MAX_ENTRY) as u64 / 4);
        Ok(Self { path: path.into(), file, size, half })
    }

    /// Appends bytes, in several entries when they are many. `at`: nanoseconds since 1970.
    ///
    /// # Errors
    /// When the disk is full or the file cannot be rotated; nothing but this piece of output is then lost.
    pub fn append(&mut self, stream: Stream, at: u64, bytes: &[u8]) -> io::Result<()> {
        let longest = MAX_ENTRY.min(self.half as usize - HEADER);
        bytes.chunks(longest).try_for_each(|piece| self.entry(stream, at, piece))
    }

    fn entry(&mut self, stream: Stream, at: u64, bytes: &[u8]) -> io::Result<()> {
        let length = (HEADER + bytes.len()) as u64;
        if self.size + length > self.half {
            fs::rename(&self.path, rotated(&self.path))?;
            self.file = open(&self.path)?;
            self.size = 0;
        }
        let mut header = [0u8; HEADER];
        header[0] = stream as u8;
        header[1..9].copy_from_slice(&at.to_le_bytes());
        header[9..].copy_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_le_bytes());
        let written = write_both(&mut self.file, &header, bytes);
        match &written {
            Ok(()) => self.size += length,
            // What was half written would make the rest unreadable.
            Err(_) => self.file.set_len(self.size)?,
        }
        written
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

fn write_both(file: &mut File, header: &[u8], bytes: &[u8]) -> io::Result<()> {
    let written = file.write_vectored(&[IoSlice::new(header), IoSlice::new(bytes)])?;
    if written < header.len() {
        file.write_all(&header[written..])?;
        return file.write_all(bytes);
    }
    file.write_all(&bytes[written - header.len()..])
}
