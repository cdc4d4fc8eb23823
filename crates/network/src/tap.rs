//! Taps: interfaces whose other end is a file descriptor.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use kapsel_netlink::{Message, Socket, link, number};
use libc::{IFLA_AF_SPEC, IFLA_IFNAME, IFLA_MTU, RTM_GETLINK, RTM_NEWLINK};

use crate::error::Context;
use crate::{Error, Result};

const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
const IFF_UP: u32 = 1;
/// What the names of all taps begin with.
pub(crate) const PREFIX: &str = "kapsel";

/// A tap in the calling thread's network namespace. It goes with its last descriptor.
pub(crate) struct Tap {
    pub fd: OwnedFd,
    pub name: String,
}

impl Tap {
    /// Makes a tap under a name of the kernel's choice. Frames carry the header by which the guest may leave checksums and
    /// segmentation to others.
    pub(crate) fn new() -> Result<Self> {
        let file = File::options().read(true).write(true).open("/dev/net/tun").map_err(Error::Tap)?;
        // SAFETY: ifreq is plain data; all zeros is a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(PREFIX.bytes().chain(*b"%d")) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        // SAFETY: TUNSETIFF reads and writes a struct ifreq, which outlives the call.
        if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } == -1 {
            return Err(Error::Tap(std::io::Error::last_os_error()));
        }
        let name: Vec<u8> = request.ifr_name.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
        Ok(Self { fd: file.into(), name: String::from_utf8_lossy(&name).into_owned() })
    }

    /// Its number.
    pub(crate) fn index(&self, socket: &mut Socket) -> Result<u32> {
        let links = socket.list(&Message::new(RTM_GETLINK, 0, &[0; 16]));
        let links = links.context(|| format!("find the tap {}", self.name))?;
        let name = [self.name.as_bytes(), b"\0"].concat();
        let is = |body: &&Vec<u8>| {
            kapsel_netlink::attributes(body.get(16..).unwrap_or_default())
                .any(|(kind, value)| kind == IFLA_IFNAME && value == name)
        };
        let index = links.iter().find(is).and_then(|body| number(body.get(4..8)?));
        index.ok_or_else(|| Error::Tap(std::io::ErrorKind::NotFound.into()))
    }

    /// Lets frames pass. The host has no address on it and says nothing by itself: every frame is the guest's.
    pub(crate) fn up(&self, socket: &mut Socket, index: u32, mtu: u32) -> Result<()> {
        let failed = || format!("bring the tap {} up", self.name);
        quiet(socket, index).context(failed)?;
        let up = Message::new(RTM_NEWLINK, 0, &link(index, IFF_UP)).with_number(IFLA_MTU, mtu);
        socket.request(&up).context(failed)
    }
}

/// Keeps the kernel from giving an interface an IPv6 address of its own.
pub(crate) fn quiet(socket: &mut Socket, index: u32) -> std::io::Result<()> {
    let quiet = Message::new(RTM_NEWLINK, 0, &link(index, 0)).with_nested(IFLA_AF_SPEC, |families| {
        families.with_nested(libc::AF_INET6 as u16, |inet6| {
            inet6.with(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE])
        })
    });
    match socket.request(&quiet) {
        // A kernel without IPv6, or with it switched off.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) => Ok(()),
        result => result,
    }
}
