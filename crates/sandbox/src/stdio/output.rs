//! From a process: one stream, several listeners.

use std::{io, sync::PoisonError};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::unix::{OwnedWriteHalf, pipe},
    sync::mpsc,
    task::{JoinHandle, JoinSet},
};

use super::{
    Attacher, Endpoint, Error, Log, PIECE,
    file::BoundedFile,
    input::{Closer, feed},
};
use crate::{logs, record::now};

/// Everybody who gets a stream's bytes.
pub(super) struct Sinks {
    log: Option<(Log, logs::Stream)>,
    fifo: Option<pipe::Sender>,
    file: Option<BoundedFile>,
    attached: Vec<Attached>,
    /// So that a full disk is told once and not for each piece.
    complained: bool,
}

struct Attached {
    connection: OwnedWriteHalf,
    lossless: bool,
}

impl Sinks {
    /// `logger` is what a program reads, for an endpoint that is one.
    pub(super) fn open(
        endpoint: &Endpoint,
        log: Option<Log>,
        logged: logs::Stream,
        logger: Option<pipe::Sender>,
    ) -> Result<Self, Error> {
        let mut sinks = Self { log: None, fifo: None, file: None, attached: Vec::new(), complained: false };
        match endpoint {
            Endpoint::Nowhere | Endpoint::Kapsel { log: false } => {}
            Endpoint::Kapsel { log: true } => sinks.log = log.map(|log| (log, logged)),
            // Opened for reading too, so that it does not matter which side comes first, or that a reader goes.
            Endpoint::Fifo(path) => {
                let open = pipe::OpenOptions::new().read_write(true).open_sender(path);
                sinks.fifo = Some(open.map_err(|source| Error::Open { path: path.clone(), source })?);
            }
            Endpoint::Logger(_) => sinks.fifo = logger,
            Endpoint::File(path) => {
                let open = BoundedFile::open(path);
                sinks.file = Some(open.map_err(|source| Error::Open { path: path.clone(), source })?);
            }
        }
        Ok(sinks)
    }

    /// Gives a piece to everybody; returns when the lossless ones have taken it.
    async fn write(&mut self, bytes: &[u8]) {
        let kept = match (&self.log, &mut self.file) {
            (Some((log, stream)), _) => {
                log.lock().unwrap_or_else(PoisonError::into_inner).append(*stream, now(), bytes)
            }
            (None, Some(file)) => file.append(bytes),
            (None, None) => Ok(()),
        };
        if let Err(error) = kept
            && !std::mem::replace(&mut self.complained, true)
        {
            tracing::warn!(%error, "cannot keep the container's output; it is lost from here on");
        }
        if let Some(fifo) = &mut self.fifo
            && let Err(error) = fifo.write_all(bytes).await
        {
            tracing::warn!(%error, "what the container prints is not read any more; it is lost from here on");
            self.fifo = None;
        }
        let mut at = 0;
        while let Some(attached) = self.attached.get_mut(at) {
            let taken = match attached.lossless {
                true => attached.connection.write_all(bytes).await,
                false => write_now(&attached.connection, bytes),
            };
            match taken {
                Ok(()) => at += 1,
                // It left, or reads too slowly for one that does not hold the process up.
                Err(_) => drop(self.attached.swap_remove(at)),
            }
        }
    }

    fn add(&mut self, connection: OwnedWriteHalf, lossless: bool) {
        self.attached.push(Attached { connection, lossless });
    }
}

/// Writes as much as the socket takes at once: all, or the client is too slow.
fn write_now(connection: &OwnedWriteHalf, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match connection.try_write(bytes)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n => bytes = &bytes[n..],
        }
    }
    Ok(())
}

/// Starts the pump from `guest`; it ends when all was delivered.
pub(super) fn start(
    guest: impl AsyncRead + Unpin + Send + 'static,
    attachers: mpsc::Receiver<Attacher>,
    sinks: Sinks,
) -> JoinHandle<()> {
    tokio::spawn(pump(guest, attachers, sinks, None))
}

/// The same for a terminal, whose attachers also feed `input`.
pub(super) fn start_terminal(
    guest: impl AsyncRead + Unpin + Send + 'static,
    attachers: mpsc::Receiver<Attacher>,
    sinks: Sinks,
    input: Closer,
) -> JoinHandle<()> {
    tokio::spawn(pump(guest, attachers, sinks, Some(input)))
}

async fn pump(
    mut guest: impl AsyncRead + Unpin,
    mut attachers: mpsc::Receiver<Attacher>,
    mut sinks: Sinks,
    input: Option<Closer>,
) {
    let mut feeders = JoinSet::new();
    let mut buffer = Vec::new();
    loop {
        // Grown by the first output: an idle stream costs nothing.
        tokio::select! {
            biased;
            Some(Attacher { connection, lossless }) = attachers.recv() => {
                let (reader, writer) = connection.into_split();
                if let Some(input) = &input {
                    // Closing the connection detaches; it does not end the terminal's input.
                    feeders.spawn(feed(reader, input.clone(), false));
                }
                sinks.add(writer, lossless);
            }
            Some(_) = feeders.join_next() => {}
            read = read_piece(&mut guest, &mut buffer) => match read {
                Ok(0) => return,
                Ok(n) => sinks.write(&buffer[..n]).await,
                Err(error) => {
                    tracing::warn!(%error, "a stream of the container broke off");
                    return;
                }
            },
        }
    }
}

async fn read_piece(guest: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>) -> io::Result<usize> {
    const SMALL: usize = 1024;
    if buffer.is_empty() {
        buffer.resize(SMALL, 0);
    }
    let n = guest.read(buffer).await?;
    if n == buffer.len() && n < PIECE {
        buffer.resize(PIECE, 0);
    }
    Ok(n)
}
