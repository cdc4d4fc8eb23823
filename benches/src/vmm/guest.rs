//! The guest's part: moves bytes, and says on the console when each task begins and ends.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::net::TcpStream;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};

/// Reads the disk.
pub const BLOCK: &str = "block";
/// Writes the disk.
pub const WRITE: &str = "write";
/// Sends a stream.
pub const SEND: &str = "send";
/// Receives one.
pub const RECEIVE: &str = "receive";
/// Waits for the host's answer, again and again.
pub const PING: &str = "ping";

/// The disk's size.
pub const DISK: usize = 64 << 20;
/// How often it is read, and written.
pub const DISK_PASSES: usize = 2;
/// Bytes of a stream, in each direction.
pub const STREAM: usize = 64 << 20;
/// Words of 64 bytes that go to the host and back.
pub const PINGS: usize = 500;
/// The network card's name.
pub const NET: &str = "net";
/// The host's address.
pub const HOST: &str = "172.16.0.1";
/// The guest's.
pub const GUEST: &str = "172.16.0.2";
/// Where the host takes and gives streams.
pub const NET_PORT: u16 = 5001;
/// Where the host answers.
pub const VSOCK_PORT: u32 = 5002;

/// Begins the line with what a guest could not do.
pub const FAILED: &str = "the guest failed: ";

const HOST_CID: u32 = 2;
/// Bytes of one request to the disk, and of one write to a stream.
const PIECE: usize = 256 << 10;

/// What is said when a task begins.
pub fn begin(task: &str) -> String {
    format!("<{task}>")
}

/// What is said when it has ended.
pub fn end(task: &str) -> String {
    format!("</{task}>")
}

/// What [`flood`] prints.
pub const FLOOD: &str = "....";
/// The serial port's data register.
const SERIAL_PORT: u16 = 0x3f8;

/// Prints all the time, past the kernel's driver: whenever the machine is saved, its next output is a few instructions away,
/// and neither interrupts nor other threads are between. (`/dev/port` would do, but kernels for clouds have none.)
pub fn flood() -> ! {
    println!("{}", crate::inside::FIRST);
    // SAFETY: the call lets this process, which is alone in its machine, write to one port, and touches no memory.
    if unsafe { nix::libc::ioperm(SERIAL_PORT.into(), 1, 1) } != 0 {
        println!("{FAILED}no access to the serial port: {}", io::Error::last_os_error());
        loop {
            std::thread::park();
        }
    }
    loop {
        // SAFETY: the port is the serial line's data register, which may be written to since the call above; the instruction
        // touches neither memory nor flags.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") SERIAL_PORT, in("al") b'.', options(nomem, nostack, preserves_flags));
        }
    }
}

/// Does all tasks, says what went wrong, and waits for its end.
pub fn main() -> ! {
    if let Err(error) = tasks() {
        println!("{FAILED}{error:#}");
    }
    loop {
        std::thread::park();
    }
}

fn tasks() -> Result<()> {
    task(BLOCK, || disk(|disk, piece| disk.read_exact(piece)))?;
    task(WRITE, || disk(|disk, piece| disk.write_all(piece)))?;
    let up = format!("ip addr add {GUEST}/24 dev eth0 && ip link set eth0 up");
    ensure!(Command::new("/bin/sh").args(["-c", &up]).status()?.success(), "there is no network");
    let mut stream = TcpStream::connect((HOST, NET_PORT)).context("the host's port")?;
    task(SEND, || {
        let piece = vec![7; PIECE];
        for _ in 0..STREAM / PIECE {
            stream.write_all(&piece)?;
        }
        // It comes when the host has everything.
        Ok(stream.read_exact(&mut [0])?)
    })?;
    task(RECEIVE, || {
        let mut piece = vec![0; PIECE];
        for _ in 0..STREAM / PIECE {
            stream.read_exact(&mut piece)?;
        }
        Ok(())
    })?;
    let mut vsock = connect_vsock()?;
    task(PING, || {
        let mut word = [7; 64];
        for _ in 0..PINGS {
            vsock.write_all(&word)?;
            vsock.read_exact(&mut word)?;
        }
        Ok(())
    })
}

fn task(name: &str, work: impl FnOnce() -> Result<()>) -> Result<()> {
    println!("{}", begin(name));
    work().with_context(|| format!("in {name}"))?;
    println!("{}", end(name));
    Ok(())
}

/// Goes over the whole disk past the guest's cache.
fn disk(mut work: impl FnMut(&mut File, &mut [u8]) -> io::Result<()>) -> Result<()> {
    let direct = nix::fcntl::OFlag::O_DIRECT.bits();
    let mut disk = File::options().read(true).write(true).custom_flags(direct).open("/dev/vda")?;
    // What goes past the cache has to begin at a page.
    const PAGE: usize = 4096;
    let mut room = vec![7; PIECE + PAGE];
    let offset = room.as_ptr().align_offset(PAGE);
    let piece = &mut room[offset..offset + PIECE];
    for _ in 0..DISK_PASSES {
        disk.rewind()?;
        for _ in 0..DISK / PIECE {
            work(&mut disk, piece)?;
        }
    }
    Ok(())
}

fn connect_vsock() -> Result<File> {
    let socket: OwnedFd = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::empty(), None)?;
    connect(socket.as_raw_fd(), &VsockAddr::new(HOST_CID, VSOCK_PORT)).context("the host's vsock port")?;
    Ok(socket.into())
}
