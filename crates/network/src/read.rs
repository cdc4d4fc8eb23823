//! What is in the calling thread's network namespace.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kapsel_netlink::{Message, NUD_PERMANENT, RTAX_MTU, Socket, attributes, ip, number};
use libc::{
    ARPHRD_ETHER, ARPHRD_LOOPBACK, IFA_ADDRESS, IFA_F_NOPREFIXROUTE, IFA_FLAGS, IFA_LOCAL, IFLA_ADDRESS,
    IFLA_IFNAME, IFLA_MASTER, IFLA_MTU, NDA_DST, NDA_LLADDR, RTA_DST, RTA_GATEWAY, RTA_METRICS,
    RTA_MULTIPATH, RTA_OIF, RTA_PREFSRC, RTA_PRIORITY, RTA_TABLE, RTA_VIA, RTM_GETADDR, RTM_GETLINK,
    RTM_GETNEIGH, RTM_GETROUTE, RTN_UNICAST, RTPROT_KERNEL,
};

use crate::error::Context;
use crate::{Address, Interface, Mac, Neighbour, Result, Route};

const RTNH_F_ONLINK: u32 = 4;
const RTPROT_RA: u8 = 9;

/// An interface with its number in the namespace.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub index: u32,
    pub interface: Interface,
}

/// All Ethernet interfaces that are up and nobody's port; the others are told to the log.
pub(crate) fn interfaces(socket: &mut Socket) -> Result<Vec<Found>> {
    let mut list = |kind: u16, body: &[u8], what: &str| {
        socket.list(&Message::new(kind, 0, body)).context(|| format!("list the namespace's {what}"))
    };
    let links = list(RTM_GETLINK, &[0; 16], "interfaces")?;
    let addresses = list(RTM_GETADDR, &[0; 8], "addresses")?;
    let routes = list(RTM_GETROUTE, &[0; 12], "routes")?;
    let neighbours = list(RTM_GETNEIGH, &[0; 12], "neighbours")?;
    let mut found: Vec<Found> = links.iter().filter_map(|body| link(body)).collect();
    for Found { index, interface } in &mut found {
        interface.addresses = addresses.iter().filter_map(|body| address(body, *index)).collect();
        interface.routes = routes.iter().filter_map(|body| route(body, *index)).collect();
        interface.routes.sort_by_key(Route::order);
        interface.neighbours = neighbours.iter().filter_map(|body| neighbour(body, *index)).collect();
    }
    Ok(found)
}

/// The numbers of all interfaces, of whatever kind.
pub(crate) fn indices(socket: &mut Socket) -> Result<Vec<u32>> {
    let links = socket.list(&Message::new(RTM_GETLINK, 0, &[0; 16]));
    let links = links.context(|| "list the namespace's interfaces".into())?;
    Ok(links.iter().filter_map(|body| word(body, 4)).collect())
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes([*bytes.get(at)?, *bytes.get(at + 1)?]))
}

pub(crate) fn word(bytes: &[u8], at: usize) -> Option<u32> {
    number(bytes.get(at..at + 4)?)
}

pub(crate) fn find(attributes_of: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(attributes_of).find_map(|(found, value)| (found == kind).then_some(value))
}

/// `struct ifinfomsg`: family, type (2), index (4), flags (8), change (12).
fn link(body: &[u8]) -> Option<Found> {
    const IFF_UP: u32 = 1;
    let rest = body.get(16..)?;
    let (kind, index, flags) = (half(body, 2)?, word(body, 4)?, word(body, 8)?);
    let name = find(rest, IFLA_IFNAME)?.split(|byte| *byte == 0).next()?;
    let name = String::from_utf8(name.to_vec()).ok()?;
    let why_not = match kind {
        ARPHRD_LOOPBACK => return None,
        ARPHRD_ETHER if flags & IFF_UP == 0 => "it is down",
        ARPHRD_ETHER if find(rest, IFLA_MASTER).is_some() => "it is a port of another one",
        ARPHRD_ETHER => "",
        _ => "it is not an Ethernet interface",
    };
    if !why_not.is_empty() {
        tracing::info!(interface = name, why_not, "an interface of the namespace is left out");
        return None;
    }
    let mac = Mac(find(rest, IFLA_ADDRESS)?.try_into().ok()?);
    let mtu = number(find(rest, IFLA_MTU)?)?;
    let interface =
        Interface { name, mac, mtu, addresses: Vec::new(), routes: Vec::new(), neighbours: Vec::new() };
    Some(Found { index, interface })
}

/// `struct ifaddrmsg`: family, prefix (1), flags (2), scope (3), index (4).
fn address(body: &[u8], index: u32) -> Option<Address> {
    let rest = body.get(8..)?;
    if word(body, 4)? != index {
        return None;
    }
    // On a point-to-point link the other attribute is the peer's.
    let own = find(rest, IFA_LOCAL).or_else(|| find(rest, IFA_ADDRESS))?;
    let flags = find(rest, IFA_FLAGS).and_then(number).unwrap_or(0);
    Some(Address { ip: ip(own)?, prefix: body[1], no_route: flags & IFA_F_NOPREFIXROUTE != 0 })
}

/// `struct rtmsg`: family, dst_len (1), src_len (2), tos (3), table (4), protocol (5), scope (6), type (7), flags (8).
fn route(body: &[u8], index: u32) -> Option<Route> {
    const MAIN: u32 = 254;
    const RTM_F_CLONED: u32 = 0x200;
    let rest = body.get(12..)?;
    let [family, prefix, from, _, table, protocol, scope, kind] = *body.first_chunk()?;
    let flags = word(body, 8)?;
    let table = find(rest, RTA_TABLE).and_then(number).unwrap_or(table.into());
    // What the kernel or a router's advertisements bring, they bring in the guest too.
    if table != MAIN || flags & RTM_F_CLONED != 0 || [RTPROT_KERNEL, RTPROT_RA].contains(&protocol) {
        return None;
    }
    let through = find(rest, RTA_OIF).and_then(number);
    if find(rest, RTA_MULTIPATH).is_some() || find(rest, RTA_VIA).is_some() || from != 0 {
        tracing::warn!(
            "a route of the namespace has several paths, a gateway of another family, or a source; it is left out"
        );
        return None;
    }
    if through != Some(index) || kind != RTN_UNICAST {
        return None;
    }
    let any = match i32::from(family) {
        libc::AF_INET => IpAddr::from(Ipv4Addr::UNSPECIFIED),
        libc::AF_INET6 => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    Some(Route {
        destination: find(rest, RTA_DST).map_or(Some(any), ip)?,
        prefix,
        gateway: find(rest, RTA_GATEWAY).and_then(ip),
        source: find(rest, RTA_PREFSRC).and_then(ip),
        metric: find(rest, RTA_PRIORITY).and_then(number).unwrap_or(0),
        scope,
        on_link: flags & RTNH_F_ONLINK != 0,
        mtu: find(rest, RTA_METRICS).and_then(|m| find(m, RTAX_MTU)).and_then(number).unwrap_or(0),
    })
}

/// `struct ndmsg`: family, index (4), state (8), flags (10), type (11).
fn neighbour(body: &[u8], index: u32) -> Option<Neighbour> {
    let rest = body.get(12..)?;
    if word(body, 4)? != index || half(body, 8)? & NUD_PERMANENT == 0 {
        return None;
    }
    let mac = Mac(find(rest, NDA_LLADDR)?.try_into().ok()?);
    Some(Neighbour { ip: ip(find(rest, NDA_DST)?)?, mac })
}
