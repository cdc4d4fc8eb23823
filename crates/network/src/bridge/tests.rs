use std::fs::File;
use std::io::{Read, Write};

use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::*;

fn subnet() -> Subnet {
    "10.213.0.0/22".parse().unwrap()
}

/// Runs something in a network namespace of its own; false when that cannot be had.
fn alone(work: impl FnOnce() + Send) -> bool {
    let ready = rustix::process::geteuid().is_root() && rules::program().is_ok();
    if !ready {
        println!("skipped: needs root and nftables");
        return false;
    }
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: a network namespace is a thread's own; nothing in this process relies on this thread's being the others'.
            unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.unwrap();
            work();
        });
        thread.join().unwrap();
    });
    true
}

fn told(program: &str, arguments: &str) -> String {
    let ran = std::process::Command::new(program).args(arguments.split(' ')).output().unwrap();
    String::from_utf8_lossy(&ran.stdout).into_owned() + &String::from_utf8_lossy(&ran.stderr)
}

fn join(base: &Path, name: &str) -> (Attached, Port) {
    attach_at(base, subnet(), Guest { id: "0123456789ab", name }).unwrap()
}

#[test]
fn the_first_makes_the_bridge_and_the_last_removes_it() {
    let base = tempfile::tempdir().unwrap();
    alone(|| {
        let (first, port) = join(base.path(), "one");
        let (second, other) = join(base.path(), "two");
        assert_eq!([first.address().to_string(), second.address().to_string()], ["10.213.0.2", "10.213.0.3"]);
        assert_eq!(port.interface.mac.to_string(), "02:6b:0a:d5:00:02");
        assert_ne!(port.interface.mac, other.interface.mac);
        let names: Vec<String> =
            first.neighbours().list().unwrap().into_iter().map(|guest| guest.name).collect();
        assert_eq!(names, ["one", "two"]);
        let bridge = told("ip", "addr show kapsel-br0");
        assert!(bridge.contains("10.213.0.1/22") && !bridge.contains("fe80"), "{bridge}");
        assert!(bridge.contains("inet6 fd6b:ad5::ad5:1/64"), "{bridge}");
        assert_eq!(first.address6(), Some("fd6b:ad5::ad5:2".parse().unwrap()));
        let addresses = port.interface.addresses.iter().map(|address| address.ip.to_string());
        assert_eq!(addresses.collect::<Vec<_>>(), ["10.213.0.2", "fd6b:ad5::ad5:2"]);
        assert_eq!(port.interface.routes.len(), 1, "the host passes no IPv6 on");
        assert_eq!(told("ip", "-o link show master kapsel-br0").lines().count(), 2);
        let rules = told("nft", "list ruleset");
        assert!(rules.contains("02:6b:0a:d5:00:03 . 10.213.0.3") && rules.contains("masquerade"), "{rules}");
        assert!(rules.contains("ip6 saddr fd6b:ad5::/64 oifname != \"kapsel-br0\" masquerade"), "{rules}");

        drop((first, port));
        let rules = told("nft", "list ruleset");
        assert!(!rules.contains("10.213.0.2") && rules.contains("10.213.0.3"), "{rules}");
        let (again, _port) = join(base.path(), "three");
        assert_eq!(again.address(), Ipv4Addr::new(10, 213, 0, 2));
        drop((again, second));
        assert_eq!(told("nft", "list ruleset"), "");
        assert!(told("ip", "link show kapsel-br0").contains("does not exist"));
        assert!(lease::namespaces(base.path()).unwrap().is_empty());
    });
}

#[test]
fn a_host_that_passes_ipv6_on_is_a_way_out() {
    let base = tempfile::tempdir().unwrap();
    alone(|| {
        own_sysctl("net/ipv6/conf/all/forwarding", "1");
        let (first, port) = join(base.path(), "one");
        let ways: Vec<_> =
            port.interface.routes.iter().map(|route| route.gateway.unwrap().to_string()).collect();
        assert_eq!(ways, ["10.213.0.1", "fd6b:ad5::ad5:1"]);
        drop((first, port));
    });
}

