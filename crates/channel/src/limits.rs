//! Bounds of a session. Both sides use the same ones.

/// Streams that may exist at once in a session, both directions together.
pub const MAX_STREAMS: usize = 256;

/// Bytes that a peer may send on one stream ahead of its reader (yamux's initial window, never grown).
pub const WINDOW: u32 = 256 * 1024;

/// Largest payload of a frame that this side sends. Keeps a bulk stream from delaying the others.
pub const MAX_PAYLOAD: usize = 16 * 1024;

/// Bytes that this side queues towards the transport before its writers have to wait.
pub const OUT_BUFFER: usize = 128 * 1024;

/// The most that a session holds for its peer, in bytes, whatever the peer does.
pub const SESSION_MEMORY: usize = MAX_STREAMS * WINDOW as usize + 2 * OUT_BUFFER;

/// Bytes of an earlier session that a preamble may have to skip before it is found.
pub const MAX_STALE: usize = 4 * 1024 * 1024;
