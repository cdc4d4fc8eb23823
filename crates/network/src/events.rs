//! What the kernel tells of a namespace of its own accord.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, bind, recv, socket_with};

/// Groups of `linux/rtnetlink.h`: interfaces, IPv4 addresses and routes, IPv6 addresses and routes.
const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;

/// Is readable when something has changed in a network namespace: interfaces, their addresses and routes. What has, is looked up then: of
/// many changes at once some may not be told.
#[derive(Debug)]
pub struct Events(OwnedFd);

impl Events {
    /// From now on, in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Protocol 0 is NETLINK_ROUTE.
        let fd = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&fd, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Self(fd))
    }

    /// Forgets what was told; true when there was something.
    pub fn drain(&self) -> bool {
        let mut told = false;
        // The first bytes take a message away. More than the socket has room for (ENOBUFS) is a change as well.
        while matches!(recv(&self.0, &mut [0_u8; 16][..], RecvFlags::TRUNC), Ok(_) | Err(Errno::NOBUFS)) {
            told = true;
        }
        told
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
