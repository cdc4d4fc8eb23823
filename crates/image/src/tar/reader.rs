//! The stream of entries.

use std::io::{self, BufRead};

use super::header::{BLOCK, Header};
use super::pax::{self, Extensions};
use super::{Entry, Kind, Segment, TarError, sparse};
use crate::Limits;

/// Reads the entries of a tar archive in order.
pub(crate) struct Reader<'a, R> {
    input: R,
    limits: &'a Limits,
    /// Bytes consumed from the input.
    position: u64,
    /// Stored bytes of the current entry that are not read yet, and the padding after them.
    remaining: u64,
    padding: u64,
    /// The path of the current entry, for messages.
    path: Vec<u8>,
    ended: bool,
}

/// What precedes an entry's own header: PAX and GNU long-name records.
#[derive(Default)]
struct Preamble {
    pax: Extensions,
    long_path: Option<Vec<u8>>,
    long_target: Option<Vec<u8>>,
    /// Whether any of them was there: the archive may not end after them.
    present: bool,
}

impl<'a, R: BufRead> Reader<'a, R> {
    pub(crate) fn new(input: R, limits: &'a Limits) -> Reader<'a, R> {
        Reader { input, limits, position: 0, remaining: 0, padding: 0, path: Vec::new(), ended: false }
    }

    /// Where the current entry's unread data begins, in bytes from the archive's start.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Stored bytes of the current entry that have not been read yet.
    pub(crate) fn remaining(&self) -> u64 {
        self.remaining
    }

    /// The next entry; the data of the current one is skipped. `None` at the archive's end, which is two zero blocks
    /// or, as many writers are careless, the end of the input between two entries.
    pub(crate) fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.skip_data()?;
        let mut preamble = Preamble::default();
        while !self.ended {
            let Some(block) = self.header_block()? else {
                self.ended = true;
                break;
            };
            let header = Header::parse(&block).map_err(|reason| self.malformed(reason))?;
            let size = header.size().ok_or_else(|| self.malformed("its size is not a number"))?;
            match header.typeflag() {
                b'x' | b'X' => {
                    let records = self.metadata_record(size)?;
                    let segments = self.limits.sparse_segments;
                    preamble.pax.parse(&records, segments).map_err(|reason| self.malformed(reason))?;
                    // Now, since any number of such headers may follow.
                    self.check_xattrs(&preamble.pax)?;
                }
                // Global records would apply to everything that follows; container images have none that matter, and
                // Docker ignores them too (`git archive` writes a comment).
                b'g' => drop(self.metadata_record(size)?),
                b'L' => preamble.long_path = Some(self.long_name(size)?),
                b'K' => preamble.long_target = Some(self.long_name(size)?),
                _ => return self.entry(&header, size, preamble).map(Some),
            }
            preamble.present = true;
        }
        if preamble.present {
            Err(self.malformed("the archive ends after an extended header"))
        } else {
            Ok(None)
        }
    }

    /// The next piece of the current entry's stored data, not consumed yet. Empty at its end.
    pub(crate) fn data(&mut self) -> Result<&[u8], TarError> {
        if self.remaining == 0 {
            return Ok(&[]);
        }
        let available = self.input.fill_buf()?;
        if available.is_empty() {
            return Err(truncated(&self.path));
        }
        let length = usize::try_from(self.remaining).map_or(available.len(), |r| r.min(available.len()));
        Ok(&available[..length])
    }

    /// Consumes `length` bytes of what [`data`](Reader::data) returned.
    pub(crate) fn consume(&mut self, length: usize) {
        self.input.consume(length);
        self.position += length as u64;
        self.remaining -= length as u64;
    }

    /// Reads the input to its end, so that a digest of all of it can be had. What follows the archive is ignored.
    pub(crate) fn drain(&mut self) -> Result<(), TarError> {
        self.skip_data()?;
        loop {
            let length = self.input.fill_buf()?.len();
            if length == 0 {
                return Ok(());
            }
            self.input.consume(length);
            self.position += length as u64;
        }
    }

    fn skip_data(&mut self) -> Result<(), TarError> {
        // The remaining data and its padding are skipped as one.
        self.remaining += std::mem::take(&mut self.padding);
        loop {
            let length = match self.data() {
                Ok(data) => data.len(),
                Err(error) => return Err(error),
            };
            if length == 0 {
                return Ok(());
            }
            self.consume(length);
        }
    }

