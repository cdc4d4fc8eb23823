//! The network: loopback always, other interfaces as the host describes them.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::time::Duration;

use kapsel_netlink::{
    CREATE, Message, NUD_PERMANENT, REPLACE, RTAX_MTU, Socket, attributes, ip, link, number, octets,
};
use kapsel_protocol::{api, limits};
use libc::{
    IFA_ADDRESS, IFA_BROADCAST, IFA_F_NODAD, IFA_F_NOPREFIXROUTE, IFA_FLAGS, IFA_LOCAL, IFLA_ADDRESS,
    IFLA_IFNAME, IFLA_MTU, NDA_DST, NDA_LLADDR, RT_SCOPE_LINK, RT_TABLE_MAIN, RTA_DST, RTA_GATEWAY,
    RTA_METRICS, RTA_OIF, RTA_PREFSRC, RTA_PRIORITY, RTM_GETLINK, RTM_NEWADDR, RTM_NEWLINK, RTM_NEWNEIGH,
    RTM_NEWROUTE, RTN_UNICAST, RTPROT_STATIC,
};
use rustix::net::{AddressFamily, SocketType};

use crate::error::{Error, Result};
use crate::storage::probe_slots;

/// How long a device may take to appear.
const DEVICE_DEADLINE: Duration = Duration::from_secs(10);

