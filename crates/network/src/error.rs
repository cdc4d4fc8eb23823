//! What can go wrong with a network.

use std::io;
use std::path::PathBuf;

use crate::bridge::{self, Subnet};

/// Why a sandbox cannot be connected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such namespace.
    #[error("cannot use the network namespace {path}: {source}; `ip netns list` shows those that have names")]
    Namespace {
        /// As it was given.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It is this process's own.
    #[error(
        "{0} is the network namespace of the host itself, which a sandbox cannot have: taking its interfaces would cut the \
         host off; give the sandbox a namespace of its own"
    )]
    Host(PathBuf),
    /// Not privileged.
    #[error(
        "cannot enter the network namespace {0}: it takes CAP_SYS_ADMIN and CAP_NET_ADMIN; run kapsel as root"
    )]
    Privilege(PathBuf),
    /// Somebody else redirects the interface's frames.
    #[error(
        "interface {interface} in {namespace} already has an ingress queueing discipline, so another sandbox or another \
         program uses it; give each sandbox a namespace of its own"
    )]
    InUse {
        /// The interface.
        interface: String,
        /// The namespace.
        namespace: PathBuf,
    },
    /// More than a machine has places for.
    #[error("{namespace} has {found} Ethernet interfaces, at most {max} go to a sandbox")]
    TooMany {
        /// The namespace.
        namespace: PathBuf,
        /// How many.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// A bridge without privileges.
    #[error("a bridge takes root; run kapsel as root, or leave --network out")]
    Root,
    /// Rules cannot be set.
    #[error(
        "the program nft is missing, by which rules for the bridge are set; install the package nftables"
    )]
    NoNft,
    /// nft does not take the rules over.
    #[error("cannot set the rules of the bridge {name}: nft: {0}; the kernel must have nf_tables, for bridges too", name = bridge::NAME)]
    Rules(String),
    /// Every address is handed out.
    #[error("all addresses of {0} are in use on the bridge {name}; end a sandbox, or set a larger bridge_subnet in the configuration", name = bridge::NAME)]
    Full(Subnet),
    /// The host has the addresses elsewhere.
    #[error(
        "the bridge's network {subnet} is in use here: {route} is reached through {interface}; set another bridge_subnet in the \
         configuration"
    )]
    Overlap {
        /// The bridge's.
        subnet: Subnet,
        /// Where the route leads.
        route: String,
        /// Through what.
        interface: String,
    },
    /// The bridge is there with other addresses.
    #[error(
        "the bridge {name} has the network {found}, and the configuration says {wanted}; end the sandboxes that are on it, and it is \
         made anew", name = bridge::NAME
    )]
    OtherSubnet {
        /// What the configuration says.
        wanted: Subnet,
        /// What the bridge has.
        found: Subnet,
    },
    /// No taps here.
    #[error("cannot make a tap: {0}; /dev/net/tun must be there (modprobe tun)")]
    Tap(io::Error),
    /// The kernel refused a change or a list.
    #[error("cannot {what}: {source}")]
    Kernel {
        /// What was tried, on what.
        what: String,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The note for the end cannot be kept.
    #[error("cannot {what} {path}: {source}")]
    Note {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// Says what was asked of the kernel.
pub(crate) trait Context<T> {
    /// `what` tells what was tried, on what.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|source| Error::Kernel { what: what(), source })
    }
}