    /// Reads a header block, or `None` at the end of the archive.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let Some(block) = self.block()? else { return Ok(None) };
        if block.iter().any(|&b| b != 0) {
            return Ok(Some(block));
        }
        match self.block()? {
            Some(second) if second.iter().any(|&b| b != 0) => {
                Err(self.malformed("a lone zero block stands between entries"))
            }
            _ => Ok(None),
        }
    }

    /// Reads one block; `None` at the end of the input.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let mut block = [0; BLOCK];
        let mut filled = 0;
        while filled < BLOCK {
            let available = self.input.fill_buf()?;
            if available.is_empty() {
                return if filled == 0 { Ok(None) } else { Err(truncated(&self.path)) };
            }
            let length = available.len().min(BLOCK - filled);
            block[filled..filled + length].copy_from_slice(&available[..length]);
            self.input.consume(length);
            self.position += length as u64;
            filled += length;
        }
        Ok(Some(block))
    }

    /// Reads the body of an extended header into memory.
    fn metadata_record(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        // A path, a link target and the attributes must fit, and the sparse map of versions 0.0 and 0.1.
        let limit =
            4 * self.limits.path_length + 2 * self.limits.xattr_size + 42 * self.limits.sparse_segments;
        if size > limit as u64 {
            return Err(
                self.malformed(format!("its extended header has {size} bytes, at most {limit} make sense"))
            );
        }
        self.remaining = size;
        self.padding = padding(size);
        // Not `with_capacity(size)`: the memory is taken as the bytes really come.
        let mut record = Vec::new();
        loop {
            let data = self.data()?;
            let length = data.len();
            if length == 0 {
                break;
            }
            record.extend_from_slice(data);
            self.consume(length);
        }
        self.skip_data()?;
        Ok(record)
    }

    /// Reads a GNU long name.
    fn long_name(&mut self, size: u64) -> Result<Vec<u8>, TarError> {
        let limit = self.limits.path_length as u64;
        // One more for the terminating NUL.
        if size > limit + 1 {
            return Err(TarError::Limit {
                what: format!("a path of {size} bytes"),
                name: "path_length",
                limit,
            });
        }
        let record = self.metadata_record(size)?;
        Ok(super::header::until_nul(&record).to_vec())
    }

    /// Assembles the entry from its header and what preceded it.
    fn entry(&mut self, header: &Header<'_>, stored: u64, preamble: Preamble) -> Result<Entry, TarError> {
        let Preamble { mut pax, long_path, long_target, .. } = preamble;
        // PAX comes first, as in GNU tar and Go; a sparse file's real name before its made-up one.
        let path = pax.sparse.name.take().or_else(|| pax.path.take()).or(long_path);
        self.path = path.unwrap_or_else(|| header.path());
        if self.path.len() > self.limits.path_length {
            let what = format!("a path of {} bytes", self.path.len());
            return Err(self.over(what, "path_length", self.limits.path_length as u64));
        }
        let target = pax.link_target.take().or(long_target).unwrap_or_else(|| header.link_target());
        let kind = self.kind(header, target)?;

        let mut stored = pax.size.unwrap_or(stored);
        if kind != Kind::File {
            // Some writers give links and directories a size, but no data follows (as Go's reader has it).
            stored = 0;
        }
        if stored > self.limits.layer_size {
            return Err(self.over(
                format!("an entry of {stored} bytes"),
                "layer_size",
                self.limits.layer_size,
            ));
        }
        self.remaining = stored;
        self.padding = padding(stored);
        let (size, segments) = match kind {
            Kind::File => self.extent(header, &mut pax)?,
            _ => (0, None),
        };
        if size > self.limits.file_size {
            return Err(self.over(format!("a file of {size} bytes"), "file_size", self.limits.file_size));
        }
        let bad = |field: &str| self.malformed(format!("its {field} is out of range"));
        let id = |n: Option<i64>| n.and_then(|n| u32::try_from(n).ok());
        Ok(Entry {
            kind,
            mode: (header.mode().ok_or_else(|| bad("mode"))? & 0o7777) as u16,
            uid: pax.uid.or_else(|| id(header.uid())).ok_or_else(|| bad("owner"))?,
            gid: pax.gid.or_else(|| id(header.gid())).ok_or_else(|| bad("group"))?,
            mtime: pax.mtime.or_else(|| header.mtime()).ok_or_else(|| bad("time"))?,
            size,
            segments,
            xattrs: std::mem::take(&mut pax.xattrs),
            path: self.path.clone(),
        })
    }

    fn kind(&self, header: &Header<'_>, target: Vec<u8>) -> Result<Kind, TarError> {
        let device = || header.device().ok_or_else(|| self.malformed("its device number is out of range"));
        if target.len() > self.limits.path_length {
            let what = format!("a link target of {} bytes", target.len());
            return Err(self.over(what, "path_length", self.limits.path_length as u64));
        }
        Ok(match header.typeflag() {
            // Before ustar, a directory was a file whose name ends in a slash.
            b'0' | 0 if self.path.ends_with(b"/") => Kind::Directory,
            b'0' | 0 | b'7' | b'S' => Kind::File,
            b'1' => Kind::HardLink { target },
            b'2' => Kind::Symlink { target },
            b'3' => device().map(|(major, minor)| Kind::CharDevice { major, minor })?,
            b'4' => device().map(|(major, minor)| Kind::BlockDevice { major, minor })?,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => return Err(self.malformed(format!("it has the unknown type {:?}", char::from(other)))),
        })
    }

    /// The apparent size of a file and where it has data. Reads a sparse map that precedes the data.
    fn extent(
        &mut self,
        header: &Header<'_>,
        pax: &mut Extensions,
    ) -> Result<(u64, Option<Vec<Segment>>), TarError> {
        let (map, real_size) = if header.typeflag() == b'S' {
            let real_size = header.gnu_real_size();
            (self.gnu_map(header)?, real_size)
        } else if pax.sparse.map_in_data {
            (self.pax_map()?, pax.sparse.real_size)
        } else if pax.sparse.is_present() {
            (pax.sparse.map.take().unwrap_or_default(), pax.sparse.real_size)
        } else {
            return Ok((self.remaining, None));
        };
        let real_size = real_size.ok_or_else(|| self.malformed("its sparse file has no size"))?;
        let map = sparse::check(map, real_size, self.remaining).map_err(|reason| self.malformed(reason))?;
        Ok((real_size, Some(map)))
    }

    /// The old GNU map: four descriptors in the header, 21 in each extension block.
    fn gnu_map(&mut self, header: &Header<'_>) -> Result<Vec<Segment>, TarError> {
        let mut map = Vec::new();
        let read = |bytes: &[u8], map: &mut Vec<Segment>| sparse::gnu_descriptors(bytes, map);
        read(header.gnu_sparse(), &mut map).map_err(|reason| self.malformed(reason))?;
        let mut extended = header.gnu_is_extended();
        while extended {
            self.check_segments(map.len())?;
            let block = self.block()?.ok_or_else(|| truncated(&self.path))?;
            read(&block[..504], &mut map).map_err(|reason| self.malformed(reason))?;
            extended = block[504] != 0;
        }
        Ok(map)
    }

    /// The PAX 1.0 map: decimal numbers, one a line, before the data and padded to a block.
    fn pax_map(&mut self) -> Result<Vec<Segment>, TarError> {
        let mut number = PaxNumbers { line: Vec::new(), block: Vec::new() };
        let count: u64 = number.next(self)?;
        self.check_segments(usize::try_from(count).unwrap_or(usize::MAX))?;
        let mut map = Vec::new();
        for _ in 0..count {
            map.push(Segment { offset: number.next(self)?, length: number.next(self)? });
        }
        Ok(map)
    }

    fn check_xattrs(&self, pax: &Extensions) -> Result<(), TarError> {
        let size: usize = pax.xattrs.iter().map(|(name, value)| name.len() + value.len()).sum();
        if size > self.limits.xattr_size {
            let what = format!("a file with {size} bytes of extended attributes");
            return Err(self.over(what, "xattr_size", self.limits.xattr_size as u64));
        }
        Ok(())
    }

    fn check_segments(&self, count: usize) -> Result<(), TarError> {
        let limit = self.limits.sparse_segments;
        if count > limit {
            return Err(self.over(
                format!("a sparse file of {count} segments"),
                "sparse_segments",
                limit as u64,
            ));
        }
        Ok(())
    }

    fn over(&self, what: String, name: &'static str, limit: u64) -> TarError {
        TarError::Limit { what, name, limit }
    }

    fn malformed(&self, reason: impl Into<String>) -> TarError {
        TarError::Malformed { entry: self.path.clone(), reason: reason.into() }
    }
}

