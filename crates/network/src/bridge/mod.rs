//! A bridge of kapsel's own: sandboxes as ports of one switch, with the host as their way out.
//!
//! Each network namespace in which kapsel runs (mostly there is one, the host's) has a bridge of its own while a sandbox is on it. No
//! daemon keeps it: each shim holds a [`Lease`] on an address, the rules are made anew from all leases with each that comes or goes,
//! and whoever gives the last one back removes bridge and rules. A killed shim's lease is found by [`sweep`], since nobody holds it.

mod lease;
mod link;
mod rules;
mod subnet;

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kapsel_netlink::Socket;

use crate::error::Context;
use crate::namespace;
use crate::tap::Tap;
use crate::{Address, Error, Interface, Mac, Port, Result, Route};
pub use lease::Leased;
use lease::{Lease, Store};
pub use subnet::Subnet;

/// The bridge's name, the same in each network namespace.
pub const NAME: &str = "kapsel-br0";

/// Where leases are: not below a data root, since all that share a network namespace share its bridge.
const BASE: &str = "/run/kapsel/networks";

/// A sandbox's place on the bridge. Dropping it gives it back.
#[derive(Debug)]
pub struct Attached {
    lease: Lease,
    base: PathBuf,
}

/// Who wants to be on the bridge.
#[derive(Clone, Copy, Debug)]
pub struct Guest<'a> {
    /// The sandbox, for whoever looks at the leases.
    pub id: &'a str,
    /// By which the others shall find it.
    pub name: &'a str,
}

/// Refuses a bridge where none can be had.
///
/// # Errors
/// [`Error::Root`] or [`Error::NoNft`].
pub fn check() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Err(Error::Root);
    }
    rules::program().map(drop)
}

/// Puts a guest on the bridge of the calling process's network namespace, which is made where there is none.
///
/// # Errors
/// When no address is free, the subnet is in use elsewhere, or the kernel refuses. Nothing is left of it then.
pub fn attach(subnet: Subnet, guest: Guest<'_>) -> Result<(Attached, Port)> {
    attach_at(Path::new(BASE), subnet, guest)
}

fn attach_at(base: &Path, subnet: Subnet, guest: Guest<'_>) -> Result<(Attached, Port)> {
    let store = Store::lock(base)?.of(own_namespace()?)?;
    let (mut others, _) = store.scan()?;
    if let Some(other) = others.iter().find(|other| other.subnet != subnet) {
        return Err(Error::OtherSubnet { wanted: subnet, found: other.subnet });
    }
    let address = subnet.free(others.iter().map(|other| other.address)).ok_or(Error::Full(subnet))?;
    let mut socket = Socket::open().context(|| "speak with the kernel's network".into())?;
    let bridge = match link::find(&mut socket, NAME)? {
        Some(bridge) if !others.is_empty() => bridge,
        left => link::make(&mut socket, left, subnet)?,
    };
    forward()?;
    let tap = Tap::new()?;
    let address6 = link::has_ipv6(&mut socket, bridge.index, subnet)?.then(|| subnet.address6(address));
    let leased = Leased {
        sandbox: guest.id.into(),
        name: guest.name.into(),
        address,
        address6,
        subnet,
        tap: tap.name.clone(),
    };
    let lease = store.write(&leased)?;
    // From here on dropping it undoes all, once the store is unlocked.
    let attached = Attached { lease, base: base.to_owned() };
    others.push(leased);
    let port = (|| {
        // What the guest may send is settled before it can send anything.
        rules::apply(&rules::all(subnet, &others))?;
        let index = tap.index(&mut socket)?;
        link::enslave(&mut socket, index, bridge.index)?;
        tap.up(&mut socket, index, bridge.mtu)?;
        Ok(Port { interface: interface(subnet, address, address6, bridge.mtu), tap: tap.fd })
    })();
    drop(store);
    Ok((attached, port?))
}

/// What the guest is told.
fn interface(subnet: Subnet, address: Ipv4Addr, address6: Option<Ipv6Addr>, mtu: u32) -> Interface {
    let default = |everywhere: IpAddr, gateway: IpAddr| Route {
        destination: everywhere,
        prefix: 0,
        gateway: Some(gateway),
        source: None,
        metric: 0,
        scope: 0,
        on_link: false,
        mtu: 0,
    };
    let on = |ip: IpAddr, prefix| Address { ip, prefix, no_route: false };
    let mut interface = Interface {
        name: "eth0".into(),
        mac: mac(address),
        mtu,
        addresses: vec![on(address.into(), subnet.prefix())],
        routes: vec![default(Ipv4Addr::UNSPECIFIED.into(), subnet.gateway().into())],
        neighbours: Vec::new(),
    };
    if let Some(address) = address6 {
        interface.addresses.push(on(address.into(), subnet.prefix6()));
        // Without a way out programs are told at once, and take the other address of whom they look for.
        if forwards_ipv6() {
            interface.routes.push(default(Ipv6Addr::UNSPECIFIED.into(), subnet.gateway6().into()));
        }
    }
    interface
}