#[test]
fn without_ipv6_there_is_a_bridge_all_the_same() {
    let base = tempfile::tempdir().unwrap();
    alone(|| {
        own_sysctl("net/ipv6/conf/default/disable_ipv6", "1");
        let (first, port) = join(base.path(), "one");
        assert_eq!((first.address6(), port.interface.addresses.len()), (None, 1));
        let rules = told("nft", "list ruleset");
        assert!(!rules.contains("ip6") && rules.contains("10.213.0.2"), "{rules}");
        drop((first, port));
        assert_eq!(told("nft", "list ruleset"), "");
    });
}

/// Sets a parameter of this thread's network namespace.
fn own_sysctl(name: &str, value: &str) {
    fs::write(Path::new("/proc/sys").join(name), value).unwrap();
}

#[test]
fn what_nobody_holds_any_more_is_swept() {
    let base = tempfile::tempdir().unwrap();
    alone(|| {
        let (lost, port) = join(base.path(), "lost");
        let (kept, _port) = join(base.path(), "kept");
        // As after a kill: the lock is gone, and the file is not.
        let file = lost.lease.directory().join(lost.address().to_string());
        let text = fs::read(&file).unwrap();
        drop(port);
        fs::remove_file(&file).unwrap();
        fs::write(&file, &text).unwrap();
        sweep_at(base.path()).unwrap();
        assert!(!file.exists());
        let rules = told("nft", "list ruleset");
        assert!(!rules.contains("10.213.0.2") && rules.contains("10.213.0.3"), "{rules}");

        let all = kept.lease.directory().to_owned();
        drop(kept);
        fs::create_dir_all(&all).unwrap();
        fs::write(&file, &text).unwrap();
        told("ip", "link add kapsel-br0 type bridge");
        sweep_at(base.path()).unwrap();
        assert!(told("ip", "link show kapsel-br0").contains("does not exist") && !all.exists());
        drop(lost);
    });
}

#[test]
fn many_at_once_get_different_addresses() {
    let base = tempfile::tempdir().unwrap();
    alone(|| {
        let namespace = namespace::find(own_namespace().unwrap()).unwrap();
        let attached: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8)
                .map(|_| scope.spawn(|| namespace.run(|| Ok(join(base.path(), "x"))).unwrap()))
                .collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let addresses: std::collections::HashSet<_> = attached.iter().map(|(it, _)| it.address()).collect();
        assert_eq!(addresses.len(), 8);
    });
}

#[test]
fn addresses_that_are_elsewhere_are_not_taken() {
    let base = tempfile::tempdir().unwrap();
    alone(|| {
        told("ip", "link add there type veth peer name here");
        told("ip", "addr add 10.213.2.9/24 dev there");
        told("ip", "link set there up");
        let refused = attach_at(base.path(), subnet(), Guest { id: "a", name: "a" }).unwrap_err().to_string();
        assert!(refused.contains("10.213.2.") && refused.contains("through there"), "{refused}");
        assert!(refused.contains("bridge_subnet"), "{refused}");
        assert_eq!(told("nft", "list ruleset"), "");
        let other: Subnet = "10.214.0.0/24".parse().unwrap();
        let (first, _port) = attach_at(base.path(), other, Guest { id: "a", name: "a" }).unwrap();
        let refused = attach_at(base.path(), subnet(), Guest { id: "a", name: "a" }).unwrap_err();
        assert!(matches!(refused, Error::OtherSubnet { .. }), "{refused}");
        drop(first);
    });
}

/// An Ethernet frame of an ARP question, with the header that taps want in front.
fn question(mac: [u8; 6], sender_mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend([0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1]);
    frame.extend(sender_mac);
    frame.extend(sender);
    frame.extend([0; 6]);
    frame.extend([10, 213, 0, 3]);
    frame.resize(VNET_HEADER + 60, 0);
    frame
}

/// An empty IPv4 packet to everybody, or what another kind of Ethernet makes of it.
fn packet(kind: &[u8], mac: [u8; 6], sender: [u8; 4]) -> Vec<u8> {
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([0xff; 6]);
    frame.extend(mac);
    frame.extend(kind);
    let start = frame.len();
    frame.extend([0x45, 0, 0, 20, 0, 0, 0, 0, 64, 59, 0, 0]);
    frame.extend(sender);
    frame.extend([10, 213, 3, 255]);
    let half = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    let sum: u32 = frame[start..].chunks_exact(2).map(half).sum();
    let checksum = !((sum & 0xffff) + (sum >> 16)) as u16;
    frame[start + 10..start + 12].copy_from_slice(&checksum.to_be_bytes());
    frame.resize(VNET_HEADER + 60, 0);
    frame
}

