//! The buffers of one request.

use std::collections::VecDeque;

use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::bitmap::Bitmap;
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemory, GuestMemoryBackend, Permissions};

use crate::{Memory, Slice};

/// No chain has more buffers than this, whatever the guest's indirect tables say.
pub const MAX_BUFFERS: usize = 1024;

/// What is wrong with a chain of descriptors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ChainError {
    /// A descriptor's index is not in its table.
    #[error("a descriptor's index is outside of its table")]
    Index,
    /// More descriptors than the table has, or than [`MAX_BUFFERS`]: a loop.
    #[error("the chain has more descriptors than its table")]
    Loop,
    /// An indirect table in an indirect table, or of an impossible length.
    #[error("an indirect table is not allowed here or has an impossible length")]
    Indirect,
    /// A buffer or a table is not in the guest's memory.
    #[error("a buffer or a table is not in the guest's memory")]
    Address,
    /// A buffer for the device to read comes after one for it to write.
    #[error("a readable buffer follows a writable one")]
    Order,
    /// Together the buffers are longer than 4 GiB.
    #[error("the buffers are longer than 4 GiB together")]
    Length,
}

/// A descriptor as it is in guest memory (virtio 1.2, section 2.7.5).
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

// SAFETY: integers only, without padding, so every pattern of bytes is a descriptor.
unsafe impl ByteValued for Descriptor {}

impl Descriptor {
    fn is(&self, flag: u32) -> bool {
        u32::from(self.flags) & flag != 0
    }
}

/// A table of descriptors that is in one region of memory, so that it is looked for once and not with each of them.
struct Table<'m>(Slice<'m>);

impl<'m> Table<'m> {
    fn find(memory: &'m Memory, address: u64, size: u32) -> Option<Self> {
        memory.get_slice(GuestAddress(address), size as usize * size_of::<Descriptor>()).ok().map(Table)
    }

    fn read(&self, index: u32) -> Result<Descriptor, ChainError> {
        let offset = index as usize * size_of::<Descriptor>();
        self.0.read_obj(offset).map_err(|_| ChainError::Address)
    }
}

/// The buffers of one request, checked to be in the guest's memory.
#[derive(Debug)]
pub struct Chain<'m> {
    /// What the driver wrote for the device.
    pub readable: Buffers<'m>,
    /// Where the device answers.
    pub writable: Buffers<'m>,
}

impl<'m> Chain<'m> {
    pub(crate) fn read(memory: &'m Memory, table: u64, size: u16, head: u16) -> Result<Self, ChainError> {
        let mut chain = Chain { readable: Buffers::default(), writable: Buffers::default() };
        let (mut table, mut size, mut index, mut indirect) = (table, u32::from(size), u32::from(head), false);
        let mut left = size;
        let mut whole = Table::find(memory, table, size);
        loop {
            if index >= size {
                return Err(ChainError::Index);
            }
            if left == 0 {
                return Err(ChainError::Loop);
            }
            left -= 1;
            let address = table.checked_add(u64::from(index) * 16).ok_or(ChainError::Address)?;
            let descriptor: Descriptor = match &whole {
                Some(table) => table.read(index)?,
                None => memory.read_obj(GuestAddress(address)).map_err(|_| ChainError::Address)?,
            };
            if descriptor.is(VRING_DESC_F_INDIRECT) {
                if indirect || descriptor.is(VRING_DESC_F_NEXT) || !descriptor.length.is_multiple_of(16) {
                    return Err(ChainError::Indirect);
                }
                (table, size, index, indirect) = (descriptor.address, descriptor.length / 16, 0, true);
                if size == 0 || size > u32::from(u16::MAX) {
                    return Err(ChainError::Indirect);
                }
                left = size;
                whole = Table::find(memory, table, size);
                continue;
            }
            chain.add(memory, &descriptor)?;
            if !descriptor.is(VRING_DESC_F_NEXT) {
                return Ok(chain);
            }
            index = u32::from(descriptor.next);
        }
    }

    fn add(&mut self, memory: &'m Memory, descriptor: &Descriptor) -> Result<(), ChainError> {
        let writable = descriptor.is(VRING_DESC_F_WRITE);
        if !writable && !self.writable.slices.is_empty() {
            return Err(ChainError::Order);
        }
        let access = if writable { Permissions::Write } else { Permissions::Read };
        let buffers = if writable { &mut self.writable } else { &mut self.readable };
        // More than one slice only where the buffer crosses from one region of memory to the next.
        let length = descriptor.length as usize;
        let one = memory.get_slice(GuestAddress(descriptor.address), length).ok().filter(|_| length > 0);
        if let Some(slice) = one {
            buffers.slices.push_back(slice);
            return self.added(descriptor, writable);
        }
        let slices = GuestMemory::get_slices(memory, GuestAddress(descriptor.address), length, access);
        for slice in slices.map_err(|_| ChainError::Address)? {
            buffers.slices.push_back(slice.map_err(|_| ChainError::Address)?);
        }
        self.added(descriptor, writable)
    }

