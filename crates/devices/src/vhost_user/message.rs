//! Messages of the vhost-user protocol, as far as a front end needs them ("Vhost-user Protocol" in QEMU's documentation): a header of
//! three words, then a body, both in the host's byte order.

use std::fmt;

/// Length of a header, in bytes.
pub const HEADER: usize = 12;

/// Version of the protocol, in the lowest bits of a header's flags.
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
/// The message is an answer.
const REPLY: u32 = 1 << 2;
/// The back end shall answer whether it could do what it was asked for.
const NEED_REPLY: u32 = 1 << 3;

/// Feature bit by which a back end says that it has protocol features (no bit of virtio's own).
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Protocol features.
pub mod protocol {
    /// Every request can be answered.
    pub const REPLY_ACK: u64 = 1 << 3;
    /// The back end has the device's configuration space.
    pub const CONFIG: u64 = 1 << 9;
}

/// What a back end is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Request {
    /// Features of the device.
    GetFeatures = 1,
    /// Those that it shall have.
    SetFeatures = 2,
    /// The session begins.
    SetOwner = 3,
    /// Where the guest's memory is.
    SetMemTable = 5,
    /// The length of a ring.
    SetVringNum = 8,
    /// Where it is.
    SetVringAddr = 9,
    /// Its next entry.
    SetVringBase = 10,
    /// Stops a ring, and asks for its next entry.
    GetVringBase = 11,
    /// The event by which the driver announces buffers.
    SetVringKick = 12,
    /// The event that interrupts the driver.
    SetVringCall = 13,
    /// Features of the protocol.
    GetProtocolFeatures = 15,
    /// Those that are used.
    SetProtocolFeatures = 16,
    /// Starts a ring.
    SetVringEnable = 18,
    /// The device's configuration space.
    GetConfig = 24,
}

/// The words are Firecracker's.
impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Request::GetFeatures => "Get features",
            Request::SetFeatures => "Set features",
            Request::SetOwner => "Set owner",
            Request::SetMemTable => "Set mem table",
            Request::SetVringNum => "Set vring num",
            Request::SetVringAddr => "Set vring addr",
            Request::SetVringBase => "Set vring base",
            Request::GetVringBase => "Get vring base",
            Request::SetVringKick => "Set vring kick",
            Request::SetVringCall => "Set vring call",
            Request::GetProtocolFeatures => "Get protocol features",
            Request::SetProtocolFeatures => "Set protocol features",
            Request::SetVringEnable => "Set vring enable",
            Request::GetConfig => "Get config",
        })
    }
}

/// A whole message.
pub fn request(request: Request, answered: bool, body: &[u8]) -> Vec<u8> {
    let flags = VERSION | if answered { NEED_REPLY } else { 0 };
    let words = [request as u32, flags, body.len() as u32];
    words.iter().flat_map(|word| word.to_ne_bytes()).chain(body.iter().copied()).collect()
}

/// The length of the body that follows an answer's header.
///
/// # Errors
/// What is wrong with it.
pub fn answer(header: [u8; HEADER], to: Request) -> Result<usize, &'static str> {
    let word = |n: usize| u32::from_ne_bytes(std::array::from_fn(|byte| header[4 * n + byte]));
    let (request, flags, size) = (word(0), word(1), word(2));
    if request != to as u32 {
        return Err("it answers another request");
    }
    if flags & VERSION_MASK != VERSION {
        return Err("it has another version of the protocol");
    }
    if flags & REPLY == 0 {
        return Err("it is no answer");
    }
    Ok(size as usize)
}

/// Words of 32 bits, two of which make one of 64.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Words of 64 bits.
pub fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}
