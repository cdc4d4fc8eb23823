//! A socket to the kernel's routing.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

use crate::message::{HEADER, Message};

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
/// The list changed while it was being made.
const DUMP_INTERRUPTED: u16 = 0x10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// The kernel packs lists into buffers of at most so many bytes.
const BUFFER: usize = 32 << 10;
/// The kernel answers while it is asked; should it ever not, nobody waits for ever.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(10);
/// How often a list is asked for again when it changes meanwhile.
const TRIES: usize = 10;

/// A socket to the routing of the network namespace in which it was opened.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// Those of socket(2).
    pub fn open() -> io::Result<Self> {
        // Protocol 0 is NETLINK_ROUTE.
        let fd =
            rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        set_socket_timeout(&fd, Timeout::Recv, Some(PATIENCE))?;
        Ok(Self { fd, sequence: 0 })
    }

    /// Has the kernel change something.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn request(&mut self, message: &Message) -> io::Result<()> {
        self.exchange(message, ACK, |_, _| ()).map(drop)
    }

    /// Has the kernel list something: gives the body (structure and attributes) of each message.
    ///
    /// # Errors
    /// The kernel's answer.
    pub fn list(&mut self, message: &Message) -> io::Result<Vec<Vec<u8>>> {
        for _ in 0..TRIES {
            let mut found = Vec::new();
            if self.exchange(message, DUMP, |_, body| found.push(body.to_vec()))? {
                return Ok(found);
            }
        }
        Err(io::ErrorKind::ResourceBusy.into())
    }

    /// Sends a request and reads to the end of the answer. False: a list that is not of one moment.
    fn exchange(
        &mut self,
        message: &Message,
        flags: u16,
        mut each: impl FnMut(u16, &[u8]),
    ) -> io::Result<bool> {
        self.sequence = self.sequence.wrapping_add(1);
        let request = message.finish(REQUEST | flags, self.sequence);
        rustix::net::send(&self.fd, &request, SendFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        let mut whole = true;
        loop {
            let (n, _) = rustix::net::recv(&self.fd, &mut buffer[..], RecvFlags::empty())?;
            let mut rest = &buffer[..n];
            while let Some(header) = rest.get(..HEADER) {
                let word = |at: usize| [header[at], header[at + 1], header[at + 2], header[at + 3]];
                let half = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
                let length = u32::from_ne_bytes(word(0)) as usize;
                let Some(body) = rest.get(HEADER..length) else {
                    return Err(io::ErrorKind::InvalidData.into());
                };
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
                if u32::from_ne_bytes(word(8)) != self.sequence {
                    // Of an earlier request that failed halfway.
                    continue;
                }
                whole &= half(6) & DUMP_INTERRUPTED == 0;
                match (half(4), body.first_chunk().map(|code| i32::from_ne_bytes(*code))) {
                    (NLMSG_ERROR, Some(0)) => return Ok(true),
                    (NLMSG_ERROR | NLMSG_DONE, Some(code)) if code < 0 => {
                        return Err(io::Error::from_raw_os_error(-code));
                    }
                    (NLMSG_DONE, _) => return Ok(whole),
                    (NLMSG_ERROR, _) => return Err(io::ErrorKind::InvalidData.into()),
                    (kind, _) => each(kind, body),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RTM_GETLINK: u16 = 18;
    const RTM_SETLINK: u16 = 19;

    #[test]
    fn the_kernel_lists_loopback_and_refuses_nonsense() {
        let mut socket = Socket::open().unwrap();
        let links = socket.list(&Message::new(RTM_GETLINK, 0, &[0; 16])).unwrap();
        let named = |link: &Vec<u8>| crate::attributes(&link[16..]).any(|a| a == (3, &b"lo\0"[..]));
        assert!(links.iter().any(named));
        // An interface of this number there is not.
        let mut body = [0; 16];
        body[4..8].copy_from_slice(&i32::MAX.to_ne_bytes());
        let refused = socket.request(&Message::new(RTM_SETLINK, 0, &body)).unwrap_err();
        assert!([19, 1].contains(&refused.raw_os_error().unwrap()), "{refused}");
        assert_eq!(socket.list(&Message::new(RTM_GETLINK, 0, &[0; 16])).unwrap().len(), links.len());
    }
}