/// A neighbour advertisement (RFC 4861) to everybody, or another message with the same beginning.
fn advertisement(kind: u8, mac: [u8; 6], sender: Ipv6Addr, target: Ipv6Addr) -> Vec<u8> {
    let mut message = vec![kind, 0, 0, 0, 0x20, 0, 0, 0];
    message.extend(target.octets());
    message.extend([2, 1]);
    message.extend(mac);
    let all: Ipv6Addr = "ff02::1".parse().unwrap();
    let pseudo = [&sender.octets()[..], &all.octets(), &[0, 0, 0, message.len() as u8, 0, 0, 0, 58]].concat();
    let half = |pair: &[u8]| u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    let sum: u32 = pseudo.chunks_exact(2).chain(message.chunks_exact(2)).map(half).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    message[2..4].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    let mut frame = vec![0; VNET_HEADER];
    frame.extend([0x33, 0x33, 0, 0, 0, 1]);
    frame.extend(mac);
    frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, message.len() as u8, 58, 255]);
    frame.extend(sender.octets());
    frame.extend(all.octets());
    frame.extend(message);
    frame
}

/// `struct virtio_net_hdr`.
const VNET_HEADER: usize = 10;

#[test]
fn a_guest_speaks_for_nobody_else() {
    let base = tempfile::tempdir().unwrap();
    alone(|| {
        let (_first, first_port) = join(base.path(), "hostile");
        let (_second, second_port) = join(base.path(), "victim");
        let [own, others] = [first_port.interface.mac.0, second_port.interface.mac.0];
        let (own_ip, others_ip, free_ip) = ([10, 213, 0, 2], [10, 213, 0, 3], [10, 213, 0, 9]);
        let mut hostile = File::from(first_port.tap);
        let mut victim = File::from(second_port.tap);
        rustix::io::ioctl_fionbio(&victim, true).unwrap();
        const IPV4: &[u8] = &[0x08, 0x00];
        let mut arrives = |frame: &[u8]| {
            let mut buffer = [0; 2048];
            while victim.read(&mut buffer).is_ok() {}
            hostile.write_all(frame).unwrap();
            // The kernel has delivered or dropped it when the write returns, but for a softirq's delay.
            std::thread::sleep(std::time::Duration::from_millis(20));
            std::iter::from_fn(|| victim.read(&mut buffer).ok().map(|n| buffer[..n].to_vec()))
                .any(|seen| seen[VNET_HEADER..].starts_with(&frame[VNET_HEADER..VNET_HEADER + 34]))
        };
        assert!(arrives(&question(own, own, own_ip)), "an honest question");
        assert!(arrives(&packet(IPV4, own, own_ip)), "an honest packet");
        const ADVERTISEMENT: u8 = 136;
        let [own6, others6, link_local] =
            ["fd6b:ad5::ad5:2", "fd6b:ad5::ad5:3", "fe80::1"].map(|ip| ip.parse::<Ipv6Addr>().unwrap());
        assert!(arrives(&advertisement(ADVERTISEMENT, own, own6, own6)), "an honest advertisement");
        for (what, frame) in [
            ("a question from another address", question(own, own, others_ip)),
            ("a question from a free address", question(own, own, free_ip)),
            ("a question that another shall be answered", question(own, others, own_ip)),
            ("a question from another interface", question(others, own, own_ip)),
            ("a packet from another address", packet(IPV4, own, others_ip)),
            ("a packet from another interface", packet(IPV4, others, own_ip)),
            ("a packet of IPv4 as one of IPv6", packet(&[0x86, 0xdd], own, own_ip)),
            ("another's advertisement", advertisement(ADVERTISEMENT, own, others6, others6)),
            ("an advertisement for another", advertisement(ADVERTISEMENT, own, own6, others6)),
            ("an advertisement from another interface", advertisement(ADVERTISEMENT, others, own6, own6)),
            ("a router's advertisement", advertisement(134, own, own6, own6)),
            ("a router's, as from its link", advertisement(134, own, link_local, own6)),
            ("a redirection", advertisement(137, own, own6, own6)),
            ("a packet from another address in a VLAN", packet(&[0x81, 0, 0, 5, 0x08, 0], own, others_ip)),
        ] {
            assert!(!arrives(&frame), "{what}");
        }
    });
}
