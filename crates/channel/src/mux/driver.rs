//! The task of a session: transport on one side, [`State`](super::state::State) on the other.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::state::{Payload, Shared};
use crate::frame::{HEADER, Header};
use crate::{Error, Result, preamble};

/// How long a closed session may take to send what was written before.
const LINGER: Duration = Duration::from_secs(2);

/// Bytes read from the transport at once.
const READ: usize = 32 * 1024;

/// Reads in a row before other tasks get a turn.
const READS_PER_TURN: usize = 16;

/// Where a session leaves bytes that belong to the next one on the same transport.
pub(crate) type Unread = Arc<Mutex<Vec<u8>>>;

/// Runs a session to its end.
pub(super) async fn run(
    shared: Arc<Shared>,
    io: impl AsyncRead + AsyncWrite + Unpin,
    received: Vec<u8>,
    unread: Option<Unread>,
) {
    let mut driver = Driver { shared: &shared, io, input: Input::default(), output: Vec::new(), written: 0 };
    let error = match driver.input.take(&shared, &received) {
        Err(error) => error,
        Ok(()) => poll_fn(|cx| driver.poll(cx)).await,
    };
    if matches!(error, Error::Closed) && shared.lock().closing {
        let _ = tokio::time::timeout(LINGER, poll_fn(|cx| driver.poll_write(cx))).await;
        let _ = tokio::time::timeout(LINGER, poll_fn(|cx| Pin::new(&mut driver.io).poll_flush(cx))).await;
    }
    tracing::debug!(%error, "session ended");
    if let Some(unread) = unread {
        *unread.lock().unwrap_or_else(PoisonError::into_inner) =
            std::mem::take(&mut driver.input.next_session);
    }
    shared.lock().end(error);
}

struct Driver<'a, T> {
    shared: &'a Shared,
    io: T,
    input: Input,
    output: Vec<u8>,
    written: usize,
}

impl<T: AsyncRead + AsyncWrite + Unpin> Driver<'_, T> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Error> {
        {
            let mut state = self.shared.lock();
            if state.closing {
                return Poll::Ready(Error::Closed);
            }
            state.driver = Some(cx.waker().clone());
        }
        // Writing comes first and reading last: a transport with one readiness for both (the guest's port) may hand
        // its event to whichever asks first, and reading always tries before it waits.
        for _ in 0..READS_PER_TURN {
            if let Poll::Ready(Err(error)) = self.poll_write(cx) {
                return Poll::Ready(error.into());
            }
            match self.poll_read(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(error),
                Poll::Pending => return Poll::Pending,
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Ready when everything is written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        loop {
            if self.written == self.output.len() {
                self.output.clear();
                self.written = 0;
                if !self.shared.lock().take_output(&mut self.output) {
                    return Poll::Ready(Ok(()));
                }
            }
            let n = ready!(Pin::new(&mut self.io).poll_write(cx, &self.output[self.written..]))?;
            if n == 0 {
                return Poll::Ready(Err(std::io::ErrorKind::WriteZero.into()));
            }
            self.written += n;
            self.shared.lock().sent(n);
        }
    }

    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<()>> {
        let mut buffer = [std::mem::MaybeUninit::uninit(); READ];
        let mut buffer = ReadBuf::uninit(&mut buffer);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut buffer))?;
        if buffer.filled().is_empty() {
            return Poll::Ready(Err(Error::Closed));
        }
        Poll::Ready(self.input.take(self.shared, buffer.filled()))
    }
}

/// The parser of what arrives. Holds at most one partial header.
#[derive(Default)]
struct Input {
    header: [u8; HEADER],
    have: usize,
    payload: Option<Payload>,
    /// From the first byte of a preamble on: what belongs to the next session.
    next_session: Vec<u8>,
}

impl Input {
    fn take(&mut self, shared: &Shared, mut bytes: &[u8]) -> Result<()> {
        let mut state = shared.lock();
        while !bytes.is_empty() {
            if let Some(payload) = &mut self.payload {
                let n = bytes.len().min(payload.left as usize);
                state.on_payload(payload.stream, &bytes[..n]);
                bytes = &bytes[n..];
                payload.left -= n as u32;
                if payload.left == 0 {
                    let Payload { stream, finish, .. } = *payload;
                    self.payload = None;
                    if finish {
                        state.on_fin(stream)?;
                    }
                }
                continue;
            }
            if self.have == 0 && bytes[0] == preamble::MAGIC[0] {
                self.next_session = bytes.to_vec();
                return Err(Error::Closed);
            }
            let n = bytes.len().min(HEADER - self.have);
            self.header[self.have..self.have + n].copy_from_slice(&bytes[..n]);
            self.have += n;
            bytes = &bytes[n..];
            if self.have == HEADER {
                self.have = 0;
                let header = Header::decode(&self.header).ok_or(Error::Protocol("a malformed frame"))?;
                self.payload = state.on_header(header)?;
            }
        }
        Ok(())
    }
}
