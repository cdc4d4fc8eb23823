//! Host memory of an idle sandbox: the proportional set size (PSS) of each of its processes, from the kernel's own account
//! (`proc_pid_smaps(5)`).

use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::contenders::{Running, Workshop};
use kapsel_benches::report::{machine, write_json};

/// Megabytes are 10^6 bytes here and in the README.
#[derive(Serialize)]
struct Memory {
    machine: String,
    guest_mb: f64,
    monitor_mb: f64,
    shim_mb: f64,
    fsd_mb: f64,
    total_mb: f64,
}

/// Starts one warm sandbox that shares a directory (so that its fs process is there too), lets it idle, and adds up.
pub fn measure(workshop: &Workshop, out: &Path) -> Result<()> {
    let shared = tempfile::tempdir()?;
    let volume = format!("{}:/shared", shared.path().display());
    let name = "kapsel-bench-memory";
    let _running = Running::kapsel(workshop, name, &["-v", &volume])?;
    std::thread::sleep(std::time::Duration::from_secs(2));

    let inspect = workshop.kapsel().args(["inspect", name]).output()?;
    let inspect: serde_json::Value =
        serde_json::from_slice(&inspect.stdout).context("kapsel inspect printed no JSON")?;
    let pids = &inspect[0]["pids"];
    let pid = |value: &serde_json::Value| value.as_u64().context("kapsel inspect names no process ID");

    let (guest, monitor) = split(pid(&pids["monitor"])?)?;
    let shim = pss(pid(&pids["shim"])?)?;
    let mut fsd = 0;
    for value in pids["fsd"].as_array().context("kapsel inspect lists no fs processes")? {
        fsd += pss(pid(value)?)?;
    }
    let mb = |kib: u64| (kib * 1024) as f64 / 1e6;
    let memory = Memory {
        machine: machine(),
        guest_mb: mb(guest),
        monitor_mb: mb(monitor),
        shim_mb: mb(shim),
        fsd_mb: mb(fsd),
        total_mb: mb(guest + monitor + shim + fsd),
    };
    println!("\nhost memory of an idle warm sandbox with one shared directory, PSS in MB");
    println!(
        "guest {:.1}  monitor {:.1}  shim {:.1}  fsd {:.1}  together {:.1}",
        memory.guest_mb, memory.monitor_mb, memory.shim_mb, memory.fsd_mb, memory.total_mb
    );
    write_json(out, "memory", &memory)
}

/// The monitor's PSS in KiB: the guest's memory (the one mapping as large as a guest), and all the rest.
fn split(pid: u64) -> Result<(u64, u64)> {
    /// No other mapping of a monitor comes near the smallest guest's size.
    const GUEST: u64 = 96 << 20;
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut guest, mut rest, mut is_guest) = (0, 0, false);
    for line in smaps.lines() {
        if let Some((start, end)) = line.split(' ').next().and_then(range) {
            is_guest = end - start >= GUEST
                && !line.contains(" ---p ")
                && (line.contains("memory") || line.contains("memfd"));
        } else if let Some(kib) = kib(line, "Pss:") {
            *if is_guest { &mut guest } else { &mut rest } += kib;
        }
    }
    Ok((guest, rest))
}

fn range(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

fn kib(line: &str, key: &str) -> Option<u64> {
    line.strip_prefix(key)?.trim().strip_suffix(" kB")?.parse().ok()
}

/// A whole process's PSS in KiB.
fn pss(pid: u64) -> Result<u64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))
        .with_context(|| format!("process {pid} of the sandbox is gone"))?;
    rollup.lines().find_map(|l| kib(l, "Pss:")).context("no Pss in smaps_rollup")
}
