//! What a monitor does for its user beside running a guest: log, metrics, limits, statistics, the keyboard.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::guest;
use crate::host::{Files, PATIENCE};
use crate::session::{Client, Session};

/// What the disk may do in a second, in bytes: a quarter of its size, beside the quarter that passes at once.
const BYTES_PER_SECOND: usize = guest::SLOW_SECTORS * 512 / 4;

/// The most that a monitor may have for itself, in KiB, its program included. One that is linked dynamically has the
/// libraries' pages beside these, which all programs share.
const OWN_KIB_MAX: u64 = 3 * 1024;
/// The most that is in no file, and so another monitor's as well only in part.
const ANONYMOUS_KIB_MAX: u64 = 512;

pub fn services() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let inside = |name: &str| directory.path().join(name);
    let (socket, disk, log, metrics) = (inside("api"), inside("disk"), inside("log"), inside("metrics"));
    fs::write(&disk, vec![1; guest::SLOW_SECTORS * 512])?;
    let options = ["--id", "servant", "--boot-timer", "--start-time-us", "1", "--metrics-path"];
    let metrics_path = metrics.to_str().expect("a plain path");
    let mut session = Session::start(&files, &socket, &[&options[..], &[metrics_path]].concat())?;
    let id = session.id();
    let client = &mut session.client;
    put_together(client, &files, &disk, &log)?;
    client.done("PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
    session.console.wait(0)?;
    statistics(client)?;
    small(id)?;
    client.done("PUT", "/actions", &json!({"action_type": "FlushMetrics"}))?;
    counted(&metrics)?;
    logged(&log)?;
    client.done("PUT", "/actions", &json!({"action_type": "SendCtrlAltDel"}))?;
    let (status, console) = session.finish()?;
    if !status.success() {
        return Err("the guest did not restart".into());
    }
    limited(&console)
}

fn put_together(client: &mut Client, files: &Files, disk: &Path, log: &Path) -> Result<(), Failed> {
    let (status, version) = client.ask("GET", "/version", &Value::Null)?;
    if status != 200 || !version["firecracker_version"].is_string() {
        return Err(version.to_string().into());
    }
    let missing = json!({"log_path": "/nonexistent/log"});
    client.refused("PUT", "/logger", &missing, "Logger error: ")?;
    client.done("PUT", "/logger", &json!({"log_path": log, "level": "Info", "show_level": true}))?;
    client.refused("PUT", "/metrics", &json!({"metrics_path": log}), "Metrics error: ")?;
    let flush = json!({"action_type": "FlushMetrics"});
    client.refused("PUT", "/actions", &flush, "not supported before starting")?;
    let kernel = json!({
        "kernel_image_path": files.vmlinux,
        "initrd_path": files.initramfs,
        "boot_args": guest::arguments("services"),
    });
    client.done("PUT", "/boot-source", &kernel)?;
    client.done("PUT", "/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 256}))?;
    let bandwidth = json!({"size": BYTES_PER_SECOND, "refill_time": 1000});
    let limiter = json!({"bandwidth": bandwidth, "ops": null});
    let drive =
        json!({"drive_id": "slow", "path_on_host": disk, "is_root_device": false, "rate_limiter": limiter});
    client.done("PUT", "/drives/slow", &drive)?;
    let limiter = json!({"bandwidth": {"size": 64, "refill_time": 100}});
    client.done("PUT", "/entropy", &json!({"rate_limiter": limiter}))?;
    let balloon = json!({"amount_mib": 8, "deflate_on_oom": false, "stats_polling_interval_s": 1});
    client.done("PUT", "/balloon", &balloon)
}

/// The guest's numbers come with the second they are asked for, and the interval can be changed but not ended.
fn statistics(client: &mut Client) -> Result<(), Failed> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let (status, numbers) = client.ask("GET", "/balloon/statistics", &Value::Null)?;
        let memory = numbers["total_memory"].as_u64().unwrap_or(0) >> 20;
        if status == 200 && (100..256).contains(&memory) && numbers["actual_mib"] == 8 {
            break;
        }
        if Instant::now() > deadline {
            return Err(numbers.to_string().into());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let interval = |seconds: u16| json!({"stats_polling_interval_s": seconds});
    client.done("PATCH", "/balloon/statistics", &interval(2))?;
    client.refused("PATCH", "/balloon/statistics", &interval(0), "cannot be enabled/disabled")
}

/// What the monitor has beside the guest's memory, which is the one mapping of its size.
fn small(monitor: u32) -> Result<(), Failed> {
    let text = fs::read_to_string(format!("/proc/{monitor}/smaps"))?;
    let kib = |line: &str, key: &str| line.strip_prefix(key)?.trim().strip_suffix(" kB")?.parse::<u64>().ok();
    let (mut own, mut anonymous, mut guests, mut size) = (0, 0, 0, 0);
    for line in text.lines() {
        size = kib(line, "Size:").unwrap_or(size);
        let resident = kib(line, "Rss:").unwrap_or(0);
        if size == 256 * 1024 {
            guests += resident;
        } else {
            own += resident;
            anonymous += kib(line, "Anonymous:").unwrap_or(0);
        }
    }
    println!("the monitor has {own} KiB, {anonymous} of them anonymous, beside the guest's {guests}");
    let small = anonymous <= ANONYMOUS_KIB_MAX && (own <= OWN_KIB_MAX || text.contains("/libc.so"));
    if guests > 0 && small {
        Ok(())
    } else {
        Err(format!("{own} KiB, {anonymous} anonymous:\n{text}").into())
    }
}

/// What was counted since the line before, as often as it was written: at the end, and every minute.
pub fn metrics(text: &str) -> serde_json::Result<Vec<Value>> {
    text.lines().map(serde_json::from_str).collect()
}

fn counted(metrics: &Path) -> Result<(), Failed> {
    let text = fs::read_to_string(metrics)?;
    let lines = self::metrics(&text)?;
    let at_least = |group: &str, name: &str, least: u64| {
        lines.iter().map(|line| line[group][name].as_u64().unwrap_or(0)).sum::<u64>() >= least
    };
    let disk = guest::SLOW_SECTORS as u64 * 512;
    let all = at_least("block", "read_bytes", disk)
        && at_least("block_slow", "read_bytes", disk)
        && at_least("block_slow", "rate_limiter_throttled_events", 1)
        && at_least("entropy", "entropy_bytes", guest::RANDOM_BYTES as u64)
        && at_least("entropy", "entropy_rate_limiter_throttled", 1)
        && at_least("balloon", "stats_updates_count", 1)
        && at_least("vcpu", "exit_mmio_read", 10)
        && at_least("api_server", "process_startup_time_us", 1)
        && at_least("put_api_requests", "drive_count", 1)
        && at_least("put_api_requests", "actions_fails", 1);
    if all { Ok(()) } else { Err(text.into()) }
}

fn logged(log: &Path) -> Result<(), Failed> {
    let text = fs::read_to_string(log)?;
    let booted = text.lines().find(|line| line.contains("Guest-boot-time = "));
    if booted.is_some_and(|line| line.contains("[servant:vcpu 0:INFO]")) { Ok(()) } else { Err(text.into()) }
}

/// Three quarters of the disk had to wait, a second for each.
fn limited(console: &str) -> Result<(), Failed> {
    let took =
        console.split(guest::SLOW).nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    if took.is_some_and(|milliseconds: u64| (2500..20_000).contains(&milliseconds)) {
        Ok(())
    } else {
        Err(console.into())
    }
}
