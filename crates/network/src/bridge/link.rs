//! The bridge's interface.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use kapsel_netlink::{CREATE, Message, Socket, ip, link, number};
use libc::{
    AF_INET, AF_INET6, EACCES, EAFNOSUPPORT, ENODEV, EOPNOTSUPP, IFA_ADDRESS, IFA_F_NODAD, IFA_FLAGS,
    IFA_LOCAL, IFF_UP, IFLA_ADDRESS, IFLA_IFNAME, IFLA_INFO_KIND, IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU,
    RTA_DST, RTA_OIF, RTM_DELLINK, RTM_GETADDR, RTM_GETLINK, RTM_GETROUTE, RTM_NEWADDR, RTM_NEWLINK,
};

use super::{NAME, Subnet, mac};
use crate::error::Context;
use crate::read::{find as attribute, word};
use crate::tap::quiet;
use crate::{Error, Result};

/// What Ethernet carries, where there is no way out that says otherwise.
const USUAL_MTU: u32 = 1500;
/// Routes to more than so much of the world are ways out, and none that a network must keep clear of.
const LONGEST_DEFAULT: u8 = 7;

/// The bridge, as far as it matters.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bridge {
    pub index: u32,
    pub mtu: u32,
}

/// An interface by its name.
pub(super) fn find(socket: &mut Socket, name: &str) -> Result<Option<Bridge>> {
    let wanted = [name.as_bytes(), b"\0"].concat();
    Ok(links(socket)?.iter().find_map(|body| {
        let rest = body.get(16..)?;
        (attribute(rest, IFLA_IFNAME)? == wanted).then_some(())?;
        Some(Bridge { index: word(body, 4)?, mtu: number(attribute(rest, IFLA_MTU)?)? })
    }))
}

/// Makes the bridge anew: one that is `left` from before has nobody on it.
pub(super) fn make(socket: &mut Socket, left: Option<Bridge>, subnet: Subnet) -> Result<Bridge> {
    if let Some(left) = left {
        remove(socket, left.index)?;
    }
    let mtu = survey(socket, subnet)?;
    let gateway = subnet.gateway();
    let create = Message::new(RTM_NEWLINK, CREATE, &link(0, 0))
        .with_text(IFLA_IFNAME, NAME)
        .with_number(IFLA_MTU, mtu)
        // Else it is that of a port, and changes when that goes.
        .with(IFLA_ADDRESS, &mac(gateway).0)
        .with_nested(IFLA_LINKINFO, |info| info.with_text(IFLA_INFO_KIND, "bridge"));
    socket.request(&create).context(|| format!("make the bridge {NAME}"))?;
    let bridge = find(socket, NAME)?.ok_or_else(|| Error::Kernel {
        what: format!("find the bridge {NAME}"),
        source: std::io::ErrorKind::NotFound.into(),
    })?;
    let set_up = quiet(socket, bridge.index)
        .and_then(|()| {
            let body = address(AF_INET, subnet.prefix(), bridge.index);
            socket.request(&Message::new(RTM_NEWADDR, CREATE, &body).with(IFA_LOCAL, &gateway.octets()))
        })
        .and_then(|()| add_ipv6(socket, bridge.index, subnet))
        .and_then(|()| socket.request(&Message::new(RTM_NEWLINK, 0, &link(bridge.index, IFF_UP as u32))))
        .context(|| format!("give the bridge {NAME} the address {gateway}"));
    if set_up.is_err() {
        let _ = remove(socket, bridge.index);
    }
    set_up.map(|()| bridge)
}

/// `struct ifaddrmsg`.
fn address(family: i32, prefix: u8, index: u32) -> [u8; 8] {
    let [a, b, c, d] = index.to_ne_bytes();
    [family as u8, prefix, 0, 0, a, b, c, d]
}

