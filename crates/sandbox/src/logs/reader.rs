//! Reading a log, also while it grows.

use std::{
    collections::VecDeque,
    fs::File,
    io::{self, BufReader, Read},
    os::{fd::OwnedFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::inotify,
};

use super::{HEADER, MAX_ENTRY, Stream, rotated};

/// How long a follower sleeps at most between two looks at whether it shall stop, should no event tell it.
const LOOK_AGAIN: Duration = Duration::from_secs(2);

/// Why a log cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading failed.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("{path} is damaged at byte {offset}: the rest is skipped")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        offset: u64,
    },
}

/// What to read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ReadOptions {
    /// Wait for more at the end.
    pub follow: bool,
    /// Only the last lines, so many.
    pub tail: Option<usize>,
    /// Only what was printed at or after this time, nanoseconds since 1970.
    pub since: Option<u64>,
}

/// One piece of output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Where it was printed.
    pub stream: Stream,
    /// When, nanoseconds since 1970.
    pub at: u64,
    /// What.
    pub bytes: Vec<u8>,
}

/// Iterates over the entries of a log.
pub struct Reader {
    path: PathBuf,
    current: Option<Part>,
    /// What `tail` kept, to be given out first.
    kept: VecDeque<Entry>,
    since: Option<u64>,
    watch: Option<OwnedFd>,
    stop: Box<dyn FnMut() -> bool + Send>,
    done: bool,
}

struct Part {
    file: BufReader<File>,
    inode: u64,
    offset: u64,
}

impl Reader {
    /// Opens a log. A log that does not exist yet is empty.
    ///
    /// # Errors
    /// When a file cannot be read.
    pub fn open(path: &Path, options: ReadOptions) -> Result<Self, Error> {
        let io = |source| Error::Io { path: path.into(), source };
        let watch = options.follow.then(|| watch(path)).transpose().map_err(io)?;
        let mut reader = Self {
            path: path.into(),
            current: None,
            kept: VecDeque::new(),
            since: options.since,
            watch,
            stop: Box::new(|| false),
            done: false,
        };
        reader.current = match Part::open(&rotated(path)).map_err(io)? {
            Some(old) => Some(old),
            None => Part::open(path).map_err(io)?,
        };
        if let Some(lines) = options.tail {
            reader.keep_last(lines)?;
        }
        Ok(reader)
    }

    /// Ends a follower when `condition` holds and everything was read. Looked at after each change in the log's
    /// directory.
    pub fn stop_when(&mut self, condition: impl FnMut() -> bool + Send + 'static) {
        self.stop = Box::new(condition);
    }

    /// Reads to the end and keeps only the last `lines`.
    fn keep_last(&mut self, lines: usize) -> Result<(), Error> {
        let mut kept: VecDeque<Entry> = VecDeque::new();
        let mut breaks = 0;
        let count = |bytes: &[u8]| bytes.iter().filter(|&&b| b == b'\n').count();
        while let Some(entry) = self.read_available()? {
            breaks += count(&entry.bytes);
            kept.push_back(entry);
            // One more break than lines: the one before the first line kept.
            while kept.front().is_some_and(|first| breaks - count(&first.bytes) > lines) {
                breaks -= kept.pop_front().map_or(0, |first| count(&first.bytes));
            }
        }
        let unfinished = kept.back().is_some_and(|last| last.bytes.last() != Some(&b'\n'));
        let mut surplus = (breaks + usize::from(unfinished)).saturating_sub(lines);
        while surplus > 0 {
            let Some(first) = kept.front_mut() else { break };
            match first.bytes.iter().position(|&b| b == b'\n') {
                Some(at) => {
                    first.bytes.drain(..=at);
                    surplus -= 1;
                }
                None => drop(kept.pop_front()),
            }
        }
        self.kept = kept;
        Ok(())
    }

    /// The next entry that is there, going from the older half to the newer.
    fn read_available(&mut self) -> Result<Option<Entry>, Error> {
        loop {
            let Some(part) = &mut self.current else {
                self.current = Part::open(&self.path).map_err(|source| self.io(source))?;
                if self.current.is_none() {
                    return Ok(None);
                }
                continue;
            };
            match part.next() {
                Ok(Some(entry)) if self.since.is_some_and(|since| entry.at < since) => {}
                Ok(Some(entry)) => return Ok(Some(entry)),
                Ok(None) => match successor(&self.path, part.inode) {
                    Err(source) => return Err(self.io(source)),
                    Ok(Some(next)) => {
                        // The writer may have added to this file between our last read and its rotation.
                        if let Ok(Some(entry)) = part.next() {
                            return Ok(Some(entry));
                        }
                        self.current = Some(next);
                    }
                    Ok(None) => return Ok(None),
                },
                Err(ReadError::Io(source)) => return Err(self.io(source)),
                Err(ReadError::Damaged(offset)) => {
                    self.done = true;
                    return Err(Error::Damaged { path: self.path.clone(), offset });
                }
            }
        }
    }

