//! `--network bridge`: sandboxes on a bridge of kapsel's own, each on a host of the test's own.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use rustix::process::Signal;

use crate::host::{BEYOND, HOST, Host};
use crate::world::{Container, PATIENCE, World, eventually, kill, world};

fn on_bridge(
    world: &'static World,
    host: &Host,
    name: &'static str,
    flags: &[&str],
    command: &[&str],
) -> Container {
    host.here(|| world.container(name, &[&["--network", "bridge"], flags].concat(), command))
}

fn address(world: &World, name: &str) -> String {
    world.inspect(name)["network"]["address"].as_str().expect("an address").to_owned()
}

/// What a shell in a container says and how it ends.
fn sh(world: &World, name: &str, script: &str) -> (i32, String) {
    let ran = world.run(["exec", name, "sh", "-c", script]);
    (ran.code, ran.text() + &ran.stderr)
}

/// A server beyond that says with whom it speaks.
fn who_is_there(listener: TcpListener) -> impl FnOnce() + Send {
    listener.set_nonblocking(true).expect("set");
    move || {
        let mut accepted = None;
        eventually("somebody comes", || {
            accepted = listener.accept().ok();
            accepted.is_some()
        });
        let (mut stream, peer) = accepted.expect("connected");
        stream.set_nonblocking(false).expect("set");
        stream.write_all(format!("you are {}\n", peer.ip()).as_bytes()).expect("written");
    }
}

#[test]
fn sandboxes_on_the_bridge_reach_each_other_and_the_world() {
    let world = world!();
    let host = Host::new("reach");
    let httpd = ["httpd", "-f", "-p", "80", "-h", "/etc"];
    let web = on_bridge(world, &host, "e2e-br-web", &["--cold"], &httpd);
    let client = on_bridge(world, &host, "e2e-br-client", &[], &["sleep", "999"]);
    assert_eq!(world.inspect(client.name)["isolation"]["template"], true, "it is cloned from a template");
    let (first, second) = (address(world, web.name), address(world, client.name));
    assert_eq!((first.as_str(), second.as_str()), ("10.213.0.2", "10.213.0.3"));

    let (_, seen) = sh(world, client.name, "ip addr show eth0; ip route");
    for wanted in ["mtu 1400", "02:6b:0a:d5:00:03", "inet 10.213.0.3/22", "default via 10.213.0.1 dev eth0"] {
        assert!(seen.contains(wanted), "{wanted:?} is not in {seen}");
    }
    // Another sandbox, and the bridge itself.
    let (_, page) =
        sh(world, client.name, "printf 'GET /notes HTTP/1.0\\r\\n\\r\\n' | nc -w 20 10.213.0.2 80");
    assert!(page.ends_with("not a program\n"), "{page}");
    let (code, pinged) = sh(world, client.name, "ping -c 1 -W 20 10.213.0.1");
    assert_eq!(code, 0, "{pinged}");
    // The world sees the host.
    let serve = who_is_there(host.beyond(|| TcpListener::bind((BEYOND, 7000)).expect("bound")));
    let answer = std::thread::scope(|scope| {
        scope.spawn(serve);
        sh(world, client.name, &format!("nc {BEYOND} 7000")).1
    });
    assert_eq!(answer, format!("you are {HOST}\n"));
    // The host reaches a sandbox, the world does not.
    let mut stream = host.here(|| TcpStream::connect("10.213.0.2:80").expect("connected"));
    stream.write_all(b"GET /notes HTTP/1.0\r\n\r\n").expect("written");
    stream.set_read_timeout(Some(PATIENCE)).expect("set");
    let mut page = String::new();
    stream.read_to_string(&mut page).expect("read");
    assert!(page.ends_with("not a program\n"), "{page}");
    let route = ["route", "add", "10.213.0.0/22", "via", HOST];
    host.beyond(|| assert!(std::process::Command::new("ip").args(route).status().expect("ip").success()));
    let from_beyond = host.beyond(|| {
        TcpStream::connect_timeout(&"10.213.0.2:80".parse().expect("an address"), Duration::from_secs(2))
    });
    assert!(from_beyond.is_err(), "nobody outside begins a conversation");

    drop(web);
    assert!(!host.is_clean(), "one is left");
    drop(client);
    assert!(host.is_clean(), "{}", host.told("ip", &["link"]));
}

