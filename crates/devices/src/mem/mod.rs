//! Memory that comes and goes while the guest runs (virtio 1.2, section 5.15): a region of the guest's address space in
//! blocks, of which the guest plugs as many as it is asked to.
//!
//! The region is mapped as a whole from the start, and costs nothing where nobody writes. It is given to the guest in slots
//! of many blocks ([`Host::give`]): one that has no block plugged is not there for the guest's processors. What other
//! devices write for the guest they can write to all of the region, so its size bounds what a guest can take.

use std::io;

use vm_memory::bitmap::Bitmap;
use vm_memory::{ByteValued, GuestAddress, GuestMemoryBackend};

use crate::balloon::release;
use crate::calls::{SystemCall, SystemCalls, only};
use crate::chain::Chain;
use crate::queue::{Position, Queue, QueueError};
use crate::state::{Reader, StateError, Writer};
use crate::{Activation, Device, Event, Kind, Memory, Metric};

/// The driver leaves unplugged memory alone (section 5.15.3).
const VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE: u32 = 1;
/// Linux has one request under way.
const QUEUE_SIZE: u16 = 64;

/// Unplugged memory goes back to the host.
const CALLS: &[SystemCall] = &[
    only(libc::SYS_madvise, 2, libc::MADV_DONTNEED as u32),
    only(libc::SYS_madvise, 2, libc::MADV_REMOVE as u32),
];

/// Requests (section 5.15.6).
mod request {
    pub const PLUG: u16 = 0;
    pub const UNPLUG: u16 = 1;
    pub const UNPLUG_ALL: u16 = 2;
    pub const STATE: u16 = 3;
}

/// Answers.
mod response {
    pub const ACK: u16 = 0;
    pub const NACK: u16 = 1;
    pub const BUSY: u16 = 2;
    pub const ERROR: u16 = 3;
}

/// States of a range of blocks.
const PLUGGED: u16 = 0;
const UNPLUGGED: u16 = 1;
const MIXED: u16 = 2;

/// A request as the guest writes it.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Request {
    kind: u16,
    padding: [u16; 3],
    address: u64,
    blocks: u16,
    end: [u16; 3],
}
// SAFETY: integers without padding between them, so every pattern of bytes is a request.
unsafe impl ByteValued for Request {}

/// What the monitor does for the device.
pub trait Host: Send {
    /// Has the guest's processors find a slot of the region, or not find it any more.
    ///
    /// # Errors
    /// When the host refuses; nothing has changed then.
    fn give(&mut self, slot: usize, there: bool) -> io::Result<()>;
}

/// What the device is made of, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Config {
    /// Where the region begins in the guest's address space; a multiple of `slot`.
    pub address: u64,
    /// How large it is: a multiple of `slot`.
    pub size: u64,
    /// What is plugged at least; a power of two.
    pub block: u64,
    /// What the processors are given at least: a multiple of `block`.
    pub slot: u64,
}

/// A size that the plugged memory cannot have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("Size {0} is invalid: it must be a multiple of block size and less than the total size")]
pub struct InvalidSize(u64);

/// The device.
pub struct Mem {
    config: Config,
    host: Box<dyn Host>,
    /// What the guest is asked to have plugged, in bytes.
    requested: u64,
    /// So far the guest may plug, in bytes from the region's beginning.
    usable: u64,
    plugged: Vec<bool>,
    counters: Counters,
    queue: Option<Queue>,
}

#[derive(Debug, Default)]
struct Counters {
    queue_event_count: u64,
    plug_count: u64,
    plug_bytes: u64,
    plug_fails: u64,
    unplug_count: u64,
    unplug_bytes: u64,
    unplug_fails: u64,
    unplug_all_count: u64,
    unplug_all_fails: u64,
    state_count: u64,
    state_fails: u64,
}

impl Mem {
    /// A region with nothing plugged. `host` gives its slots to the guest.
    pub fn new(config: Config, host: Box<dyn Host>) -> Self {
        let plugged = vec![false; (config.size / config.block) as usize];
        Mem { config, host, requested: 0, usable: 0, plugged, counters: Counters::default(), queue: None }
    }

    /// Asks the guest for another size, in bytes. The driver has to be told: see
    /// [`Transport::reconfigure`](crate::mmio::Transport::reconfigure).
    ///
    /// # Errors
    /// [`InvalidSize`]; nothing has changed then.
    pub fn resize(&mut self, size: u64) -> Result<(), InvalidSize> {
        if !size.is_multiple_of(self.config.block) || size > self.config.size {
            return Err(InvalidSize(size));
        }
        self.requested = size;
        // It becomes smaller only when the driver starts anew: what it knows of has to stay valid.
        self.usable = self.usable.max(size.next_multiple_of(self.config.slot));
        Ok(())
    }

