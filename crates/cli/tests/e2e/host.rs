//! A host of a test's own: a network namespace in which kapsel runs, with a way out to another one, the world beyond. Nothing touches
//! this machine's interfaces.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The host's own address.
pub const HOST: &str = "198.18.0.2";
/// Somebody in the world.
pub const BEYOND: &str = "198.18.0.1";

/// The two namespaces. They go with the value.
pub struct Host {
    near: String,
    far: String,
}

impl Host {
    /// A host with a way out whose MTU is 1400.
    pub fn new(name: &str) -> Self {
        let host = Self { near: format!("kapsel-{name}-host"), far: format!("kapsel-{name}-beyond") };
        host.remove();
        let (near, far) = (&host.near, &host.far);
        for command in [
            format!("netns add {near}"),
            format!("netns add {far}"),
            format!("-n {near} link set lo up"),
            format!("-n {near} link add out mtu 1400 type veth peer name in netns {far}"),
            format!("-n {near} addr add {HOST}/24 dev out"),
            format!("-n {near} link set out up"),
            format!("-n {far} addr add {BEYOND}/24 dev in"),
            format!("-n {far} link set in mtu 1400 up"),
            format!("-n {near} route add default via {BEYOND}"),
        ] {
            ip(&command);
        }
        host
    }

    /// Does something on the host, by a thread that ends there: what it starts is there too.
    pub fn here<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.near, work)
    }

    /// Does something beyond.
    pub fn beyond<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.far, work)
    }

    /// What a program says on the host.
    pub fn told(&self, program: &str, arguments: &[&str]) -> String {
        self.here(|| {
            let ran = Command::new(program).args(arguments).output().expect("it is installed");
            String::from_utf8_lossy(&ran.stdout).into_owned()
        })
    }

    /// Nothing of kapsel's is left on the host.
    pub fn is_clean(&self) -> bool {
        let links = self.told("ip", &["link"]);
        !links.contains(": kapsel") && self.told("nft", &["list", "ruleset"]).is_empty()
    }

    fn remove(&self) {
        for name in [&self.near, &self.far] {
            let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.remove();
    }
}

fn within<T: Send>(namespace: &str, work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/run/netns/{namespace}")).expect("a namespace");
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("entered");
            work()
        });
        entered.join().expect("a thread")
    })
}

fn ip(arguments: &str) {
    let ran = Command::new("ip").args(arguments.split(' ')).output().expect("iproute2 is installed");
    assert!(ran.status.success(), "{arguments}: {}", String::from_utf8_lossy(&ran.stderr));
}
