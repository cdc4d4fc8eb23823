//! Many streams on one transport: yamux version 0, with the port of a stream in its first four bytes (little endian).
//!
//! Written here rather than taken from the `yamux` crate because of three things that this place needs: what a peer can
//! make this side hold is bounded by bytes received, not by frames (the crate keeps one allocation per frame, so that
//! 1-byte frames cost it about 60 times their size); a session can begin and end again on a transport that stays; and
//! the guest's side is short enough to be fast when every instruction of it has to be translated first. The tests run it against
//! that crate.
//!
//! One task per session ([`driver`]) moves bytes between the transport and [`state`]; streams touch only the state.

mod driver;
mod state;
mod stream;

use std::future::poll_fn;
use std::sync::Arc;
use std::task::Poll;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinHandle;

use crate::{Channel, Error, Result, Stream};
use state::Shared;
use stream::MuxStream;

pub(crate) use driver::Unread;

/// Which side of the session this is: yamux numbers the host's streams odd, the guest's even.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// yamux's client.
    Host,
    /// yamux's server.
    Guest,
}

/// A session. Cloning gives another handle; dropping the last one ends it.
#[derive(Clone)]
pub struct Mux(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.lock().close();
    }
}

impl Mux {
    /// Runs a session over `io`. `received` are bytes of it that were read already.
    ///
    /// Must be called within a tokio runtime, which runs the session's task.
    pub fn new(
        io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        side: Side,
        received: Vec<u8>,
    ) -> Mux {
        Self::start(io, side, received, None).0
    }

    pub(crate) fn start(
        io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        side: Side,
        received: Vec<u8>,
        unread: Option<Unread>,
    ) -> (Mux, JoinHandle<()>) {
        let shared = Arc::new(Shared::new(side));
        let task = tokio::spawn(driver::run(shared.clone(), io, received, unread));
        (Mux(Arc::new(Handle { shared })), task)
    }

    /// Waits until the session has ended, and tells why.
    pub async fn closed(&self) -> Error {
        poll_fn(|cx| {
            let mut state = self.0.shared.lock();
            match &state.ended {
                Some(error) => Poll::Ready(error.clone()),
                None => {
                    state.watchers.push(cx.waker().clone());
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Ends the session: what was written is still sent (as far as the peer takes it), then the transport is closed.
    pub fn close(&self) {
        self.0.shared.lock().close();
    }
}

impl std::fmt::Debug for Mux {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Mux").finish_non_exhaustive()
    }
}

#[async_trait::async_trait]
impl Channel for Mux {
    async fn open(&self, port: u32) -> Result<Stream> {
        let id = poll_fn(|cx| self.0.shared.lock().poll_open(cx, port)).await?;
        Ok(Stream::new(MuxStream::new(self.0.shared.clone(), id)))
    }

    async fn accept(&self) -> Result<(u32, Stream)> {
        let (port, id) = poll_fn(|cx| self.0.shared.lock().poll_accept(cx)).await?;
        Ok((port, Stream::new(MuxStream::new(self.0.shared.clone(), id))))
    }
}
