//! Layers as streams of tar, read and decompressed in a thread of their own.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use crate::digest::Hasher;
use crate::{Digest, Error, Limits, Result};

/// Bytes of one piece. Small enough that hashing and copying it find it in the processor's cache.
const PIECE: usize = 256 << 10;
/// Pieces in flight.
const PIECES: usize = 8;

/// How a stream is compressed. Told by its first bytes: media types are often wrong, and archives have none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Compression {
    /// Bytes that [`detect`](Compression::detect) looks at.
    pub(crate) const PREFIX: usize = 4;

    pub(crate) fn detect(prefix: &[u8]) -> Compression {
        match prefix {
            [0x1f, 0x8b, ..] => Compression::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
            // A skippable frame: some writers put one first.
            [magic, 0x2a, 0x4d, 0x18, ..] if magic & 0xf0 == 0x50 => Compression::Zstd,
            _ => Compression::None,
        }
    }

    /// Decompresses `input`.
    pub(crate) fn reader<'a>(self, input: impl BufRead + Send + 'a) -> io::Result<Box<dyn Read + Send + 'a>> {
        Ok(match self {
            Compression::None => Box::new(input),
            Compression::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(input)),
            Compression::Zstd => {
                let mut decoder = zstd::Decoder::with_buffer(input)?;
                // The largest window that decoders must support by default (zstd's own limit): 128 MiB.
                decoder.window_log_max(27)?;
                Box::new(decoder)
            }
        })
    }
}

/// A compressed or uncompressed stream, as its content; its compression is detected. The bounds of [`Limits`] on what
/// it may decompress to hold, with `stored` as its compressed size where that is known.
pub(crate) struct Decoder {
    label: String,
    pieces: Receiver<Vec<u8>>,
    recycle: Sender<Vec<u8>>,
    thread: Option<JoinHandle<Result<Option<Digest>>>>,
    /// Where this side hashes. That of two threads does it which has less to do: the other one while it only reads,
    /// and this one while the other decompresses, which takes as long as all the rest.
    hasher: Option<Hasher>,
    digest: Option<Digest>,
    current: Vec<u8>,
    consumed: usize,
}

impl Decoder {
    /// Starts to decode `file`, which has `stored` bytes. `label` names it in errors.
    pub(crate) fn start(file: File, stored: u64, label: &str, limits: &Limits) -> Result<Decoder> {
        let (sender, pieces) = sync_channel(PIECES);
        let (recycle, recycled) = channel();
        let compression = detect(&file).map_err(|error| Error::malformed(label, error))?;
        let compressed = compression != Compression::None;
        let producer = Producer {
            sender,
            recycled,
            label: label.to_owned(),
            stored,
            limits: limits.clone(),
            compression,
            hasher: (!compressed).then(Hasher::default),
        };
        let thread = std::thread::Builder::new().name("decode".into()).spawn(move || producer.run(file));
        let thread = thread.map_err(|source| Error::Io {
            action: "start a thread to decode",
            path: label.into(),
            source,
        })?;
        Ok(Decoder {
            label: label.to_owned(),
            pieces,
            recycle,
            thread: Some(thread),
            hasher: compressed.then(Hasher::default),
            digest: None,
            current: Vec::new(),
            consumed: 0,
        })
    }

    /// The digest of the whole decompressed content, which must have been read to its end.
    pub(crate) fn digest(&self) -> Result<Digest> {
        self.digest.ok_or_else(|| Error::malformed(self.label.clone(), "it was not read to its end"))
    }
}

impl BufRead for Decoder {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.consumed == self.current.len() {
            self.consumed = 0;
            match self.pieces.recv() {
                Ok(piece) => {
                    if let Some(hasher) = &mut self.hasher {
                        hasher.update(&piece);
                    }
                    let used = std::mem::replace(&mut self.current, piece);
                    // The thread may have ended already, having read everything.
                    let _ = self.recycle.send(used);
                }
                Err(_) => {
                    self.current.clear();
                    if let Some(thread) = self.thread.take() {
                        let result = thread.join().unwrap_or_else(|_| {
                            Err(Error::malformed(self.label.clone(), "its decoder failed unexpectedly"))
                        });
                        let theirs = result.map_err(io::Error::other)?;
                        self.digest = theirs.or(self.hasher.take().map(Hasher::finish));
                    }
                }
            }
        }
        Ok(&self.current[self.consumed..])
    }

    fn consume(&mut self, amount: usize) {
        self.consumed += amount;
    }
}

impl Read for Decoder {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let length = available.len().min(out.len());
        out[..length].copy_from_slice(&available[..length]);
        self.consume(length);
        Ok(length)
    }
}

struct Producer {
    sender: SyncSender<Vec<u8>>,
    recycled: Receiver<Vec<u8>>,
    label: String,
    stored: u64,
    limits: Limits,
    compression: Compression,
    hasher: Option<Hasher>,
}

impl Producer {
    fn run(mut self, file: File) -> Result<Option<Digest>> {
        // Large reads pass through it without a copy.
        let input = BufReader::with_capacity(PIECE, file);
        let label = self.label.clone();
        let failed = |error: io::Error| Error::malformed(label.clone(), error);
        let mut reader = self.compression.reader(input).map_err(failed)?;
        let mut total = 0;
        loop {
            let mut piece = self.recycled.try_recv().unwrap_or_default();
            piece.resize(PIECE, 0);
            let length = fill(&mut reader, &mut piece).map_err(failed)?;
            piece.truncate(length);
            total += length as u64;
            self.check(total)?;
            if let Some(hasher) = &mut self.hasher {
                hasher.update(&piece);
            }
            // When nobody listens any more, the layer has been refused.
            if length == 0 || self.sender.send(piece).is_err() {
                return Ok(self.hasher.map(Hasher::finish));
            }
        }
    }

    fn check(&self, total: u64) -> Result<()> {
        let Limits { layer_size, ratio, ratio_floor, .. } = self.limits;
        if total > layer_size {
            let what = format!("{}, decompressed to more than {layer_size} bytes,", self.label);
            return Err(Error::limit(what, "layer_size", layer_size));
        }
        if total > ratio_floor && total / ratio > self.stored {
            let what = format!("{}, which became {ratio} times larger by decompression,", self.label);
            return Err(Error::limit(what, "ratio", ratio));
        }
        Ok(())
    }
}

/// How a file is compressed. Does not move its position.
fn detect(file: &File) -> io::Result<Compression> {
    let mut prefix = [0; Compression::PREFIX];
    let length = file.read_at(&mut prefix, 0)?;
    Ok(Compression::detect(&prefix[..length]))
}

/// Reads until `buffer` is full or the input ends.
fn fill(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}
