//! The files by which a container's programs find names and servers, and the names of the other sandboxes on the bridge in them.
//!
//! No daemon answers for names: each shim watches who comes to the bridge and who leaves it, and writes its own guest's `/etc/hosts`.

use std::fmt::Write;
use std::fs;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Weak};
use std::time::Duration;

use kapsel_network::bridge::{Leased, Neighbours};
use kapsel_protocol::api;
use rustix::fs::inotify;
use tokio::io::{Interest, unix::AsyncFd};

use super::Sandbox;
use crate::annotations::Wishes;
use crate::network::Network;

/// Where the host's name servers are written, the second where the first names only a service on loopback (systemd-resolved).
const HOSTS_RESOLVERS: [&str; 2] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"];
/// A longer file of the host's is none.
const RESOLVERS_MAX: u64 = 64 << 10;
/// Sandboxes often come and go together: their changes are taken as one.
const TOGETHER: Duration = Duration::from_millis(20);

/// What a container is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    hostname: String,
    address: Option<Ipv4Addr>,
    address6: Option<Ipv6Addr>,
    added: Vec<(String, IpAddr)>,
    /// Written only where there is something to write.
    hosts: bool,
    resolv_conf: Option<String>,
}

impl Names {
    /// For a sandbox with these wishes and this network.
    pub fn new(
        wishes: &Wishes,
        network: &Network,
        hostname: &str,
        address: Option<Ipv4Addr>,
        address6: Option<Ipv6Addr>,
    ) -> Self {
        let all = *network == Network::Bridge;
        let resolv_conf = match wishes.dns.is_empty() {
            true if !all => None,
            true => Some(of_host()),
            false => Some(resolv_conf("", &wishes.dns)),
        };
        Self {
            hostname: hostname.into(),
            address,
            address6,
            added: wishes.add_hosts.clone(),
            hosts: all || !wishes.add_hosts.is_empty(),
            resolv_conf,
        }
    }

    /// The files, with these sandboxes on the bridge.
    pub fn files(&self, others: &[Leased]) -> Vec<api::NamesFile> {
        let file = |name: &str, content: String| api::NamesFile {
            name: name.into(),
            content: content.into_bytes(),
            ..Default::default()
        };
        let mut files = Vec::new();
        if self.hosts {
            files.push(file("hosts", self.hosts(others)));
            files.push(file("hostname", format!("{}\n", self.hostname)));
        }
        files.extend(self.resolv_conf.clone().map(|content| file("resolv.conf", content)));
        files
    }

