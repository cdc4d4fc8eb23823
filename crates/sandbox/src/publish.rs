//! Ports of a sandbox that are reached by ports of the host.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::OwnedFd;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The most ports that one sandbox publishes: each takes a socket.
pub const MAX: usize = 128;

/// What a port speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// Connections.
    Tcp,
    /// Datagrams.
    Udp,
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// A published port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// The host's address.
    pub host_ip: IpAddr,
    /// The host's port; 0: any that is free.
    pub host_port: u16,
    /// The sandbox's port.
    pub port: u16,
    /// What it speaks.
    pub protocol: Protocol,
}

/// A port that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot publish {protocol} port {at}: {why}", protocol = .wanted.protocol, at = .wanted.host())]
pub struct Error {
    wanted: Publish,
    why: String,
}

impl Publish {
    /// Takes the host's port. Gives what was taken, with its number, and its socket.
    ///
    /// # Errors
    /// When it is in use, or may not be used.
    pub fn bind(&self) -> Result<(Self, OwnedFd), Error> {
        let at = self.host();
        let bound = match self.protocol {
            Protocol::Tcp => {
                TcpListener::bind(at).and_then(|socket| Ok((socket.local_addr()?, socket.into())))
            }
            Protocol::Udp => UdpSocket::bind(at).and_then(|socket| Ok((socket.local_addr()?, socket.into()))),
        };
        let (taken, socket): (SocketAddr, OwnedFd) = bound.map_err(|error| {
            let why = match error.kind() {
                std::io::ErrorKind::AddrInUse => "it is in use; choose another, or end what uses it".into(),
                std::io::ErrorKind::AddrNotAvailable => {
                    "this host has no such address; `ip addr` shows those that it has".into()
                }
                std::io::ErrorKind::PermissionDenied => {
                    "ports below 1024 are root's; choose another, or run kapsel as root".into()
                }
                _ => error.to_string(),
            };
            Error { wanted: *self, why }
        })?;
        Ok((Self { host_port: taken.port(), ..*self }, socket))
    }

    /// The host's side.
    pub fn host(&self) -> SocketAddr {
        SocketAddr::new(self.host_ip, self.host_port)
    }
}

impl fmt::Display for Publish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}/{}", self.host(), self.port, self.protocol)
    }
}

impl FromStr for Publish {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match Published::from_str(text)?.0[..] {
            [one] => Ok(one),
            _ => Err("expected one port".into()),
        }
    }
}

/// `[[HOST_IP:]HOST_PORT:]PORT[/PROTO]`, where both ports may be ranges of the same length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published(pub Vec<Publish>);

impl FromStr for Published {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str =
            "expected [[HOST_IP:]HOST_PORT:]PORT[/tcp|/udp], as 8080:80 or 127.0.0.1:53:53/udp";
        let bad = || FORM.to_owned();
        let (text, protocol) = match text.rsplit_once('/') {
            None | Some((_, "tcp")) => (text.strip_suffix("/tcp").unwrap_or(text), Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some(_) => return Err(bad()),
        };
        let (host, port) = text.rsplit_once(':').map_or((None, text), |(host, port)| (Some(host), port));
        let (host_ip, host_port) = match host {
            None => (None, ""),
            Some(host) => host.rsplit_once(':').map_or((None, host), |(ip, port)| (Some(ip), port)),
        };
        let host_ip = match host_ip {
            None => Ipv4Addr::LOCALHOST.into(),
            Some(ip) => match ip.strip_prefix('[') {
                Some(six) => {
                    IpAddr::V6(six.strip_suffix(']').and_then(|six| six.parse().ok()).ok_or_else(bad)?)
                }
                None => IpAddr::V4(ip.parse().map_err(|_| bad())?),
            },
        };
        let ports = range(port).ok_or_else(bad)?;
        // Without numbers of the host's each gets one that is free.
        let any = host_port.is_empty() || host_port == "0";
        let host_ports = if any { None } else { Some(range(host_port).ok_or_else(bad)?) };
        if host_ports.as_ref().is_some_and(|host_ports| host_ports.len() != ports.len()) {
            return Err("the range of the host's ports and that of the sandbox's differ in length".into());
        }
        if ports.len() > MAX {
            return Err(format!("at most {MAX} ports can be published"));
        }
        let first = host_ports.map(|ports| *ports.start());
        let each = ports.enumerate().map(|(n, port)| {
            // Within the range that was parsed, which is as long.
            let host_port = first.map_or(0, |first| first + n as u16);
            Publish { host_ip, host_port, port, protocol }
        });
        Ok(Self(each.collect()))
    }
}

/// `N` or `N-M`; 0 is no port.
fn range(text: &str) -> Option<std::ops::RangeInclusive<u16>> {
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
    match text.split_once('-') {
        None => number(text).map(|port| port..=port),
        Some((from, to)) => {
            let (from, to) = (number(from)?, number(to)?);
            (from <= to).then_some(from..=to)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Result<Vec<String>, String> {
        text.parse::<Published>().map(|all| all.0.iter().map(Publish::to_string).collect())
    }

    #[test]
    fn what_people_write() {
        for (text, all) in [
            ("80", &["127.0.0.1:0:80/tcp"][..]),
            ("8080:80", &["127.0.0.1:8080:80/tcp"]),
            ("8080:80/udp", &["127.0.0.1:8080:80/udp"]),
            ("0.0.0.0:8080:80/tcp", &["0.0.0.0:8080:80/tcp"]),
            ("192.0.2.1::80", &["192.0.2.1:0:80/tcp"]),
            ("[::1]:8080:80", &["[::1]:8080:80/tcp"]),
            ("8080-8081:80-81", &["127.0.0.1:8080:80/tcp", "127.0.0.1:8081:81/tcp"]),
            ("80-81", &["127.0.0.1:0:80/tcp", "127.0.0.1:0:81/tcp"]),
        ] {
            assert_eq!(shown(text), Ok(all.iter().map(|&one| one.to_owned()).collect()), "{text}");
            for one in all {
                assert_eq!(one.parse::<Publish>().unwrap().to_string(), *one);
            }
        }
    }

    #[test]
    fn what_makes_no_sense() {
        for text in [
            "",
            "0",
            "x",
            "80/sctp",
            "80/",
            "99999",
            "80-79",
            "8080:80-81",
            "1-200:1-200",
            "::1:80:80",
            "host:80:80",
            "[::1:80:80",
            "1:2:3:4",
            "-80",
            "80-",
        ] {
            assert!(shown(text).is_err(), "{text}: {:?}", shown(text));
        }
    }

    #[test]
    fn a_port_is_had_once() {
        let any: Publish = "80".parse().unwrap();
        let (taken, _socket) = any.bind().unwrap();
        assert_ne!(taken.host_port, 0);
        let error = taken.bind().unwrap_err().to_string();
        assert!(error.contains("is in use; choose another") && error.contains("127.0.0.1:"), "{error}");
        let elsewhere: Publish = "192.0.2.1:8080:80".parse().unwrap();
        assert!(elsewhere.bind().unwrap_err().to_string().contains("no such address"));
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[0-9:./a-z\\[\\]-]{0,30}") {
            let _ = shown(&text);
        }
    }
}
