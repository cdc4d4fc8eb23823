//! To a process: several sources, one stream.

use std::sync::Arc;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    sync::{Notify, mpsc},
    task::{JoinHandle, JoinSet},
};

use super::{Attacher, Endpoint, Error, PIECE};

/// What a source has.
enum Piece {
    Bytes(Vec<u8>),
    End,
}

/// Ends a process's input from elsewhere, and feeds it.
#[derive(Clone, Debug)]
pub(super) struct Closer {
    pieces: mpsc::Sender<Piece>,
    /// For the reader of a FIFO, which first takes what is in it.
    closing: Arc<Notify>,
    has_fifo: bool,
}

impl Closer {
    /// Ends the input, but for what a FIFO holds already.
    pub(super) async fn close(&self) {
        match self.has_fifo {
            true => self.closing.notify_one(),
            false => self.end().await,
        }
    }

    /// As if the source had ended.
    async fn end(&self) {
        // The pump is gone when the input has ended already.
        let _ = self.pieces.send(Piece::End).await;
    }
}

/// Opens the FIFO of an input endpoint. It ends with its last writer, as a pipe does; a terminal's does not, so that a client can come
/// back to it.
pub(super) fn fifo(endpoint: &Endpoint, terminal: bool) -> Result<Option<pipe::Receiver>, Error> {
    match endpoint {
        Endpoint::Fifo(path) => {
            let open = pipe::OpenOptions::new().read_write(terminal).open_receiver(path);
            open.map(Some).map_err(|source| Error::Open { path: path.clone(), source })
        }
        Endpoint::Logger(program) => Err(Error::BadUri(format!("binary://{}", program.path().display()))),
        Endpoint::File(path) => Err(Error::BadUri(format!("file://{}", path.display()))),
        Endpoint::Nowhere | Endpoint::Kapsel { .. } => Ok(None),
    }
}

/// Starts the pump to `guest`. `ends`: whether the end of an attacher's bytes is the end of the input.
pub(super) fn start(
    guest: impl AsyncWrite + Unpin + Send + 'static,
    attachers: mpsc::Receiver<Attacher>,
    fifo: Option<pipe::Receiver>,
    ends: bool,
) -> (JoinHandle<()>, Closer) {
    // One piece waits while another is written: that is all the memory this takes.
    let (sender, pieces) = mpsc::channel(1);
    let closer = Closer { pieces: sender, closing: Arc::default(), has_fifo: fifo.is_some() };
    (tokio::spawn(pump(guest, attachers, fifo, ends, closer.clone(), pieces)), closer)
}

async fn pump(
    mut guest: impl AsyncWrite + Unpin,
    mut attachers: mpsc::Receiver<Attacher>,
    fifo: Option<pipe::Receiver>,
    ends: bool,
    closer: Closer,
    mut pieces: mpsc::Receiver<Piece>,
) {
    // Dropped, and with it all sources, when the input ends.
    let mut sources = JoinSet::new();
    if let Some(fifo) = fifo {
        sources.spawn(feed_from_fifo(fifo, closer.clone()));
    }
    loop {
        tokio::select! {
            Some(attacher) = attachers.recv() => {
                // Only the receiving half is used; the client sees the end of its connection when the input ends.
                sources.spawn(feed(attacher.connection, closer.clone(), ends));
            }
            Some(_) = sources.join_next() => {}
            piece = pieces.recv() => match piece {
                Some(Piece::Bytes(bytes)) => {
                    let sent = async {
                        guest.write_all(&bytes).await?;
                        guest.flush().await
                    };
                    if sent.await.is_err() {
                        // The process closed its input, or is gone.
                        return;
                    }
                }
                Some(Piece::End) | None => {
                    let _ = guest.shutdown().await;
                    return;
                }
            },
        }
    }
}

/// Moves bytes from a FIFO to the pump, until its last writer ends or the input is to be closed.
async fn feed_from_fifo(mut fifo: pipe::Receiver, to: Closer) {
    let mut bytes = vec![0; PIECE];
    loop {
        tokio::select! {
            read = fifo.read(&mut bytes) => match read {
                Ok(n) if n > 0 => {
                    if to.pieces.send(Piece::Bytes(bytes[..n].to_vec())).await.is_err() {
                        return;
                    }
                }
                _ => return to.end().await,
            },
            () = to.closing.notified() => break,
        }
    }
    // What was written before the order to close comes before the end. Asked of the kernel: the reactor may not have heard of it yet.
    while let Ok(n) = rustix::io::read(&fifo, &mut bytes)
        && n > 0
    {
        if to.pieces.send(Piece::Bytes(bytes[..n].to_vec())).await.is_err() {
            return;
        }
    }
    to.end().await;
}

/// Moves bytes from a source to the pump.
pub(super) async fn feed(mut source: impl AsyncRead + Unpin, to: Closer, ends: bool) {
    // Small for keys, growing to full pieces for bulk.
    let mut size = 4096;
    loop {
        let mut bytes = vec![0; size];
        match source.read(&mut bytes).await {
            Ok(0) | Err(_) => break,
            Ok(n) => {
                if n == size {
                    size = (size * 2).min(PIECE);
                }
                bytes.truncate(n);
                if to.pieces.send(Piece::Bytes(bytes)).await.is_err() {
                    return;
                }
            }
        }
    }
    if ends {
        to.end().await;
    }
}
