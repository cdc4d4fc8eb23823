//! Split virtqueues (virtio 1.2, section 2.7): the description that a driver writes, and the frozen queue that a device uses.

use vm_memory::{GuestAddress, GuestMemoryBackend};

use virtio_queue::{Queue as Ring, QueueOwnedT, QueueT};

use crate::chain::{Chain, ChainError};
use crate::{Interrupt, Memory};

/// Why a queue cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    /// The size is zero, not a power of two or above the maximum.
    #[error("a queue of size {size} is not possible; the maximum is {max} and sizes are powers of two")]
    Size {
        /// What the driver wrote.
        size: u32,
        /// What the device allows.
        max: u16,
    },
    /// A part of the queue is misaligned or not in the guest's memory.
    #[error("the queue's {part} at {address:#x} is misaligned or not in the guest's memory")]
    Placement {
        /// Which part.
        part: &'static str,
        /// Where the driver put it.
        address: u64,
    },
    /// The device cannot work without this queue.
    #[error("queue {0} is needed and was not set up")]
    Missing(usize),
    /// The driver moved its index further than the queue is long, or the ring left the guest's memory.
    #[error("the queue is broken: {0}")]
    Broken(#[from] virtio_queue::Error),
    /// The process that serves it cannot, or does not any more.
    #[error("its back end failed: {0}")]
    Backend(String),
}

/// A queue while the driver describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueConfig {
    /// The largest size that the device allows.
    pub max: u16,
    /// Number of descriptors, as written by the driver.
    pub size: u32,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Whether the driver means to use the queue.
    pub ready: bool,
}

impl QueueConfig {
    /// An empty description.
    pub fn new(max: u16) -> Self {
        QueueConfig { max, size: 0, descriptors: 0, available: 0, used: 0, ready: false }
    }

    /// Checks the description and makes it a queue that can no longer change.
    ///
    /// # Errors
    /// [`QueueError::Size`] or [`QueueError::Placement`].
    pub fn freeze(
        &self,
        memory: &Memory,
        interrupt: &Interrupt,
        event_idx: bool,
    ) -> Result<Queue, QueueError> {
        let wrong_size = QueueError::Size { size: self.size, max: self.max };
        let size = match u16::try_from(self.size) {
            Ok(size) if size.is_power_of_two() && size <= self.max => size,
            _ => return Err(wrong_size),
        };
        // Lengths of section 2.7 without the optional event fields; those are covered below when they are used.
        let event = if event_idx { 2 } else { 0 };
        let entries = usize::from(size);
        check(memory, "descriptor table", self.descriptors, 16 * entries, 16)?;
        check(memory, "available ring", self.available, 4 + 2 * entries + event, 2)?;
        check(memory, "used ring", self.used, 4 + 8 * entries + event, 4)?;

        let mut ring = Ring::new(self.max)?;
        ring.try_set_size(size)?;
        ring.try_set_desc_table_address(GuestAddress(self.descriptors))?;
        ring.try_set_avail_ring_address(GuestAddress(self.available))?;
        ring.try_set_used_ring_address(GuestAddress(self.used))?;
        ring.set_event_idx(event_idx);
        ring.set_ready(true);
        Ok(Queue { ring, memory: memory.clone(), interrupt: interrupt.clone(), added: false })
    }
}

fn check(
    memory: &Memory,
    part: &'static str,
    address: u64,
    length: usize,
    alignment: u64,
) -> Result<(), QueueError> {
    if address.is_multiple_of(alignment) && memory.check_range(GuestAddress(address), length) {
        Ok(())
    } else {
        Err(QueueError::Placement { part, address })
    }
}

/// Where a queue stands, for a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Position {
    /// The next entry of the available ring that the device will read.
    pub next_available: u16,
    /// The next entry of the used ring that the device will write.
    pub next_used: u16,
}

/// A queue in use by a device. Its configuration was checked and cannot change.
#[derive(Debug)]
pub struct Queue {
    ring: Ring,
    memory: Memory,
    interrupt: Interrupt,
    added: bool,
}