    /// What the guest is asked to have plugged, in bytes.
    pub fn requested(&self) -> u64 {
        self.requested
    }

    /// What the guest has plugged, in bytes.
    pub fn plugged(&self) -> u64 {
        self.plugged.iter().filter(|plugged| **plugged).count() as u64 * self.config.block
    }

    /// The slots that the guest's processors have.
    pub fn slots(&self) -> impl Iterator<Item = usize> {
        (0..(self.config.size / self.config.slot) as usize).filter(|slot| self.needs(*slot))
    }

    /// Whether a block of the slot is plugged.
    fn needs(&self, slot: usize) -> bool {
        let blocks = (self.config.slot / self.config.block) as usize;
        self.plugged[slot * blocks..][..blocks].contains(&true)
    }

    /// Blocks of a range that the driver may speak of.
    fn range(&self, request: &Request) -> Option<std::ops::Range<usize>> {
        let offset = request.address.checked_sub(self.config.address)?;
        let end = offset.checked_add(u64::from(request.blocks) * self.config.block)?;
        let valid = offset.is_multiple_of(self.config.block) && request.blocks > 0 && end <= self.usable;
        valid.then(|| (offset / self.config.block) as usize..(end / self.config.block) as usize)
    }

    /// Whether all, none or some of the blocks are plugged.
    fn state(&self, range: std::ops::Range<usize>) -> u16 {
        let blocks = &self.plugged[range];
        match (blocks.contains(&true), blocks.contains(&false)) {
            (true, false) => PLUGGED,
            (false, _) => UNPLUGGED,
            (true, true) => MIXED,
        }
    }

    /// Slots that a range of blocks touches.
    fn slots_of(&self, range: &std::ops::Range<usize>) -> std::ops::Range<usize> {
        let blocks = (self.config.slot / self.config.block) as usize;
        range.start / blocks..range.end.div_ceil(blocks)
    }

    fn plug(&mut self, request: &Request) -> u16 {
        let Some(range) = self.range(request) else { return response::ERROR };
        if self.state(range.clone()) != UNPLUGGED {
            return response::ERROR;
        }
        let length = range.len() as u64 * self.config.block;
        if self.plugged() + length > self.requested {
            return response::NACK;
        }
        let new: Vec<_> = self.slots_of(&range).filter(|slot| !self.needs(*slot)).collect();
        for (done, slot) in new.iter().enumerate() {
            if let Err(error) = self.host.give(*slot, true) {
                tracing::warn!(%error, "memory cannot be given to the guest");
                // What is taken back was not the guest's yet.
                new[..done].iter().for_each(|slot| self.take(*slot));
                return response::BUSY;
            }
        }
        self.plugged[range].fill(true);
        self.counters.plug_bytes += length;
        response::ACK
    }

    fn unplug(&mut self, request: &Request, memory: &Memory) -> u16 {
        match self.range(request) {
            Some(range) if self.state(range.clone()) == PLUGGED => {
                self.counters.unplug_bytes += range.len() as u64 * self.config.block;
                self.remove(range, memory);
                response::ACK
            }
            _ => response::ERROR,
        }
    }

    /// Takes blocks from the guest, whatever they are.
    fn remove(&mut self, range: std::ops::Range<usize>, memory: &Memory) {
        let had: Vec<_> = self.slots_of(&range).filter(|slot| self.needs(*slot)).collect();
        self.plugged[range.clone()].fill(false);
        // Before its pages go: nobody shall make new ones meanwhile.
        for slot in had {
            if !self.needs(slot) {
                self.take(slot);
            }
        }
        let (start, length) =
            (range.start as u64 * self.config.block, range.len() as u64 * self.config.block);
        match memory.get_slice(GuestAddress(self.config.address + start), length as usize) {
            Ok(slice) => {
                release(memory, &slice);
                // A snapshot of what changed has to know that they are empty.
                slice.bitmap().mark_dirty(0, slice.len());
            }
            Err(error) => tracing::error!(%error, "the region is not in the guest's memory"),
        }
    }

    fn take(&mut self, slot: usize) {
        if let Err(error) = self.host.give(slot, false) {
            tracing::warn!(%error, "memory cannot be taken from the guest");
        }
    }

