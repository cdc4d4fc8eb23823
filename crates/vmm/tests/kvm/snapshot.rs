//! A machine that is saved by one monitor and goes on in another.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use rustix::fs::SeekFrom;
use serde_json::{Value, json};

use crate::guest;
use crate::handler::Handler;
use crate::host::{Files, PATIENCE, echo_once};
use crate::session::{Client, Session};

/// So many pages are enough to see that the balloon's are removed.
const REMOVED_MIN: usize = 1024;

pub fn snapshot() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let inside = |name: &str| directory.path().join(name);
    let (state, memory) = (inside("state"), inside("memory"));
    let (ticks, later) = save(&files, &inside, &state, &memory)?;
    let saved = fs::read(&memory)?;
    described(&files, &state, &memory)?;

    let mut session = start(&files, &inside("second"))?;
    let load = json!({
        "snapshot_path": state,
        "mem_backend": {"backend_type": "File", "backend_path": memory},
        "vsock_override": {"uds_path": inside("other")},
    });
    damaged(&mut session.client, &state, &memory, &load)?;
    let echo = echo(&inside("other"))?;
    session.client.done("PUT", "/snapshot/load", &load)?;
    assert_eq!(session.client.state()?, "Paused");
    let again = json!({"snapshot_path": state, "mem_file_path": memory});
    session.client.refused("PUT", "/snapshot/load", &again, "after starting")?;
    session.client.done("PATCH", "/vm", &json!({"state": "Resumed"}))?;
    went_on(session, &inside("second"), ticks)?;
    echo.join().expect("the echo does not panic")?;
    assert!(fs::read(&memory)? == saved, "what a clone writes is its own");
    served(&files, &inside, &state, &memory, ticks)?;
    changes(&files, &inside, &memory, later)
}

/// A monitor whose log does not get into what its guest prints.
fn start(files: &Files, socket: &Path) -> Result<Session, Failed> {
    let log = log_of(socket);
    let log = log.to_str().ok_or("the temporary directory has no name in UTF-8")?;
    Session::start(files, socket, &["--level", "Info", "--log-path", log])
}

fn log_of(socket: &Path) -> PathBuf {
    socket.with_extension("log")
}

/// The host's side of a clone's last task.
fn echo(socket: &Path) -> Result<JoinHandle<std::io::Result<()>>, Failed> {
    let listener = UnixListener::bind(format!("{}_{}", socket.display(), guest::HOST_PORT))?;
    Ok(std::thread::spawn(move || echo_once(&listener)))
}

/// The guest of the monitor with this socket goes on where it was after so many ticks, finds everything as it was, and ends.
fn went_on(session: Session, socket: &Path, ticks: usize) -> Result<(), Failed> {
    let text = session.finish_content().map_err(|failed| {
        let log = fs::read_to_string(log_of(socket)).unwrap_or_else(|error| error.to_string());
        format!("{}: {}\nlog:\n{log}", socket.display(), failed.message().unwrap_or_default())
    })?;
    let forked =
        text.split(guest::FORKED).nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    if forked.is_none_or(|tick: usize| tick + 1 < ticks) || text.contains(&format!("{} 0\n", guest::TICK)) {
        return Err(format!("the first machine ticked {ticks} times before; then came:\n{text}").into());
    }
    Ok(())
}

/// What was written between two snapshots is in a file of its own, and goes onto the first one's memory.
fn changes(
    files: &Files,
    inside: &impl Fn(&str) -> PathBuf,
    memory: &Path,
    ticks: usize,
) -> Result<(), Failed> {
    let (base, diff) = (memory.metadata()?, inside("diff").metadata()?);
    let (all, changed) = (base.blocks() * 512, diff.blocks() * 512);
    println!("a diff has {} KiB of {} KiB", changed >> 10, all >> 10);
    assert!(base.len() == diff.len() && (1 << 20..all / 2).contains(&changed), "{changed} of {all}");
    merge(&inside("diff"), memory)?;
    let mut session = start(files, &inside("third"))?;
    let load = json!({
        "snapshot_path": inside("later"),
        "mem_backend": {"backend_type": "File", "backend_path": memory},
        "vsock_override": {"uds_path": inside("third-vsock")},
        "track_dirty_pages": true,
    });
    session.client.done("PUT", "/snapshot/load", &load)?;
    // What the monitor itself writes, which is another generation.
    let create = json!({"snapshot_path": inside("x"), "mem_file_path": inside("y"), "snapshot_type": "Diff"});
    session.client.done("PUT", "/snapshot/create", &create)?;
    let written = inside("y").metadata()?.blocks() * 512;
    assert!((1..1 << 20).contains(&written), "{written} bytes were written by nobody");
    let echo = echo(&inside("third-vsock"))?;
    session.client.done("PATCH", "/vm", &json!({"state": "Resumed"}))?;
    went_on(session, &inside("third"), ticks)?;
    echo.join().expect("the echo does not panic")?;
    Ok(())
}

