//! Carries connections and datagrams to published ports into a sandbox: one process a sandbox, in a jail, with sockets that are
//! bound already. It looks at no byte of what it carries.
//!
//! | file | idea |
//! | --- | --- |
//! | `args` | the command line |
//! | `tcp` | connections |
//! | `udp` | datagrams |

mod args;
mod tcp;
mod udp;

use std::sync::Arc;

use anyhow::Context;
use tokio::sync::Semaphore;

use args::{Port, Transport};

/// Connections at a time, over all ports: who comes later waits in the kernel's queue.
const CONNECTIONS: usize = 512;

fn main() -> anyhow::Result<()> {
    let ports = args::parse(std::env::args().skip(1))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.context("cannot start the runtime")?.block_on(serve(ports))
}

/// Serves until the process is ended with its sandbox.
async fn serve(ports: Vec<Port>) -> anyhow::Result<()> {
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    for Port { transport, to } in ports {
        match transport {
            Transport::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                let listener = tokio::net::TcpListener::from_std(listener)?;
                tokio::spawn(tcp::serve(listener, to, slots.clone()));
            }
            Transport::Udp(socket) => {
                socket.set_nonblocking(true)?;
                tokio::spawn(udp::serve(tokio::net::UdpSocket::from_std(socket)?, to));
            }
        }
    }
    std::future::pending().await
}