#[test]
fn a_sandbox_does_not_reach_its_host() {
    let world = world!();
    let host = Host::new("hostile");
    let guest = on_bridge(world, &host, "e2e-br-hostile", &[], &["sleep", "999"]);
    // A service of the host, on all of its addresses.
    let _listener = host.here(|| TcpListener::bind("0.0.0.0:7000").expect("bound"));
    host.here(|| TcpStream::connect("10.213.0.1:7000").expect("the host itself reaches it"));
    for at in ["10.213.0.1", HOST] {
        let (code, said) = sh(world, guest.name, &format!("nc -w 10 {at} 7000 </dev/null"));
        assert_ne!(code, 0, "{at}: {said}");
    }
}

#[test]
fn what_a_killed_shim_had_on_the_bridge_is_given_back() {
    let world = world!();
    let host = Host::new("swept");
    let container = on_bridge(world, &host, "e2e-br-killed", &[], &["sleep", "999"]);
    let shim = world.inspect(container.name)["pids"]["shim"].as_u64().expect("a pid");
    assert!(!host.is_clean());
    kill(u32::try_from(shim).expect("a pid"), Signal::KILL);
    // By a command that runs elsewhere, too.
    eventually("the next command clears up", || {
        world.ok(["ps"]);
        host.is_clean()
    });
    let next = on_bridge(world, &host, "e2e-br-next", &[], &["true"]);
    drop(next);
    eventually("it is gone", || host.is_clean());
}

#[test]
fn addresses_that_the_host_has_elsewhere_are_refused() {
    let world = world!();
    let host = Host::new("clash");
    host.told("ip", &["addr", "add", "10.213.1.1/24", "dev", "out"]);
    let ran = host.here(|| world.run(["run", "--rm", "--network", "bridge", "busybox", "true"]));
    assert!(ran.code == 125 && ran.stderr.contains("through out"), "{} {}", ran.code, ran.stderr);
    assert!(ran.stderr.contains("hint: set another bridge_subnet"), "{}", ran.stderr);
    assert!(host.is_clean());
}

