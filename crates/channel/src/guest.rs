//! The guest's end: a virtio-serial port, on which sessions follow each other, or a vsock port, where each session is a connection.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, PoisonError};
use std::task::{Context, Poll, ready};

use rustix::event::epoll;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::task::JoinHandle;

use crate::mux::{Mux, Side, Unread};
use crate::preamble::{self, Kind, Preamble};
use crate::{Error, Result, frame, vsock};

/// The port on which the host begins sessions.
pub struct GuestPort {
    way: Way,
    unread: Unread,
    session: Option<JoinHandle<()>>,
}

/// How the host comes.
enum Way {
    /// By one device, again and again.
    Device(Arc<Port>),
    /// By connections.
    Listener(vsock::Listener),
}

impl GuestPort {
    /// Opens the port, usually `/dev/virtio-ports/kapsel.0`.
    ///
    /// # Errors
    /// When the device does not exist, is open already, or epoll fails.
    pub fn open(path: &Path) -> io::Result<GuestPort> {
        let file = File::options().read(true).write(true).open(path)?;
        rustix::io::ioctl_fionbio(&file, true)?;
        Self::from_file(file)
    }

    /// Uses an open, non-blocking file or socket.
    ///
    /// # Errors
    /// When epoll fails.
    pub fn from_file(file: File) -> io::Result<GuestPort> {
        Ok(Self::of(Way::Device(Arc::new(Port::new(file)?))))
    }

    /// Listens on a port of vsock.
    ///
    /// # Errors
    /// When the kernel has no vsock, or the port is in use.
    pub fn listen(port: u32) -> io::Result<GuestPort> {
        Ok(Self::of(Way::Listener(vsock::Listener::bind(port)?)))
    }

    fn of(way: Way) -> GuestPort {
        GuestPort { way, unread: Unread::default(), session: None }
    }

    /// Waits until the host begins a session. An earlier session must have ended or been dropped; its end is waited for.
    ///
    /// # Errors
    /// When the port itself fails. Whatever the host does (closing, garbage) only makes this wait further.
    pub async fn next_session(&mut self) -> Result<Mux> {
        if let Some(session) = self.session.take() {
            // A panic of the session's task ended that session, and nothing else.
            let _ = session.await;
        }
        loop {
            let (port, may_fail) = match &self.way {
                Way::Device(port) => (port.clone(), false),
                Way::Listener(listener) => {
                    // What a connection that ended left is no beginning of the next.
                    self.unread.lock().unwrap_or_else(PoisonError::into_inner).clear();
                    (Arc::new(Port::new(listener.accept().await?)?), true)
                }
            };
            let received = match self.greet(&port).await {
                Ok(received) => received,
                Err(Error::Protocol(_)) => continue,
                // The host may come again, by another connection.
                Err(_) if may_fail => continue,
                Err(Error::Closed) => {
                    port.changed().await?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let (mux, session) = Mux::start(PortIo(port), Side::Guest, received, Some(self.unread.clone()));
            self.session = Some(session);
            return Ok(mux);
        }
    }

    /// Answers hellos until a frame follows one. Returns what was read of the frames.
    async fn greet(&self, port: &Arc<Port>) -> Result<Vec<u8>> {
        let mut io = PortIo(port.clone());
        let mut pending = std::mem::take(&mut *self.unread.lock().unwrap_or_else(PoisonError::into_inner));
        loop {
            let hello = |p: Preamble| (p.kind == Kind::Hello).then_some(p);
            let hello = preamble::find(&mut io, &mut pending, hello).await?;
            let welcome = Preamble { kind: Kind::Welcome, version: preamble::VERSION, nonce: hello.nonce };
            io.write_all(&welcome.encode()).await?;
            while pending.is_empty() {
                let mut chunk = [0; 4 * frame::HEADER];
                match io.read(&mut chunk).await? {
                    0 => return Err(Error::Closed),
                    n => pending.extend_from_slice(&chunk[..n]),
                }
            }
            // Frames begin with 0; anything else belongs to a later hello.
            if pending[0] == 0 {
                return Ok(pending);
            }
        }
    }
}

/// The device and its readiness.
///
/// While the host has its end closed the port reports `EPOLLHUP`, and it will not go away until the host returns. Tokio
/// remembers a hang-up for ever and would spin, so the port sits in an epoll instance of its own, edge-triggered, and tokio
/// watches that instance: it becomes readable whenever something about the port *changes*.
struct Port {
    file: File,
    changes: AsyncFd<OwnedFd>,
}

/// Takes the event, so that the instance is readable again only after the next change.
fn drain(epoll: &OwnedFd) -> io::Result<()> {
    let mut events =
        [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 1];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    epoll::wait(epoll, &mut events[..], Some(&now))?;
    Ok(())
}

impl Port {
    fn new(file: File) -> io::Result<Port> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let events = epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::ET;
        epoll::add(&epoll, &file, epoll::EventData::new_u64(0), events)?;
        // SAFETY: an `OwnedFd` stays open and keeps its number for as long as it exists.
        let changes = unsafe { AsyncFd::register_with_interest(epoll, tokio::io::Interest::READABLE) };
        Ok(Port { file, changes: changes? })
    }

    /// Waits for the next change.
    async fn changed(&self) -> io::Result<()> {
        let mut guard = self.changes.readable().await?;
        drain(guard.get_inner())?;
        guard.clear_ready();
        Ok(())
    }

    /// Repeats `operation` until it does not say `WouldBlock`.
    fn poll_io<R>(
        &self,
        cx: &mut Context<'_>,
        mut operation: impl FnMut(&File) -> io::Result<R>,
    ) -> Poll<io::Result<R>> {
        loop {
            match operation(&self.file) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => return Poll::Ready(result),
            }
            let mut guard = ready!(self.changes.poll_read_ready(cx))?;
            drain(guard.get_inner())?;
            guard.clear_ready();
        }
    }
}

/// One session's view of the port.
struct PortIo(Arc<Port>);

impl AsyncRead for PortIo {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let n = ready!(self.0.poll_io(cx, |mut file| file.read(buf.initialize_unfilled())))?;
        buf.advance(n);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for PortIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.0.poll_io(cx, |mut file| file.write(buf))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
