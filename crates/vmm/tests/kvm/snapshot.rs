//! A machine that is saved by one monitor and goes on in another.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::api::{Client, Console, Monitor};
use crate::guest;
use crate::host::{Files, echo_once};

/// A monitor that waits to be told what to do.
struct Session {
    monitor: Monitor,
    client: Client,
    console: Console,
    reader: JoinHandle<()>,
}

impl Session {
    fn start(files: &Files, socket: &Path) -> Result<Self, Failed> {
        let mut command = Command::new(&files.vmm);
        command.arg("--api-sock").arg(socket).args(["--level", "Warn"]);
        let mut monitor = Monitor(command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?);
        let console = Console::default();
        let (copy, stdout) = (console.clone(), monitor.0.stdout.take().expect("stdout is a pipe"));
        let reader = std::thread::spawn(move || copy.read(stdout));
        Ok(Session { monitor, client: Client::connect(socket)?, console, reader })
    }

    /// Whether it succeeded, and what its guest printed; a minute is enough.
    fn finish(mut self) -> Result<(bool, String), Failed> {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.monitor.0.try_wait()?.is_none() {
            if Instant::now() > deadline {
                self.monitor.0.kill()?;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        self.reader.join().expect("the reader does not panic");
        Ok((self.monitor.0.wait()?.success(), self.console.text()))
    }
}

pub fn snapshot() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let inside = |name: &str| directory.path().join(name);
    let (state, memory) = (inside("state"), inside("memory"));
    let ticks = save(&files, &inside, &state, &memory)?;
    let saved = fs::read(&memory)?;
    described(&files, &state, &memory)?;

    let mut session = Session::start(&files, &inside("second"))?;
    let load = json!({
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": memory},
        "vsock_override": {"uds_path": inside("other")},
    });
    damaged(&mut session.client, &state, &memory, &load)?;
    let listener = UnixListener::bind(inside(&format!("other_{}", guest::HOST_PORT)))?;
    let echo = std::thread::spawn(move || echo_once(&listener));
    session.client.done("PUT", "/snapshot/load", &load)?;
    assert_eq!(session.client.state()?, "Paused");
    let again = json!({"snapshot_path": state, "mem_file_path": memory});
    session.client.refused("PUT", "/snapshot/load", &again, "after starting")?;
    session.client.done("PATCH", "/vm", &json!({"state": "Resumed"}))?;
    let (success, text) = session.finish()?;
    if !success || !text.contains(guest::DONE) {
        return Err(format!("success: {success}, console:\n{text}").into());
    }
    echo.join().expect("the echo does not panic")?;
    let forked =
        text.split(guest::FORKED).nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    if forked.is_none_or(|tick: usize| tick + 1 < ticks) || text.contains(&format!("{} 0\n", guest::TICK)) {
        return Err(format!("the first machine ticked {ticks} times before; then came:\n{text}").into());
    }
    assert!(fs::read(&memory)? == saved, "what a clone writes is its own");
    Ok(())
}

/// The state file has a version that can be asked for; the memory file has none.
fn described(files: &Files, state: &Path, memory: &Path) -> Result<(), Failed> {
    let describe = |path: &Path| Command::new(&files.vmm).arg("--describe-snapshot").arg(path).output();
    let (good, bad) = (describe(state)?, describe(memory)?);
    let refused =
        !bad.status.success() && String::from_utf8_lossy(&bad.stderr).contains("larger than any snapshot");
    if good.stdout == b"v1\n" && refused { Ok(()) } else { Err(format!("{good:?} {bad:?}").into()) }
}

/// Saves a machine after some ticks and says how many. It goes on ticking afterwards.
fn save(
    files: &Files,
    inside: &impl Fn(&str) -> PathBuf,
    state: &Path,
    memory: &Path,
) -> Result<usize, Failed> {
    let disk = inside("disk");
    fs::write(&disk, guest::pattern(8 * 512))?;
    let listener = UnixListener::bind(inside(&format!("vsock_{}", guest::HOST_PORT)))?;
    // Open until the monitor ends.
    let held =
        std::thread::spawn(move || listener.accept().and_then(|(mut stream, _)| stream.read(&mut [0])));
    let mut session = Session::start(files, &inside("first"))?;
    let client = &mut session.client;
    let kernel = json!({
        "kernel_image_path": files.vmlinux,
        "initrd_path": files.initramfs,
        "boot_args": guest::arguments("clone"),
    });
    client.done("PUT", "/boot-source", &kernel)?;
    client.done("PUT", "/machine-config", &json!({"vcpu_count": 2, "mem_size_mib": 256}))?;
    let drive =
        json!({"drive_id": "data", "path_on_host": disk, "is_root_device": false, "is_read_only": true});
    client.done("PUT", "/drives/data", &drive)?;
    client.done("PUT", "/vsock", &json!({"guest_cid": 42, "uds_path": inside("vsock")}))?;
    client.done("PUT", "/balloon", &json!({"amount_mib": 0, "deflate_on_oom": false}))?;
    client.done("PUT", "/entropy", &json!({}))?;
    client.done("PUT", "/actions", &json!({"action_type": "InstanceStart"}))?;
    session.console.wait(2)?;
    let create = json!({"snapshot_path": state, "mem_file_path": memory});
    client.refused("PUT", "/snapshot/create", &create, "has to be paused")?;
    client.done("PATCH", "/vm", &json!({"state": "Paused"}))?;
    let nowhere = json!({"snapshot_path": "/nonexistent/state", "mem_file_path": memory});
    client.refused("PUT", "/snapshot/create", &nowhere, "cannot write the state /nonexistent/state")?;
    client.done("PUT", "/snapshot/create", &create)?;
    let ticks = session.console.ticks();
    client.done("PATCH", "/vm", &json!({"state": "Resumed"}))?;
    session.console.wait(ticks + 2)?;
    drop(session.monitor);
    held.join().expect("the holder does not panic")?;
    Ok(ticks)
}

/// Files that were cut or changed are refused with a reason, and the monitor is none the worse for it.
fn damaged(client: &mut Client, state: &Path, memory: &Path, load: &Value) -> Result<(), Failed> {
    let good = fs::read(state)?;
    let bad = state.with_extension("bad");
    let with = |key: &str, path: &Path| {
        let mut load = load.clone();
        *load.pointer_mut(key).expect("there is such a key") = json!(path);
        load
    };
    let mut flipped = good.clone();
    flipped[good.len() / 2] ^= 1;
    let mut newer = good.clone();
    newer[8] = 99;
    for (content, reason) in [
        (&good[..good.len() - 1], "was it cut?"),
        (&good[..20], "ends too early"),
        (&flipped, "damaged"),
        (&newer, "version 99"),
        (b"#!/bin/sh", "not a snapshot"),
    ] {
        fs::write(&bad, content)?;
        client.refused("PUT", "/snapshot/load", &with("/snapshot_path", &bad), reason)?;
    }
    let cut = fs::File::create(&bad)?;
    cut.set_len(fs::metadata(memory)?.len() - 4096)?;
    let load = with("/mem_backend/backend_path", &bad);
    client.refused("PUT", "/snapshot/load", &load, "the memory file should have")
}
