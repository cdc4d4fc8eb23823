//! A streaming reader for tar archives that may be hostile.
//!
//! Reads ustar, POSIX.1-2001 (PAX) and GNU archives, sparse files of all four kinds (old GNU, PAX 0.0, 0.1, 1.0)
//! included. Differs from the `tar` crate in what a container image needs: every length is bounded before memory is
//! taken, file data is handed out as slices of the input's own buffer, and nothing touches a file system.

mod header;
mod pax;
mod reader;
mod sparse;

pub(crate) use reader::Reader;

/// One entry of an archive. Its data, if any, is read with [`Reader::data`] before the next entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    /// The path as written, without a terminating NUL.
    pub path: Vec<u8>,
    pub kind: Kind,
    /// Permission bits, with set-user-id, set-group-id and sticky.
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: Timestamp,
    /// Apparent size of a regular file, holes included; 0 for everything else.
    pub size: u64,
    /// Where a sparse file has data; `None` for a file that is all data.
    pub segments: Option<Vec<Segment>>,
    /// Extended attributes in the archive's order, the last of equal names only.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an [`Entry`] is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Symlink { target: Vec<u8> },
    HardLink { target: Vec<u8> },
    CharDevice { major: u32, minor: u32 },
    BlockDevice { major: u32, minor: u32 },
    Fifo,
}

/// A point in time: seconds since the epoch, possibly before it, and nanoseconds after that second.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Timestamp {
    pub seconds: i64,
    pub nanoseconds: u32,
}

/// A part of a sparse file that has data, in the file's own offsets. Segments ascend and do not overlap.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    pub offset: u64,
    pub length: u64,
}

/// Why an archive cannot be read.
#[derive(Debug)]
pub(crate) enum TarError {
    /// The input failed.
    Io(std::io::Error),
    /// The archive is not well-formed.
    Malformed { entry: Vec<u8>, reason: String },
    /// The archive exceeds a field of [`Limits`](crate::Limits).
    Limit { what: String, name: &'static str, limit: u64 },
}

impl From<std::io::Error> for TarError {
    fn from(error: std::io::Error) -> TarError {
        TarError::Io(error)
    }
}