    fn io(&self, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), source }
    }
}

impl Iterator for Reader {
    type Item = Result<Entry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(entry) = self.kept.pop_front() {
            return Some(Ok(entry));
        }
        while !self.done {
            // Asked before reading, so that what was written before the stop is still read.
            let stop = self.watch.is_none() || (self.stop)();
            match self.read_available() {
                Ok(Some(entry)) => return Some(Ok(entry)),
                Ok(None) if stop => self.done = true,
                Ok(None) => {
                    if let Some(Err(source)) = self.watch.as_ref().map(wait_for_change) {
                        self.done = true;
                        return Some(Err(self.io(source)));
                    }
                }
                Err(error) => {
                    self.done = true;
                    return Some(Err(error));
                }
            }
        }
        None
    }
}

enum ReadError {
    Io(io::Error),
    Damaged(u64),
}

impl Part {
    fn open(path: &Path) -> io::Result<Option<Self>> {
        match File::open(path) {
            Ok(file) => {
                let inode = file.metadata()?.ino();
                Ok(Some(Self { file: BufReader::with_capacity(MAX_ENTRY, file), inode, offset: 0 }))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// `None` at the end, also in the middle of an entry that is being written.
    fn next(&mut self) -> Result<Option<Entry>, ReadError> {
        let mut header = [0u8; HEADER];
        if !self.fill(&mut header, 0)? {
            return Ok(None);
        }
        let [kind, time @ .., a, b, c, d] = header;
        let length = u32::from_le_bytes([a, b, c, d]) as usize;
        let stream = match kind {
            1 => Stream::Stdout,
            2 => Stream::Stderr,
            _ => return Err(ReadError::Damaged(self.offset)),
        };
        if length > MAX_ENTRY {
            return Err(ReadError::Damaged(self.offset));
        }
        let mut bytes = vec![0; length];
        if !self.fill(&mut bytes, HEADER)? {
            return Ok(None);
        }
        self.offset += (HEADER + length) as u64;
        Ok(Some(Entry { stream, at: u64::from_le_bytes(time), bytes }))
    }

    /// Reads all of `into`, or goes back to the entry's beginning (`already` bytes before here) when there is less.
    fn fill(&mut self, into: &mut [u8], already: usize) -> Result<bool, ReadError> {
        let mut filled = 0;
        while filled < into.len() {
            match self.file.read(&mut into[filled..]) {
                Ok(0) => {
                    let back = i64::try_from(filled + already).unwrap_or(i64::MAX);
                    self.file.seek_relative(-back).map_err(ReadError::Io)?;
                    return Ok(false);
                }
                Ok(n) => filled += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(ReadError::Io(e)),
            }
        }
        Ok(true)
    }
}

/// The file that follows the one with `inode`: the newer half after the older one, or after a rotation.
fn successor(path: &Path, inode: u64) -> io::Result<Option<Part>> {
    let newer = Part::open(path)?;
    if newer.as_ref().is_none_or(|part| part.inode == inode) {
        return Ok(None);
    }
    // Rotated twice since: what is between has its name still, and comes first.
    match Part::open(&rotated(path))? {
        Some(older) if older.inode != inode => Ok(Some(older)),
        _ => Ok(newer),
    }
}

fn watch(path: &Path) -> io::Result<OwnedFd> {
    use inotify::{CreateFlags, WatchFlags};
    let dir = path.parent().unwrap_or(Path::new("."));
    let fd = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    let flags = WatchFlags::MODIFY
        | WatchFlags::CREATE
        | WatchFlags::MOVED_TO
        | WatchFlags::DELETE
        | WatchFlags::DELETE_SELF;
    inotify::add_watch(&fd, dir, flags)?;
    Ok(fd)
}

/// Sleeps until something changes in the log's directory, and forgets what changed.
fn wait_for_change(watch: &OwnedFd) -> io::Result<()> {
    let timeout = Timespec { tv_sec: LOOK_AGAIN.as_secs() as i64, tv_nsec: 0 };
    match poll(&mut [PollFd::new(watch, PollFlags::IN)], Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(e) => return Err(e.into()),
    }
    let mut events = [0u8; 4096];
    loop {
        match rustix::io::read(watch, &mut events) {
            Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(()),
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}