/// Gives the bridge its IPv6 address, where the kernel has IPv6 for it.
fn add_ipv6(socket: &mut Socket, index: u32, subnet: Subnet) -> io::Result<()> {
    let body = address(AF_INET6, subnet.prefix6(), index);
    // At once: nobody else can have it.
    let add = Message::new(RTM_NEWADDR, CREATE, &body)
        .with(IFA_LOCAL, &subnet.gateway6().octets())
        .with_number(IFA_FLAGS, IFA_F_NODAD);
    match socket.request(&add) {
        // There is none, or it is switched off (net.ipv6.conf.default.disable_ipv6).
        Err(error)
            if [EAFNOSUPPORT, EOPNOTSUPP, EACCES, ENODEV].map(Some).contains(&error.raw_os_error()) =>
        {
            tracing::info!(%error, "the bridge {NAME} has no IPv6");
            Ok(())
        }
        result => result,
    }
}

/// Whether it has its IPv6 address.
pub(super) fn has_ipv6(socket: &mut Socket, index: u32, subnet: Subnet) -> Result<bool> {
    let listed = socket.list(&Message::new(RTM_GETADDR, 0, &address(AF_INET6, 0, 0)));
    let listed = listed.context(|| format!("list the addresses of the bridge {NAME}"))?;
    let wanted = subnet.gateway6().octets();
    Ok(listed.iter().any(|body| {
        let rest = body.get(8..).unwrap_or_default();
        word(body, 4) == Some(index) && attribute(rest, IFA_ADDRESS).is_some_and(|ip| ip == wanted)
    }))
}

/// Removes it.
pub(super) fn remove(socket: &mut Socket, index: u32) -> Result<()> {
    socket
        .request(&Message::new(RTM_DELLINK, 0, &link(index, 0)))
        .context(|| format!("remove the bridge {NAME}"))
}

/// Makes an interface a port of the bridge.
pub(super) fn enslave(socket: &mut Socket, port: u32, bridge: u32) -> Result<()> {
    let join = Message::new(RTM_NEWLINK, 0, &link(port, 0)).with_number(IFLA_MASTER, bridge);
    socket.request(&join).context(|| format!("put a sandbox's interface on the bridge {NAME}"))
}

/// Looks at the host's routes: none may lead where the subnet is. Gives the MTU of the way out.
fn survey(socket: &mut Socket, subnet: Subnet) -> Result<u32> {
    let mut header = [0; 12];
    header[0] = AF_INET as u8;
    let routes = socket.list(&Message::new(RTM_GETROUTE, 0, &header));
    let routes = routes.context(|| "list the host's routes".into())?;
    let links = links(socket)?;
    let of =
        |index: u32| links.iter().find(|body| word(body, 4) == Some(index)).and_then(|body| body.get(16..));
    let mut mtu = None;
    for body in &routes {
        let (Some(rest), Some(prefix)) = (body.get(12..), body.get(1).copied()) else { continue };
        let destination = match attribute(rest, RTA_DST).and_then(ip) {
            Some(IpAddr::V4(destination)) => destination,
            _ => Ipv4Addr::UNSPECIFIED,
        };
        let through = attribute(rest, RTA_OIF).and_then(number).and_then(of);
        if prefix <= LONGEST_DEFAULT {
            mtu = mtu.or_else(|| through.and_then(|link| number(attribute(link, IFLA_MTU)?)));
        } else if subnet.overlaps(destination, prefix) {
            let name = through.and_then(|link| attribute(link, IFLA_IFNAME)).unwrap_or(b"?\0");
            let interface = String::from_utf8_lossy(name).trim_end_matches('\0').to_owned();
            return Err(Error::Overlap { subnet, route: format!("{destination}/{prefix}"), interface });
        }
    }
    Ok(mtu.unwrap_or(USUAL_MTU))
}

fn links(socket: &mut Socket) -> Result<Vec<Vec<u8>>> {
    let links = socket.list(&Message::new(RTM_GETLINK, 0, &[0; 16]));
    links.context(|| "list the host's interfaces".into())
}
