//! A machine that is put together, started, paused and changed through the API.

use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::guest;
use crate::host::Files;

const SECTOR: usize = 512;

/// A connection to the API.
pub struct Client(BufReader<UnixStream>);

impl Client {
    /// Connects as soon as the monitor listens.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match UnixStream::connect(socket) {
                Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                stream => return Ok(Client(BufReader::new(stream?))),
            }
        }
    }

    /// Status and body of the answer.
    pub fn ask(&mut self, method: &str, path: &str, body: &Value) -> io::Result<(u16, Value)> {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        write!(self.0.get_mut(), "{method} {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
        let (mut status, mut length) = (0, 0);
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line)?;
            if let Some(rest) = line.strip_prefix("HTTP/1.1 ") {
                status = rest.trim().parse().map_err(io::Error::other)?;
            } else if let Some(rest) = line.strip_prefix("Content-Length: ") {
                length = rest.trim().parse().map_err(io::Error::other)?;
            } else if line.trim().is_empty() {
                break;
            }
        }
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes)?;
        Ok((status, if bytes.is_empty() { Value::Null } else { serde_json::from_slice(&bytes)? }))
    }

    pub fn done(&mut self, method: &str, path: &str, body: &Value) -> Result<(), Failed> {
        match self.ask(method, path, body)? {
            (204, Value::Null) => Ok(()),
            other => Err(format!("{method} {path}: {other:?}").into()),
        }
    }

    pub fn refused(&mut self, method: &str, path: &str, body: &Value, reason: &str) -> Result<(), Failed> {
        match self.ask(method, path, body)? {
            (400, fault) if fault["fault_message"].as_str().is_some_and(|text| text.contains(reason)) => {
                Ok(())
            }
            other => Err(format!("{method} {path}: {other:?} instead of {reason}").into()),
        }
    }

    pub fn state(&mut self) -> io::Result<String> {
        let (_, instance) = self.ask("GET", "/", &Value::Null)?;
        Ok(instance["state"].as_str().unwrap_or_default().to_owned())
    }
}

/// The guest's console, read as it comes.
#[derive(Clone, Default)]
pub struct Console {
    ticks: Arc<AtomicUsize>,
    text: Arc<Mutex<String>>,
}

impl Console {
    pub fn read(&self, from: impl Read) {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            self.ticks.fetch_add(usize::from(line.contains(guest::TICK)), Ordering::SeqCst);
            self.text.lock().expect("no reader panics").push_str(&(line + "\n"));
        }
    }

    /// What was printed so far.
    pub fn text(&self) -> String {
        self.text.lock().expect("no reader panics").clone()
    }

    pub fn ticks(&self) -> usize {
        self.ticks.load(Ordering::SeqCst)
    }

    /// Waits until the guest has ticked more often than `before`.
    pub fn wait(&self, before: usize) -> Result<(), Failed> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.ticks() <= before {
            if Instant::now() > deadline {
                return Err(
                    format!("the guest does not tick:\n{}", self.text.lock().expect("no panic")).into()
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }
}

/// Ends with its test.
pub struct Monitor(pub Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

pub fn life() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let (socket, small, large) =
        (directory.path().join("api"), directory.path().join("small"), directory.path().join("large"));
    fs::write(&small, vec![1; 64 * SECTOR])?;
    fs::write(&large, vec![2; guest::LARGE_SECTORS * SECTOR])?;
    let child = Command::new(&files.vmm)
        .arg("--api-sock")
        .arg(&socket)
        .args(["--id", "the-first"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut monitor = Monitor(child);
    let console = Console::default();
    let (reader, stdout) = (console.clone(), monitor.0.stdout.take().expect("stdout is a pipe"));
    let reader = std::thread::spawn(move || reader.read(stdout));

    let mut client = Client::connect(&socket)?;
    put_together(&mut client, &files, &small)?;
    client.done("PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
    console.wait(0)?;
    every_thread_is_confined(monitor.0.id())?;
    free_memory_comes_back(monitor.0.id())?;
    change(&mut client, &console, &large)?;
    reader.join().expect("the reader does not panic");
    let text = console.text.lock().expect("no reader panics").clone();
    if !monitor.0.wait()?.success() || !text.contains(guest::DONE) {
        return Err(text.into());
    }
    Ok(())
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
        if started.elapsed() > Duration::from_secs(120) {
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
