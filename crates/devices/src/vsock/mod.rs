//! The socket device (virtio 1.2, section 5.10), without a kernel module on the host: the guest's streams are Unix sockets.
//!
//! A program on the host connects to the device's socket and writes `CONNECT <port>\n`; once a guest's program has
//! accepted, it reads `OK <its own port>\n` and then what the guest sends. A guest that connects to port n of the host
//! reaches the socket whose path is the device's with `_n` appended.
//!
//! The guest can make the host keep at most 64 KiB for each of at most 1023 connections.

mod connection;
mod muxer;
mod packet;

#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use crate::calls::{SystemCall, SystemCalls, any, only};
use crate::queue::{Position, Queue, QueueError};
use crate::state::{Reader, StateError};
use crate::{Activation, Device, Event, Kind};
use muxer::Muxer;

/// The event that ends all connections.
const TRANSPORT_RESET: [u8; 4] = 0u32.to_le_bytes();

const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENTS: usize = 2;

/// Unix sockets are accepted, connected and watched; there is no other kind of socket.
const CALLS: &[SystemCall] = &[
    only(libc::SYS_socket, 0, libc::AF_UNIX as u32),
    only(libc::SYS_ioctl, 1, libc::FIONBIO as u32),
    any(libc::SYS_accept4),
    any(libc::SYS_connect),
    any(libc::SYS_recvfrom),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendto),
    any(libc::SYS_sendmsg),
    any(libc::SYS_shutdown),
    any(libc::SYS_epoll_ctl),
];
/// The listener is watched from the driver's start to its reset.
const STARTING: &[SystemCall] = &[any(libc::SYS_epoll_ctl)];

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// 0, 1, 2 and all ones are not addresses of guests.
    #[error("{0} cannot be a guest's context identifier; use 3 to 4294967294")]
    Cid(u64),
    /// The socket cannot be made.
    #[error("cannot listen at {path}: {source}")]
    Listen {
        /// Where.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// Sockets between the guest and the host.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    muxer: Muxer,
    queues: Option<Queues>,
}

#[derive(Debug)]
struct Queues {
    receive: Queue,
    transmit: Queue,
    /// For what the device has to say after a restore; the driver's buffers wait in it.
    events: Queue,
}

impl Vsock {
    /// Makes the host's socket at `path`, where nothing may be yet. `cid` is the guest's address.
    ///
    /// # Errors
    /// [`Error`].
    pub fn new(cid: u64, path: &Path) -> Result<Self, Error> {
        if !(3..u64::from(u32::MAX)).contains(&cid) {
            return Err(Error::Cid(cid));
        }
        let muxer =
            Muxer::new(cid, path).map_err(|source| Error::Listen { path: path.to_owned(), source })?;
        Ok(Vsock { cid, muxer, queues: None })
    }

    /// Works on packets of the guest, then gives it what there is for it. True when there is more.
    fn exchange(&mut self) -> Result<bool, QueueError> {
        let Some(queues) = &mut self.queues else { return Ok(false) };
        let muxer = &mut self.muxer;
        let mut held_back = false;
        let mut more = queues.transmit.serve(|chain| match chain {
            Ok(chain) => {
                held_back = !muxer.receive(chain);
                (!held_back).then_some(0)
            }
            Err(error) => {
                tracing::debug!(%error, "a packet of the guest is malformed");
                Some(0)
            }
        })?;
        if muxer.has_packets() {
            let mut sent = false;
            more |= queues.receive.serve(|chain| match chain {
                Ok(chain) => muxer.send(chain).inspect(|_| sent = true),
                Err(error) => {
                    tracing::debug!(%error, "a buffer for packets is malformed");
                    Some(0)
                }
            })?;
            // Answers were taken, so the packets that waited for it have their turn.
            more |= held_back && sent;
        }
        Ok(more)
    }
}

impl Device for Vsock {
    fn kind(&self) -> Kind {
        Kind::Vsock
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256, 256]
    }

    fn config(&self) -> Vec<u8> {
        self.cid.to_le_bytes().to_vec()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), QueueError> {
        self.queues = Some(Queues {
            receive: activation.take(RECEIVE)?,
            transmit: activation.take(TRANSMIT)?,
            events: activation.take(EVENTS)?,
        });
        self.muxer.start();
        Ok(())
    }

    fn reset(&mut self) {
        self.queues = None;
        self.muxer.reset();
    }

    fn positions(&self) -> Vec<Option<Position>> {
        let queues =
            self.queues.iter().flat_map(|queues| [&queues.receive, &queues.transmit, &queues.events]);
        queues.map(|queue| Some(queue.position())).collect()
    }

    /// The host's ends of all connections are gone, which the driver has to be told (section 5.10.6.7).
    fn restore(&mut self, _reader: &mut Reader<'_>) -> Result<(), StateError> {
        if let Some(queues) = &mut self.queues {
            let mut told = false;
            queues.events.serve(|chain| {
                if std::mem::replace(&mut told, true) {
                    return None;
                }
                let written = chain.is_ok_and(|mut chain| chain.writable.write(&TRANSPORT_RESET).is_ok());
                Some(if written { TRANSPORT_RESET.len() as u32 } else { 0 })
            })?;
        }
        Ok(())
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.muxer.descriptor()]
    }

    fn system_calls(&self) -> SystemCalls {
        SystemCalls { events: CALLS, registers: STARTING }
    }

    fn handle(&mut self, event: Event) -> Result<bool, QueueError> {
        if let Event::Source(_) = event {
            self.muxer.host_events();
        }
        self.exchange()
    }
}
