//! A network namespace that is taken as it is found. The namespaces are the test's own, and nothing leaves them.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use rustix::process::Signal;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::world::{PATIENCE, World, eventually, kill, world};

/// Two namespaces with a veth pair between them: a sandbox gets the near one, the far one is the world.
struct Wire {
    near: String,
    far: String,
}

impl Wire {
    fn new(name: &str) -> Self {
        let wire = Wire { near: format!("kapsel-{name}-near"), far: format!("kapsel-{name}-far") };
        wire.remove();
        let (near, far) = (&wire.near, &wire.far);
        for command in [
            format!("netns add {near}"),
            format!("netns add {far}"),
            format!(
                "-n {near} link add uplink mtu 1400 address 02:00:00:00:09:02 type veth peer name peer netns {far}"
            ),
            format!("-n {near} addr add 10.9.0.2/24 dev uplink"),
            format!("-n {near} addr add fd00:9::2/64 dev uplink nodad"),
            format!("-n {near} link set uplink up"),
            format!("-n {near} neigh add 10.9.0.77 lladdr 02:00:00:00:00:77 dev uplink"),
            // A gateway that no route of its network leads to, and a route that needs another one first.
            format!("-n {near} route add 192.0.2.1 dev uplink"),
            format!("-n {near} route add default via 192.0.2.1 src 10.9.0.2 metric 7"),
            format!("-n {near} route add 198.51.100.0/24 via 10.9.0.1"),
            format!("-n {far} addr add 10.9.0.1/24 dev peer"),
            format!("-n {far} addr add fd00:9::1/64 dev peer nodad"),
            format!("-n {far} link set peer mtu 1400 up"),
        ] {
            ip(&command);
        }
        // The kernel makes sure that its link-local address is nobody else's.
        eventually("the link has settled", || !ip(&format!("-n {near} addr")).contains("tentative"));
        wire
    }

    fn flag(&self) -> String {
        format!("--network=ns:/run/netns/{}", self.near)
    }

    /// All that can be seen of the near namespace, but for counters.
    fn look(&self) -> String {
        let all = ["-d link", "addr", "route", "-6 route", "neigh show nud permanent"];
        let told: Vec<String> = all.iter().map(|what| ip(&format!("-n {} {what}", self.near))).collect();
        told.join("\n") + &self.disciplines()
    }

    fn disciplines(&self) -> String {
        output(Command::new("tc").args(["-n", &self.near, "qdisc"]))
    }

    /// Does something in the far namespace, by a thread that ends there.
    fn far<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.far)).expect("a namespace");
        std::thread::scope(|scope| {
            let entered = scope.spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
                    .expect("entered");
                work()
            });
            entered.join().expect("a thread")
        })
    }

    fn remove(&self) {
        for name in [&self.near, &self.far] {
            let _ = Command::new("ip").args(["netns", "del", name]).stderr(Stdio::null()).status();
        }
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.remove();
    }
}

fn ip(arguments: &str) -> String {
    output(Command::new("ip").args(arguments.split(' ')))
}

