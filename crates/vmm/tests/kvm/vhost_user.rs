//! A disk that another process serves: QEMU's storage daemon, which is what the protocol is measured by.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;
use serde_json::{Value, json};

use crate::guest;
use crate::host::{Files, PATIENCE};
use crate::proxy;
use crate::session::{Client, Session, connect};

const SECTOR: usize = 512;

/// Ends with its test.
struct Daemon(Child);

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Daemon {
    /// Serves the file at the socket, and takes commands at the other.
    fn start(program: &Path, file: &Path, socket: &Path, control: &Path) -> Result<Self, Failed> {
        let child = Command::new(program)
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={}", file.display()))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={},writable=on",
                socket.display()
            ))
            .arg("--chardev")
            .arg(format!("socket,id=control,path={},server=on,wait=off", control.display()))
            .args(["--monitor", "chardev=control"])
            .spawn()?;
        Ok(Daemon(child))
    }

    /// Has it take the file at this size.
    fn resize(control: &Path, bytes: usize) -> Result<(), Failed> {
        let mut stream = BufReader::new(connect(control)?);
        let mut line = String::new();
        stream.read_line(&mut line)?;
        for command in [
            json!({"execute": "qmp_capabilities"}),
            json!({"execute": "block_resize", "arguments": {"node-name": "disk", "size": bytes}}),
        ] {
            writeln!(stream.get_mut(), "{command}")?;
            line.clear();
            stream.read_line(&mut line)?;
            if !line.contains("return") {
                return Err(format!("{command}: {line}").into());
            }
        }
        Ok(())
    }
}

pub fn vhost_user() -> Result<(), Failed> {
    let files = Files::here();
    let directory = tempfile::tempdir()?;
    let inside = |name: &str| directory.path().join(name);
    let (disk, socket, control, log) = (inside("disk"), inside("blk"), inside("qmp"), inside("log"));
    fs::write(&disk, vec![1; 64 * SECTOR])?;
    let options = ["--level", "Warn", "--log-path", log.to_str().ok_or("a plain path")?];
    let mut session = Session::start(&files, &inside("api"), &options)?;
    let client = &mut session.client;
    nobody(client, &inside("nobody"))?;

    let mut daemon = Daemon::start(&files.storage_daemon, &disk, &inside("daemon"), &control)?;
    let size = proxy::start(&socket, connect(&inside("daemon"))?)?;
    put_together(client, &files, &socket, &inside("metrics"))?;
    session.console.wait(0)?;
    let client = &mut session.client;
    let path = json!({"drive_id": "data", "path_on_host": disk});
    client.refused("PATCH", "/drives/data", &path, "Block: Running method expected different backend.")?;
    client.done("PATCH", "/vm", &json!({"state": "Paused"}))?;
    let create = json!({"snapshot_path": inside("state"), "mem_file_path": inside("memory")});
    let reason = "Devices without snapshot support are present: vhost-user-block(id: data)";
    client.refused("PUT", "/snapshot/create", &create, reason)?;
    assert!(!inside("memory").exists());
    client.done("PATCH", "/vm", &json!({"state": "Resumed"}))?;

    // The guest waits for its disk to grow.
    let mut content = fs::read(&disk)?;
    assert!(content[..4 * SECTOR] == guest::pattern(4 * SECTOR), "what the guest wrote is in the file");
    content.resize(guest::LARGE_SECTORS * SECTOR, 2);
    fs::write(&disk, content)?;
    Daemon::resize(&control, guest::LARGE_SECTORS * SECTOR)?;
    size.store(guest::LARGE_SECTORS as u64, Ordering::SeqCst);
    client.done("PATCH", "/drives/data", &json!({"drive_id": "data"}))?;
    let seen = || session.console.text().contains(guest::READY);
    until("the guest has seen it", seen).map_err(|failed| with(failed, &session.console.text()))?;

    daemon.0.kill()?;
    daemon.0.wait()?;
    let gone = || fs::read_to_string(&log).is_ok_and(|text| text.contains("has to reset the device"));
    until("the monitor has noticed that the daemon is gone", gone)?;
    let client = &mut session.client;
    assert_eq!(client.state()?, "Running");
    client.refused("PATCH", "/drives/data", &json!({"drive_id": "data"}), "its session failed")?;
    let ticks = session.console.ticks();
    session.console.wait(ticks)?;
    session.client.done("PUT", "/actions", &json!({"action_type": "FlushMetrics"}))?;
    counted(&fs::read_to_string(inside("metrics"))?)?;
    session.client.done("PUT", "/actions", &json!({"action_type": "SendCtrlAltDel"}))?;
    let (status, text) = session.finish()?;
    if status.success() { Ok(()) } else { Err(format!("{status}, console:\n{text}").into()) }
}

fn with(failed: Failed, console: &str) -> Failed {
    format!("{}, console:\n{console}", failed.message().unwrap_or_default()).into()
}

fn until(what: &str, mut condition: impl FnMut() -> bool) -> Result<(), Failed> {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        if Instant::now() > deadline {
            return Err(format!("not within {PATIENCE:?}: {what}").into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

/// Who is not there, and who hangs up when spoken to.
fn nobody(client: &mut Client, socket: &Path) -> Result<(), Failed> {
    let drive = json!({"drive_id": "data", "is_root_device": false, "socket": socket});
    let failed = |reason: &str| {
        format!(
            "Drive config error: Unable to create the virtio block device: Vhost user backend error: Vhost-user error: {reason}"
        )
    };
    client.refused("PUT", "/drives/data", &drive, &failed("Failed to connect to UDS Unix stream: "))?;
    let listener = UnixListener::bind(socket)?;
    let hangs_up = std::thread::spawn(move || listener.accept().map(drop));
    client.refused("PUT", "/drives/data", &drive, "failed: the back end has hung up")?;
    hangs_up.join().expect("the thread does not panic")?;
    Ok(())
}

fn put_together(client: &mut Client, files: &Files, socket: &Path, metrics: &Path) -> Result<(), Failed> {
    let kernel = json!({
        "kernel_image_path": files.vmlinux,
        "initrd_path": files.initramfs,
        "boot_args": guest::arguments("served"),
    });
    client.done("PUT", "/metrics", &json!({"metrics_path": metrics}))?;
    client.done("PUT", "/boot-source", &kernel)?;
    client.done("PUT", "/machine-config", &json!({"vcpu_count": 2, "mem_size_mib": 256}))?;
    let both = json!({"drive_id": "data", "is_root_device": false, "socket": socket, "is_read_only": false});
    client.refused("PUT", "/drives/data", &both, "Invalid block config.")?;
    let drive =
        json!({"drive_id": "data", "is_root_device": false, "socket": socket, "cache_type": "Writeback"});
    client.done("PUT", "/drives/data", &drive)?;
    let (_, config) = client.ask("GET", "/vm/config", &Value::Null)?;
    assert_eq!(config["drives"][0]["socket"], json!(socket));
    client.done("PUT", "/actions", &json!({"action_type": "InstanceStart"}))
}

/// Under Firecracker's name, and no other.
fn counted(text: &str) -> Result<(), Failed> {
    let lines = crate::services::metrics(text)?;
    let sum = |name: &str| -> u64 {
        lines.iter().map(|line| line["vhost_user_block_data"][name].as_u64().unwrap_or(0)).sum()
    };
    assert!(lines.iter().all(|line| line["block"].is_null()), "{text}");
    assert!(sum("init_time_us") > 0 && sum("activate_time_us") > 0, "{text}");
    assert_eq!((sum("activate_fails"), sum("cfg_fails")), (0, 1), "{text}");
    Ok(())
}
