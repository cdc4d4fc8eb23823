//! What an interface is, so that another kernel can have the same.

use std::fmt;
use std::net::IpAddr;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// An Ethernet interface with all that its kernel was told about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Its name, at most 15 bytes.
    pub name: String,
    /// Its address.
    pub mac: Mac,
    /// The largest packet, in bytes.
    pub mtu: u32,
    /// In the order in which they were given.
    pub addresses: Vec<Address>,
    /// Those that the kernel does not make itself from the addresses, in an order in which each can be added.
    pub routes: Vec<Route>,
    /// Those that somebody has written down: what was learnt is learnt again.
    pub neighbours: Vec<Neighbour>,
}

/// An address of an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// Bits of it that name the network.
    pub prefix: u8,
    /// The kernel shall not make a route to that network itself.
    pub no_route: bool,
}

/// A route through an interface, in the main table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where to; of the family's length also for the default route.
    pub destination: IpAddr,
    /// Bits of the destination that count; 0 for the default route.
    pub prefix: u8,
    /// The next hop; none for what is on the link.
    pub gateway: Option<IpAddr>,
    /// The address that packets are sent from.
    pub source: Option<IpAddr>,
    /// The smaller wins; 0: the kernel's default.
    pub metric: u32,
    /// RT_SCOPE_*.
    pub scope: u8,
    /// The gateway is on the link although no route says so.
    pub on_link: bool,
    /// The largest packet on this route; 0: the interface's.
    pub mtu: u32,
}

impl Route {
    /// A gateway can only be named once there is a route to it.
    pub(crate) fn order(&self) -> (bool, u8) {
        (self.gateway.is_some() && !self.on_link, u8::MAX - self.prefix)
    }
}

/// Who is where on the link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Whose.
    pub ip: IpAddr,
    /// Where.
    pub mac: Mac,
}
