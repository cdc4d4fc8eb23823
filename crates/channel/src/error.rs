//! What can go wrong with a session.

use std::io;

use crate::limits;

/// Why a session could not be had, or ended.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// The other side closed the session, or this side dropped it.
    #[error("the channel is closed")]
    Closed,
    /// [`limits::MAX_STREAMS`] are open already.
    #[error("{} streams are open on the channel, which is the most; close some first", limits::MAX_STREAMS)]
    TooManyStreams,
    /// The peer sent what the protocol does not allow.
    #[error("the other side of the channel broke the protocol: {0}")]
    Protocol(&'static str),
    /// The peer speaks another version of the protocol.
    #[error(
        "the other side of the channel speaks version {theirs}, this one {ours}: host and guest parts of kapsel differ"
    )]
    Version {
        /// This side's version.
        ours: u16,
        /// The peer's.
        theirs: u16,
    },
    /// The peer did not answer the preamble in time.
    #[error("no answer on the channel within {0:?}")]
    Deadline(std::time::Duration),
    /// The transport failed.
    #[error("the channel's transport failed: {1}")]
    Io(io::ErrorKind, String),
}

impl From<io::Error> for Error {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            // The other side went while this one was writing.
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Error::Closed,
            kind => Error::Io(kind, error.to_string()),
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Closed => io::ErrorKind::ConnectionReset,
            Error::TooManyStreams => io::ErrorKind::ResourceBusy,
            Error::Protocol(_) | Error::Version { .. } => io::ErrorKind::InvalidData,
            Error::Deadline(_) => io::ErrorKind::TimedOut,
            Error::Io(kind, _) => *kind,
        };
        io::Error::new(kind, error)
    }
}