impl Queue {
    /// The guest's memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// Where its parts are in the guest's memory: the descriptor table, the available ring and the used ring.
    pub(crate) fn addresses(&self) -> [u64; 3] {
        [self.ring.desc_table(), self.ring.avail_ring(), self.ring.used_ring()]
    }

    /// Takes the next request that the driver made available, without looking at its buffers.
    ///
    /// # Errors
    /// [`QueueError::Broken`] when the driver's index is out of bounds.
    pub fn pop(&mut self) -> Result<Option<Request>, QueueError> {
        let mut available = self.ring.iter(&self.memory)?;
        Ok(available.next().map(|descriptors| Request { head: descriptors.head_index() }))
    }

    /// The buffers of a request.
    ///
    /// # Errors
    /// [`ChainError`] says what the driver did wrong. The request still has to be completed.
    pub fn chain(&self, request: Request) -> Result<Chain<'_>, ChainError> {
        self.chain_in(&self.memory, request)
    }

    /// As [`Queue::chain`], in a copy of the queue's own [`Queue::memory`], so that the buffers can be kept while the queue
    /// goes on.
    ///
    /// # Errors
    /// As [`Queue::chain`].
    pub fn chain_in<'m>(&self, memory: &'m Memory, request: Request) -> Result<Chain<'m>, ChainError> {
        Chain::read(memory, self.ring.desc_table(), self.ring.size(), request.head)
    }

    /// Puts the last popped request back, to be popped again.
    pub fn undo_pop(&mut self) {
        self.ring.set_next_avail(self.ring.next_avail().wrapping_sub(1));
    }

    /// Gives a request's buffers back to the driver with `written` bytes in the writable ones.
    ///
    /// # Errors
    /// [`QueueError::Broken`] when the head is not one of the queue's.
    pub fn complete(&mut self, request: Request, written: u32) -> Result<(), QueueError> {
        self.ring.add_used(&self.memory, request.head, written)?;
        self.added = true;
        Ok(())
    }

    /// Interrupts the driver if something was completed since the last call and the driver wants to know.
    ///
    /// # Errors
    /// [`QueueError::Broken`] when the ring cannot be read.
    pub fn notify(&mut self) -> Result<(), QueueError> {
        if std::mem::take(&mut self.added) && self.ring.needs_notification(&self.memory)? {
            self.interrupt.used_buffer();
        }
        Ok(())
    }

    /// Asks the driver for a notification at the next request. True when one is there already: look again.
    ///
    /// # Errors
    /// [`QueueError::Broken`] when the ring cannot be accessed.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        Ok(self.ring.enable_notification(&self.memory)?)
    }

    /// Calls `serve` for every request there is, until it answers `None`, which leaves that request for later. `Some` is
    /// the number of bytes written. Completes the requests and interrupts the driver once.
    ///
    /// At most one full queue is served in a call: a driver that adds requests as fast as they are served does not keep
    /// the event loop from its other devices. True when there is more to do.
    ///
    /// # Errors
    /// [`QueueError::Broken`].
    pub fn serve(
        &mut self,
        mut serve: impl FnMut(Result<Chain<'_>, ChainError>) -> Option<u32>,
    ) -> Result<bool, QueueError> {
        let mut budget = self.size();
        let more = loop {
            if budget == 0 {
                break true;
            }
            let Some(request) = self.pop()? else {
                if self.enable_notification()? {
                    continue;
                }
                break false;
            };
            match serve(self.chain(request)) {
                Some(written) => self.complete(request, written)?,
                None => {
                    self.undo_pop();
                    break false;
                }
            }
            budget -= 1;
        };
        self.notify()?;
        Ok(more)
    }

    /// Where the queue stands.
    pub fn position(&self) -> Position {
        Position { next_available: self.ring.next_avail(), next_used: self.ring.next_used() }
    }

    /// Continues where an earlier queue stood.
    pub fn set_position(&mut self, position: Position) {
        self.ring.set_next_avail(position.next_available);
        self.ring.set_next_used(position.next_used);
    }
}

