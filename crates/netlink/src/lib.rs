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

/// A route's MTU, among its metrics (`linux/rtnetlink.h`; the libc crate has the other numbers).
pub const RTAX_MTU: u16 = 2;
/// The state of a neighbour that is written down and not found out (`linux/neighbour.h`).
pub const NUD_PERMANENT: u16 = 0x80;

/// `struct ifinfomsg` of an interface, with flags (`IFF_*`) to set.
pub fn link(index: u32, flags: u32) -> [u8; 16] {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&flags.to_ne_bytes());
    body
}

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
