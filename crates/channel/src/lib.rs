//! Streams between host and guest.
//!
//! One trait, [`Channel`]: open a stream to a numbered port on the other side, or accept one from it. Where the
//! monitor has vsock a session is one vsock connection, else it is on a serial port (QEMU's virtio-serial): in both, its
//! streams are multiplexed by [`mux`], with the same bounds.
//!
//! The other side is hostile when it is the guest. A session therefore has fixed bounds ([`limits`]): no byte sequence
//! from the peer makes this side buffer more than [`limits::SESSION_MEMORY`], and a peer that breaks the protocol loses
//! its session, nothing more.

mod error;
mod frame;
mod guest;
mod host;
pub mod limits;
pub mod mux;
mod preamble;
mod stream;
mod vsock;

pub use error::Error;
pub use guest::GuestPort;
pub use host::{connect, dial};
pub use stream::Stream;

/// `Result` with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A session with the other side, over which streams are opened in both directions.
///
/// Dropping the last handle of a session ends it; its streams then fail with `ConnectionReset`.
#[async_trait::async_trait]
pub trait Channel: Send + Sync {
    /// Opens a stream to `port` on the other side.
    ///
    /// Does not wait for the peer: a port on which nobody listens shows as a reset of the stream.
    ///
    /// # Errors
    /// [`Error::Closed`] when the session has ended, [`Error::TooManyStreams`] at the bound.
    async fn open(&self, port: u32) -> Result<Stream>;

    /// Waits for the next stream that the other side opens, and tells the port it asked for.
    ///
    /// Cancel-safe. A stream that is not wanted is dropped, which resets it.
    ///
    /// # Errors
    /// [`Error::Closed`] or what ended the session.
    async fn accept(&self) -> Result<(u32, Stream)>;
}
