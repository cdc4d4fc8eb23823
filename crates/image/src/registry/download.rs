//! Downloading blobs: once however many ask for them, resumed where they broke off, verified before they have a name.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use futures::StreamExt;
use oci_spec::image::Descriptor;
use reqwest::StatusCode;
use tokio::sync::mpsc;

use super::session::{ATTEMPTS, PAUSE, Refusal, Session, cut, failure};
use crate::digest::Hasher;
use crate::error::{IoContext, Result};
use crate::progress::{Phase, Progress, ProgressItem};
use crate::store::{Claim, Claimed, LOCK_POLL, Store, digest_of};
use crate::{Digest, Error};

/// Bytes by which an attempt counts as one that got on. Without a least number, a registry could drop the connection
/// after every byte, and never be given up.
const PROGRESS: u64 = 16 << 10;
/// Pieces between the network and the disk.
const PIECES: usize = 16;

/// Brings the blob into the store, unless it is there.
pub(super) async fn blob(
    store: &Store,
    session: &Session,
    descriptor: Descriptor,
    progress: &dyn Progress,
) -> Result<()> {
    let (digest, size) = (digest_of(&descriptor)?, descriptor.size());
    let target = store.layout().blob(&digest);
    let partial = store.layout().partial().join(digest.hex());
    let mut item = progress.start(Phase::Download, &digest.short(), Some(size));
    loop {
        match Claim::attempt(&partial, &target)? {
            Claimed::Exists => {
                // Here already, or downloaded by somebody else meanwhile.
                store.blobs().has(&digest, size)?;
                item.advance(size);
                item.done();
                return Ok(());
            }
            Claimed::Busy => tokio::time::sleep(LOCK_POLL).await,
            Claimed::Mine(claim) => {
                let mut download = Download { session, digest, size, reported: 0, item: item.as_mut() };
                match download.run(&claim).await {
                    Ok(()) => claim.complete()?,
                    Err(error) => {
                        if !worth_resuming(&error) {
                            claim.discard()?;
                        }
                        return Err(error);
                    }
                }
                item.done();
                return Ok(());
            }
        }
    }
}

/// Whether the bytes so far are worth keeping after the error. A full disk needs them gone more than they are worth.
fn worth_resuming(error: &Error) -> bool {
    matches!(error, Error::Registry { .. })
}

struct Download<'a> {
    session: &'a Session,
    digest: Digest,
    size: u64,
    /// Bytes that the progress has been told of; it only moves forward.
    reported: u64,
    item: &'a mut dyn ProgressItem,
}

/// How one attempt ended.
enum Attempt {
    /// All bytes are there.
    Complete,
    /// The registry sent less than the blob has.
    Short,
    /// The connection broke.
    Broken(String),
    /// What is there cannot be continued: the registry has nothing from that point on.
    Stale,
}

impl Download<'_> {
    async fn run(&mut self, claim: &Claim) -> Result<()> {
        let what = format!("blob {}", self.digest);
        let mut fresh = false;
        let mut failures = 0;
        loop {
            let mut writer = Writer::resume(claim, self.size).await?;
            let resumed = writer.length;
            fresh |= resumed == 0;
            let attempt = self.attempt(&mut writer).await?;
            let reached = writer.length;
            let digest = writer.finish().await?;
            match attempt {
                Attempt::Complete if digest == self.digest => return Ok(()),
                // What an earlier pull left may have been bad.
                Attempt::Complete if !fresh => truncate(claim)?,
                Attempt::Complete => {
                    return Err(Error::DigestMismatch { what, expected: self.digest, actual: digest });
                }
                Attempt::Stale if !fresh => truncate(claim)?,
                _ if reached >= resumed + PROGRESS => failures = 0,
                Attempt::Short | Attempt::Stale if failures + 1 >= ATTEMPTS => {
                    return Err(Error::SizeMismatch { what, expected: self.size, actual: reached });
                }
                Attempt::Broken(reason) if failures + 1 >= ATTEMPTS => {
                    let reason =
                        format!("{reason} (after {reached} of {} bytes; pull again to go on)", self.size);
                    return Err(failure(self.session.reference(), &format!("download {what}"), reason));
                }
                _ => {
                    failures += 1;
                    tokio::time::sleep(PAUSE * 2u32.pow(failures)).await;
                }
            }
        }
    }

    async fn attempt(&mut self, writer: &mut Writer) -> Result<Attempt> {
        self.report(writer.length);
        if writer.length == self.size {
            return Ok(Attempt::Complete);
        }
        let what = format!("blob {}", self.digest);
        let (response, start) = match self.session.blob(&self.digest, writer.length).await {
            Ok(answer) => answer,
            Err(Refusal::Status(StatusCode::RANGE_NOT_SATISFIABLE)) => return Ok(Attempt::Stale),
            Err(refusal) if refusal.is_transient() => return Ok(Attempt::Broken(refusal.reason())),
            Err(refusal) => return Err(self.session.error(&format!("download {what}"), &refusal)),
        };
        if start == 0 && writer.length > 0 {
            writer.restart().await?;
        }
        if start != writer.length {
            return Ok(Attempt::Stale);
        }
        let mut body = response.bytes_stream();
        while let Some(piece) = body.next().await {
            let piece = match piece {
                Ok(piece) => piece,
                Err(error) => {
                    return Ok(Attempt::Broken(cut(&format!("the connection broke: {error}"))));
                }
            };
            let reached = writer.length + piece.len() as u64;
            if reached > self.size {
                return Err(Error::SizeMismatch { what, expected: self.size, actual: reached });
            }
            writer.write(piece).await?;
            self.report(writer.length);
        }
        Ok(if writer.length == self.size { Attempt::Complete } else { Attempt::Short })
    }

    fn report(&mut self, length: u64) {
        if length > self.reported {
            self.item.advance(length - self.reported);
            self.reported = length;
        }
    }
}