fn output(command: &mut Command) -> String {
    let ran = command.output().expect("iproute2 is installed");
    assert!(ran.status.success(), "{command:?}: {}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8_lossy(&ran.stdout).into_owned()
}

/// What a guest sees must be what the namespace has.
fn sees_the_interface(world: &World, name: &str) {
    let seen = world.ok(["exec", name, "sh", "-c", "ip addr show uplink; ip route; ip -6 route; ip neigh"]);
    for wanted in [
        "mtu 1400",
        "02:00:00:00:09:02",
        "inet 10.9.0.2/24",
        "inet6 fd00:9::2/64",
        "192.0.2.1 dev uplink scope link",
        "default via 192.0.2.1 dev uplink  src 10.9.0.2  metric 7",
        "198.51.100.0/24 via 10.9.0.1 dev uplink",
        "fd00:9::/64 dev uplink",
        "10.9.0.77 dev uplink lladdr 02:00:00:00:00:77",
    ] {
        assert!(seen.contains(wanted), "{wanted:?} is not in: {seen}");
    }
}

/// Bytes pass in both directions, opened from either side: also those of segments that are larger than packets.
fn carries_traffic(world: &'static World, wire: &Wire, name: &str) {
    for (address, kind) in [("10.9.0.1", "-4"), ("fd00:9::1", "-6")] {
        let ran = world.run(["exec", name, "ping", kind, "-c", "2", "-W", "20", address]);
        assert!(ran.text().contains("2 packets received"), "{}{}", ran.text(), ran.stderr);
    }
    let sent: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();

    // The guest's end says at once that it will send nothing, which must not end the other direction.
    let listener = wire.far(|| TcpListener::bind("10.9.0.1:7000").expect("bound"));
    listener.set_nonblocking(true).expect("set");
    let got = std::thread::scope(|scope| {
        let reading = scope.spawn(|| world.run(["exec", name, "nc", "10.9.0.1", "7000"]));
        let mut accepted = None;
        eventually("the guest connects", || {
            accepted = listener.accept().ok();
            accepted.is_some()
        });
        let (mut stream, _) = accepted.expect("connected");
        stream.set_nonblocking(false).expect("set");
        stream.write_all(&sent).expect("written");
        drop(stream);
        reading.join().expect("a thread").stdout
    });
    assert!(got == sent, "{} bytes of {} came into the guest whole", got.len(), sent.len());

    let served = std::thread::scope(|scope| {
        let serving = scope.spawn(|| world.run_with(["exec", "-i", name, "nc", "-l", "-p", "8000"], &sent));
        eventually("it listens", || world.run(["exec", name, "netstat", "-ltn"]).text().contains(":8000"));
        let mut stream = wire.far(|| TcpStream::connect("10.9.0.2:8000").expect("connected"));
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut got = Vec::new();
        stream.read_to_end(&mut got).expect("read");
        assert!(got == sent, "{} bytes of {} came out of the guest whole", got.len(), sent.len());
        drop(stream);
        serving.join().expect("a thread")
    });
    assert_eq!(served.code, 0, "{}", served.stderr);
}

#[test]
fn a_namespace_is_taken_as_it_is_found_and_given_back() {
    let world = world!();
    let wire = Wire::new("taken");
    let before = wire.look();
    let flag = wire.flag();
    for (name, flags) in [("e2e-net-cold", &[&flag[..], "--cold"][..]), ("e2e-net-warm", &[&flag[..]])] {
        let container = world.container(name, flags, &["sleep", "999"]);
        let warm = world.inspect(name)["isolation"]["template"] == true;
        assert_eq!(warm, name.ends_with("warm"), "{}", world.inspect(name));
        assert!(ip(&format!("-n {} link", wire.near)).contains("kapsel0"));
        sees_the_interface(world, name);
        carries_traffic(world, &wire, name);
        drop(container);
        assert_eq!(wire.look(), before);
    }
}

#[test]
fn interfaces_come_and_go_while_it_runs() {
    let world = world!();
    let wire = Wire::new("later");
    let before = wire.look();
    let container = world.container("e2e-net-later", &[&wire.flag()], &["sleep", "999"]);
    let (near, far) = (&wire.near, &wire.far);
    let inside = || world.ok(["exec", container.name, "ip", "addr"]);
    // The second time in another place, since a machine's places are used once.
    for round in ["a first", "a second"] {
        for command in [
            format!(
                "-n {near} link add later address 02:00:00:00:0a:02 type veth peer name peer2 netns {far}"
            ),
            format!("-n {far} addr add 10.10.0.1/24 dev peer2"),
            format!("-n {far} link set peer2 up"),
            format!("-n {near} addr add 10.10.0.2/24 dev later"),
            format!("-n {near} link set later up"),
            format!("-n {near} route add 203.0.113.0/24 via 10.10.0.1"),
        ] {
            ip(&command);
        }
        eventually(&format!("the guest has it {round} time"), || inside().contains("inet 10.10.0.2/24"));
        let routes = world.ok(["exec", container.name, "ip", "route"]);
        assert!(routes.contains("203.0.113.0/24 via 10.10.0.1 dev later"), "{routes}");
        for address in ["10.10.0.1", "10.9.0.1"] {
            let ran = world.run(["exec", container.name, "ping", "-c", "1", "-W", "20", address]);
            assert!(ran.text().contains("1 packets received"), "{}{}", ran.text(), ran.stderr);
        }
        ip(&format!("-n {near} link del later"));
        eventually("the guest has it no more", || !inside().contains("later"));
        eventually("its tap is gone", || !ip(&format!("-n {near} link")).contains("kapsel1"));
    }
    drop(container);
    assert_eq!(wire.look(), before);
}

#[test]
fn a_killed_shim_leaves_a_namespace_as_it_was() {
    let world = world!();
    let wire = Wire::new("killed");
    let before = wire.look();
    let container = world.container("e2e-net-killed", &[&wire.flag()], &["sleep", "999"]);
    let shim = world.inspect(container.name)["pids"]["shim"].as_u64().expect("a pid");
    assert!(wire.disciplines().contains("ingress"));
    kill(u32::try_from(shim).expect("a pid"), Signal::KILL);
    eventually("the tap is gone", || !ip(&format!("-n {} link", wire.near)).contains("kapsel0"));
    world.ok(["ps"]);
    assert_eq!(wire.look(), before);
}

#[test]
fn what_is_no_namespace_for_a_sandbox_is_refused() {
    let world = world!();
    let wire = Wire::new("refused");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let taken = world.container("e2e-net-in-use", &[&wire.flag()], &["sleep", "999"]);
    let before = wire.look();
    for (path, said) in [
        (PathBuf::from("/proc/self/ns/net"), "the host itself"),
        ("/run/netns/kapsel-no-such".into(), "kapsel-no-such"),
        (file.path().into(), "no network namespace"),
        (format!("/run/netns/{}", wire.near).into(), "uplink"),
    ] {
        let flag = format!("--network=ns:{}", path.display());
        let ran = world.run(["run", "--rm", &flag, "busybox", "true"]);
        let told = ran.stderr;
        assert!(ran.code == 125 && told.contains(said) && told.contains("hint: "), "{told}");
    }
    for (value, code) in [("host", 125), ("ns:relative", 125)] {
        let ran = world.run(["run", "--rm", "--network", value, "busybox", "true"]);
        assert!(ran.code == code && ran.stderr.contains("ns:PATH"), "{} {}", ran.code, ran.stderr);
    }
    assert_eq!(wire.look(), before, "the one that has it keeps it");
    drop(taken);
}

#[test]
fn without_a_network_there_is_only_loopback() {
    let world = world!();
    let seen = world.ok(["run", "--rm", "busybox", "ip", "-o", "link"]);
    assert!(seen.lines().count() == 1 && seen.contains("lo:"), "{seen}");
}
