//! The sandbox's connection to the network: what the host does for it, and what the guest is told.

use std::path::Path;
use std::sync::Arc;

use kapsel_machine::Nic;
use kapsel_netlink::octets;
use kapsel_network::{Interface, Port, Taken};
use kapsel_protocol::{api, limits};

use super::{Error, guest_spec::MAX_SHARES};
use crate::network::Network;

/// A connection as long as the sandbox lives; dropping it undoes it.
#[derive(Debug, Default)]
pub struct Connection {
    _taken: Option<Taken>,
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
    /// Connects a sandbox that shares `shares` directories. What must be undone is noted in `note` before it is done.
    ///
    /// # Errors
    /// When the network is not there or cannot be had.
    pub async fn make(network: &Network, note: &Path, shares: usize) -> Result<(Self, Plugs), Error> {
        let Network::Namespace(path) = network else { return Ok(Default::default()) };
        let room = limits::INTERFACES_MAX.min(MAX_SHARES.saturating_sub(shares));
        let (path, note) = (path.clone(), note.to_owned());
        // The kernel is fast, but its locks are shared with all of the host.
        let taking = tokio::task::spawn_blocking(move || Taken::take(&path, &note, room));
        let taken = taking.await.map_err(|e| Error::Resources(format!("taking the network failed: {e}")))?;
        let (taken, ports) = taken?;
        let plugs = Plugs::of(ports)?;
        Ok((Self { _taken: Some(taken) }, plugs))
    }
}

impl Plugs {
    fn of(ports: Vec<Port>) -> Result<Self, Error> {
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
