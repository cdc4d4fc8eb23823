//! Memory and exits, from the kernel's own account.

use std::fs;

use anyhow::{Context, Result};

/// What of a process is in no mapping as large as the guest's memory, in KiB.
pub fn beside_guest(process: u32, guest_mib: u64) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps"))?;
    let (mut own, mut size) = (0, 0);
    for line in text.lines() {
        size = kib(line, "Size:").unwrap_or(size);
        if size < guest_mib * 1024 {
            own += kib(line, "Rss:").unwrap_or(0);
        }
    }
    Ok(own as f64)
}

/// A process's share of all that it has, in KiB: what it shares with others is divided among them.
pub fn share(process: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
    let share = text.lines().find_map(|line| kib(line, "Pss:"));
    Ok(share.context("the kernel tells no Pss")? as f64)
}

/// What the host could still give away, in KiB.
pub fn available() -> Result<f64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let available = text.lines().find_map(|line| kib(line, "MemAvailable:"));
    Ok(available.context("the kernel tells no MemAvailable")? as f64)
}

fn kib(line: &str, key: &str) -> Option<u64> {
    line.strip_prefix(key)?.trim().strip_suffix(" kB")?.parse().ok()
}

/// How often guests left the processor, by KVM's own count.
pub struct Exits {
    /// For a port or a device's memory.
    pub to_monitor: f64,
    /// For what KVM does itself. What the host's own interrupts took is not among them: that is a matter of time.
    pub to_kvm: f64,
}

/// Of the machine of one process.
pub fn exits(process: u32) -> Result<Exits> {
    const KVM: &str = "/sys/kernel/debug/kvm";
    let prefix = format!("{process}-");
    let mut machines =
        fs::read_dir(KVM).with_context(|| format!("cannot list {KVM}"))?.filter_map(Result::ok);
    let machine = machines.find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix));
    let machine = machine.context("KVM does not count for this machine")?.path();
    let count = |name: &str| -> Result<f64> {
        let path = machine.join(name);
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(text.trim().parse()?)
    };
    // Notifications of queues, which KVM passes on, are among them.
    let to_monitor = count("io_exits")? + count("mmio_exits")?;
    Ok(Exits { to_monitor, to_kvm: count("exits")? - count("irq_exits")? - to_monitor })
}