    fn added(&mut self, descriptor: &Descriptor, writable: bool) -> Result<(), ChainError> {
        let buffers = if writable { &mut self.writable } else { &mut self.readable };
        buffers.length += u64::from(descriptor.length);
        if self.readable.slices.len() + self.writable.slices.len() > MAX_BUFFERS {
            return Err(ChainError::Loop);
        }
        if self.readable.length + self.writable.length > u64::from(u32::MAX) {
            return Err(ChainError::Length);
        }
        Ok(())
    }
}

/// The request's buffers are shorter than they must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the request's buffers are too short")]
pub struct TooShort;

/// A sequence of buffers, consumed from its front.
#[derive(Debug, Default)]
pub struct Buffers<'m> {
    slices: VecDeque<Slice<'m>>,
    length: u64,
}

impl<'m> Buffers<'m> {
    /// How many bytes are left.
    pub fn len(&self) -> u64 {
        self.length
    }

    /// Whether none are left.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Reads exactly `into.len()` bytes.
    ///
    /// # Errors
    /// [`TooShort`]; nothing is consumed then.
    pub fn read(&mut self, into: &mut [u8]) -> Result<(), TooShort> {
        let mut done = 0;
        self.consume(into.len() as u64, |slice| {
            done += slice.copy_to(&mut into[done..]);
        })
    }

