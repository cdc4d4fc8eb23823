//! What the machine is made of, in the words of kapsel-vmm's (and Firecracker's) configuration.

use serde_json::{Value, json};

use super::{PLACES, SHARES, TAPS, paths};
use crate::spec::NEEDLESS;
use crate::{MachineSpec, Nic, Share};

/// The guest's address on its vsock. Each machine has a device of its own, so they may all have the same.
const CID: u32 = 3;

/// What the guest's kernel needs to be told, whichever it is.
///
/// `reboot=k`: the keyboard controller's reset ends the machine, and a panic does so at once. The rest is what a virtual machine
/// need not wait for: the timer check, a second source for the clock, checks of the kernel's own cryptography, serial ports and
/// keyboards that do not exist.
const ARGUMENTS: &str = "console=ttyS0 reboot=k panic=-1 quiet no_timer_check tsc=reliable random.trust_cpu=on \
     cryptomgr.notests 8250.nr_uarts=1 i8042.noaux i8042.nomux i8042.dumbkbd audit=0 lsm=landlock";

/// The configuration of a machine. It names nothing that differs between a saved machine and one that is made from it.
pub(super) fn of(spec: &MachineSpec) -> Value {
    let arguments = format!("{ARGUMENTS} initcall_blacklist={} {}", NEEDLESS.join(","), spec.cmdline);
    let drives = spec.disks.iter().map(|disk| {
        json!({
            "drive_id": disk.serial,
            "path_on_host": paths::disk(&disk.serial),
            "is_root_device": false,
            "is_read_only": disk.read_only,
            // A scratch disk lives no longer than its machine, so that flushing it would be for nothing.
            "cache_type": "Unsafe",
        })
    });
    json!({
        "boot-source": {
            "kernel_image_path": paths::KERNEL,
            "initrd_path": paths::INITRAMFS,
            "boot_args": arguments.trim_end(),
        },
        "machine-config": { "vcpu_count": spec.vcpus, "mem_size_mib": spec.memory_mib },
        "drives": drives.collect::<Vec<_>>(),
        "spare-places": PLACES,
        "vsock": { "guest_cid": CID, "uds_path": paths::VSOCK },
        "balloon": { "amount_mib": 0, "deflate_on_oom": true, "free_page_reporting": true },
        "entropy": {},
    })
}

/// The same with what a clone would bring: its network interfaces and shares.
pub(super) fn whole(spec: &MachineSpec) -> Value {
    let mut config = of(spec);
    config["late-network-interfaces"] = nics(spec);
    config["shares"] = shares(spec);
    config["spare-places"] = json!(PLACES - spec.shares.len());
    config
}

/// The shares. The connections to their servers are open in the jail.
pub(super) fn shares(spec: &MachineSpec) -> Value {
    let share = |(n, share): (usize, &Share)| json!({ "tag": share.tag, "socket": format!("fd:{}", SHARES + n as i32) });
    spec.shares.iter().enumerate().map(share).collect()
}

/// The network interfaces. Their taps are open in the jail.
pub(super) fn nics(spec: &MachineSpec) -> Value {
    let nic = |(n, nic): (usize, &Nic)| {
        let mac = nic.mac.map(|byte| format!("{byte:02x}")).join(":");
        json!({ "iface_id": format!("nic{n}"), "host_dev_name": format!("fd:{}", TAPS + n as i32), "guest_mac": mac })
    };
    spec.nics.iter().enumerate().map(nic).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_is_described_by_what_its_jail_has() {
        let config = whole(&super::super::tests::spec());
        let drive = &config["drives"][0];
        assert_eq!((&drive["drive_id"], &drive["path_on_host"]), (&json!("rootfs"), &json!("/disks/rootfs")));
        assert_eq!(drive["is_read_only"], true);
        assert_eq!(config["machine-config"], json!({ "vcpu_count": 2, "mem_size_mib": 256 }));
        let arguments = config["boot-source"]["boot_args"].as_str().unwrap();
        assert!(arguments.starts_with("console=ttyS0 ") && arguments.ends_with(" more"), "{arguments}");
        assert!(!config.to_string().contains("nowhere"), "a host's path is in {config}");
    }
}
