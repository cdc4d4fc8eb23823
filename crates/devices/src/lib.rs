//! Virtio devices for a microVM monitor.
//!
//! A device lives behind a [`mmio::Transport`]. The guest's driver negotiates features and describes its queues there; at
//! DRIVER_OK every description is checked and frozen into a [`queue::Queue`], which moves into the device. From then on the
//! device looks at guest memory only through its queues, and the driver can only reset it.
//!
//! Everything in guest memory is hostile: descriptors are checked as they are read, lengths are bounded before anything is
//! allocated, and a request that makes no sense is completed with an error or with nothing written.
//!
//! Devices never block on the guest and have no threads: the monitor's event loop tells them what happened
//! ([`Device::handle`]).

pub mod balloon;
pub mod block;
pub mod calls;
pub mod chain;
pub mod dirty;
mod interrupt;
pub mod mem;
pub mod mmio;
pub mod net;
pub mod queue;
pub mod rate;
pub mod rng;
pub mod state;
pub mod timer;
pub mod vhost_user;
pub mod vsock;

#[cfg(test)]
mod testing;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use calls::SystemCalls;
pub use interrupt::Interrupt;
use queue::{Position, Queue, QueueError};
use state::{Reader, StateError, Writer};
use vmm_sys_util::eventfd::EventFd;

/// The guest's memory.
pub type Memory = vm_memory::GuestMemoryMmap<dirty::Dirty>;

/// A part of it.
pub(crate) type Slice<'m> = vm_memory::VolatileSlice<'m, vm_memory::bitmap::BS<'m, dirty::Dirty>>;

/// A counter's name and its value.
pub type Metric = (&'static str, u64);

/// A device's type (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// Network card.
    Net = 1,
    /// Block device.
    Block = 2,
    /// Entropy source.
    Rng = 4,
    /// Traditional memory balloon.
    Balloon = 5,
    /// Socket.
    Vsock = 19,
    /// Memory that comes and goes.
    Mem = 24,
    /// File system.
    FileSystem = 26,
}

/// What a device is given when the driver has finished its configuration.
pub struct Activation {
    /// The features that device and driver agreed on.
    pub features: u64,
    /// One per queue of the device; `None` for one that the driver did not set up.
    pub queues: Vec<Option<Queue>>,
    /// How the device calls for the driver's attention outside of queues.
    pub interrupt: Interrupt,
    /// The events by which the driver announces buffers, one per queue. They are signalled to whoever waits for them, which is the
    /// monitor's event loop unless the device is [`served elsewhere`](Device::served_elsewhere).
    pub events: Arc<[EventFd]>,
}

impl Activation {
    /// Takes a queue that the device cannot work without.
    ///
    /// # Errors
    /// [`QueueError::Missing`] when the driver did not set it up.
    pub fn take(&mut self, index: usize) -> Result<Queue, QueueError> {
        self.queues.get_mut(index).and_then(Option::take).ok_or(QueueError::Missing(index))
    }

    /// Whether the feature with this bit number was agreed on.
    pub fn has(&self, feature: u32) -> bool {
        self.features & (1 << feature) != 0
    }
}

/// Something for a device to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The driver made buffers available in the queue.
    Queue(usize),
    /// The descriptor of that index in [`Device::sources`] is ready.
    Source(usize),
}

/// A virtio device: what it offers, and what it does once it is active.
pub trait Device: Send {
    /// The device's type.
    fn kind(&self) -> Kind;

    /// Features of the device; the transport adds its own.
    fn features(&self) -> u64;

    /// Features of its queues, of [`mmio::feature::OF_QUEUES`]: those that whoever serves them has.
    fn queue_features(&self) -> u64 {
        mmio::feature::OF_QUEUES
    }

    /// Whether another process waits for the queues' events, and interrupts the driver. Then nobody does so here.
    fn served_elsewhere(&self) -> bool {
        false
    }

    /// The largest size of each queue; a power of two.
    fn queue_sizes(&self) -> &'static [u16];

    /// The device's configuration space. Reads beyond it give zeroes.
    fn config(&self) -> Vec<u8>;

    /// The driver writes to the configuration space. Most devices have nothing to write.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// The driver is ready: queues move into the device.
    ///
    /// # Errors
    /// When a queue that the device needs is missing; the device then stays inactive and asks to be reset.
    fn activate(&mut self, activation: Activation) -> Result<(), QueueError>;

    /// Forgets the queues and everything that belongs to the driver's session. Nothing touches guest memory afterwards.
    fn reset(&mut self);

    /// Where the device's queues stand, by their numbers.
    fn positions(&self) -> Vec<Option<Position>>;

    /// Adds state to a snapshot that is in neither the configuration nor the queues. Most devices have none.
    fn save(&self, _writer: &mut Writer) {}

    /// Takes up what was saved, after [`Device::activate`] if the device was active.
    ///
    /// # Errors
    /// [`StateError`]; the device is of no use any more then.
    fn restore(&mut self, _reader: &mut Reader<'_>) -> Result<(), StateError> {
        Ok(())
    }

    /// Descriptors that make the device work when they are readable. They are watched, level-triggered, during the
    /// device's whole life; a device with many of its own gives one that stands for all (epoll).
    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        Vec::new()
    }

    /// The system calls that the device makes. A monitor allows no others.
    fn system_calls(&self) -> SystemCalls {
        SystemCalls::default()
    }

    /// What the device has counted since it was made, by Firecracker's names.
    fn metrics(&self) -> Vec<Metric> {
        Vec::new()
    }

    /// Works on what happened, for a bounded time. Only called while the device is active. True when there is more to do
    /// in the queue: the event then comes again, after those of other devices.
    ///
    /// # Errors
    /// When a queue cannot be used any more; the device then asks to be reset.
    fn handle(&mut self, event: Event) -> Result<bool, QueueError>;
}
