//! Bytes between guest and host, by disk, network and socket.

use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::guest::{
    BLOCK, DISK, DISK_PASSES, GUEST, HOST, NET, NET_PORT, PING, PINGS, RECEIVE, SEND, STREAM, VSOCK_PORT,
    WRITE, begin, end,
};
use crate::inside::{Files, milliseconds, shell};
use crate::monitor::{Monitor, Program};
use crate::results::Measures;

const TAP: &str = "tap0";
/// Room for the page cache of nothing, and for the program.
const MEMORY_MIB: u64 = 256;

/// One guest a run does everything.
pub fn measure(programs: &[Program<'_>], files: &Files, runs: usize, measures: &mut Measures) -> Result<()> {
    shell(&format!("tunctl -t {TAP} >/dev/null && ip addr add {HOST}/24 dev {TAP} && ip link set {TAP} up"))?;
    for _ in 0..runs {
        for program in programs {
            let monitor = run(program, files)?;
            let mut rate = |task: &str, name: &str, bytes: usize| -> Result<()> {
                let took = time(&monitor, task)?;
                eprintln!("{}: {took:?} for {bytes} bytes ({name})", program.name);
                measures.add(program.name, name, "MB/s", bytes as f64 / 1e6 / took.as_secs_f64());
                Ok(())
            };
            rate(BLOCK, "disk, read", DISK * DISK_PASSES)?;
            rate(WRITE, "disk, written", DISK * DISK_PASSES)?;
            rate(SEND, "network, sent", STREAM)?;
            rate(RECEIVE, "network, received", STREAM)?;
            let round = milliseconds(time(&monitor, PING)?) * 1e3 / PINGS as f64;
            measures.add(program.name, "vsock round trip", "us", round);
        }
    }
    Ok(())
}

fn time(monitor: &Monitor, task: &str) -> Result<Duration> {
    Ok(monitor.wait(&end(task))? - monitor.wait(&begin(task))?)
}

fn run(program: &Program<'_>, files: &Files) -> Result<Monitor> {
    let mut monitor = Monitor::start(program)?;
    let (disk, socket) = (monitor.directory.path().join("disk"), monitor.directory.path().join("vsock"));
    std::fs::write(&disk, vec![7; DISK])?;
    monitor.configure(&files.kernel, &files.whole, "", MEMORY_MIB)?;
    let drive =
        json!({"drive_id": "disk", "path_on_host": disk, "is_root_device": false, "is_read_only": false});
    monitor.ask("PUT", "/drives/disk", &drive)?;
    let card = json!({"iface_id": NET, "host_dev_name": TAP, "guest_mac": "06:00:ac:10:00:02"});
    monitor.ask("PUT", &format!("/network-interfaces/{NET}"), &card)?;
    monitor.ask("PUT", "/vsock", &json!({"guest_cid": 3, "uds_path": socket}))?;

    let network = TcpListener::bind((HOST, NET_PORT)).with_context(|| format!("{GUEST} has no host"))?;
    let sockets = UnixListener::bind(format!("{}_{VSOCK_PORT}", socket.display()))?;
    std::thread::spawn(move || stream(&network));
    std::thread::spawn(move || answer(&sockets));
    monitor.begin()?;
    // By then the host's side has ended as well, and its port can be had again.
    monitor.wait(&end(PING))?;
    Ok(monitor)
}

/// Takes the guest's bytes, and then gives it as many.
fn stream(listener: &TcpListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut buffer = vec![0; 1 << 16];
    let mut left = STREAM;
    while left > 0 {
        left -= match stream.read(&mut buffer)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => length.min(left),
        };
    }
    stream.write_all(&[1])?;
    for _ in 0..STREAM / buffer.len() {
        stream.write_all(&buffer)?;
    }
    Ok(())
}

/// Gives back what comes.
fn answer(listener: &UnixListener) -> io::Result<()> {
    let (mut stream, _) = listener.accept()?;
    let mut word = [0; 64];
    while stream.read_exact(&mut word).is_ok() {
        stream.write_all(&word)?;
    }
    Ok(())
}
