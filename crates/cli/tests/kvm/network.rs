//! Containers with a network: a machine that boots with it, and one that was cloned without.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::containers::{json, pattern};
use crate::host::{ip, ok};

/// The sandboxes' end of the cable, and the world's.
const NEAR: &str = "kvm-near";
const FAR: &str = "kvm-far";
const PORT: u16 = 7000;

/// Cold and warm, each by the same namespace, which is given back as it was.
pub fn all() {
    for command in [
        format!("netns add {NEAR}"),
        format!("netns add {FAR}"),
        format!("-n {NEAR} link add uplink mtu 1400 type veth peer name peer netns {FAR}"),
        format!("-n {NEAR} addr add 10.9.0.2/24 dev uplink"),
        format!("-n {NEAR} link set uplink up"),
        format!("-n {FAR} addr add 10.9.0.1/24 dev peer"),
        format!("-n {FAR} link set peer mtu 1400 up"),
    ] {
        ip(&command);
    }
    let before = ip(&format!("-n {NEAR} -o link"));
    for (name, how) in [("wired-cold", "--cold"), ("wired-warm", "--rm")] {
        let network = format!("--network=ns:/run/netns/{NEAR}");
        ok(&["run", "-d", "--name", name, how, &network, "busybox", "sleep", "1000"]);
        let isolation = &json(&["inspect", name])[0]["isolation"];
        let warm = (how != "--cold").into();
        assert_eq!((&isolation["kind"], &isolation["template"]), (&"kapsel-vmm".into(), &warm));
        let seen = ok(&["exec", name, "ip", "addr", "show", "uplink"]);
        assert!(seen.contains("mtu 1400") && seen.contains("inet 10.9.0.2/24"), "{seen}");
        carries_traffic(name);
        ok(&["rm", "-f", name]);
        assert_eq!(ip(&format!("-n {NEAR} -o link")), before);
    }
    for name in [NEAR, FAR] {
        ip(&format!("netns del {name}"));
    }
}

/// More than all buffers hold goes to the world and back.
fn carries_traffic(name: &str) {
    let sent = pattern(1 << 20);
    let listener = far(|| TcpListener::bind(("10.9.0.1", PORT)).expect("bound"));
    let echo = std::thread::spawn(move || -> std::io::Result<usize> {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(Duration::from_secs(300)))?;
        let mut bytes = vec![0; 1 << 20];
        stream.read_exact(&mut bytes)?;
        stream.write_all(&bytes)?;
        stream.shutdown(Shutdown::Write)?;
        Ok(bytes.len())
    });
    let nc = ["exec", "-i", name, "sh", "-c", &format!("nc 10.9.0.1 {PORT} | md5sum")];
    let ran = crate::host::run_with(&nc, &sent);
    assert!(ran.stdout.starts_with(&crate::containers::md5sum(&sent)), "{}{}", ran.stdout, ran.stderr);
    assert_eq!(echo.join().expect("a thread").expect("echoed"), sent.len());
}

/// Does something in the world's namespace, by a thread that ends there.
fn far<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    let namespace = File::open(format!("/run/netns/{FAR}")).expect("a namespace");
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network)).expect("entered");
            work()
        });
        entered.join().expect("a thread")
    })
}
