//! Just enough of rtnetlink(7) for both ends: the host reads and redirects interfaces, the guest's agent sets them up.
//!
//! Blocking, and without types of its own for what the kernel says: a message is a fixed structure (as bytes) and
//! attributes. The crates that model all of rtnetlink are many times the code, which every sandbox would carry.

mod message;
mod socket;

pub use message::{Message, attributes};
pub use socket::Socket;

/// Flags of a request that makes something new, and fails when it is there (NLM_F_CREATE, NLM_F_EXCL).
pub const CREATE: u16 = 0x400 | 0x200;
/// Flags of a request that makes something or replaces it (NLM_F_CREATE, NLM_F_REPLACE).
pub const REPLACE: u16 = 0x400 | 0x100;

/// An IPv4 or IPv6 address from its bytes.
pub fn ip(bytes: &[u8]) -> Option<std::net::IpAddr> {
    match bytes.len() {
        4 => <[u8; 4]>::try_from(bytes).ok().map(std::net::IpAddr::from),
        16 => <[u8; 16]>::try_from(bytes).ok().map(std::net::IpAddr::from),
        _ => None,
    }
}

/// The bytes of an address, as the kernel takes them.
pub fn octets(ip: std::net::IpAddr) -> Vec<u8> {
    match ip {
        std::net::IpAddr::V4(ip) => ip.octets().to_vec(),
        std::net::IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

/// The number in an attribute of four bytes.
pub fn number(bytes: &[u8]) -> Option<u32> {
    bytes.try_into().ok().map(u32::from_ne_bytes)
}
