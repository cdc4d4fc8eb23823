//! Datagrams: each client has a socket of its own towards the sandbox, so that answers find their way back.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc;

/// Clients at a time of one port; datagrams of further ones are lost, as datagrams may be.
const CLIENTS: usize = 256;
/// A client that is not heard of for so long, nor spoken to, is forgotten.
const IDLE: Duration = Duration::from_secs(60);
/// The largest datagram.
const LARGEST: usize = 64 << 10;

/// A client.
struct Flow {
    socket: Arc<UdpSocket>,
    /// It was heard of since somebody looked.
    heard: Arc<AtomicBool>,
}

/// Carries datagrams for as long as the process lives.
pub async fn serve(front: UdpSocket, to: SocketAddr) {
    carry(front, to, IDLE).await;
}

async fn carry(front: UdpSocket, to: SocketAddr, idle: Duration) {
    let front = Arc::new(front);
    let mut flows: HashMap<SocketAddr, Flow> = HashMap::new();
    let (ended, mut ends) = mpsc::channel(CLIENTS);
    let mut datagram = vec![0; LARGEST];
    loop {
        tokio::select! {
            Some(client) = ends.recv() => {
                flows.remove(&client);
            }
            received = front.recv_from(&mut datagram) => {
                // An error is about an earlier datagram, which is lost.
                let Ok((length, client)) = received else { continue };
                if !flows.contains_key(&client) {
                    if flows.len() >= CLIENTS {
                        continue;
                    }
                    let Ok(flow) = begin(to).await else { continue };
                    let (socket, heard) = (flow.socket.clone(), flow.heard.clone());
                    tokio::spawn(answer(socket, heard, front.clone(), client, idle, ended.clone()));
                    flows.insert(client, flow);
                }
                let flow = &flows[&client];
                flow.heard.store(true, Ordering::Relaxed);
                // Full or refused: lost.
                let _ = flow.socket.try_send(&datagram[..length]);
            }
        }
    }
}

async fn begin(to: SocketAddr) -> std::io::Result<Flow> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(to).await?;
    // The first datagram is sent without waiting.
    socket.writable().await?;
    Ok(Flow { socket: Arc::new(socket), heard: Arc::default() })
}

/// Carries answers until it has been still for a while in both directions.
async fn answer(
    socket: Arc<UdpSocket>,
    heard: Arc<AtomicBool>,
    front: Arc<UdpSocket>,
    client: SocketAddr,
    idle: Duration,
    ended: mpsc::Sender<SocketAddr>,
) {
    let mut datagram = vec![0; LARGEST];
    loop {
        match tokio::time::timeout(idle, socket.recv(&mut datagram)).await {
            Ok(Ok(length)) => drop(front.send_to(&datagram[..length], client).await),
            // Nobody listens there yet, or no more.
            Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(10)).await,
            Err(_) if heard.swap(false, Ordering::Relaxed) => {}
            Err(_) => break,
        }
    }
    // The receiver lives as long as the port.
    let _ = ended.send(client).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn each_client_gets_its_own_answers() {
        let guest = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let front = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let at = front.local_addr().unwrap();
        tokio::spawn(carry(front, guest.local_addr().unwrap(), Duration::from_millis(300)));
        let mut clients = Vec::new();
        for name in ["one", "two"] {
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.connect(at).await.unwrap();
            client.send(name.as_bytes()).await.unwrap();
            clients.push((client, name));
        }
        let mut buffer = [0; 100];
        let mut first_peer = None;
        for _ in 0..2 {
            let (length, peer) = guest.recv_from(&mut buffer).await.unwrap();
            first_peer = first_peer.or((&buffer[..length] == b"one").then_some(peer));
            let answer = [&buffer[..length], b"!"].concat();
            guest.send_to(&answer, peer).await.unwrap();
        }
        for (client, name) in &clients {
            let length = client.recv(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..length], format!("{name}!").as_bytes());
        }
        // Forgotten after a while, it is a new one to the sandbox.
        tokio::time::sleep(Duration::from_millis(1000)).await;
        clients[0].0.send(b"again").await.unwrap();
        let (_, peer) = guest.recv_from(&mut buffer).await.unwrap();
        assert_ne!(Some(peer), first_peer);
    }
}