/// The memory comes from a handler, page by page, which learns what the balloon takes.
fn served(
    files: &Files,
    inside: &impl Fn(&str) -> PathBuf,
    state: &Path,
    memory: &Path,
    ticks: usize,
) -> Result<(), Failed> {
    let mut session = start(files, &inside("served"))?;
    let load = json!({
        "snapshot_path": state,
        "mem_backend": {"backend_type": "Uffd", "backend_path": inside("handler")},
        "vsock_override": {"uds_path": inside("served-vsock")},
    });
    session.client.refused("PUT", "/snapshot/load", &load, "give the memory to its handler")?;
    let handler = Handler::start(&inside("handler"), memory)?;
    session.client.done("PUT", "/snapshot/load", &load)?;
    session.client.done("PATCH", "/balloon", &json!({"amount_mib": guest::BALLOON_MIB}))?;
    // Its last task waits until somebody answers.
    let listener = UnixListener::bind(inside(&format!("served-vsock_{}", guest::HOST_PORT)))?;
    session.client.done("PATCH", "/vm", &json!({"state": "Resumed"}))?;
    let deadline = Instant::now() + PATIENCE;
    let count = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
    let counters = handler.counters.clone();
    while count(&counters.removed) < REMOVED_MIN && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    // What it takes back comes as zeroes.
    session.client.done("PATCH", "/balloon", &json!({"amount_mib": 0}))?;
    let echo = std::thread::spawn(move || echo_once(&listener));
    went_on(session, &inside("served"), ticks)?;
    echo.join().expect("the echo does not panic")?;
    handler.finish()?;
    let (copied, removed) = (count(&counters.copied), count(&counters.removed));
    println!("{copied} pages were brought, {removed} removed, {} zeroed", count(&counters.zeroed));
    let all = guest::MEMORY_MIB * 256;
    if removed >= REMOVED_MIN && (100..all / 2).contains(&copied) {
        Ok(())
    } else {
        Err(format!("{copied} of {all} pages were brought, {removed} removed").into())
    }
}

/// Copies what is not a hole.
fn merge(from: &Path, to: &Path) -> std::io::Result<()> {
    let (from, to) = (fs::File::open(from)?, fs::File::options().write(true).open(to)?);
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&from, SeekFrom::Data(at)) {
        at = rustix::fs::seek(&from, SeekFrom::Hole(data))?;
        let mut bytes = vec![0; (at - data) as usize];
        from.read_exact_at(&mut bytes, data)?;
        to.write_all_at(&bytes, data)?;
    }
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

/// Saves a machine after some ticks, and what has changed some ticks later, and says how many ticks that was.
fn save(
    files: &Files,
    inside: &impl Fn(&str) -> PathBuf,
    state: &Path,
    memory: &Path,
) -> Result<(usize, usize), Failed> {
    let disk = inside("disk");
    fs::write(&disk, guest::pattern(8 * 512))?;
    let listener = UnixListener::bind(inside(&format!("vsock_{}", guest::HOST_PORT)))?;
    // Open until the monitor ends.
    let held =
        std::thread::spawn(move || listener.accept().and_then(|(mut stream, _)| stream.read(&mut [0])));
    let mut session = start(files, &inside("first"))?;
    let client = &mut session.client;
    let kernel = json!({
        "kernel_image_path": files.vmlinux,
        "initrd_path": files.initramfs,
        "boot_args": guest::arguments("clone"),
    });
    client.done("PUT", "/boot-source", &kernel)?;
    let machine = json!({"vcpu_count": 2, "mem_size_mib": guest::MEMORY_MIB, "track_dirty_pages": true});
    client.done("PUT", "/machine-config", &machine)?;
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
    client.done("PATCH", "/vm", &json!({"state": "Paused"}))?;
    let create =
        json!({"snapshot_path": inside("later"), "mem_file_path": inside("diff"), "snapshot_type": "Diff"});
    client.done("PUT", "/snapshot/create", &create)?;
    let later = session.console.ticks();
    client.done("PATCH", "/vm", &json!({"state": "Resumed"}))?;
    session.console.wait(later)?;
    drop(session);
    held.join().expect("the holder does not panic")?;
    Ok((ticks, later))
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
