//! The bytes of processes: between pipes or terminals in the guest and the channel's streams.
//!
//! Each direction is one small task with one buffer. It reads only when the other side has taken what it read before, so a
//! process whose output nobody takes waits in write(2), and nothing else does.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use kapsel_channel::Stream;
use kapsel_protocol::limits::{HEADER_DEADLINE, STREAM_DEADLINE, WAITING_STREAMS_MAX};
use kapsel_protocol::stdio::{Header, Kind, Token};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::sync::oneshot;

/// Bytes that a pump moves at a time.
const CHUNK: usize = 32 * 1024;

type Key = (Token, Kind);

/// The streams of a session that wait for their request, and the requests that wait for their streams.
#[derive(Debug, Default)]
pub struct Streams(Mutex<Waiting>);

#[derive(Debug, Default)]
struct Waiting {
    streams: HashMap<Key, (Stream, Instant)>,
    claims: HashMap<Key, oneshot::Sender<Stream>>,
}

impl Streams {
    /// Takes in a new stream: reads its header and gives it to the request that claims it. A stream without a valid header,
    /// or above the limits, is reset.
    pub async fn accept(&self, mut stream: Stream) {
        let header = tokio::time::timeout(HEADER_DEADLINE, read_header(&mut stream)).await;
        let Ok(Ok(header)) = header else { return };
        let key = (header.token, header.kind);
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.streams.retain(|_, (_, since)| since.elapsed() < STREAM_DEADLINE);
        waiting.claims.retain(|_, claim| !claim.is_closed());
        match waiting.claims.remove(&key) {
            // A claim that has just been given up resets the stream.
            Some(claim) => drop(claim.send(stream)),
            None if waiting.streams.len() < WAITING_STREAMS_MAX => {
                waiting.streams.entry(key).or_insert((stream, Instant::now()));
            }
            None => {}
        }
    }

    /// Announces a stream, now, so that it is known when the host opens it; the future waits for it.
    pub fn claim(&self, token: Token, kind: Kind) -> impl Future<Output = Option<Stream>> + Send + use<> {
        let (sender, receiver) = oneshot::channel();
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        match waiting.streams.remove(&(token, kind)) {
            // The receiver is right here.
            Some((stream, _)) => drop(sender.send(stream)),
            None => drop(waiting.claims.insert((token, kind), sender)),
        }
        async move { tokio::time::timeout(STREAM_DEADLINE, receiver).await.ok()?.ok() }
    }
}

async fn read_header(stream: &mut Stream) -> io::Result<Header> {
    let mut line = [0; Header::MAX];
    stream.read_exact(&mut line[..Header::MIN]).await?;
    let mut len = Header::MIN;
    while line[len - 1] != b'\n' {
        if len == Header::MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut line[len..=len]).await?;
        len += 1;
    }
    Header::parse(&line[..len - 1]).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

/// A descriptor of our own for use with tokio.
///
/// # Errors
/// When it cannot be made non-blocking or watched.
pub fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    crate::sys::in_event_loop(fd, interest)
}

async fn read(fd: &AsyncFd<OwnedFd>, buffer: &mut [u8]) -> io::Result<usize> {
    let mut read = |fd: &OwnedFd| rustix::io::read(fd, &mut *buffer).map_err(io::Error::from);
    fd.async_io(Interest::READABLE, |fd| read(fd)).await
}

async fn write_all(fd: &AsyncFd<OwnedFd>, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let n = fd
            .async_io(Interest::WRITABLE, |fd| rustix::io::write(fd, data).map_err(io::Error::from))
            .await?;
        data = &data[n..];
    }
    Ok(())
}

/// Copies a process's output to its stream until all its writers are gone, and then says that it was all. If the host never
/// opens the stream or stops listening, the process's next write fails.
pub async fn output(pipe: AsyncFd<OwnedFd>, stream: impl Future<Output = Option<Stream>>) {
    if let Some(mut stream) = stream.await {
        let mut buffer = vec![0; CHUNK];
        loop {
            match read(&pipe, &mut buffer).await {
                // An error of the shutdown is the host's having gone.
                Ok(0) => return drop(stream.shutdown().await),
                Ok(n) if stream.write_all(&buffer[..n]).await.is_ok() => {}
                _ => return,
            }
        }
    }
}

/// Copies a stream to a process's input until the host half-closes it or all its readers are gone.
pub async fn input(pipe: AsyncFd<OwnedFd>, stream: impl Future<Output = Option<Stream>>) {
    let Some(mut stream) = stream.await else { return };
    let mut buffer = vec![0; CHUNK];
    loop {
        let read = tokio::select! {
            biased;
            // A pipe whose readers are gone reports an error, without anything being written.
            _ = pipe.ready(Interest::ERROR) => return,
            read = stream.read(&mut buffer) => read,
        };
        match read {
            Ok(n) if n > 0 && write_all(&pipe, &buffer[..n]).await.is_ok() => {}
            _ => return,
        }
    }
}

/// Copies in both directions between a terminal and its stream, until the last process has closed the terminal. Without a
/// stream the output is read and forgotten, as a terminal that is not attached does.
pub async fn terminal(master: Arc<AsyncFd<OwnedFd>>, stream: impl Future<Output = Option<Stream>>) {
    let mut buffer = vec![0; CHUNK];
    let Some(stream) = stream.await else {
        while let Ok(1..) = read(&master, &mut buffer).await {}
        return;
    };
    let (mut from_host, mut to_host) = tokio::io::split(stream);
    let input = async {
        let mut buffer = vec![0; 4096];
        while let Ok(n @ 1..) = from_host.read(&mut buffer).await {
            if write_all(&master, &buffer[..n]).await.is_err() {
                break;
            }
        }
        // The host's end of input does not end the terminal.
        std::future::pending::<()>().await
    };
    let output = async {
        // EIO: nobody has the other side open any more.
        while let Ok(n @ 1..) = read(&master, &mut buffer).await {
            if to_host.write_all(&buffer[..n]).await.is_err() {
                break;
            }
        }
        // An error of the shutdown is the host's having gone.
        let _ = to_host.shutdown().await;
    };
    tokio::select! {
        () = output => {}
        () = input => {}
    }
    // Whoever still writes to the terminal must not wait for a host that has gone.
    while let Ok(1..) = read(&master, &mut buffer).await {}
}