#[test]
fn published_ports_lead_into_a_sandbox() {
    let world = world!();
    let host = Host::new("ports");
    let flags = ["-p", "8080:80", "-p", "80", "-p", "0.0.0.0:8081:80", "-p", "5353:53/udp"];
    let web = on_bridge(world, &host, "e2e-br-ports", &flags, &["httpd", "-f", "-p", "80", "-h", "/etc"]);
    let told = world.inspect(web.name);
    let ports = told["network"]["ports"].as_array().expect("ports").clone();
    let chosen = ports[1]["host_port"].as_u64().expect("a port");
    assert!(ports.len() == 4 && chosen > 0, "{told}");
    let listed = world.ok(["ps"]);
    assert!(listed.contains("127.0.0.1:8080->80/tcp"), "{listed}");
    let listed: serde_json::Value = serde_json::from_str(&world.ok(["ps", "--json"])).expect("JSON");
    let of = listed.as_array().expect("a list").iter().find(|one| one["name"] == web.name).expect("it");
    assert_eq!(of["ports"], told["network"]["ports"]);

    let served = |at: &str| {
        let mut page = String::new();
        let asked = host.here(|| TcpStream::connect(at)).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"GET /notes HTTP/1.0\r\n\r\n")?;
            stream.read_to_string(&mut page)
        });
        asked.is_ok() && page.ends_with("not a program\n")
    };
    // Connections are carried before anybody serves them, and then reset.
    eventually("it serves", || served("127.0.0.1:8080"));
    for at in ["127.0.0.1:8080".to_owned(), format!("127.0.0.1:{chosen}"), format!("{HOST}:8081")] {
        assert!(served(&at), "{at}");
    }
    // By default it is for this host alone.
    assert!(host.beyond(|| TcpStream::connect((HOST, 8080))).is_err());
    assert!(host.beyond(|| TcpStream::connect((HOST, 8081))).is_ok());
    let socket = host.here(|| UdpSocket::bind("127.0.0.1:0").expect("bound"));
    socket.connect("127.0.0.1:5353").expect("connected");
    // Nobody is there, and the guest's kernel counts.
    let counted =
        || sh(world, web.name, "grep Udp: /proc/net/snmp | sed 1d").1.split(' ').nth(2).map(str::to_owned);
    assert_eq!(counted().as_deref(), Some("0"));
    eventually("a datagram comes in", || {
        let _ = socket.send(b"datagram");
        counted().is_some_and(|unheard| unheard != "0")
    });

    // Its ports are nobody else's, and that is known before anything starts.
    let begun = std::time::Instant::now();
    let ran =
        host.here(|| world.run(["run", "--rm", "--network", "bridge", "-p", "8080:80", "busybox", "true"]));
    let said = &ran.stderr;
    assert!(ran.code == 125 && said.contains("127.0.0.1:8080: it is in use"), "{} {said}", ran.code);
    assert!(said.contains("hint: choose another"), "{said}");
    assert!(!host.told("nft", &["list", "ruleset"]).contains("10.213.0.3"), "{:?}", begun.elapsed());
    let ran = world.run(["run", "--rm", "-p", "8080:80", "busybox", "true"]);
    assert!(ran.code == 125 && ran.stderr.contains("--network none"), "{}", ran.stderr);

    // What carries them goes with it, also when it is killed, and it does not live without.
    let carrier = told["pids"]["forward"].as_u64().expect("a pid");
    let confined = std::fs::read_to_string(format!("/proc/{carrier}/status")).expect("it lives");
    assert!(confined.contains("CapEff:\t0000000000000000") && confined.contains("Seccomp:\t2"), "{confined}");
    assert!(!confined.contains("Uid:\t0\t"), "{confined}");
    kill(u32::try_from(carrier).expect("a pid"), Signal::KILL);
    eventually("the sandbox ends", || world.inspect(web.name)["status"] == "exited");
    assert!(
        world.inspect(web.name)["exit"]["reason"].as_str().expect("a reason").contains("carries its ports")
    );
    eventually("all is given back", || host.is_clean());
    let again = on_bridge(world, &host, "e2e-br-ports-2", &["-p", "8080:80"], &["sleep", "999"]);
    let shim = world.inspect(again.name)["pids"].clone();
    kill(u32::try_from(shim["shim"].as_u64().expect("a pid")).expect("a pid"), Signal::KILL);
    let carrier = shim["forward"].as_u64().expect("a pid");
    eventually("what carried its port is gone", || !crate::world::lives(carrier));
    host.here(|| TcpListener::bind("127.0.0.1:8080").expect("the port is free again"));
}

