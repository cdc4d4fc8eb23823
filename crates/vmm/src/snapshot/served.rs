//! Memory whose contents another process brings, page by page, as the guest touches them (userfaultfd).
//!
//! The handler listens at a Unix socket. It gets one message: the descriptor of the userfaultfd, and a JSON list of the
//! memory's regions as Firecracker sends it. From then on it reads faults from the descriptor, and removals: what the
//! balloon gave back reads as zeroes when it is touched again. The monitor keeps the descriptor as well. Without it a
//! handler that dies would leave the guest with zeroes; with it the guest waits for good, and somebody has to notice.

use std::fs::File;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use kapsel_devices::Memory;
use linux_raw_sys::general::{
    UFFDIO, UFFDIO_REGISTER_MODE_MISSING, uffdio_api, uffdio_range, uffdio_register,
};
use linux_raw_sys::ioctl::{UFFDIO_API, UFFDIO_REGISTER};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde::Serialize;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::Error;
use crate::config::Config;
use crate::memory::{HugePages, allocate};

/// The device that makes them, for those who may open it.
const DEVICE: &str = "/dev/userfaultfd";
/// Its one request (linux/userfaultfd.h).
const USERFAULTFD_IOC_NEW: libc::Ioctl = 0xaa00;
/// A handler that does not take its message for so long is none.
const PATIENCE: Duration = Duration::from_secs(10);

/// A region as the handler is told of it.
#[derive(Debug, Serialize)]
struct Region {
    /// Where it is in the monitor.
    base_host_virt_addr: u64,
    size: u64,
    /// Where its contents are in the memory's file.
    offset: u64,
    page_size: u64,
    /// In bytes as well, since the name was wrong from the start.
    page_size_kib: u64,
}

/// Memory for a guest, and what keeps its handler in charge.
///
/// # Errors
/// [`Error::File`] when nobody listens at `socket`, or the host gives no userfaultfd; [`Error::Build`] without memory.
pub fn connect(config: &Config, socket: &Path) -> Result<(Memory, OwnedFd), Error> {
    let machine = &config.machine_config;
    let memory = allocate(config.into(), machine.huge_pages, machine.track_dirty_pages);
    let memory = memory.map_err(|e| Box::new(e.into()))?;
    let failed = |action, path: &Path| {
        let path = path.to_owned();
        move |source| Error::File { action, path, source }
    };
    let descriptor = open().map_err(failed("make a userfaultfd with", Path::new(DEVICE)))?;
    let page_size = match machine.huge_pages {
        HugePages::None => 4096,
        HugePages::TwoMegabytes => 2 << 20,
    };
    let regions = register(&memory, &descriptor, page_size);
    let regions = regions.map_err(failed("have the memory served with", Path::new(DEVICE)))?;
    send(socket, &regions, &descriptor).map_err(failed("give the memory to its handler at", socket))?;
    Ok((memory, descriptor))
}

/// Faults of the kernel, which KVM's are, may be served only by who may open the device or has a capability.
fn open() -> io::Result<OwnedFd> {
    const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let descriptor = match File::options().read(true).write(true).open(DEVICE) {
        // SAFETY: the request takes flags, no pointer.
        Ok(device) => unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, FLAGS) },
        // Kernels before 6.1 have only the system call.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // SAFETY: the call takes flags, no pointer.
            unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) as i32 }
        }
        Err(error) => return Err(error),
    };
    if descriptor < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else owns it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(descriptor) };
    let features = linux_raw_sys::general::UFFD_FEATURE_EVENT_REMOVE.into();
    let mut api = uffdio_api { api: UFFDIO.into(), features, ioctls: 0 };
    // SAFETY: the request reads and writes the structure that it is given, and keeps no pointer.
    ok(unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_API.into(), &mut api) })?;
    Ok(descriptor)
}

fn ok(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn register(memory: &Memory, descriptor: &OwnedFd, page_size: u64) -> io::Result<Vec<Region>> {
    let (mut regions, mut offset) = (Vec::new(), 0);
    for region in memory.iter() {
        let (base, size) = (region.as_ptr() as u64, region.len());
        let range = uffdio_range { start: base, len: size };
        let mut request = uffdio_register { range, mode: UFFDIO_REGISTER_MODE_MISSING.into(), ioctls: 0 };
        // SAFETY: as for UFFDIO_API. The range is a mapping that the guest's memory owns; nothing was in it yet.
        ok(unsafe { libc::ioctl(descriptor.as_raw_fd(), UFFDIO_REGISTER.into(), &mut request) })?;
        regions.push(Region { base_host_virt_addr: base, size, offset, page_size, page_size_kib: page_size });
        offset += size;
    }
    Ok(regions)
}

fn send(socket: &Path, regions: &[Region], descriptor: &OwnedFd) -> io::Result<()> {
    let stream = UnixStream::connect(socket)?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let json = serde_json::to_vec(regions)?;
    let descriptors = [descriptor.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
    let sent = sendmsg(&stream, &[IoSlice::new(&json)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == json.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}
