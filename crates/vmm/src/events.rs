//! What the monitor's main thread waits for.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use vmm_sys_util::eventfd::EventFd;

/// One reason to wake up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The machine has ended.
    Stop,
    /// The driver of a device announced buffers: device and queue.
    Queue(usize, usize),
    /// A device's own descriptor: device and index.
    Device(usize, usize),
    /// The API was asked for something.
    Api,
    /// It is time to tell what was counted.
    Metrics,
    /// Somebody types.
    Input,
    /// The guest's console has room for input.
    InputRoom,
}

/// A set of descriptors, each with the reason why it is watched. All are watched for reading, level-triggered.
#[derive(Debug)]
pub struct Events {
    epoll: OwnedFd,
    sources: Vec<Source>,
}

impl Events {
    /// An empty set.
    pub fn new() -> io::Result<Self> {
        Ok(Events { epoll: epoll::create(CreateFlags::CLOEXEC)?, sources: Vec::new() })
    }

    /// Adds a descriptor, for the first time or again.
    pub fn watch(&mut self, descriptor: impl AsFd, source: Source) -> io::Result<()> {
        let known = self.sources.iter().position(|other| *other == source);
        let data = EventData::new_u64(known.unwrap_or(self.sources.len()) as u64);
        epoll::add(&self.epoll, descriptor, data, EventFlags::IN)?;
        if known.is_none() {
            self.sources.push(source);
        }
        Ok(())
    }

    /// Adds an event descriptor.
    pub fn watch_event(&mut self, event: &EventFd, source: Source) -> io::Result<()> {
        // SAFETY: the descriptor is open as long as `event` is borrowed, which is longer than this call.
        self.watch(unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }, source)
    }

    /// Takes a descriptor out. It must have been added.
    pub fn forget(&self, descriptor: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(&self.epoll, descriptor)?)
    }

    /// Waits until something happens.
    pub fn wait(&self) -> io::Result<Vec<Source>> {
        let mut buffer = [std::mem::MaybeUninit::<epoll::Event>::uninit(); 32];
        match epoll::wait(&self.epoll, &mut buffer, None) {
            Ok((ready, _)) => Ok(ready
                .iter()
                .filter_map(|event| self.sources.get(event.data.u64() as usize).copied())
                .collect()),
            Err(rustix::io::Errno::INTR) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }
}
