//! What may pass: nftables rules, all of them made anew at once from the leases.
//!
//! A whole that replaces the former one in a single transaction cannot be half there, and heals what somebody else has removed.

use std::io::Write;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::{Leased, NAME, Subnet, mac};
use crate::tap::PREFIX as TAPS;
use crate::{Error, Result};

/// Removes all of kapsel's, whether there is any or not.
pub(super) fn none() -> String {
    let families = ["ip", "bridge"].into_iter().chain(has_ipv6().then_some("ip6"));
    let remove = |family| format!("add table {family} kapsel\ndelete table {family} kapsel\n");
    families.map(remove).collect()
}

/// Whether the kernel knows IPv6: one that does not takes no rules for it.
fn has_ipv6() -> bool {
    Path::new("/proc/sys/net/ipv6").exists()
}

/// The rules of a bridge with these guests on it.
///
/// A guest sends from its own addresses (also one whose shim was killed a moment ago and is not known any more sends nothing else), reaches the other guests and the world, and not this host but for an echo of the gateway;
/// nobody outside begins a conversation with it. Of the addresses where clouds hand out credentials only name servers are reached.
pub(super) fn all(subnet: Subnet, guests: &[Leased]) -> String {
    let known = |guest: &Leased| format!("\"{}\" . {} . {}", guest.tap, mac(guest.address), guest.address);
    let known = guests.iter().map(known).collect::<Vec<_>>().join(", ");
    let version4 = Version {
        family: "ip",
        network: subnet.to_string(),
        gateway: subnet.gateway().to_string(),
        metadata: "169.254.0.0/16",
        icmp: "icmp",
        neighbours: "",
    };
    let mut routed = version4.table();
    let guests6: Vec<_> = guests.iter().filter_map(|guest| Some((guest, guest.address6?))).collect();
    if !guests6.is_empty() {
        let version6 = Version {
            family: "ip6",
            network: format!("{}/{}", subnet.gateway6(), subnet.prefix6()),
            gateway: subnet.gateway6().to_string(),
            metadata: "{ fd00:ec2::/32, fd20:ce::254 }",
            icmp: "icmpv6",
            neighbours: r#"
    icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept"#,
        };
        routed += &version6.table();
    }
    let (dispatch, chains) = speaking_ipv6(&guests6);
    format!(
        r#"{none}{routed}table bridge kapsel {{
  set known {{
    type ifname . ether_addr . ipv4_addr
    elements = {{ {known} }}
  }}
{chains}  chain prerouting {{
    type filter hook prerouting priority -300
    iifname "{TAPS}*" jump guest
  }}
  chain guest {{
    iifname . ether saddr . ip saddr @known accept
    iifname . ether saddr . arp saddr ip @known iifname . arp saddr ether . arp saddr ip @known accept
{dispatch}    drop
  }}
}}
"#,
        none = none()
    )
}

/// What may be routed to and from the bridge by one version of IP.
struct Version {
    family: &'static str,
    network: String,
    gateway: String,
    /// Where clouds hand out credentials.
    metadata: &'static str,
    icmp: &'static str,
    /// Rules for what finds neighbours, where that is IP too.
    neighbours: &'static str,
}

impl Version {
    fn table(&self) -> String {
        let Self { family, network, gateway, metadata, icmp, neighbours } = self;
        format!(
            r#"table {family} kapsel {{
  chain postrouting {{
    type nat hook postrouting priority 100
    {family} saddr {network} oifname != "{NAME}" masquerade
  }}
  chain forward {{
    type filter hook forward priority 0
    iifname "{NAME}" oifname "{NAME}" accept
    iifname "{NAME}" {family} daddr {metadata} meta l4proto != {{ tcp, udp }} drop
    iifname "{NAME}" {family} daddr {metadata} th dport != 53 drop
    oifname "{NAME}" ct state established,related accept
    oifname "{NAME}" drop
  }}
  chain input {{
    type filter hook input priority 0
    iifname "{NAME}" ct state established,related accept{neighbours}
    iifname "{NAME}" {family} daddr {gateway} {icmp} type echo-request accept
    iifname "{NAME}" reject with {icmp} type admin-prohibited
  }}
}}
"#
        )
    }
}

/// By IPv6 a guest says with whom it speaks and who it is in packets of its own: as itself only, and it is no router. To which chain a guest's
/// packets go, and those chains.
fn speaking_ipv6(guests: &[(&Leased, Ipv6Addr)]) -> (String, String) {
    if guests.is_empty() {
        return Default::default();
    }
    let chain = |(guest, address): &(&Leased, Ipv6Addr)| {
        let (tap, mac) = (&guest.tap, mac(guest.address));
        // The target follows four bytes of ICMPv6's header and four of flags.
        format!(
            r#"  chain ipv6-{tap} {{
    ether saddr != {mac} drop
    ip6 saddr != {address} drop
    icmpv6 type {{ nd-router-advert, nd-redirect }} drop
    icmpv6 type nd-neighbor-advert @th,64,128 != 0x{target:032x} drop
    accept
  }}
"#,
            target = u128::from(*address)
        )
    };
    let to = |(guest, _): &(&Leased, Ipv6Addr)| format!("\"{0}\" : goto ipv6-{0}", guest.tap);
    let map = guests.iter().map(to).collect::<Vec<_>>().join(", ");
    let dispatch = format!("    ether type ip6 iifname vmap {{ {map} }}\n");
    (dispatch, guests.iter().map(chain).collect())
}

/// The program that speaks with the kernel.
pub(super) fn program() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join("nft")).find(|nft| nft.is_file()).ok_or(Error::NoNft)
}

/// Has the kernel take rules over, all or none, in the calling thread's network namespace.
pub(super) fn apply(rules: &str) -> Result<()> {
    let failed = |why: String| Error::Rules(why);
    let mut nft = Command::new(program()?)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    let written = nft.stdin.take().map(|mut stdin| stdin.write_all(rules.as_bytes()));
    let ended = nft.wait_with_output().map_err(|error| failed(error.to_string()))?;
    match (ended.status.success(), written) {
        (true, Some(Ok(()))) => Ok(()),
        _ => {
            let told = String::from_utf8_lossy(&ended.stderr).into_owned();
            Err(failed(told.lines().next().unwrap_or("it does not say why").replace("; ", ", ")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_guest_is_tied_to_its_addresses() {
        let subnet: Subnet = "10.213.0.0/22".parse().unwrap();
        let guest = |last: u8, tap: &str| Leased {
            sandbox: "a".into(),
            name: "n".into(),
            address: [10, 213, 0, last].into(),
            address6: None,
            subnet,
            tap: tap.into(),
        };
        let rules = all(subnet, &[guest(2, "kapsel0"), guest(3, "kapsel1")]);
        assert!(rules.starts_with(&none()), "they replace the former ones");
        for part in [
            r#"iifname "kapsel*" jump guest"#,
            r#"elements = { "kapsel0" . 02:6b:0a:d5:00:02 . 10.213.0.2, "kapsel1" . 02:6b:0a:d5:00:03 . 10.213.0.3 }"#,
            r#"ip saddr 10.213.0.0/22 oifname != "kapsel-br0" masquerade"#,
            "ip daddr 10.213.0.1 icmp type echo-request accept",
        ] {
            assert!(rules.contains(part), "{part:?} is not in {rules}");
        }
    }
}
