//! A guest on a network of its own: a tap device in a namespace that lives as long as the test's thread.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::net::{Shutdown, TcpListener};
use std::process::Command;
use std::time::Duration;

use libtest_mimic::Failed;
use serde_json::json;

use crate::guest;
use crate::host::{Files, Monitor, Output, config};

pub fn network() -> Result<(), Failed> {
    // Namespaces belong to threads, and what a thread starts is in its own.
    std::thread::spawn(in_namespace).join().expect("the thread does not panic").map_err(Failed::from)
}

fn in_namespace() -> Result<(), String> {
    let failed = |error: io::Error| error.to_string();
    // SAFETY: only this thread moves into the new namespace, and it has no descriptors that belong to the old one.
    if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
        return Err(format!("no network namespace: {}", io::Error::last_os_error()));
    }
    run("ip link set lo up && tunctl -t tap0 >/dev/null && ip link set tap0 up")?;
    run(&format!("ip addr add {}/24 dev tap0", guest::HOST_ADDRESS))?;
    let listener = TcpListener::bind((guest::HOST_ADDRESS, guest::NETWORK_PORT)).map_err(failed)?;
    let echo = std::thread::spawn(move || echo_once(&listener));

    let files = Files::here();
    let directory = tempfile::tempdir().map_err(failed)?;
    let mut config = config(&files, &files.vmlinux, "network");
    let limiter = json!({"bandwidth": {"size": 100 << 20, "refill_time": 1000}});
    config["network-interfaces"] = json!([{
        "iface_id": "net", "host_dev_name": "tap0", "guest_mac": guest::GUEST_MAC, "mtu": 1400,
        "rx_rate_limiter": limiter, "tx_rate_limiter": limiter,
    }]);
    let metrics = directory.path().join("metrics");
    config["mmds-config"] = json!({"version": "V2", "network_interfaces": ["net"]});
    let document = directory.path().join("metadata");
    fs::write(&document, json!({"long": guest::METADATA.repeat(guest::METADATA_TIMES)}).to_string())
        .map_err(failed)?;
    config["metrics"] = json!({"metrics_path": metrics});
    let options = ["--metadata", document.to_str().expect("a plain path")];
    let mut monitor = Monitor::start_with(&files, directory.path(), &config, &options).map_err(failed)?;
    let mut console = BufReader::new(monitor.take_console());
    let mut text = String::new();
    while !text.contains(guest::READY) && console.read_line(&mut text).map_err(failed)? > 0 {}
    run("ip link del tap0")?;
    let errors = monitor.errors_until("the tap device fails").map_err(failed)?;
    // Time for the guest to lose a few frames.
    std::thread::sleep(Duration::from_secs(2));
    monitor.say("enough").map_err(failed)?;
    io::Read::read_to_string(&mut console, &mut text).map_err(failed)?;
    let output = monitor.finish().map_err(failed)?;
    let output = Output { console: text, stderr: errors + &output.stderr, ..output };
    let said = |condition: bool| output.expect(condition).map_err(|failed| format!("{failed:?}"));
    said(output.status.success() && output.console.contains(guest::DONE))?;
    said(output.stderr.contains("the tap device fails"))?;
    let echoed = echo.join().map_err(|_| "the echo panicked".to_owned())?.map_err(failed)?;
    said(echoed == guest::STREAM as u64)?;
    counted(&fs::read_to_string(metrics).map_err(failed)?)
}

/// All of the stream was counted, and large pieces of it went at once: there are far fewer frames than packets of the
/// network's size.
fn counted(text: &str) -> Result<(), String> {
    let lines = crate::services::metrics(text).map_err(|e| e.to_string())?;
    let sum = |group: &str, name: &str| -> u64 {
        lines.iter().map(|line| line[group][name].as_u64().unwrap_or(0)).sum()
    };
    let count = |name: &str| sum("net_net", name);
    let stream = guest::STREAM as u64;
    let whole = count("tx_bytes_count") > stream && count("rx_bytes_count") > stream;
    let large = count("tx_packets_count") < stream / 1400 && count("rx_packets_count") > 0;
    let cut = count("tap_write_fails") > 0 && count("tap_read_fails") > 0;
    let refused = sum("mmds", "rx_no_token") == 1 && sum("mmds", "rx_invalid_token") == 0;
    if whole && large && cut && refused {
        return Ok(());
    }
    Err(format!("whole: {whole}, in large pieces: {large}, cut: {cut}, refused: {refused}\n{text}"))
}

fn run(command: &str) -> Result<(), String> {
    let status = Command::new("sh").args(["-c", command]).status().map_err(|e| e.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("{command}: {status}")) }
}

/// Gives back what comes until it ends, and says how much it was.
fn echo_once(listener: &TcpListener) -> io::Result<u64> {
    let (mut stream, _) = listener.accept()?;
    let mut reader = stream.try_clone()?;
    let length = io::copy(&mut reader, &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    Ok(length)
}
