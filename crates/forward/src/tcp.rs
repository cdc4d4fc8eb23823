//! Connections.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rustix::net::sockopt::{set_socket_keepalive, set_socket_linger};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

/// How long a sandbox may take to accept.
const CONNECT: Duration = Duration::from_secs(10);
/// Bytes of a connection on their way, in each direction: what one side does not take, the other may not send.
const BUFFER: usize = 64 << 10;
/// Before the next try, when there is not enough of something to accept a connection.
const PAUSE: Duration = Duration::from_millis(100);

/// Carries connections for as long as the process lives.
pub async fn serve(listener: TcpListener, to: SocketAddr, slots: Arc<Semaphore>) {
    loop {
        // The semaphore is never closed.
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(async move {
                    carry(client, to).await;
                    drop(slot);
                });
            }
            Err(_) => tokio::time::sleep(PAUSE).await,
        }
    }
}

/// Carries one connection to its end. An end of one direction is passed on and leaves the other one open; a reset is passed on as a
/// reset.
async fn carry(mut client: TcpStream, to: SocketAddr) {
    let connected = tokio::time::timeout(CONNECT, TcpStream::connect(to)).await;
    let Ok(Ok(mut guest)) = connected else { return reset(&client) };
    for stream in [&client, &guest] {
        // Small writes are as urgent here as where they were made; a peer that is gone is found out one day.
        let _ = stream.set_nodelay(true);
        let _ = set_socket_keepalive(stream, true);
    }
    if copy_bidirectional_with_sizes(&mut client, &mut guest, BUFFER, BUFFER).await.is_err() {
        reset(&client);
        reset(&guest);
    }
}

/// Lets the other side see that something has failed, when the stream is closed.
fn reset(stream: &TcpStream) {
    let _ = set_socket_linger(stream, Some(Duration::ZERO));
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn forwarded(slots: usize) -> (SocketAddr, TcpListener) {
        let guest = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = front.local_addr().unwrap();
        tokio::spawn(serve(front, guest.local_addr().unwrap(), Arc::new(Semaphore::new(slots))));
        (at, guest)
    }

    #[tokio::test]
    async fn an_end_of_one_direction_leaves_the_other_open() {
        let (at, guest) = forwarded(1).await;
        let mut client = TcpStream::connect(at).await.unwrap();
        let (mut served, _) = guest.accept().await.unwrap();
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut got = String::new();
        served.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "question");
        served.write_all(b"answer").await.unwrap();
        drop(served);
        got.clear();
        client.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "answer");
    }

    #[tokio::test]
    async fn who_does_not_read_holds_the_writer_up() {
        let (at, guest) = forwarded(1).await;
        let mut client = TcpStream::connect(at).await.unwrap();
        let (mut served, _) = guest.accept().await.unwrap();
        let chunk = vec![7; 1 << 20];
        let mut written = 0_usize;
        while let Ok(result) = tokio::time::timeout(Duration::from_millis(500), client.write(&chunk)).await {
            written += result.unwrap();
            assert!(written < 256 << 20, "nobody reads, and everything is taken");
        }
        drop(tokio::spawn(async move { client.shutdown().await.map(|()| client) }).await);
        let mut got = Vec::new();
        served.read_to_end(&mut got).await.unwrap();
        assert_eq!(got.len(), written);
    }

    #[tokio::test]
    async fn failures_are_told_apart_from_ends() {
        let (at, guest) = forwarded(1).await;
        drop(guest);
        let mut client = TcpStream::connect(at).await.unwrap();
        let error = client.read_u8().await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "nobody listens");
    }

    #[tokio::test]
    async fn the_next_waits_for_a_slot() {
        let (at, guest) = forwarded(1).await;
        let first = TcpStream::connect(at).await.unwrap();
        let (_served, _) = guest.accept().await.unwrap();
        let _second = TcpStream::connect(at).await.unwrap();
        let early = tokio::time::timeout(Duration::from_millis(200), guest.accept()).await;
        assert!(early.is_err(), "there is only one slot");
        drop((first, _served));
        guest.accept().await.unwrap();
    }
}
