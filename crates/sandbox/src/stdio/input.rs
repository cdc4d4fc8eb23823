//! To a process: several sources, one stream.

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::unix::pipe,
    sync::mpsc,
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
pub(super) struct Closer(mpsc::Sender<Piece>);

impl Closer {
    /// As if the source had ended.
    pub(super) async fn close(&self) {
        // The pump is gone when the input has ended already.
        let _ = self.0.send(Piece::End).await;
    }
}

/// Opens the FIFO of an input endpoint. For reading and writing: it then does not end when a writer does, but with
/// `CloseIO`, as containerd's clients expect.
pub(super) fn fifo(endpoint: &Endpoint) -> Result<Option<pipe::Receiver>, Error> {
    match endpoint {
        Endpoint::Fifo(path) => {
            let open = pipe::OpenOptions::new().read_write(true).open_receiver(path);
            open.map(Some).map_err(|source| Error::Open { path: path.clone(), source })
        }
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
    let closer = Closer(sender.clone());
    (tokio::spawn(pump(guest, attachers, fifo, ends, sender, pieces)), closer)
}

async fn pump(
    mut guest: impl AsyncWrite + Unpin,
    mut attachers: mpsc::Receiver<Attacher>,
    fifo: Option<pipe::Receiver>,
    ends: bool,
    sender: mpsc::Sender<Piece>,
    mut pieces: mpsc::Receiver<Piece>,
) {
    // Dropped, and with it all sources, when the input ends.
    let mut sources = JoinSet::new();
    if let Some(fifo) = fifo {
        sources.spawn(feed(fifo, Closer(sender.clone()), false));
    }
    loop {
        tokio::select! {
            Some(attacher) = attachers.recv() => {
                // Only the receiving half is used; the client sees the end of its connection when the input ends.
                sources.spawn(feed(attacher.connection, Closer(sender.clone()), ends));
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
                if to.0.send(Piece::Bytes(bytes)).await.is_err() {
                    return;
                }
            }
        }
    }
    if ends {
        to.close().await;
    }
}
