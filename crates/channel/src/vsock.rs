//! A listening vsock socket, as the standard library has it for TCP.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// Connections that wait to be accepted. The host makes one at a time.
const BACKLOG: libc::c_int = 4;

/// Takes the host's connections.
pub(crate) struct Listener(AsyncFd<OwnedFd>);

impl Listener {
    /// Listens on a port of every address that this machine has.
    pub fn bind(port: u32) -> io::Result<Listener> {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: the call has no pointers, and the descriptor that it gives is owned by nobody else.
        let socket = unsafe { owned(libc::socket(libc::AF_VSOCK, kind, 0)) }?;
        // SAFETY: the structure is integers, for which zeroes are values.
        let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = libc::VMADDR_CID_ANY;
        address.svm_port = port;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: the address outlives the call, and the length is its.
        done(unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) })?;
        // SAFETY: the call has no pointers.
        done(unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) })?;
        // SAFETY: an `OwnedFd` stays open and keeps its number for as long as it exists.
        let watched = unsafe { AsyncFd::register_with_interest(socket, tokio::io::Interest::READABLE) };
        Ok(Listener(watched?))
    }

    /// The next connection, which does not block.
    pub async fn accept(&self) -> io::Result<File> {
        let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let accept = |socket: &OwnedFd| {
            let (address, length) = (std::ptr::null_mut(), std::ptr::null_mut());
            // SAFETY: no address is asked for, and the descriptor that the call gives is owned by nobody else.
            unsafe { owned(libc::accept4(socket.as_raw_fd(), address, length, flags)) }
        };
        loop {
            let mut ready = self.0.readable().await?;
            match ready.try_io(|socket| accept(socket.get_ref())) {
                Ok(Ok(connection)) => return Ok(connection.into()),
                // It was gone before it was taken.
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionAborted => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
                Err(_not_ready) => {}
            }
        }
    }
}

/// # Safety
/// A descriptor that is none of -1 must be owned by nobody else.
unsafe fn owned(descriptor: libc::c_int) -> io::Result<OwnedFd> {
    match descriptor {
        -1 => Err(io::Error::last_os_error()),
        // SAFETY: as the caller promises.
        descriptor => Ok(unsafe { OwnedFd::from_raw_fd(descriptor) }),
    }
}

fn done(result: libc::c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
