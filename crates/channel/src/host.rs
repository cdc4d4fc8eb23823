//! The host's end.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};

use crate::mux::{Mux, Side};
use crate::preamble::{self, Kind, Preamble};
use crate::{Error, Result};

/// Begins a session with the guest behind `io` (QEMU's socket of the guest's port).
///
/// Waits for the guest, which may still be booting.
///
/// # Errors
/// [`Error::Deadline`], [`Error::Version`], [`Error::Closed`] when the monitor closes the socket, [`Error::Protocol`] when something
/// else than a guest's agent answers.
pub async fn connect(
    io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    deadline: Duration,
) -> Result<Mux> {
    tokio::time::timeout(deadline, begin(io)).await.map_err(|_| Error::Deadline(deadline))?
}

async fn begin(mut io: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Mux> {
    let mut nonce = [0; 16];
    rustix::rand::getrandom(&mut nonce, rustix::rand::GetRandomFlags::empty())
        .map_err(std::io::Error::from)?;
    let hello = Preamble { kind: Kind::Hello, version: preamble::VERSION, nonce };
    io.write_all(&hello.encode()).await?;
    let mut received = Vec::new();
    let answer = |p: Preamble| (p.kind == Kind::Welcome && p.nonce == nonce).then_some(p.version);
    let theirs = preamble::find(&mut io, &mut received, answer).await?;
    if theirs != preamble::VERSION {
        return Err(Error::Version { ours: preamble::VERSION, theirs });
    }
    Ok(Mux::new(io, Side::Host, received))
}