    /// Does a request and returns how much was written.
    fn serve(&mut self, chain: Chain<'_>, memory: &Memory) -> u32 {
        let Chain { mut readable, mut writable } = chain;
        let Ok(request) = readable.read_obj::<Request>() else { return 0 };
        let counters = &mut self.counters;
        let mut state = UNPLUGGED;
        let code = match request.kind {
            request::PLUG => {
                counters.plug_count += 1;
                let code = self.plug(&request);
                self.counters.plug_fails += u64::from(code != response::ACK);
                code
            }
            request::UNPLUG => {
                counters.unplug_count += 1;
                let code = self.unplug(&request, memory);
                self.counters.unplug_fails += u64::from(code != response::ACK);
                code
            }
            request::UNPLUG_ALL => {
                counters.unplug_all_count += 1;
                self.remove(0..self.plugged.len(), memory);
                self.usable = self.requested.next_multiple_of(self.config.slot);
                response::ACK
            }
            request::STATE => {
                counters.state_count += 1;
                match self.range(&request) {
                    Some(range) => {
                        state = self.state(range);
                        response::ACK
                    }
                    None => {
                        self.counters.state_fails += 1;
                        response::ERROR
                    }
                }
            }
            _ => response::ERROR,
        };
        let answer: Vec<u8> = [code, 0, 0, 0, state].iter().flat_map(|word| word.to_le_bytes()).collect();
        if writable.write(&answer).is_ok() { answer.len() as u32 } else { 0 }
    }
}

impl Device for Mem {
    fn kind(&self) -> Kind {
        Kind::Mem
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    /// The layout is that of section 5.15.4; there are no NUMA nodes.
    fn config(&self) -> Vec<u8> {
        let Config { address, size, block, .. } = self.config;
        let words = [block, 0, address, size, self.usable, self.plugged(), self.requested];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn activate(&mut self, mut activation: Activation) -> Result<(), QueueError> {
        self.queue = Some(activation.take(0)?);
        Ok(())
    }

    /// What is plugged stays: the memory is in use, whatever becomes of the driver (section 5.15.5.2).
    fn reset(&mut self) {
        self.queue = None;
    }

    fn system_calls(&self) -> SystemCalls {
        SystemCalls { events: CALLS, registers: &[] }
    }

    fn positions(&self) -> Vec<Option<Position>> {
        vec![self.queue.as_ref().map(Queue::position)]
    }

    fn save(&self, writer: &mut Writer) {
        writer.u64(self.requested);
        writer.u64(self.usable);
        let bytes: Vec<u8> = self.plugged.iter().map(|plugged| u8::from(*plugged)).collect();
        writer.bytes(&bytes);
    }

    fn restore(&mut self, reader: &mut Reader<'_>) -> Result<(), StateError> {
        let (requested, usable, plugged) = (reader.u64()?, reader.u64()?, reader.bytes()?);
        let sizes = requested <= self.config.size && usable <= self.config.size;
        let aligned = requested.is_multiple_of(self.config.block) && usable.is_multiple_of(self.config.slot);
        if !sizes || !aligned || plugged.len() != self.plugged.len() || plugged.iter().any(|byte| *byte > 1) {
            return Err(StateError::Invalid("the memory device"));
        }
        (self.requested, self.usable) = (requested, usable);
        self.plugged = plugged.iter().map(|byte| *byte == 1).collect();
        for slot in self.slots().collect::<Vec<_>>() {
            self.host.give(slot, true).map_err(|_| StateError::Invalid("the memory device's slots"))?;
        }
        Ok(())
    }

    fn metrics(&self) -> Vec<Metric> {
        let counters = &self.counters;
        vec![
            ("queue_event_count", counters.queue_event_count),
            ("plug_count", counters.plug_count),
            ("plug_bytes", counters.plug_bytes),
            ("plug_fails", counters.plug_fails),
            ("unplug_count", counters.unplug_count),
            ("unplug_bytes", counters.unplug_bytes),
            ("unplug_fails", counters.unplug_fails),
            ("unplug_all_count", counters.unplug_all_count),
            ("unplug_all_fails", counters.unplug_all_fails),
            ("state_count", counters.state_count),
            ("state_fails", counters.state_fails),
        ]
    }

    fn handle(&mut self, _: Event) -> Result<bool, QueueError> {
        let Some(mut queue) = self.queue.take() else { return Ok(false) };
        self.counters.queue_event_count += 1;
        let memory = queue.memory().clone();
        let served = queue.serve(|chain| match chain {
            Ok(chain) => Some(self.serve(chain, &memory)),
            Err(error) => {
                tracing::debug!(%error, "a request to the memory device is malformed");
                Some(0)
            }
        });
        self.queue = Some(queue);
        served
    }
}

#[cfg(test)]
mod tests;
