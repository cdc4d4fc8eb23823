//! How a session begins on a transport that may still hold bytes of an earlier one.
//!
//! A guest that was saved and restored continues with whatever was in flight, so neither side trusts the first byte it
//! sees. The host sends a *hello* with a fresh nonce; the guest skips everything up to a hello and answers with a
//! *welcome* that repeats the nonce; the host skips everything up to its own nonce. Frames follow on both sides. A
//! frame's first byte is 0 and a preamble's never is, so a guest that meets a hello where a frame should begin knows
//! that a new session has begun.

use tokio::io::{AsyncRead, AsyncReadExt};

use crate::{Error, Result, limits};

/// Marks a preamble. The first byte differs from a frame's version.
pub(crate) const MAGIC: [u8; 8] = *b"\xf5kapsel\xf5";
/// Version of the channel's protocol.
pub(crate) const VERSION: u16 = 1;
/// Bytes of a preamble.
pub(crate) const LEN: usize = 28;

/// Chosen by the host, different for each session.
pub(crate) type Nonce = [u8; 16];

/// Who speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The host begins a session.
    Hello = 1,
    /// The guest agrees.
    Welcome = 2,
}

/// A preamble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Preamble {
    pub kind: Kind,
    pub version: u16,
    pub nonce: Nonce,
}

impl Preamble {
    pub(crate) fn encode(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&self.version.to_le_bytes());
        bytes[10] = self.kind as u8;
        bytes[12..].copy_from_slice(&self.nonce);
        bytes
    }

    fn decode(bytes: &[u8; LEN]) -> Option<Preamble> {
        let kind = match bytes[10] {
            1 => Kind::Hello,
            2 => Kind::Welcome,
            _ => return None,
        };
        if bytes[..8] != MAGIC || bytes[11] != 0 {
            return None;
        }
        let mut nonce = [0; 16];
        nonce.copy_from_slice(&bytes[12..]);
        Some(Preamble { kind, version: u16::from_le_bytes([bytes[8], bytes[9]]), nonce })
    }
}

/// Reads until `wanted` accepts a preamble, keeping what follows it in `pending`.
///
/// `pending` may hold bytes already; skips at most [`limits::MAX_STALE`]. Cancel-safe: nothing read is lost.
pub(crate) async fn find<T>(
    io: &mut (impl AsyncRead + Unpin),
    pending: &mut Vec<u8>,
    mut wanted: impl FnMut(Preamble) -> Option<T>,
) -> Result<T> {
    let mut skipped = 0;
    loop {
        let (found, stale) = scan(pending, &mut wanted);
        pending.drain(..stale);
        if let Some(found) = found {
            return Ok(found);
        }
        skipped += stale;
        if skipped > limits::MAX_STALE {
            return Err(Error::Protocol("no preamble found in what it sent"));
        }
        let mut chunk = [0; 4096];
        match io.read(&mut chunk).await? {
            0 => return Err(Error::Closed),
            n => pending.extend_from_slice(&chunk[..n]),
        }
    }
}

/// The first accepted preamble in `bytes`, and how many bytes need not be looked at again.
fn scan<T>(bytes: &[u8], wanted: &mut impl FnMut(Preamble) -> Option<T>) -> (Option<T>, usize) {
    let mut at = 0;
    while let Some(window) = bytes[at..].first_chunk::<LEN>() {
        if let Some(found) = Preamble::decode(window).and_then(&mut *wanted) {
            return (Some(found), at + LEN);
        }
        at += 1;
    }
    (None, at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(nonce: u8) -> Preamble {
        Preamble { kind: Kind::Hello, version: VERSION, nonce: [nonce; 16] }
    }

    proptest! {
        #[test]
        fn found_behind_any_stale_bytes(stale in proptest::collection::vec(any::<u8>(), 0..9000), cut in 0usize..28, rest: Vec<u8>) {
            let mut bytes = stale;
            bytes.extend_from_slice(&hello(1).encode()[..cut]);
            bytes.extend_from_slice(&hello(2).encode());
            bytes.extend_from_slice(&rest);
            let mut pending = Vec::new();
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let found = runtime.block_on(find(&mut bytes.as_slice(), &mut pending, |p| (p == hello(2)).then_some(p)));
            prop_assert_eq!(found.unwrap(), hello(2));
        }
    }

    #[tokio::test]
    async fn an_endless_stream_of_garbage_is_given_up() {
        let mut garbage = tokio::io::repeat(0xf5);
        let found = find(&mut garbage, &mut Vec::new(), Some).await;
        assert!(matches!(found, Err(Error::Protocol(_))));
    }

    #[tokio::test]
    async fn bytes_after_it_are_kept() {
        let mut bytes = hello(3).encode().to_vec();
        bytes.extend_from_slice(b"frames");
        let mut pending = Vec::new();
        find(&mut bytes.as_slice(), &mut pending, Some).await.unwrap();
        assert_eq!(pending, b"frames");
    }
}
