//! A process that serves a guest's memory, as a monitor's user would write it; here it is a thread of the test.

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;

use linux_raw_sys::general::{
    UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMOVE, uffd_msg, uffdio_copy, uffdio_range, uffdio_zeropage,
};
use linux_raw_sys::ioctl::{UFFDIO_COPY, UFFDIO_ZEROPAGE};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde::Deserialize;

const PAGE: u64 = 4096;

#[derive(Deserialize)]
struct Region {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    page_size_kib: u64,
}

/// What it has done.
#[derive(Default)]
pub struct Counters {
    pub copied: AtomicUsize,
    pub zeroed: AtomicUsize,
    pub removed: AtomicUsize,
    stop: AtomicBool,
}

pub struct Handler {
    pub counters: Arc<Counters>,
    thread: JoinHandle<io::Result<()>>,
}

impl Handler {
    /// Serves the contents of `memory` to the first monitor that comes.
    pub fn start(socket: &Path, memory: &Path) -> io::Result<Self> {
        let (listener, memory) = (UnixListener::bind(socket)?, File::open(memory)?);
        let counters = Arc::new(Counters::default());
        let of_thread = counters.clone();
        let thread = std::thread::spawn(move || {
            let (descriptor, regions) = greet(&listener)?;
            Serving {
                descriptor,
                regions,
                memory,
                gone: HashSet::new(),
                waiting: Vec::new(),
                counters: of_thread,
            }
            .serve()
            // Its monitor would wait for good, and the test never hear of it by joining.
            .inspect_err(|error| println!("the handler of the memory failed: {error}"))
        });
        Ok(Handler { counters, thread })
    }

    /// Ends, and says whether everything could be served.
    pub fn finish(self) -> io::Result<()> {
        self.counters.stop.store(true, Ordering::SeqCst);
        self.thread.join().expect("the handler does not panic")
    }
}

fn greet(listener: &UnixListener) -> io::Result<(OwnedFd, Vec<Region>)> {
    let (stream, _) = listener.accept()?;
    let (mut bytes, mut space) = ([0; 4096], [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))]);
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(&stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let descriptor = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    let regions: Vec<Region> = serde_json::from_slice(&bytes[..received.bytes])?;
    assert!(regions.iter().all(|region| (region.page_size, region.page_size_kib) == (PAGE, PAGE)));
    Ok((descriptor.ok_or_else(|| io::Error::other("there is no descriptor"))?, regions))
}

struct Serving {
    descriptor: OwnedFd,
    regions: Vec<Region>,
    memory: File,
    /// Pages that were removed: they are zero from then on, whatever the file has.
    gone: HashSet<u64>,
    /// Pages that could not be brought while memory was being removed. Nobody asks for them again.
    waiting: Vec<u64>,
    counters: Arc<Counters>,
}

impl Serving {
    fn serve(&mut self) -> io::Result<()> {
        let timeout = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        while !self.counters.stop.load(Ordering::SeqCst) {
            let mut wait = [PollFd::from_borrowed_fd(self.descriptor.as_fd(), PollFlags::IN)];
            poll(&mut wait, Some(&timeout))?;
            let mut bytes = [0; size_of::<uffd_msg>()];
            match rustix::io::read(&self.descriptor, &mut bytes) {
                Ok(length) if length == bytes.len() => self.message(&bytes)?,
                Err(rustix::io::Errno::AGAIN) => {}
                other => return Err(io::Error::other(format!("{other:?}"))),
            }
            for page in std::mem::take(&mut self.waiting) {
                self.bring(page)?;
            }
        }
        Ok(())
    }

    /// The event is the first byte; the structure's two numbers that matter here are at 8 and 16.
    fn message(&mut self, bytes: &[u8]) -> io::Result<()> {
        let number = |at: usize| u64::from_ne_bytes(std::array::from_fn(|n| bytes[at + n]));
        match u32::from(bytes[0]) {
            UFFD_EVENT_PAGEFAULT => self.bring(number(16) & !(PAGE - 1)),
            UFFD_EVENT_REMOVE => {
                let pages = (number(8)..number(16)).step_by(PAGE as usize);
                self.counters.removed.fetch_add(pages.clone().count(), Ordering::SeqCst);
                self.gone.extend(pages);
                Ok(())
            }
            other => Err(io::Error::other(format!("an event {other}"))),
        }
    }

    fn bring(&mut self, address: u64) -> io::Result<()> {
        let inside = |region: &&Region| address.wrapping_sub(region.base_host_virt_addr) < region.size;
        let region = self.regions.iter().find(inside).expect("a fault is in the guest's memory");
        if self.gone.contains(&address) {
            self.counters.zeroed.fetch_add(1, Ordering::SeqCst);
            let range = uffdio_range { start: address, len: PAGE };
            let mut request = uffdio_zeropage { range, mode: 0, zeropage: 0 };
            // SAFETY: the request reads and writes the structure that it is given, and keeps no pointer.
            let result =
                unsafe { libc::ioctl(self.descriptor.as_raw_fd(), UFFDIO_ZEROPAGE.into(), &mut request) };
            return self.brought(address, result);
        }
        self.counters.copied.fetch_add(1, Ordering::SeqCst);
        let mut page = [0u8; PAGE as usize];
        self.memory.read_exact_at(&mut page, address - region.base_host_virt_addr + region.offset)?;
        let mut request =
            uffdio_copy { dst: address, src: page.as_ptr() as u64, len: PAGE, mode: 0, copy: 0 };
        // SAFETY: as above; the source is a page of this function's, which outlives the call.
        let result = unsafe { libc::ioctl(self.descriptor.as_raw_fd(), UFFDIO_COPY.into(), &mut request) };
        self.brought(address, result)
    }

    /// A page that is there already and a monitor that has gone are no failures.
    fn brought(&mut self, address: u64, result: i32) -> io::Result<()> {
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            _ if result == 0 => Ok(()),
            Some(libc::EAGAIN) => {
                self.waiting.push(address);
                Ok(())
            }
            Some(libc::EEXIST | libc::ESRCH) => Ok(()),
            _ => Err(error),
        }
    }
}
