//! The command line, which a program writes: `tcp:FD=IP:PORT` and `udp:FD=IP:PORT`, any number of them.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use anyhow::{Context, bail};

/// A published port.
#[derive(Debug)]
pub struct Port {
    /// Where the host's side comes.
    pub transport: Transport,
    /// In the sandbox.
    pub to: SocketAddr,
}

/// A socket of the host's side.
#[derive(Debug)]
pub enum Transport {
    /// Listens.
    Tcp(TcpListener),
    /// Is bound.
    Udp(UdpSocket),
}

/// Reads the arguments after the program's name.
pub fn parse(args: impl Iterator<Item = String>) -> anyhow::Result<Vec<Port>> {
    let mut seen = Vec::new();
    args.map(|arg| {
        let (transport, fd, to) = split(&arg).with_context(|| format!("{arg:?} is not tcp:FD=IP:PORT"))?;
        if seen.contains(&fd) {
            bail!("descriptor {fd} is given twice");
        }
        seen.push(fd);
        // SAFETY: the parent passed this descriptor for this purpose alone, and it is taken only once: `seen` has each.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let transport = match transport {
            Protocol::Tcp => {
                let listener = TcpListener::from(fd);
                listener.local_addr().with_context(|| format!("{arg}: no socket"))?;
                Transport::Tcp(listener)
            }
            Protocol::Udp => {
                let socket = UdpSocket::from(fd);
                socket.local_addr().with_context(|| format!("{arg}: no socket"))?;
                Transport::Udp(socket)
            }
        };
        Ok(Port { transport, to })
    })
    .collect()
}

#[derive(Debug, PartialEq, Eq)]
enum Protocol {
    Tcp,
    Udp,
}

fn split(arg: &str) -> Option<(Protocol, RawFd, SocketAddr)> {
    let (protocol, rest) = arg.split_once(':')?;
    let (fd, to) = rest.split_once('=')?;
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        _ => return None,
    };
    // 0, 1 and 2 are not for sockets.
    Some((protocol, fd.parse().ok().filter(|fd| *fd > 2)?, to.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let to = "10.213.0.2:80".parse().unwrap();
        assert_eq!(split("tcp:3=10.213.0.2:80"), Some((Protocol::Tcp, 3, to)));
        assert_eq!(split("udp:77=10.213.0.2:80"), Some((Protocol::Udp, 77, to)));
        for arg in ["", "tcp:2=1.2.3.4:5", "sctp:3=1.2.3.4:5", "tcp:3=host:5", "tcp:3", "tcp:3=1.2.3.4"] {
            assert_eq!(split(arg), None, "{arg}");
        }
        assert!(parse(["tcp:9999=1.2.3.4:5".to_owned()].into_iter()).is_err(), "not open");
    }
}