/// Reads the lines of a PAX 1.0 sparse map, block by block, since only whole blocks belong to it.
struct PaxNumbers {
    line: Vec<u8>,
    /// What is left of the current block, reversed.
    block: Vec<u8>,
}

impl PaxNumbers {
    fn next<R: BufRead>(&mut self, reader: &mut Reader<'_, R>) -> Result<u64, TarError> {
        self.line.clear();
        loop {
            let byte = match self.block.pop() {
                Some(byte) => byte,
                None if reader.remaining < BLOCK as u64 => {
                    return Err(reader.malformed("its sparse map is longer than its data"));
                }
                None => {
                    let block = reader.block()?.ok_or_else(|| truncated(&reader.path))?;
                    reader.remaining -= BLOCK as u64;
                    self.block.extend(block.iter().rev());
                    continue;
                }
            };
            if byte == b'\n' {
                return pax::decimal(&self.line)
                    .map_err(|reason| reader.malformed(format!("sparse map: {reason}")));
            }
            if self.line.len() >= 20 {
                return Err(reader.malformed("its sparse map has a number of more than 20 digits"));
            }
            self.line.push(byte);
        }
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn truncated(entry: &[u8]) -> TarError {
    let after = String::from_utf8_lossy(&entry[..entry.len().min(128)]).into_owned();
    TarError::Io(io::Error::new(
        io::ErrorKind::UnexpectedEof,
        format!("the archive is cut off in or after {after:?}"),
    ))
}