/// A request that was popped and not yet completed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    head: u16,
}

impl Request {
    /// What identifies it in its queue.
    pub(crate) fn head(self) -> u16 {
        self.head
    }

    /// A request of which nothing is known but its head. A head that its queue does not have is found when it is used.
    pub(crate) fn of(head: u16) -> Self {
        Request { head }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Driver, memory};

    #[test]
    fn a_description_that_is_wrong_anywhere_is_refused() {
        let driver = Driver::new(memory(), 0, 16);
        let good = driver.config(64);
        let freeze = |config: QueueConfig| config.freeze(&driver.memory, &driver.interrupt(), true);
        assert!(freeze(good).is_ok());
        for size in [0, 3, 128, 0x1_0010, u32::MAX] {
            assert!(matches!(freeze(QueueConfig { size, ..good }), Err(QueueError::Size { .. })), "{size}");
        }
        let end = driver.memory.last_addr().0 + 1;
        for address in [1, end - 16, end, u64::MAX - 15, u64::MAX] {
            for config in [
                QueueConfig { descriptors: address, ..good },
                QueueConfig { available: address, ..good },
                QueueConfig { used: address, ..good },
            ] {
                assert!(matches!(freeze(config), Err(QueueError::Placement { .. })), "{config:x?}");
            }
        }
    }

    #[test]
    fn an_index_beyond_the_queue_breaks_it() {
        let mut driver = Driver::new(memory(), 0, 16);
        let mut queue = driver.queue();
        driver.set_available_index(17);
        assert!(matches!(queue.pop(), Err(QueueError::Broken(_))));
    }

    #[test]
    fn a_request_is_served_once_and_in_order_and_notified_once() {
        let mut driver = Driver::new(memory(), 0, 16);
        let mut queue = driver.queue();
        let first = driver.add(&[(0x2000, 8, false)]);
        let second = driver.add(&[(0x3000, 8, false), (0x4000, 4, true)]);
        let mut seen = Vec::new();
        let more = queue
            .serve(|chain| {
                let chain = chain.unwrap();
                seen.push((chain.readable.len(), chain.writable.len()));
                Some(chain.writable.len() as u32)
            })
            .unwrap();
        assert!(!more);
        assert_eq!(seen, [(8, 0), (8, 4)]);
        assert_eq!(driver.used(), [(u32::from(first), 0), (u32::from(second), 4)]);
        assert_eq!(driver.interrupts(), 1);
    }

    #[test]
    fn a_request_that_is_left_comes_again() {
        let mut driver = Driver::new(memory(), 0, 16);
        let mut queue = driver.queue();
        driver.add(&[(0x2000, 8, false)]);
        queue.serve(|_| None).unwrap();
        assert_eq!(driver.used(), []);
        queue.serve(|_| Some(0)).unwrap();
        assert_eq!(driver.used().len(), 1);
    }

    #[test]
    fn serving_is_bounded() {
        let mut driver = Driver::new(memory(), 0, 16);
        let mut queue = driver.queue();
        for _ in 0..16 {
            driver.add(&[(0x2000, 8, false)]);
        }
        let mut served = 0;
        let more = queue.serve(|_| {
            served += 1;
            // The driver adds another request whenever one is served.
            driver.add(&[(0x2000, 8, false)]);
            Some(0)
        });
        assert!(more.unwrap());
        assert_eq!(served, 16);
    }

    #[test]
    fn a_position_is_taken_up_again() {
        let mut driver = Driver::new(memory(), 0, 16);
        let mut queue = driver.queue();
        driver.add(&[(0x2000, 8, false)]);
        queue.serve(|_| Some(0)).unwrap();
        let position = queue.position();
        let mut other = driver.queue();
        other.set_position(position);
        assert!(other.pop().unwrap().is_none());
        driver.add(&[(0x2000, 8, false)]);
        assert!(other.pop().unwrap().is_some());
    }
}
