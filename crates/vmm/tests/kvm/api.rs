//! A machine that is put together, started, paused and changed through the API.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::guest;
use crate::host::{Files, PATIENCE};
use crate::session::{Client, Console, Session};

const SECTOR: usize = 512;

pub fn life() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let (socket, small, large) =
        (directory.path().join("api"), directory.path().join("small"), directory.path().join("large"));
    fs::write(&small, vec![1; 64 * SECTOR])?;
    fs::write(&large, vec![2; guest::LARGE_SECTORS * SECTOR])?;
    let mut session = Session::start(&files, &socket, &["--id", "the-first"])?;
    put_together(&mut session.client, &files, &small)?;
    session.client.done("PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
    session.console.wait(0)?;
    every_thread_is_confined(session.id())?;
    free_memory_comes_back(session.id())?;
    change(&mut session.client, &session.console, &large)?;
    session.finish_content().map(drop)
}

/// Each with a filter, without a way to more privileges: the API's, the event loop's and two processors', beside what KVM
/// itself may have.
fn every_thread_is_confined(monitor: u32) -> Result<(), Failed> {
    let mut threads = 0;
    for thread in fs::read_dir(format!("/proc/{monitor}/task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        if !status.contains("Seccomp:\t2") || !status.contains("NoNewPrivs:\t1") {
            return Err(status.into());
        }
        threads += 1;
    }
    if threads >= 4 { Ok(()) } else { Err(format!("there are {threads} threads").into()) }
}

fn put_together(client: &mut Client, files: &Files, disk: &Path) -> Result<(), Failed> {
    assert_eq!(client.state()?, "Not started");
    let start = json!({"action_type": "InstanceStart"});
    client.refused("PUT", "/actions", &start, "without kernel configuration")?;
    client.refused("PATCH", "/vm", &json!({"state": "Paused"}), "before starting")?;
    client.refused("PUT", "/network-interfaces/eth0", &json!({}), "missing field `iface_id`")?;
    let kernel = json!({
        "kernel_image_path": files.vmlinux,
        "initrd_path": files.initramfs,
        "boot_args": guest::arguments("ticks"),
    });
    client.done("PUT", "/boot-source", &kernel)?;
    client.done("PUT", "/machine-config", &json!({"vcpu_count": 2, "mem_size_mib": 256, "smt": false}))?;
    let drive = |path: &Path| json!({"drive_id": "data", "path_on_host": path, "is_root_device": false});
    let nonexistent = drive(Path::new("/nonexistent"));
    client.refused(
        "PUT",
        "/drives/data",
        &nonexistent,
        "Drive config error: Unable to create the virtio block",
    )?;
    client.refused("GET", "/balloon", &Value::Null, "No balloon device")?;
    client.refused(
        "PUT",
        "/balloon",
        &json!({"amount_mib": 257, "deflate_on_oom": false}),
        "Balloon config error: Amount of pages requested is too large.",
    )?;
    let balloon = json!({"amount_mib": 0, "deflate_on_oom": false, "free_page_reporting": true});
    client.done("PUT", "/balloon", &balloon)?;
    client.done("PUT", "/drives/data", &drive(disk))
}

/// The monitor's memory shrinks when the guest has freed some, without anybody asking.
fn free_memory_comes_back(monitor: u32) -> Result<(), Failed> {
    // Compared with the kernel's record of the most it ever had: the guest may have given back some already.
    let mib = |key: &str| -> io::Result<usize> {
        let status = fs::read_to_string(format!("/proc/{monitor}/status"))?;
        let line = status.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix(" kB"));
        Ok(line.and_then(|kib| kib.parse::<usize>().ok()).unwrap_or(0) / 1024)
    };
    let started = Instant::now();
    // The rest may be in pieces that are too small to be reported.
    while mib("VmRSS:")? + guest::FREED_MIB / 2 > mib("VmHWM:")? {
        if started.elapsed() > PATIENCE {
            let (most, now) = (mib("VmHWM:")?, mib("VmRSS:")?);
            return Err(format!("the monitor had {most} MiB at most and still has {now}").into());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

/// Pauses and resumes the guest, then gives it the disk that it waits for.
fn change(client: &mut Client, console: &Console, disk: &Path) -> Result<(), Failed> {
    assert_eq!(client.state()?, "Running");
    client.refused("PUT", "/entropy", &json!({}), "after starting")?;
    console.wait(2)?;
    client.done("PATCH", "/vm", &json!({"state": "Paused"}))?;
    assert_eq!(client.state()?, "Paused");
    // What is in the pipe is read; then nothing may come.
    std::thread::sleep(Duration::from_millis(300));
    let paused = console.ticks();
    std::thread::sleep(Duration::from_millis(1500));
    assert_eq!(console.ticks(), paused);
    client.done("PATCH", "/vm", &json!({"state": "Resumed"}))?;
    console.wait(paused)?;
    let update = |path: &Path| json!({"drive_id": "data", "path_on_host": path});
    client.refused("PATCH", "/drives/data", &update(Path::new("/nonexistent")), "cannot open the disk")?;
    client.done("PATCH", "/drives/data", &update(disk))?;
    client.done("PATCH", "/balloon", &json!({"amount_mib": guest::BALLOON_MIB}))
}