fn truncate(claim: &Claim) -> Result<()> {
    claim.file.set_len(0).context("truncate", claim.partial())
}

/// Hashes and writes in a blocking thread, so that neither holds up other downloads.
struct Writer {
    length: u64,
    pieces: Option<mpsc::Sender<Message>>,
    thread: tokio::task::JoinHandle<Result<Digest>>,
}

enum Message {
    Data(bytes::Bytes),
    Restart,
}

impl Writer {
    /// Goes on after what the partial file has, which is read to hash it.
    async fn resume(claim: &Claim, size: u64) -> Result<Writer> {
        let path = claim.partial().to_owned();
        let file = claim.file.try_clone().context("open", &path)?;
        let mut length = file.metadata().context("inspect", &path)?.len();
        if length > size {
            truncate(claim)?;
            length = 0;
        }
        let (pieces, receiver) = mpsc::channel(PIECES);
        let thread = tokio::task::spawn_blocking(move || write(file, &path, receiver));
        Ok(Writer { length, pieces: Some(pieces), thread })
    }

    async fn write(&mut self, piece: bytes::Bytes) -> Result<()> {
        self.length += piece.len() as u64;
        self.send(Message::Data(piece)).await
    }

    /// Forgets everything and begins anew.
    async fn restart(&mut self) -> Result<()> {
        self.length = 0;
        self.send(Message::Restart).await
    }

    async fn send(&mut self, message: Message) -> Result<()> {
        let sent = match &self.pieces {
            Some(pieces) => pieces.send(message).await.is_ok(),
            None => false,
        };
        if sent {
            return Ok(());
        }
        // The thread has ended, which it only does before us when it failed.
        self.pieces = None;
        join(&mut self.thread).await.map(drop)
    }

    /// The digest of all that was written.
    async fn finish(mut self) -> Result<Digest> {
        self.pieces = None;
        join(&mut self.thread).await
    }
}

async fn join(thread: &mut tokio::task::JoinHandle<Result<Digest>>) -> Result<Digest> {
    thread.await.unwrap_or_else(|error| {
        Err(Error::Io {
            action: "finish writing",
            path: PathBuf::from("the download"),
            source: std::io::Error::other(error),
        })
    })
}

fn write(mut file: File, path: &Path, mut pieces: mpsc::Receiver<Message>) -> Result<Digest> {
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 256 << 10];
    file.seek(SeekFrom::Start(0)).context("read", path)?;
    loop {
        match file.read(&mut buffer).context("read", path)? {
            0 => break,
            length => hasher.update(&buffer[..length]),
        }
    }
    while let Some(message) = pieces.blocking_recv() {
        match message {
            Message::Data(piece) => {
                hasher.update(&piece);
                file.write_all(&piece).context("write", path)?;
            }
            Message::Restart => {
                hasher = Hasher::default();
                file.set_len(0).context("truncate", path)?;
                file.seek(SeekFrom::Start(0)).context("write", path)?;
            }
        }
    }
    Ok(hasher.finish())
}
