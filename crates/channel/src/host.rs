//! The host's end.

use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::mux::{Mux, Side};
use crate::preamble::{self, Kind, Preamble};
use crate::{Error, Result};

/// Begins a session with the guest behind `io` (QEMU's socket of the guest's port, or a connection that was dialled).
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

/// The longest answer of a monitor to a connection, in bytes: `OK 4294967295\n`.
const ANSWER_MAX: usize = 14;

/// Has the monitor behind `io`, a connection to its vsock device's Unix socket, connect it to `port` of the guest.
///
/// # Errors
/// [`Error::Closed`] when nobody listens there, [`Error::Deadline`], [`Error::Protocol`] when it is no such socket.
pub async fn dial(
    io: &mut (impl AsyncRead + AsyncWrite + Unpin + Send),
    port: u32,
    deadline: Duration,
) -> Result<()> {
    let answer = async {
        io.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
        let mut line = Vec::new();
        // Byte by byte, for what follows is the guest's.
        while !line.ends_with(b"\n") {
            let mut byte = [0];
            if line.len() == ANSWER_MAX {
                return Err(Error::Protocol("the monitor's answer to CONNECT is too long"));
            }
            match io.read(&mut byte).await? {
                0 => return Err(Error::Closed),
                _ => line.extend(byte),
            }
        }
        match line.starts_with(b"OK ") {
            true => Ok(()),
            false => Err(Error::Protocol("the monitor's answer to CONNECT is not OK")),
        }
    };
    tokio::time::timeout(deadline, answer).await.map_err(|_| Error::Deadline(deadline))?
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

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    async fn dialled(answer: &'static [u8]) -> (Result<()>, Vec<u8>) {
        let (mut ours, mut monitor) = tokio::io::duplex(64);
        monitor.write_all(answer).await.unwrap();
        let answered = dial(&mut ours, 1024, Duration::from_millis(100)).await;
        let mut asked = [0; 13];
        monitor.read_exact(&mut asked).await.unwrap();
        assert_eq!(&asked, b"CONNECT 1024\n");
        drop(monitor);
        let mut rest = Vec::new();
        tokio::time::timeout(SOON, ours.read_to_end(&mut rest)).await.unwrap().unwrap();
        (answered, rest)
    }

    #[tokio::test]
    async fn what_follows_the_monitors_answer_is_the_guests() {
        let (answered, rest) = dialled(b"OK 1073741824\nguest").await;
        assert!(answered.is_ok());
        assert_eq!(rest, b"guest");
    }

    #[tokio::test]
    async fn other_answers_are_refused_within_bounds() {
        let fails = |answer: &'static [u8]| async move { dialled(answer).await.0.unwrap_err() };
        assert!(matches!(fails(b"NO\n").await, Error::Protocol(_)));
        assert!(matches!(fails(b"OK 10737418240000\n").await, Error::Protocol(_)));
        assert!(matches!(fails(b"OK 1").await, Error::Deadline(_)));
    }
}
