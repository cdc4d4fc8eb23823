//! Who is connected: the process stays until its clients have their answers.

use std::{
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::watch,
};

/// Counts connections.
#[derive(Clone, Debug, Default)]
pub struct Clients {
    count: Arc<watch::Sender<usize>>,
}

impl Clients {
    /// One more, until the returned value is dropped.
    pub fn enter(&self) -> Guest {
        self.count.send_modify(|count| *count += 1);
        Guest(self.clone())
    }

    /// Waits until nobody is connected.
    pub async fn none(&self) {
        // The sender lives as long as `self`.
        let _ = self.count.subscribe().wait_for(|count| *count == 0).await;
    }
}

/// One connection.
#[derive(Debug)]
pub struct Guest(Clients);

impl Drop for Guest {
    fn drop(&mut self) {
        self.0.count.send_modify(|count| *count -= 1);
    }
}

/// A connection that is counted as long as it is open.
#[derive(Debug)]
pub struct Counted {
    stream: UnixStream,
    _guest: Guest,
}

impl Counted {
    /// Counts `stream`.
    pub fn new(stream: UnixStream, clients: &Clients) -> Self {
        Self { stream, _guest: clients.enter() }
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn the_last_one_lets_go() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let clients = Clients::default();
            clients.none().await;
            let (a, _peer) = UnixStream::pair().unwrap();
            let counted = Counted::new(a, &clients);
            let second = clients.enter();
            let soon = Duration::from_millis(20);
            assert!(tokio::time::timeout(soon, clients.none()).await.is_err());
            drop(counted);
            assert!(tokio::time::timeout(soon, clients.none()).await.is_err());
            drop(second);
            clients.none().await;
        });
    }
}