#[test]
fn the_bridge_carries_ipv6_too() {
    let world = world!();
    let host = Host::new("six");
    let here = |arguments: &[&str]| host.here(|| run("ip", arguments));
    here(&["addr", "add", "2001:db8::2/64", "dev", "out", "nodad"]);
    host.beyond(|| run("ip", &["addr", "add", "2001:db8::1/64", "dev", "in", "nodad"]));
    let httpd = ["httpd", "-f", "-p", "80", "-h", "/etc"];
    let web = on_bridge(world, &host, "e2e-br-six", &["-p", "[::1]:8080:80"], &httpd);
    let seen = world.inspect(web.name);
    assert_eq!(seen["network"]["address6"], "fd6b:ad5::ad5:2");
    // This host passes no IPv6 on: there is no way out, and kapsel makes none.
    assert!(!sh(world, web.name, "ip -6 route").1.contains("default"));
    host.here(|| std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").expect("set"));
    let client = on_bridge(world, &host, "e2e-br-six-client", &[], &["sleep", "999"]);
    let (_, seen) = sh(world, client.name, "cat /etc/hosts; ip -6 addr show eth0; ip -6 route");
    for wanted in
        ["fd6b:ad5::ad5:2 e2e-br-six", "inet6 fd6b:ad5::ad5:3/64", "default via fd6b:ad5::ad5:1 dev eth0"]
    {
        assert!(seen.contains(wanted), "{wanted:?} is not in {seen}");
    }
    let (_, page) =
        sh(world, client.name, "printf 'GET /notes HTTP/1.0\\r\\n\\r\\n' | nc -w 20 fd6b:ad5::ad5:2 80");
    assert!(page.ends_with("not a program\n"), "{page}");
    let (code, pinged) = sh(world, client.name, "ping -6 -c 1 -W 20 fd6b:ad5::ad5:1");
    assert_eq!(code, 0, "{pinged}");
    // The world sees the host, and the host itself is not reached.
    let serve = who_is_there(host.beyond(|| TcpListener::bind("[2001:db8::1]:7000").expect("bound")));
    let answer = std::thread::scope(|scope| {
        scope.spawn(serve);
        sh(world, client.name, "nc 2001:db8::1 7000").1
    });
    assert_eq!(answer, "you are 2001:db8::2\n");
    let listening = host.here(|| TcpListener::bind("[::]:7001").expect("bound"));
    let (code, refused) = sh(world, client.name, "nc -w 5 fd6b:ad5::ad5:1 7001 < /dev/null");
    assert_ne!(code, 0, "{refused}");
    drop(listening);
    // The host reaches a sandbox, by its address and by its port.
    for to in ["[fd6b:ad5::ad5:2]:80", "[::1]:8080"] {
        let mut stream = host.here(|| TcpStream::connect(to).expect("connected"));
        stream.write_all(b"GET /notes HTTP/1.0\r\n\r\n").expect("written");
        stream.set_read_timeout(Some(PATIENCE)).expect("set");
        let mut page = String::new();
        stream.read_to_string(&mut page).expect("read");
        assert!(page.ends_with("not a program\n"), "{to}: {page}");
    }
    drop((web, client));
    eventually("nothing is left", || host.is_clean());
}

fn run(program: &str, arguments: &[&str]) {
    let ran = std::process::Command::new(program).args(arguments).status();
    assert!(ran.is_ok_and(|ran| ran.success()), "{program} {arguments:?}");
}

#[test]
fn sandboxes_find_each_other_by_name() {
    let world = world!();
    let host = Host::new("names");
    let flags = ["--dns", "192.0.2.1", "--add-host", "db:192.0.2.7", "--hostname", "box", "--read-only"];
    let first = on_bridge(world, &host, "e2e-br-first", &flags, &["sleep", "999"]);
    let (_, told) = sh(world, first.name, "cat /etc/hosts /etc/resolv.conf /etc/hostname");
    for line in ["127.0.0.1 localhost", "192.0.2.7 db", "10.213.0.2 box", "nameserver 192.0.2.1", "box"] {
        assert!(told.lines().any(|told| told == line), "{line:?} is not in {told}");
    }
    let knows = |who: &str, line: &str| sh(world, who, "cat /etc/hosts").1.lines().any(|told| told == line);
    for flags in [&["--cold"][..], &[]] {
        let second = on_bridge(world, &host, "e2e-br-second", flags, &["sleep", "999"]);
        assert!(knows(second.name, "10.213.0.2 e2e-br-first"), "who was there before");
        eventually("who comes is known", || knows(first.name, "10.213.0.3 e2e-br-second"));
        drop(second);
        eventually("who leaves is forgotten", || !knows(first.name, "10.213.0.3 e2e-br-second"));
    }
    // What a container has made of the file is its own.
    let own = on_bridge(world, &host, "e2e-br-own", &[], &["sh", "-c", "echo own > /etc/hosts; sleep 999"]);
    let third = on_bridge(world, &host, "e2e-br-third", &[], &["sleep", "999"]);
    eventually("who comes is known", || knows(first.name, "10.213.0.4 e2e-br-third"));
    assert_eq!(sh(world, own.name, "cat /etc/hosts").1, "own\n");
    drop(third);
    // Without a network only what was asked for.
    let ran = world.ok([
        "run",
        "--rm",
        "--add-host",
        "db:192.0.2.7",
        "busybox",
        "sh",
        "-c",
        "cat /etc/hosts; ls /etc",
    ]);
    assert!(ran.contains("192.0.2.7 db") && !ran.contains("resolv.conf"), "{ran}");
    assert!(!world.ok(["run", "--rm", "busybox", "ls", "/etc"]).contains("hosts"));
}
