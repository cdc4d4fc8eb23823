//! `kapsel stats`.

use std::collections::HashMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use kapsel_sandbox::record::{Record, Status};
use serde::Serialize;

use super::host::{self, Host, Sandbox};
use crate::failure::{Failure, Outcome};
use crate::flags::container::Stats;
use crate::output::table::Table;
use crate::output::{self, size};

/// How often numbers are taken.
const EVERY: Duration = Duration::from_secs(1);
/// How long one sandbox may take to answer.
const DEADLINE: Duration = Duration::from_secs(2);

/// What one container uses, as `--json` prints it.
#[derive(Clone, Serialize)]
struct Usage {
    id: String,
    name: String,
    /// Of one CPU, in percent, since the numbers before; null the first time.
    cpu_percent: Option<f64>,
    /// Microseconds since it was started.
    cpu_usage_us: u64,
    /// Bytes, without page cache that can go.
    memory: u64,
    /// Bytes; null when there is none but the machine's own.
    memory_limit: Option<u64>,
    pids: u64,
    /// Null when there is none.
    pids_limit: Option<u64>,
    /// Bytes that all processes of the sandbox take of this machine's memory (PSS); null when that cannot be read.
    host_memory: Option<u64>,
    /// Why there are no numbers.
    error: Option<String>,
}

/// Shows what containers use.
pub fn run(host: &Host, flags: &Stats) -> Outcome {
    let registry = host.sandboxes()?;
    // Names that are wrong fail at once, not each second.
    for name in &flags.names {
        Sandbox::find(&registry, name)?;
    }
    let (mut before, mut compared) = (HashMap::new(), false);
    loop {
        let now = Instant::now();
        let mut usages = host::runtime()?.block_on(measure(host, &flags.names))?;
        for usage in &mut usages {
            let last = before.insert(usage.id.clone(), (now, usage.cpu_usage_us));
            usage.cpu_percent = last.map(|(then, us)| percent(us, usage.cpu_usage_us, now - then));
        }
        // What is shown but once is shown when there are numbers to compare with.
        let last = flags.no_stream && (compared || usages.is_empty());
        if last || !flags.no_stream {
            show(&usages, flags);
        }
        if last {
            return Ok(0);
        }
        compared = true;
        std::thread::sleep(EVERY.saturating_sub(now.elapsed()));
    }
}

fn percent(before_us: u64, now_us: u64, elapsed: Duration) -> f64 {
    let share = now_us.saturating_sub(before_us) as f64 / elapsed.as_micros().max(1) as f64;
    (share * 1000.0).round() / 10.0
}

async fn measure(host: &Host, names: &[String]) -> Result<Vec<Usage>, Failure> {
    let registry = host.registry()?;
    let mut wanted = Vec::new();
    if names.is_empty() {
        for bundle in registry.bundles()? {
            if let Ok(record) = Record::read(&bundle)
                && matches!(record.status, Status::Running | Status::Paused)
            {
                wanted.push(Sandbox { bundle, record });
            }
        }
    } else {
        // One that has been removed meanwhile is no error.
        wanted.extend(names.iter().filter_map(|name| Sandbox::find(&registry, name).ok()));
    }
    wanted.sort_by_key(|sandbox| sandbox.record.created_at);
    let tasks: Vec<_> = wanted.into_iter().map(|sandbox| tokio::spawn(one(sandbox))).collect();
    let mut usages = Vec::new();
    for task in tasks {
        usages.extend(task.await.ok());
    }
    Ok(usages)
}

async fn one(sandbox: Sandbox) -> Usage {
    let asked = async { Ok::<_, Failure>(sandbox.connect().await?.stats().await?) };
    let metrics = match tokio::time::timeout(DEADLINE, asked).await {
        Ok(Ok(metrics)) => Ok(metrics),
        Ok(Err(failure)) => Err(failure.to_string()),
        Err(_) => Err("does not answer".to_owned()),
    };
    let mut usage = Usage {
        id: sandbox.record.id.to_string(),
        name: sandbox.record.name.clone(),
        cpu_percent: None,
        cpu_usage_us: 0,
        memory: 0,
        memory_limit: None,
        pids: 0,
        pids_limit: None,
        host_memory: host_memory(&sandbox.record),
        error: None,
    };
    let limit = |number: u64| Some(number).filter(|n| *n != 0 && *n < u64::MAX >> 1);
    match metrics {
        Ok(metrics) => {
            usage.cpu_usage_us = metrics.cpu.usage_usec;
            usage.memory = metrics.memory.usage.saturating_sub(metrics.memory.inactive_file);
            usage.memory_limit = limit(metrics.memory.usage_limit);
            usage.pids = metrics.pids.current;
            usage.pids_limit = limit(metrics.pids.limit);
        }
        Err(error) => usage.error = Some(error),
    }
    usage
}

/// Proportional shares of all processes of a sandbox: what clones share is divided among them.
fn host_memory(record: &Record) -> Option<u64> {
    let machine = record.machine.as_ref()?;
    let pids = [machine.shim, machine.monitor].into_iter().chain(machine.fsd.iter().copied());
    pids.map(proportional_share).sum()
}

fn proportional_share(pid: u32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kibibytes << 10)
}

fn show(usages: &[Usage], flags: &Stats) {
    if flags.json {
        output::json(&usages);
        return;
    }
    if !flags.no_stream && std::io::stdout().is_terminal() {
        // To the top left corner, and clear what is below.
        output::print(b"\x1b[H\x1b[2J");
    }
    let mut table = Table::new(&["CONTAINER", "NAME", "CPU", "MEMORY / LIMIT", "PROCESSES", "HOST MEMORY"]);
    for usage in usages {
        let id: String = usage.id.chars().take(12).collect();
        if let Some(error) = &usage.error {
            table.row([id, usage.name.clone(), error.clone(), String::new(), String::new(), String::new()]);
            continue;
        }
        let or_dash = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        table.row([
            id,
            usage.name.clone(),
            or_dash(usage.cpu_percent.map(|percent| format!("{percent:.1}%"))),
            format!("{} / {}", size::bytes(usage.memory), or_dash(usage.memory_limit.map(size::bytes))),
            usage.pids.to_string(),
            or_dash(usage.host_memory.map(size::bytes)),
        ]);
    }
    table.print();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percent_of_one_cpu() {
        assert_eq!(percent(0, 500_000, Duration::from_secs(1)), 50.0);
        assert_eq!(percent(0, 3_000_000, Duration::from_secs(2)), 150.0);
        assert_eq!(percent(10, 5, Duration::from_secs(1)), 0.0);
    }

    #[test]
    fn the_share_of_a_process_can_be_read() {
        assert!(proportional_share(std::process::id()).unwrap() > 100 << 10);
    }
}