/// The Ethernet address that belongs to an address: who gets the one later has the other too, so that no cache is ever wrong.
pub(crate) fn mac(address: Ipv4Addr) -> Mac {
    let [a, b, c, d] = address.octets();
    // Locally administered.
    Mac([0x02, 0x6b, a, b, c, d])
}

impl Attached {
    /// The address.
    pub fn address(&self) -> Ipv4Addr {
        self.lease.leased.address
    }

    /// The IPv6 address, if the bridge has one.
    pub fn address6(&self) -> Option<Ipv6Addr> {
        self.lease.leased.address6
    }

    /// Where to look who else is on the bridge.
    pub fn neighbours(&self) -> Neighbours {
        Neighbours { base: self.base.clone(), directory: self.lease.directory().to_owned() }
    }
}

/// Who is on a bridge.
#[derive(Clone, Debug)]
pub struct Neighbours {
    base: PathBuf,
    directory: PathBuf,
}

impl Neighbours {
    /// The directory of the leases. With each sandbox that comes to the bridge a file is moved there, with each that leaves one is
    /// deleted.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// All of them now, also whoever asks.
    ///
    /// # Errors
    /// When the leases cannot be read.
    pub fn list(&self) -> Result<Vec<Leased>> {
        let store = Store::lock(&self.base)?.of(own_namespace()?)?;
        Ok(store.scan()?.0)
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let given_back = Store::lock(&self.base).and_then(|stores| {
            let store = stores.of(own_namespace()?)?;
            self.lease.remove()?;
            settle(&store)
        });
        if let Err(error) = given_back {
            tracing::warn!(%error, "the bridge is not as it should be; the next command sees to it");
        }
    }
}

/// Gives back what killed shims had on any bridge: addresses, rules, and bridges on which nobody is left. Costs one system call where no
/// bridge is in use.
///
/// # Errors
/// When leases cannot be read or the kernel refuses.
pub fn sweep() -> Result<()> {
    sweep_at(Path::new(BASE))
}

fn sweep_at(base: &Path) -> Result<()> {
    if lease::namespaces(base)?.is_empty() {
        return Ok(());
    }
    let stores = Store::lock(base)?;
    for namespace in lease::namespaces(base)? {
        let store = stores.of(namespace)?;
        let (live, dead) = store.scan()?;
        if dead > 0 || live.is_empty() {
            match namespace::find(namespace) {
                Some(namespace) => namespace.run(|| settle(&store))?,
                // Gone, and all that was in it.
                None => store.clear()?,
            }
        }
    }
    Ok(())
}

/// Makes bridge and rules of the calling thread's namespace what the leases say, and forgets those that nobody holds.
fn settle(store: &Store) -> Result<()> {
    let (live, _) = store.scan()?;
    match live.first() {
        Some(any) => rules::apply(&rules::all(any.subnet, &live))?,
        None => {
            rules::apply(&rules::none())?;
            let mut socket = Socket::open().context(|| "speak with the kernel's network".into())?;
            if let Some(bridge) = link::find(&mut socket, NAME)? {
                link::remove(&mut socket, bridge.index)?;
            }
        }
    }
    store.forget_dead()
}

/// The number of the network namespace that this thread is in.
fn own_namespace() -> Result<u64> {
    let path = PathBuf::from("/proc/thread-self/ns/net");
    let meta = fs::metadata(&path).map_err(|source| Error::Namespace { path, source })?;
    Ok(meta.ino())
}

/// Has the kernel pass packets on between interfaces, where it does not yet. It stays so: what else needs it by then is not for kapsel to
/// know.
fn forward() -> Result<()> {
    const SWITCH: &str = "/proc/sys/net/ipv4/ip_forward";
    let failed = |source: io::Error| Error::Kernel { what: format!("set {SWITCH}"), source };
    if fs::read_to_string(SWITCH).map_err(failed)?.trim() == "0" {
        fs::write(SWITCH, "1").map_err(failed)?;
        tracing::warn!("{SWITCH} was 0 and is 1 now, for the bridge {NAME}: this host passes packets on");
    }
    Ok(())
}

/// Whether the kernel passes IPv6 packets on. It is not told to: a host that does takes its own way out from no router any more
/// (`accept_ra` of Linux's ip-sysctl), which is for its administrator to decide.
fn forwards_ipv6() -> bool {
    fs::read_to_string("/proc/sys/net/ipv6/conf/all/forwarding").is_ok_and(|value| value.trim() == "1")
}

#[cfg(test)]
mod tests;
