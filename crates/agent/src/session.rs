//! Sessions with the host: one after the other on the guest's port.

use std::io;
use std::sync::Arc;

use kapsel_channel::{Channel, GuestPort, Stream};
use kapsel_protocol::service::create_agent;
use kapsel_protocol::{AGENT_PORT, STDIO_PORT};
use tokio::sync::{Notify, mpsc};
use ttrpc::asynchronous::transport::Listener;

use crate::rpc::Service;
use crate::sandbox::Sandbox;
use crate::stdio::Streams;

/// Streams that are being read for their header at a time; the next one waits.
const HEADERS_MAX: usize = 256;

/// Serves sessions until the guest shall end: at the host's request, or because the host of a configured guest has gone. Before
/// Configure a session that ends is followed by another: so a template is made, and its clones begin.
///
/// # Errors
/// When the port fails.
pub async fn serve(mut port: GuestPort, sandbox: Arc<Sandbox>) -> io::Result<()> {
    let shutdown = Arc::new(Notify::new());
    loop {
        let session = port.next_session().await.map_err(io::Error::other)?;
        tokio::select! {
            () = run(&session, &sandbox, &shutdown) => {}
            () = shutdown.notified() => {
                // Time for the reply to leave; the host may also close first.
                let _ = tokio::time::timeout(std::time::Duration::from_millis(100), session.accept()).await;
                return Ok(());
            }
        }
        if sandbox.is_configured() {
            eprintln!("kapsel-agent: the host has gone");
            return Ok(());
        }
    }
}

/// One session, to its end. All that is the session's own dies with this future.
async fn run(session: &impl Channel, sandbox: &Arc<Sandbox>, shutdown: &Arc<Notify>) {
    let streams = Arc::new(Streams::default());
    let service = Arc::new(Service::new(sandbox.clone(), streams.clone(), shutdown.clone()));
    let (connections, incoming) = mpsc::channel::<Stream>(1);
    let incoming = futures::stream::unfold(incoming, |mut incoming| async {
        incoming.recv().await.map(|stream| (Ok(stream), incoming))
    });
    let mut server = ttrpc::asynchronous::Server::new()
        .register_service(create_agent(service))
        .add_listener(Listener::new(incoming));
    if let Err(error) = server.start().await {
        eprintln!("kapsel-agent: serving the API: {error}");
        return;
    }
    let headers = Arc::new(tokio::sync::Semaphore::new(HEADERS_MAX));
    while let Ok((to, stream)) = session.accept().await {
        match to {
            AGENT_PORT => {
                // The server takes it at once.
                let _ = connections.send(stream).await;
            }
            STDIO_PORT => {
                let Ok(permit) = headers.clone().acquire_owned().await else { continue };
                let streams = streams.clone();
                tokio::spawn(async move {
                    streams.accept(stream).await;
                    drop(permit);
                });
            }
            // Dropping a stream resets it.
            _ => {}
        }
    }
    // Waits for its connections, for up to ten seconds; the next session need not.
    tokio::spawn(async move { server.disconnect().await });
}