/// Brings `lo` of this process's network namespace up.
///
/// # Errors
/// Those of socket(2) and the ioctls.
pub fn loopback_up() -> io::Result<()> {
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    // SAFETY: ifreq is plain data; all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads a struct ifreq, which outlives the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Makes the machine's interfaces what the host says.
///
/// # Errors
/// When the request makes no sense, a device does not appear, or the kernel refuses.
pub async fn configure(interfaces: &[api::Interface]) -> Result<()> {
    if interfaces.len() > limits::INTERFACES_MAX {
        return Err(Error::Invalid(format!("more than {} network interfaces", limits::INTERFACES_MAX)));
    }
    interfaces.iter().try_for_each(check)?;
    probe_slots().map_err(|e| Error::Internal(format!("looking for network interfaces: {e}")))?;
    let mut socket =
        Socket::open().map_err(|e| Error::Internal(format!("speaking with the kernel's network: {e}")))?;
    let mut indices = Vec::new();
    for interface in interfaces {
        indices.push(appeared(&mut socket, interface).await?);
    }
    if interfaces.len() > 1 {
        // The kernel has given the devices names that may be meant for others of them.
        for index in &indices {
            let away = Message::new(RTM_NEWLINK, 0, &link(*index, 0))
                .with_text(IFLA_IFNAME, &format!("kapsel-{index}"));
            socket.request(&away).map_err(|e| Error::Internal(format!("renaming an interface: {e}")))?;
        }
    }
    for (interface, index) in interfaces.iter().zip(indices) {
        set_up(&mut socket, interface, index)?;
    }
    Ok(())
}

/// Sizes, so that the kernel gets nothing but what it can read.
fn check(interface: &api::Interface) -> Result<()> {
    let address = |bytes: &[u8]| matches!(bytes.len(), 4 | 16);
    let name = &interface.name;
    let named = (1..=limits::INTERFACE_NAME_MAX).contains(&name.len())
        && !name.contains(|c: char| c == '/' || c == '\0' || c.is_whitespace());
    let entries = [interface.addresses.len(), interface.routes.len(), interface.neighbours.len()];
    let good = named
        && interface.mac.len() == 6
        && entries.iter().all(|n| *n <= limits::INTERFACE_ENTRIES_MAX)
        && interface.addresses.iter().all(|a| address(&a.ip) && a.prefix as usize <= a.ip.len() * 8)
        && interface.neighbours.iter().all(|n| address(&n.ip) && n.mac.len() == 6)
        && interface.routes.iter().all(|r| {
            let fits = |bytes: &[u8]| bytes.is_empty() || bytes.len() == r.destination.len();
            address(&r.destination)
                && r.prefix as usize <= r.destination.len() * 8
                && r.scope <= 255
                && fits(&r.gateway)
                && fits(&r.source)
        });
    match good {
        true => Ok(()),
        false => Err(Error::Invalid(format!(
            "the network interface {name:?} has a name, an address, a route or a neighbour of the wrong size"
        ))),
    }
}

/// Takes the driver off the device with this Ethernet address, so that the guest has no such interface any more.
///
/// # Errors
/// When there is none in this network namespace, or the kernel refuses.
pub fn remove(mac: &[u8]) -> Result<()> {
    const UNBIND: &str = "/sys/bus/virtio/drivers/virtio_net/unbind";
    let failed = |e: io::Error| Error::Internal(format!("removing a network interface: {e}"));
    let links = Socket::open().and_then(|mut socket| links(&mut socket)).map_err(failed)?;
    let name = links.iter().find(|link| has_address(link, mac)).and_then(|link| {
        let mut attributes = attributes(link.get(16..).unwrap_or_default());
        let (_, name) = attributes.find(|(kind, _)| *kind == IFLA_IFNAME)?;
        String::from_utf8(name.strip_suffix(b"\0")?.to_vec()).ok()
    });
    let name = name.ok_or_else(|| Error::NotFound("no network interface has this address".into()))?;
    let device = std::fs::canonicalize(format!("/sys/class/net/{name}/device")).map_err(failed)?;
    let device = device.file_name().unwrap_or_default();
    std::fs::write(UNBIND, device.as_encoded_bytes()).map_err(failed)
}

fn links(socket: &mut Socket) -> io::Result<Vec<Vec<u8>>> {
    socket.list(&Message::new(RTM_GETLINK, 0, &[0; 16]))
}

fn has_address(link: &[u8], mac: &[u8]) -> bool {
    attributes(link.get(16..).unwrap_or_default()).any(|(kind, value)| kind == IFLA_ADDRESS && value == mac)
}

/// Waits for the device with an interface's Ethernet address; gives its number.
async fn appeared(socket: &mut Socket, interface: &api::Interface) -> Result<u32> {
    let mut left = DEVICE_DEADLINE;
    let mut pause = Duration::from_millis(1);
    loop {
        let links =
            links(socket).map_err(|e| Error::Internal(format!("listing the network interfaces: {e}")))?;
        let ours = links.iter().find(|link| has_address(link, &interface.mac));
        if let Some(index) = ours.and_then(|body| number(body.get(4..8)?)) {
            return Ok(index);
        }
        let Some(less) = left.checked_sub(pause) else {
            return Err(Error::Internal(format!(
                "the device of the network interface {} is not there",
                interface.name
            )));
        };
        left = less;
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn set_up(socket: &mut Socket, interface: &api::Interface, index: u32) -> Result<()> {
    let name = &interface.name;
    let mut ask = |what: &dyn Fn() -> String, message: Message| match socket.request(&message) {
        // The kernel makes link-local addresses itself, and was perhaps faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.map_err(|e| Error::Internal(format!("{} of {name}: {e}", what()))),
    };
    // Addresses come before the interface is up, so that IPv6 does not begin with one of its own.
    for address in &interface.addresses {
        ask(
            &|| format!("setting the address {}", shown(&address.ip, address.prefix)),
            added(address, index),
        )?;
    }
    let mut up = Message::new(RTM_NEWLINK, 0, &link(index, libc::IFF_UP as u32)).with_text(IFLA_IFNAME, name);
    if interface.mtu != 0 {
        up = up.with_number(IFLA_MTU, interface.mtu);
    }
    ask(&|| "setting name and state".into(), up)?;
    for neighbour in &interface.neighbours {
        ask(&|| format!("adding the neighbour {}", shown(&neighbour.ip, 0)), written_down(neighbour, index))?;
    }
    for route in &interface.routes {
        ask(
            &|| format!("adding the route to {}", shown(&route.destination, route.prefix)),
            through(route, index),
        )?;
    }
    Ok(())
}

fn shown(bytes: &[u8], prefix: u32) -> String {
    ip(bytes).map_or_else(String::new, |ip| format!("{ip}/{prefix}"))
}

fn family(address: &[u8]) -> u8 {
    (if address.len() == 4 { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

/// `struct ifaddrmsg`: family, prefix, flags, scope, index.
fn added(address: &api::Address, index: u32) -> Message {
    let mut body = [family(&address.ip), address.prefix as u8, 0, 0, 0, 0, 0, 0];
    let parsed = ip(&address.ip);
    if parsed.is_some_and(|ip| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local())) {
        body[3] = RT_SCOPE_LINK;
    }
    body[4..].copy_from_slice(&index.to_ne_bytes());
    // The host has made sure that nobody else has it.
    let flags = IFA_F_NODAD | if address.no_route { IFA_F_NOPREFIXROUTE } else { 0 };
    let message = Message::new(RTM_NEWADDR, CREATE, &body)
        .with(IFA_LOCAL, &address.ip)
        .with(IFA_ADDRESS, &address.ip)
        .with_number(IFA_FLAGS, flags);
    match parsed {
        Some(IpAddr::V4(ip)) if address.prefix < 31 => {
            let hosts = u32::MAX.checked_shr(address.prefix).unwrap_or(0);
            message.with(IFA_BROADCAST, &octets(IpAddr::from((ip.to_bits() | hosts).to_be_bytes())))
        }
        _ => message,
    }
}

/// `struct rtmsg`: family, lengths of destination and source, tos, table, protocol, scope, type, flags.
fn through(route: &api::Route, index: u32) -> Message {
    const RTNH_F_ONLINK: u8 = 4;
    let flags = if route.on_link { RTNH_F_ONLINK } else { 0 };
    let (family, prefix, scope) = (family(&route.destination), route.prefix as u8, route.scope as u8);
    let body = [family, prefix, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST, flags, 0, 0, 0];
    let mut message = Message::new(RTM_NEWROUTE, CREATE, &body).with_number(RTA_OIF, index);
    if prefix != 0 {
        message = message.with(RTA_DST, &route.destination);
    }
    for (kind, address) in [(RTA_GATEWAY, &route.gateway), (RTA_PREFSRC, &route.source)] {
        if !address.is_empty() {
            message = message.with(kind, address);
        }
    }
    if route.metric != 0 {
        message = message.with_number(RTA_PRIORITY, route.metric);
    }
    if route.mtu != 0 {
        message = message.with_nested(RTA_METRICS, |metrics| metrics.with_number(RTAX_MTU, route.mtu));
    }
    message
}

/// `struct ndmsg`: family, index, state, flags, type.
fn written_down(neighbour: &api::Neighbour, index: u32) -> Message {
    let mut body = [0; 12];
    body[0] = family(&neighbour.ip);
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    Message::new(RTM_NEWNEIGH, REPLACE, &body).with(NDA_DST, &neighbour.ip).with(NDA_LLADDR, &neighbour.mac)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wrong_sizes_are_refused() {
        let good = api::Interface { mac: vec![2; 6], name: "eth0".into(), ..Default::default() };
        assert!(check(&good).is_ok());
        let address = |ip: &[u8], prefix| api::Address { ip: ip.into(), prefix, ..Default::default() };
        let route = |destination: &[u8], gateway: &[u8]| api::Route {
            destination: destination.into(),
            gateway: gateway.into(),
            ..Default::default()
        };
        for bad in [
            api::Interface { mac: vec![2; 5], ..good.clone() },
            api::Interface { name: "a".repeat(16), ..good.clone() },
            api::Interface { name: "a/b".into(), ..good.clone() },
            api::Interface { name: String::new(), ..good.clone() },
            api::Interface { addresses: vec![address(&[1; 5], 8)], ..good.clone() },
            api::Interface { addresses: vec![address(&[1; 4], 33)], ..good.clone() },
            api::Interface { addresses: vec![address(&[1; 4], 8); 1025], ..good.clone() },
            api::Interface { routes: vec![route(&[0; 4], &[1; 16])], ..good.clone() },
            api::Interface { routes: vec![route(&[], &[])], ..good.clone() },
        ] {
            assert!(check(&bad).is_err(), "{bad:?}");
        }
    }
}