    /// Copies bytes from the front without consuming them, as many as there are and as fit, and says how many.
    pub fn peek(&self, into: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            done += slice.copy_to(&mut into[done..]);
        }
        done
    }

    /// Reads a plain value.
    ///
    /// # Errors
    /// [`TooShort`]; nothing is consumed then.
    pub fn read_obj<T: ByteValued + Default>(&mut self) -> Result<T, TooShort> {
        let mut value = T::default();
        self.read(value.as_mut_slice())?;
        Ok(value)
    }

    /// Writes all of `from`.
    ///
    /// # Errors
    /// [`TooShort`]; nothing is written then.
    pub fn write(&mut self, from: &[u8]) -> Result<(), TooShort> {
        let mut done = 0;
        self.consume(from.len() as u64, |slice| {
            slice.copy_from(&from[done..]);
            done += slice.len();
        })
    }

    /// Splits off everything after the first `at` bytes.
    ///
    /// # Errors
    /// [`TooShort`] when there are not so many; nothing changes then.
    pub fn split_off(&mut self, at: u64) -> Result<Buffers<'m>, TooShort> {
        if at > self.length {
            return Err(TooShort);
        }
        let mut front = Buffers::default();
        self.consume(at, |slice| {
            front.length += slice.len() as u64;
            front.slices.push_back(slice);
        })?;
        std::mem::swap(self, &mut front);
        Ok(front)
    }

    /// For system calls on the buffers' memory. Valid as long as the guest's memory is, which `'m` says.
    pub fn iovecs(&self) -> Vec<libc::iovec> {
        let vector = |slice: &Slice<'m>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        self.slices.iter().map(vector).collect()
    }

    /// Says that a system call has written, or may write, the first `count` bytes.
    pub fn mark_written(&self, count: u64) {
        let mut left = usize::try_from(count).unwrap_or(usize::MAX);
        for slice in &self.slices {
            let marked = left.min(slice.len());
            slice.bitmap().mark_dirty(0, marked);
            left -= marked;
            if left == 0 {
                break;
            }
        }
    }

    /// The buffers themselves.
    pub fn slices(&self) -> impl Iterator<Item = &Slice<'m>> {
        self.slices.iter()
    }

    fn consume(&mut self, count: u64, mut take: impl FnMut(Slice<'m>)) -> Result<(), TooShort> {
        if count > self.length {
            return Err(TooShort);
        }
        let mut left = count as usize;
        self.length -= count;
        while left > 0 {
            let Some(slice) = self.slices.pop_front() else { break };
            if slice.len() <= left {
                left -= slice.len();
                take(slice);
                continue;
            }
            let (Ok(front), Ok(back)) = (slice.subslice(0, left), slice.offset(left)) else { break };
            take(front);
            self.slices.push_front(back);
            left = 0;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{Driver, NEXT, WRITE, memory};

    const INDIRECT: u16 = 4;

    /// `(address, length, flags, next)`.
    type Raw = (u64, u32, u16, u16);

    /// What the device makes of raw descriptors, the first one being the head.
    fn chain_of(descriptors: &[Raw]) -> Result<(u64, u64), ChainError> {
        let mut driver = Driver::new(memory(), 0, 16);
        let mut queue = driver.queue();
        for (index, descriptor) in descriptors.iter().enumerate() {
            driver.set_descriptor(index as u16, *descriptor);
        }
        driver.offer(0);
        let request = queue.pop().unwrap().unwrap();
        queue.chain(request).map(|chain| (chain.readable.len(), chain.writable.len()))
    }

    #[test]
    fn hostile_chains_are_refused_for_the_right_reason() {
        let end = 0x10_0000;
        let cases: &[(&[Raw], ChainError)] = &[
            (&[(0x2000, 8, NEXT, 0)], ChainError::Loop),
            (&[(0x2000, 8, NEXT, 1), (0x2000, 8, NEXT, 0)], ChainError::Loop),
            (&[(0x2000, 8, NEXT, 16)], ChainError::Index),
            (&[(0x2000, 8, NEXT, u16::MAX)], ChainError::Index),
            (&[(end - 4, 8, 0, 0)], ChainError::Address),
            (&[(end, 1, WRITE, 0)], ChainError::Address),
            (&[(u64::MAX - 3, 8, 0, 0)], ChainError::Address),
            (&[(0x2000, u32::MAX, 0, 0)], ChainError::Address),
            (&[(0x2000, 8, WRITE | NEXT, 1), (0x2000, 8, 0, 0)], ChainError::Order),
            (&[(0x2000, 24, INDIRECT, 0)], ChainError::Indirect),
            (&[(0x2000, 0, INDIRECT, 0)], ChainError::Indirect),
            (&[(0x2000, 16 * 65536, INDIRECT, 0)], ChainError::Indirect),
            (&[(0x2000, 16, INDIRECT | NEXT, 1)], ChainError::Indirect),
            (&[(end, 16, INDIRECT, 0)], ChainError::Address),
            (&[(u64::MAX - 15, 32, INDIRECT, 0)], ChainError::Address),
        ];
        for (descriptors, error) in cases {
            assert_eq!(chain_of(descriptors), Err(*error), "{descriptors:x?}");
        }
    }

    #[test]
    fn an_indirect_table_may_not_hold_another_and_may_not_loop() {
        let mut driver = Driver::new(memory(), 0, 16);
        let mut queue = driver.queue();
        driver.set_descriptor(0, (0x8000, 32, INDIRECT, 0));
        for (entry, error) in [
            ((0x8000, 32, INDIRECT, 0), Err(ChainError::Indirect)),
            ((0x2000, 8, NEXT, 0), Err(ChainError::Loop)),
            ((0x2000, 8, NEXT, 2), Err(ChainError::Index)),
            ((0x2000, 8, WRITE, 0), Ok(8)),
        ] {
            driver.write_descriptor(0x8000, entry);
            driver.offer(0);
            let request = queue.pop().unwrap().unwrap();
            assert_eq!(queue.chain(request).map(|chain| chain.writable.len()), error);
        }
    }

    #[test]
    fn a_huge_indirect_table_is_bounded() {
        let mut driver = Driver::new(memory(), 0, 16);
        let mut queue = driver.queue();
        driver.set_descriptor(0, (0x1_0000, 16 * 4096, INDIRECT, 0));
        for index in 0..4096u16 {
            driver.write_descriptor(0x1_0000 + u64::from(index) * 16, (0x2000, 1, NEXT, index + 1));
        }
        driver.offer(0);
        let request = queue.pop().unwrap().unwrap();
        assert_eq!(queue.chain(request).map(drop), Err(ChainError::Loop));
    }

    #[test]
    fn buffers_are_consumed_across_their_borders() {
        let mut driver = Driver::new(memory(), 0, 16);
        let mut queue = driver.queue();
        driver.memory.write_slice(b"abc", GuestAddress(0x2000)).unwrap();
        driver.memory.write_slice(b"defgh", GuestAddress(0x3000)).unwrap();
        driver.add(&[(0x2000, 3, false), (0x3000, 5, false), (0x4000, 2, true), (0x5000, 4, true)]);
        let request = queue.pop().unwrap().unwrap();
        let mut chain = queue.chain(request).unwrap();

        let mut four = [0; 4];
        chain.readable.read(&mut four).unwrap();
        assert_eq!(&four, b"abcd");
        assert_eq!(chain.readable.read(&mut [0; 5]), Err(TooShort));
        assert_eq!(chain.readable.read_obj::<u32>().unwrap().to_le_bytes(), *b"efgh");
        assert!(chain.readable.is_empty());

        let mut tail = chain.writable.split_off(5).unwrap();
        assert_eq!((chain.writable.len(), tail.len()), (5, 1));
        assert!(chain.writable.write(b"123456").is_err());
        chain.writable.write(b"12345").unwrap();
        tail.write(b"!").unwrap();
        let mut answer = [0; 6];
        driver.memory.read_slice(&mut answer[..2], GuestAddress(0x4000)).unwrap();
        driver.memory.read_slice(&mut answer[2..], GuestAddress(0x5000)).unwrap();
        assert_eq!(&answer, b"12345!");
    }
}
