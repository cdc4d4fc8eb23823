//! Which network a sandbox gets, as a person or an engine says it.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use oci_spec::runtime::{LinuxNamespaceType, Spec};

/// A sandbox's connection.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Network {
    /// Loopback only.
    #[default]
    None,
    /// The interfaces of a network namespace, as they are found.
    Namespace(PathBuf),
    /// An address on kapsel's own bridge.
    Bridge,
}

impl Network {
    /// What a specification asks for by itself: the network namespace that it names.
    pub fn of(spec: &Spec) -> Self {
        let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
        let network = |n: &&oci_spec::runtime::LinuxNamespace| n.typ() == LinuxNamespaceType::Network;
        let path = namespaces.and_then(|all| all.iter().find(network)?.path().clone());
        path.map_or(Self::None, Self::Namespace)
    }

    /// Refuses what a person cannot mean or have here: the namespace that kapsel itself is in, a bridge without root.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), kapsel_network::Error> {
        match self {
            Self::None => Ok(()),
            Self::Namespace(path) => kapsel_network::refuse_own(path),
            Self::Bridge => kapsel_network::bridge::check(),
        }
    }
}

impl Network {
    /// Refuses ports where nothing can come to them.
    ///
    /// # Errors
    /// Why not.
    pub fn check_publish(&self) -> Result<(), String> {
        match self {
            Self::Bridge => Ok(()),
            Self::None | Self::Namespace(_) => {
                Err(format!("with --network {self} no port can be published; use --network bridge"))
            }
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "none" => Ok(Self::None),
            None if text == "bridge" => Ok(Self::Bridge),
            Some(("ns", path)) if path.starts_with('/') => Ok(Self::Namespace(path.into())),
            _ => {
                Err("expected none, bridge, or ns:PATH with the absolute path of a network namespace".into())
            }
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Namespace(path) => write!(f, "ns:{}", path.display()),
            Self::Bridge => f.write_str("bridge"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_understood() {
        for network in [Network::None, Network::Bridge, Network::Namespace("/run/netns/a".into())] {
            assert_eq!(network.to_string().parse(), Ok(network));
        }
        for text in ["", "host", "ns:", "ns:relative", "bridge:x", "none:x"] {
            assert!(text.parse::<Network>().unwrap_err().contains("ns:PATH"), "{text}");
        }
    }
}
