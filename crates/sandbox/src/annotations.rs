//! What kapsel wants to know beyond the OCI runtime specification: annotations of `config.json`.

use std::collections::HashMap;
use std::net::IpAddr;

use oci_spec::runtime::Spec;

use crate::config::{Isolation, parse_size};
use crate::network::Network;
use crate::publish::Publish;

/// [`Isolation`]: `auto`, `kvm`, `kapsel-vmm`, `qemu-kvm` or `tcg`.
pub const ISOLATION: &str = "io.kapsel.isolation";
/// The machine's memory in bytes (or as `512M`).
pub const MEMORY: &str = "io.kapsel.memory";
/// The machine's virtual CPUs.
pub const CPUS: &str = "io.kapsel.cpus";
/// `true`: boot the kernel, use no template.
pub const COLD: &str = "io.kapsel.cold";
/// Size of the scratch disk in bytes, instead of an overlay in memory.
pub const STORAGE: &str = "io.kapsel.storage";
/// [`Network`]: `none`, `bridge` or `ns:PATH`; without it, the network namespace that the specification names by a path.
pub const NETWORK: &str = "io.kapsel.network";
/// Name servers of the container, separated by commas.
pub const DNS: &str = "io.kapsel.dns";
/// Names and addresses for the container's `/etc/hosts`: `NAME:IP`, separated by commas.
pub const ADD_HOST: &str = "io.kapsel.add-host";
/// Published ports ([`Publish`]), separated by commas.
pub const PUBLISH: &str = "io.kapsel.publish";
/// The signal that asks the container to stop, as a number.
pub const STOP_SIGNAL: &str = "io.kapsel.stop-signal";

/// `true`: the sandbox is a pod's, and containers may be added to it. For kapsel's own shim to say.
pub const POD: &str = "io.kapsel.pod";

/// What all of ours begin with.
pub const PREFIX: &str = "io.kapsel.";

/// All of ours, without the prefix.
pub(crate) fn names() -> Vec<&'static str> {
    [ISOLATION, MEMORY, CPUS, COLD, STORAGE, STOP_SIGNAL]
        .into_iter()
        .filter_map(|key| key.strip_prefix(PREFIX))
        .collect()
}

/// An annotation of ours that cannot be followed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The value does not fit.
    #[error("annotation {key}={value:?} is not valid: {expected}")]
    BadValue {
        /// Which one.
        key: String,
        /// What was found.
        value: String,
        /// What is accepted.
        expected: String,
    },
    /// Not one of ours, though it has our prefix.
    #[error("unknown annotation {0}: kapsel would ignore it, so it refuses it")]
    Unknown(String),
}

/// All annotations of one spec, parsed. `None`: the configuration decides.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Which machine.
    pub isolation: Option<Isolation>,
    /// Bytes.
    pub memory: Option<u64>,
    /// Virtual CPUs.
    pub cpus: Option<u32>,
    /// No template.
    pub cold: bool,
    /// Bytes of the scratch disk.
    pub storage: Option<u64>,
    /// Which network; `None`: what the specification says.
    pub network: Option<Network>,
    /// Name servers; empty: those of the host.
    pub dns: Vec<IpAddr>,
    /// Names for `/etc/hosts`.
    pub add_hosts: Vec<(String, IpAddr)>,
    /// Published ports.
    pub publish: Vec<Publish>,
    /// Signal number.
    pub stop_signal: Option<i32>,
    /// Containers may be added.
    pub pod: bool,
}

impl Wishes {
    /// Reads a spec's annotations.
    ///
    /// # Errors
    /// When one of ours is unknown or has a value that does not fit.
    pub fn of(spec: &Spec) -> Result<Self, Error> {
        spec.annotations().as_ref().map_or_else(|| Ok(Self::default()), Self::parse)
    }