    fn hosts(&self, others: &[Leased]) -> String {
        let mut text = String::from("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
        let mut line = |ip: IpAddr, names: &[&str]| {
            // Writing to a string does not fail.
            let _ = writeln!(text, "{ip} {}", names.join(" "));
        };
        // What a person has said comes before what sandboxes are called: the first line wins.
        self.added.iter().for_each(|(name, ip)| line(*ip, &[name]));
        let own = self.address.unwrap_or(Ipv4Addr::new(127, 0, 1, 1));
        line(own.into(), &[&self.hostname]);
        self.address6.iter().for_each(|own| line((*own).into(), &[&self.hostname]));
        for other in others.iter().filter(|other| other.name != "localhost") {
            line(other.address.into(), &[&other.name]);
            other.address6.iter().for_each(|address| line((*address).into(), &[&other.name]));
        }
        text
    }
}

/// A resolv.conf from the host's: without name servers on loopback, which is another one in a guest.
fn of_host() -> String {
    let read = |path: &str| {
        let mut text = String::new();
        let file = fs::File::open(Path::new(path)).ok()?;
        file.take(RESOLVERS_MAX).read_to_string(&mut text).ok()?;
        Some(resolv_conf(&text, &[]))
    };
    let found: Vec<String> = HOSTS_RESOLVERS.into_iter().filter_map(read).collect();
    let served = found.iter().find(|text| text.contains("nameserver "));
    if served.is_none() {
        tracing::warn!(
            "this host has no name server but on loopback, so the sandbox has none; name one with --dns"
        );
    }
    served.or(found.first()).cloned().unwrap_or_default()
}

/// What of a resolv.conf holds in a guest too, with these name servers if there are any.
fn resolv_conf(text: &str, servers: &[IpAddr]) -> String {
    let mut lines: Vec<String> = servers.iter().map(|server| format!("nameserver {server}")).collect();
    for line in text.lines().map(str::trim) {
        let mut words = line.split_whitespace();
        let kept = match (words.next(), words.next()) {
            (Some("nameserver"), Some(server)) => {
                // Also one with a zone, fe80::1%eth0, whose interface a guest has not.
                servers.is_empty() && server.parse::<IpAddr>().is_ok_and(|ip| !ip.is_loopback())
            }
            (Some("search" | "domain" | "options"), Some(_)) => true,
            _ => false,
        };
        if kept {
            lines.push(line.to_owned());
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

/// Tells of changes on a bridge.
pub struct Watch {
    neighbours: Neighbours,
    changes: AsyncFd<OwnedFd>,
}

impl Watch {
    /// Watches from now on.
    ///
    /// # Errors
    /// When the kernel has no watches left.
    pub fn new(neighbours: Neighbours) -> std::io::Result<Self> {
        let changes = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let events = inotify::WatchFlags::MOVED_TO | inotify::WatchFlags::DELETE;
        inotify::add_watch(&changes, neighbours.directory(), events)?;
        // SAFETY: an `OwnedFd` is the same open descriptor for all of its life, and the `AsyncFd` owns it.
        let changes = unsafe { AsyncFd::register_with_interest(changes, Interest::READABLE) };
        Ok(Self { neighbours, changes: changes.map_err(std::io::Error::from)? })
    }

    /// Who is on the bridge now.
    pub async fn list(&self) -> Vec<Leased> {
        let neighbours = self.neighbours.clone();
        let listed = tokio::task::spawn_blocking(move || neighbours.list()).await;
        match listed {
            Ok(Ok(leased)) => leased,
            Ok(Err(error)) => {
                tracing::warn!(%error, "cannot tell who is on the bridge");
                Vec::new()
            }
            Err(_) => Vec::new(),
        }
    }

    /// Waits for a change.
    async fn changed(&self) -> std::io::Result<()> {
        let mut ready = self.changes.readable().await?;
        tokio::time::sleep(TOGETHER).await;
        let mut events = [0; 4096];
        // What has changed is looked up anew, whatever the events say.
        while rustix::io::read(self.changes.get_ref(), &mut events).is_ok_and(|n| n > 0) {}
        ready.clear_ready();
        Ok(())
    }

    /// Keeps the container's `/etc/hosts` as the bridge is, until the sandbox ends. A file that the container has changed is its own.
    pub async fn follow(self, names: Names, mut former: Vec<u8>, sandbox: Weak<Sandbox>) {
        loop {
            let ended = sandbox.upgrade().map(|sandbox| sandbox.ended.subscribe());
            let Some(mut ended) = ended else { return };
            tokio::select! {
                changed = self.changed() => if changed.is_err() { return },
                _ = ended.wait_for(|ended| *ended != super::Ended::No) => return,
            }
            let content = names.hosts(&self.list().await).into_bytes();
            if content == former {
                continue;
            }
            let Some(sandbox) = sandbox.upgrade() else { return };
            let file = api::NamesFile {
                name: "hosts".into(),
                content: content.clone(),
                former: std::mem::replace(&mut former, content),
                ..Default::default()
            };
            let Ok(guest) = sandbox.guest() else { return };
            if let Err(error) = guest.agent.names(&sandbox.main.name, vec![file]).await {
                tracing::warn!(%error, "the guest does not know who is on the bridge");
            }
        }
    }
}

/// The content of the hosts file among files.
pub fn hosts_of(files: &[api::NamesFile]) -> Vec<u8> {
    files.iter().find(|file| file.name == "hosts").map(|file| file.content.clone()).unwrap_or_default()
}

impl Sandbox {
    /// Follows who is on the bridge, once the guest is there.
    pub(super) fn follow_names(
        self: &Arc<Self>,
        watch: Option<Watch>,
        names: Names,
        files: &[api::NamesFile],
    ) {
        if let Some(watch) = watch {
            tokio::spawn(watch.follow(names, hosts_of(files), Arc::downgrade(self)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_holds_in_a_guest_is_kept_of_the_hosts_resolvers() {
        let text = "# by hand\nnameserver 127.0.0.53\n nameserver 192.0.2.1\nnameserver ::1\nnameserver fe80::1%eth0\n\
                    search a.example b.example\noptions edns0\nsortlist x\n";
        assert_eq!(
            resolv_conf(text, &[]),
            "nameserver 192.0.2.1\nsearch a.example b.example\noptions edns0\n"
        );
        let own = ["198.51.100.1".parse().unwrap()];
        assert_eq!(resolv_conf("nameserver 192.0.2.1\n", &own), "nameserver 198.51.100.1\n");
    }

    #[test]
    fn files_are_written_where_there_is_something_to_say() {
        let wishes = |dns: &[&str], hosts: &[(&str, &str)]| Wishes {
            dns: dns.iter().map(|ip| ip.parse().unwrap()).collect(),
            add_hosts: hosts.iter().map(|(name, ip)| ((*name).into(), ip.parse().unwrap())).collect(),
            ..Wishes::default()
        };
        let files = |wishes: &Wishes, network: &Network, address: Option<Ipv4Addr>| {
            let own = address.map(|_| "fd6b:ad5::ad5:3".parse().unwrap());
            let names = Names::new(wishes, network, "box", address, own);
            let files = names.files(&[Leased {
                sandbox: "0123".into(),
                name: "web".into(),
                address: [10, 213, 0, 2].into(),
                address6: Some("fd6b:ad5::ad5:2".parse().unwrap()),
                subnet: "10.213.0.0/22".parse().unwrap(),
                tap: "kapsel0".into(),
            }]);
            let text = |file: api::NamesFile| (file.name, String::from_utf8(file.content).unwrap());
            files.into_iter().map(text).collect::<Vec<_>>()
        };
        assert_eq!(files(&wishes(&[], &[]), &Network::None, None), []);
        let dns = files(&wishes(&["192.0.2.1"], &[]), &Network::None, None);
        assert_eq!(dns, [("resolv.conf".into(), "nameserver 192.0.2.1\n".into())]);
        let all = wishes(&["192.0.2.1"], &[("db", "192.0.2.7")]);
        let all = files(&all, &Network::Bridge, Some([10, 213, 0, 3].into()));
        assert_eq!(
            all[0].1.lines().collect::<Vec<_>>()[2..],
            [
                "192.0.2.7 db",
                "10.213.0.3 box",
                "fd6b:ad5::ad5:3 box",
                "10.213.0.2 web",
                "fd6b:ad5::ad5:2 web"
            ]
        );
        assert_eq!(all[1], ("hostname".into(), "box\n".into()));
    }
}
