//! The addresses of a bridge.

use std::collections::HashSet;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An IPv4 network of 4 to 65,536 addresses. The first one that a host can have is the bridge's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Subnet {
    network: u32,
    prefix: u8,
}

impl Subnet {
    /// Bits that name the network.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// The bridge's address, by which guests reach the rest of the world.
    pub fn gateway(self) -> Ipv4Addr {
        Ipv4Addr::from(self.network + 1)
    }

    /// Bits that name the network of the IPv6 addresses.
    pub fn prefix6(self) -> u8 {
        64
    }

    /// The IPv6 address of whoever has an IPv4 address: unique local (RFC 4193), in a network whose name is that of this one. It is not random,
    /// as the RFC wants it to be: what leaves the host has the host's address.
    pub fn address6(self, address: Ipv4Addr) -> Ipv6Addr {
        let halves = |word: u32| [(word >> 16) as u16, word as u16];
        let ([a, b], [c, d]) = (halves(self.network), halves(address.into()));
        Ipv6Addr::new(0xfd6b, a, b, 0, 0, 0, c, d)
    }

    /// The bridge's.
    pub fn gateway6(self) -> Ipv6Addr {
        self.address6(self.gateway())
    }

    /// The lowest address that is not taken.
    pub(super) fn free(self, taken: impl Iterator<Item = Ipv4Addr>) -> Option<Ipv4Addr> {
        let taken: HashSet<u32> = taken.map(u32::from).collect();
        let broadcast = self.network | (u32::MAX >> self.prefix);
        (self.network + 2..broadcast).find(|address| !taken.contains(address)).map(Ipv4Addr::from)
    }

    /// Whether any address is in this network and in that one too.
    pub(super) fn overlaps(self, network: Ipv4Addr, prefix: u8) -> bool {
        let shorter = self.prefix.min(prefix);
        let mask = u32::MAX.checked_shl(32 - u32::from(shorter)).unwrap_or(0);
        (self.network ^ u32::from(network)) & mask == 0
    }
}

impl FromStr for Subnet {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || "expected an IPv4 network such as 10.213.0.0/22, its prefix 16 to 30".to_owned();
        let (network, prefix) = text.split_once('/').ok_or_else(bad)?;
        let network = u32::from(network.parse::<Ipv4Addr>().map_err(|_| bad())?);
        let prefix = prefix.parse().ok().filter(|prefix| (16..=30).contains(prefix)).ok_or_else(bad)?;
        let private = Ipv4Addr::from(network).is_private() || network >> 22 == 0x6440_0000 >> 22;
        match network & (u32::MAX >> prefix) {
            0 if private => Ok(Self { network, prefix }),
            0 => Err("expected a private network (10/8, 172.16/12, 192.168/16 or 100.64/10)".into()),
            _ => Err(format!("the address has bits beyond its prefix of {prefix}")),
        }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", Ipv4Addr::from(self.network), self.prefix)
    }
}

impl TryFrom<String> for Subnet {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Subnet> for String {
    fn from(subnet: Subnet) -> String {
        subnet.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_and_shown() {
        for text in ["10.213.0.0/22", "192.168.7.0/24", "100.64.0.0/16", "172.31.255.252/30"] {
            assert_eq!(text.parse::<Subnet>().unwrap().to_string(), text);
        }
        for text in ["", "10.0.0.0", "10.0.0.0/8", "10.0.0.0/31", "10.0.0.1/24", "8.8.8.0/24", "fd00::/64"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }

    #[test]
    fn neither_the_bridge_nor_the_broadcast_is_handed_out() {
        let subnet: Subnet = "10.1.2.0/29".parse().unwrap();
        assert_eq!(subnet.gateway(), Ipv4Addr::new(10, 1, 2, 1));
        let mut taken = Vec::new();
        while let Some(next) = subnet.free(taken.iter().copied()) {
            taken.push(next);
        }
        assert_eq!(taken, (2..7).map(|last| Ipv4Addr::new(10, 1, 2, last)).collect::<Vec<_>>());
        taken.remove(1);
        assert_eq!(subnet.free(taken.into_iter()), Some(Ipv4Addr::new(10, 1, 2, 3)));
    }

    #[test]
    fn both_addresses_of_a_guest_belong_together() {
        let subnet: Subnet = "10.213.0.0/22".parse().unwrap();
        assert_eq!(subnet.gateway6().to_string(), "fd6b:ad5::ad5:1");
        assert_eq!(subnet.address6([10, 213, 3, 7].into()).to_string(), "fd6b:ad5::ad5:307");
        let other: Subnet = "192.168.7.0/24".parse().unwrap();
        assert_eq!(other.gateway6().to_string(), "fd6b:c0a8:700::c0a8:701");
    }

    #[test]
    fn overlapping_works_both_ways() {
        let subnet: Subnet = "10.213.0.0/22".parse().unwrap();
        for (network, prefix, overlaps) in [
            ([10, 213, 3, 7], 32, true),
            ([10, 0, 0, 0], 8, true),
            ([10, 213, 4, 0], 24, false),
            ([0, 0, 0, 0], 0, true),
            ([172, 17, 0, 0], 16, false),
        ] {
            assert_eq!(subnet.overlaps(network.into(), prefix), overlaps, "{network:?}/{prefix}");
        }
    }
}
