//! The sandbox's connection to the network: what the host does for it, and what the guest is told.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::{Arc, Mutex};

use kapsel_machine::Nic;
use kapsel_netlink::octets;
use kapsel_network::{
    Interface, Port, Taken,
    bridge::{self, Attached, Guest, Neighbours, Subnet},
};
use kapsel_protocol::{api, limits};

use super::Error;
use crate::network::Network;

/// A connection as long as the sandbox lives; dropping it undoes it.
#[derive(Debug, Default)]
pub enum Connection {
    /// There is nothing to undo.
    #[default]
    None,
    /// By a namespace.
    Taken(Arc<Mutex<Taken>>),
    /// By the bridge.
    Bridge(Attached),
}

/// Who is connected, to what.
pub struct Request<'a> {
    /// What the sandbox shall have.
    pub network: Network,
    /// What must be undone is noted here before it is done.
    pub note: &'a Path,
    /// How many places its machine has left: shared directories take the same.
    pub places: usize,
    /// The bridge's network.
    pub subnet: Subnet,
    /// The sandbox's id.
    pub id: &'a str,
    /// The sandbox's name.
    pub name: &'a str,
}

/// What a machine and its guest get.
#[derive(Debug, Default)]
pub struct Plugs {
    /// For the monitor.
    pub nics: Vec<Nic>,
    /// For the agent.
    pub interfaces: Vec<api::Interface>,
}

impl Connection {
    /// Connects a sandbox.
    ///
    /// # Errors
    /// When the network is not there or cannot be had.
    pub async fn make(request: Request<'_>) -> Result<(Self, Plugs), Error> {
        let room = limits::INTERFACES_MAX.min(request.places);
        let (note, subnet) = (request.note.to_owned(), request.subnet);
        let (id, name) = (request.id.to_owned(), request.name.to_owned());
        // The kernel is fast, but its locks are shared with all of the host.
        let connecting = tokio::task::spawn_blocking(move || match request.network {
            Network::None => Ok((Self::None, Vec::new())),
            Network::Namespace(path) => {
                let (taken, ports) = Taken::take(&path, &note, room)?;
                Ok((Self::Taken(Arc::new(Mutex::new(taken))), ports))
            }
            Network::Bridge if room == 0 => {
                let what = "the shared directories leave no place for a network; share fewer";
                Err(Error::Resources(what.into()))
            }
            Network::Bridge => {
                let (attached, port) = bridge::attach(subnet, Guest { id: &id, name: &name })?;
                Ok((Self::Bridge(attached), vec![port]))
            }
        });
        let connected = connecting.await;
        let connected =
            connected.map_err(|e| Error::Resources(format!("connecting to the network failed: {e}")))?;
        let (connection, ports) = connected?;
        Ok((connection, Plugs::of(ports)?))
    }

    /// Who else is there.
    pub fn neighbours(&self) -> Option<Neighbours> {
        match self {
            Self::Bridge(attached) => Some(attached.neighbours()),
            Self::None | Self::Taken(_) => None,
        }
    }

    /// The sandbox's address, where kapsel has chosen it.
    pub fn address(&self) -> Option<Ipv4Addr> {
        match self {
            Self::Bridge(attached) => Some(attached.address()),
            Self::None | Self::Taken(_) => None,
        }
    }

    /// Its IPv6 address, where kapsel has chosen one.
    pub fn address6(&self) -> Option<Ipv6Addr> {
        match self {
            Self::Bridge(attached) => attached.address6(),
            Self::None | Self::Taken(_) => None,
        }
    }
}

impl Plugs {
    /// Of a machine's ends.
    ///
    /// # Errors
    /// When an interface has more of something than is told to a guest.
    pub fn of(ports: Vec<Port>) -> Result<Self, Error> {
        let mut plugs = Self::default();
        for Port { interface, tap } in ports {
            let lists = [interface.addresses.len(), interface.routes.len(), interface.neighbours.len()];
            if lists.iter().any(|n| *n > limits::INTERFACE_ENTRIES_MAX) {
                let (name, max) = (&interface.name, limits::INTERFACE_ENTRIES_MAX);
                return Err(Error::Resources(format!(
                    "the network interface {name} has more than {max} addresses, routes or permanent neighbours"
                )));
            }
            plugs.nics.push(Nic { mac: interface.mac.0, tap: Arc::new(tap) });
            plugs.interfaces.push(told(interface));
        }
        Ok(plugs)
    }
}

/// An interface as the agent is told of it.
fn told(interface: Interface) -> api::Interface {
    let address = |a: kapsel_network::Address| api::Address {
        ip: octets(a.ip),
        prefix: a.prefix.into(),
        no_route: a.no_route,
        ..Default::default()
    };
    let route = |r: kapsel_network::Route| api::Route {
        destination: octets(r.destination),
        prefix: r.prefix.into(),
        gateway: r.gateway.map(octets).unwrap_or_default(),
        source: r.source.map(octets).unwrap_or_default(),
        metric: r.metric,
        scope: r.scope.into(),
        on_link: r.on_link,
        mtu: r.mtu,
        ..Default::default()
    };
    let neighbour = |n: kapsel_network::Neighbour| api::Neighbour {
        ip: octets(n.ip),
        mac: n.mac.0.to_vec(),
        ..Default::default()
    };
    api::Interface {
        mac: interface.mac.0.to_vec(),
        name: interface.name,
        mtu: interface.mtu,
        addresses: interface.addresses.into_iter().map(address).collect(),
        routes: interface.routes.into_iter().map(route).collect(),
        neighbours: interface.neighbours.into_iter().map(neighbour).collect(),
        ..Default::default()
    }
}