    /// Reads annotations.
    ///
    /// # Errors
    /// When one of ours is unknown or has a value that does not fit.
    pub fn parse(annotations: &HashMap<String, String>) -> Result<Self, Error> {
        let mut wishes = Self::default();
        for (key, value) in annotations.iter().filter(|(key, _)| key.starts_with(PREFIX)) {
            let bad = |expected: String| Error::BadValue { key: key.clone(), value: value.clone(), expected };
            match key.as_str() {
                ISOLATION => wishes.isolation = Some(value.parse().map_err(bad)?),
                MEMORY => wishes.memory = Some(parse_size(value).map_err(bad)?),
                STORAGE => wishes.storage = Some(parse_size(value).map_err(bad)?),
                NETWORK => wishes.network = Some(value.parse().map_err(bad)?),
                DNS => {
                    let servers = value.split(',').map(str::parse).collect::<Result<_, _>>();
                    wishes.dns = servers.map_err(|_| bad("expected IP addresses".into()))?;
                }
                ADD_HOST => {
                    wishes.add_hosts =
                        value.split(',').map(parse_host).collect::<Result<_, _>>().map_err(bad)?;
                }
                PUBLISH => {
                    let ports = value.split(',').map(str::parse);
                    wishes.publish = ports.collect::<Result<_, _>>().map_err(bad)?;
                }
                CPUS => {
                    let cpus = value.parse().ok().filter(|n| (1..=64).contains(n));
                    wishes.cpus = Some(cpus.ok_or_else(|| bad("expected a number, 1 to 64".into()))?);
                }
                COLD => {
                    wishes.cold = value.parse().map_err(|_| bad("expected true or false".into()))?;
                }
                POD => wishes.pod = value.parse().map_err(|_| bad("expected true or false".into()))?,
                STOP_SIGNAL => {
                    let signal =
                        crate::spec::parse_signal(value).ok_or_else(|| bad("expected a signal".into()))?;
                    wishes.stop_signal = Some(signal);
                }
                _ => return Err(Error::Unknown(key.clone())),
            }
        }
        Ok(wishes)
    }

    /// Writes them as annotations.
    pub fn to_annotations(&self) -> HashMap<String, String> {
        let mut map = HashMap::new();
        let mut put = |key: &str, value: Option<String>| {
            if let Some(value) = value {
                map.insert(key.to_owned(), value);
            }
        };
        put(ISOLATION, self.isolation.map(|i| i.to_string()));
        put(MEMORY, self.memory.map(|n| n.to_string()));
        put(CPUS, self.cpus.map(|n| n.to_string()));
        put(COLD, self.cold.then(|| "true".into()));
        put(STORAGE, self.storage.map(|n| n.to_string()));
        put(NETWORK, self.network.as_ref().map(Network::to_string));
        let hosts: Vec<_> = self.add_hosts.iter().map(|(name, ip)| format!("{name}:{ip}")).collect();
        put(DNS, (!self.dns.is_empty()).then(|| joined(&self.dns)));
        put(ADD_HOST, (!hosts.is_empty()).then(|| hosts.join(",")));
        put(PUBLISH, (!self.publish.is_empty()).then(|| joined(&self.publish)));
        put(STOP_SIGNAL, self.stop_signal.map(|n| n.to_string()));
        put(POD, self.pod.then(|| "true".into()));
        map
    }
}

/// `NAME:IP`, a line of `/etc/hosts`.
///
/// # Errors
/// What is accepted.
pub fn parse_host(text: &str) -> Result<(String, IpAddr), String> {
    let bad = || "expected NAME:IP, as db:192.0.2.7".to_owned();
    let (name, ip) = text.split_once(':').ok_or_else(bad)?;
    let named = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    if name.is_empty() || name.len() > 253 || !name.chars().all(named) {
        return Err(bad());
    }
    let ip = ip.strip_prefix('[').and_then(|ip| ip.strip_suffix(']')).unwrap_or(ip);
    Ok((name.into(), ip.parse().map_err(|_| bad())?))
}

/// The items as they are shown, separated by commas.
fn joined(items: &[impl ToString]) -> String {
    items.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let wishes = Wishes {
            isolation: Some(Isolation::Tcg),
            memory: Some(512 << 20),
            cpus: Some(2),
            cold: true,
            storage: Some(1 << 30),
            network: Some(Network::Namespace("/run/netns/a".into())),
            dns: vec!["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()],
            add_hosts: vec![parse_host("db:192.0.2.7").unwrap(), parse_host("a.b:2001:db8::2").unwrap()],
            publish: vec!["8080:80".parse().unwrap(), "[::1]:53:53/udp".parse().unwrap()],
            stop_signal: Some(3),
            pod: true,
        };
        assert_eq!(Wishes::parse(&wishes.to_annotations()), Ok(wishes));
    }

    #[test]
    fn nothing_of_ours_is_ignored() {
        let one = |key: &str, value: &str| Wishes::parse(&HashMap::from([(key.into(), value.into())]));
        assert_eq!(one("org.example", "x"), Ok(Wishes::default()));
        assert!(matches!(one("io.kapsel.colour", "red"), Err(Error::Unknown(_))));
        for (key, value) in [
            (CPUS, "0"),
            (MEMORY, "much"),
            (COLD, "yes"),
            (ISOLATION, "none"),
            (NETWORK, "host"),
            (PUBLISH, "80,x"),
            (DNS, "resolver"),
            (ADD_HOST, "a b:192.0.2.7"),
            (ADD_HOST, "db"),
            (STOP_SIGNAL, "99"),
        ] {
            assert!(matches!(one(key, value), Err(Error::BadValue { .. })), "{key}={value}");
        }
    }
}
