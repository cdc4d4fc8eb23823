//! Process 1 of the guests that this crate's tests and measurements boot: a few ports on the channel, nothing else.
//!
//! Port 1 echoes; on port 2 one line of text is a command, answered with a line.

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use kapsel_channel::mux::Mux;
use kapsel_channel::{Channel, GuestPort, Stream};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};

fn main() {
    mount("devtmpfs", "/dev");
    mount("sysfs", "/sys");
    mount("proc", "/proc");
    for module in fs::read_to_string("/lib/kapsel/modules").unwrap_or_default().lines() {
        if let Ok(file) = fs::File::open(module) {
            load(&file);
        }
    }
    println!("AGENT-UP");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let served = runtime.map(|runtime| runtime.block_on(serve()));
    println!("agent: {served:?}");
}

async fn serve() -> kapsel_channel::Result<()> {
    let mut port = GuestPort::open(&port_device().await)?;
    loop {
        let session = port.next_session().await?;
        while let Ok((port, stream)) = session.accept().await {
            tokio::spawn(answer(session.clone(), port, stream));
        }
    }
}

/// The port's device node; its name is in sysfs, since nobody makes links here.
async fn port_device() -> std::path::PathBuf {
    loop {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == "kapsel.0") {
                return Path::new("/dev").join(entry.file_name());
            }
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

async fn answer(_session: Mux, port: u32, mut stream: Stream) -> std::io::Result<()> {
    if port == 1 {
        let mut bytes = vec![0; 32 * 1024];
        loop {
            match stream.read(&mut bytes).await? {
                0 => return stream.shutdown().await,
                n => stream.write_all(&bytes[..n]).await?,
            }
        }
    }
    let mut line = String::new();
    let mut stream = BufReader::new(stream);
    stream.read_line(&mut line).await?;
    let answer = command(line.trim()).unwrap_or_else(|error| format!("error: {error}"));
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

fn command(line: &str) -> std::io::Result<String> {
    let (verb, argument) = line.split_once(' ').unwrap_or((line, ""));
    match verb {
        "processors" => Ok(fs::read_to_string("/sys/devices/system/cpu/online")?),
        "remember" => fs::write("/run/memory", argument).map(|()| String::new()),
        "recall" => fs::read_to_string("/run/memory"),
        "disk" => disk(argument),
        "mount" => share(argument),
        "flood" => {
            for _ in 0..argument.parse().unwrap_or(0) {
                std::io::stdout().write_all(&[b'f'; 1023])?;
                println!();
            }
            Ok(String::new())
        }
        "panic" => fs::write("/proc/sysrq-trigger", "c").map(|()| String::new()),
        "off" => Ok(format!("{:?}", rustix::system::reboot(rustix::system::RebootCommand::Restart))),
        _ => Err(std::io::Error::other("no such command")),
    }
}

/// The first bytes of the disk with this serial.
fn disk(serial: &str) -> std::io::Result<String> {
    for entry in fs::read_dir("/sys/block")?.flatten() {
        if fs::read_to_string(entry.path().join("serial")).is_ok_and(|found| found.trim() == serial) {
            let mut bytes = [0; 16];
            let mut file = fs::File::open(Path::new("/dev").join(entry.file_name()))?;
            std::io::Read::read_exact(&mut file, &mut bytes)?;
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
    }
    Err(std::io::Error::other("no such disk"))
}

/// Mounts the share with this tag and reads its file `hello`. A share that came with a restore is in a slot that was empty at boot,
/// so the driver is told to look at every slot again.
fn share(tag: &str) -> std::io::Result<String> {
    let driver = Path::new("/sys/bus/platform/drivers/virtio-mmio");
    for entry in fs::read_dir("/sys/bus/platform/devices")?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("LNRO0005")
            && !entry.path().join("driver").exists()
        {
            // An empty slot has no device, which is no error.
            let _ = fs::write(driver.join("bind"), entry.file_name().as_encoded_bytes());
        }
    }
    fs::create_dir_all("/share")?;
    rustix::mount::mount(tag, "/share", "virtiofs", rustix::mount::MountFlags::empty(), None)?;
    fs::read_to_string("/share/hello")
}

fn mount(kind: &str, target: &str) {
    let _ = rustix::mount::mount(kind, target, kind, rustix::mount::MountFlags::empty(), None);
}

fn load(module: &fs::File) {
    let none = CString::default();
    if let Err(error) = rustix::system::finit_module(module, &none, 0) {
        println!("agent: a module does not load: {error}");
    }
}
