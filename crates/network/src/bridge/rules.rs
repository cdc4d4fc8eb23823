//! What may pass: nftables rules, all of them made anew at once from the leases.
//!
//! A whole that replaces the former one in a single transaction cannot be half there, and heals what somebody else has removed.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use super::{Leased, NAME, Subnet, mac};
use crate::tap::PREFIX as TAPS;
use crate::{Error, Result};

/// Removes all of kapsel's, whether there is any or not.
pub(super) const NONE: &str =
    "add table ip kapsel\ndelete table ip kapsel\nadd table bridge kapsel\ndelete table bridge kapsel\n";

/// The rules of a bridge with these guests on it.
///
/// A guest sends from its own addresses (also one whose shim was killed a moment ago and is not known any more sends nothing else), reaches the other guests and the world, and not this host but for an echo of the gateway;
/// nobody outside begins a conversation with it. Of the link-local addresses, where clouds hand out credentials, only name servers
/// are reached.
pub(super) fn all(subnet: Subnet, guests: &[Leased]) -> String {
    let gateway = subnet.gateway();
    let known = |guest: &Leased| format!("\"{}\" . {} . {}", guest.tap, mac(guest.address), guest.address);
    let known = guests.iter().map(known).collect::<Vec<_>>().join(", ");
    format!(
        r#"{NONE}table ip kapsel {{
  chain postrouting {{
    type nat hook postrouting priority 100
    ip saddr {subnet} oifname != "{NAME}" masquerade
  }}
  chain forward {{
    type filter hook forward priority 0
    iifname "{NAME}" oifname "{NAME}" accept
    iifname "{NAME}" ip daddr 169.254.0.0/16 meta l4proto != {{ tcp, udp }} drop
    iifname "{NAME}" ip daddr 169.254.0.0/16 th dport != 53 drop
    oifname "{NAME}" ct state established,related accept
    oifname "{NAME}" drop
  }}
  chain input {{
    type filter hook input priority 0
    iifname "{NAME}" ct state established,related accept
    iifname "{NAME}" ip daddr {gateway} icmp type echo-request accept
    iifname "{NAME}" reject with icmp type admin-prohibited
  }}
}}
table bridge kapsel {{
  set known {{
    type ifname . ether_addr . ipv4_addr
    elements = {{ {known} }}
  }}
  chain prerouting {{
    type filter hook prerouting priority -300
    iifname "{TAPS}*" jump guest
  }}
  chain guest {{
    iifname . ether saddr . ip saddr @known accept
    iifname . ether saddr . arp saddr ip @known iifname . arp saddr ether . arp saddr ip @known accept
    drop
  }}
}}
"#
    )
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
            subnet,
            tap: tap.into(),
        };
        let rules = all(subnet, &[guest(2, "kapsel0"), guest(3, "kapsel1")]);
        assert!(rules.starts_with(NONE), "they replace the former ones");
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
