//! The driver's side of a queue, for tests, and a bounded fuzz run that every device goes through.

use std::time::{Duration, Instant};

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::dirty::{Dirty, PAGE};
use crate::mmio::{Slot, Transport, register};
use crate::queue::{Queue, QueueConfig};
use crate::{Device, Interrupt, Memory};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;

/// Of the memory.
pub const SIZE: usize = 0x10_0000;

/// 1 MiB of guest memory at address 0, with marks of what is written.
pub fn memory() -> Memory {
    let mapping = MmapRegionBuilder::new_with_bitmap(SIZE, Dirty::new(SIZE, true))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build()
        .unwrap();
    Memory::from_regions(vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()]).unwrap()
}

/// As much in a file that others can map.
pub fn shared_memory() -> Memory {
    let file = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(file);
    file.set_len(SIZE as u64).unwrap();
    let mapping = MmapRegionBuilder::new_with_bitmap(SIZE, Dirty::default())
        .with_file_offset(FileOffset::new(file, 0))
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_SHARED)
        .build()
        .unwrap();
    Memory::from_regions(vec![GuestRegionMmap::new(mapping, GuestAddress(0)).unwrap()]).unwrap()
}

/// Everything that was ever written is marked: a snapshot of what changed would lack it otherwise.
pub fn assert_marked(memory: &Memory) {
    let mapping = memory.iter().next().unwrap().get_mmap();
    let mut page = [0; PAGE.get()];
    for address in (0..SIZE).step_by(PAGE.get()) {
        memory.read_slice(&mut page, GuestAddress(address as u64)).unwrap();
        let marked = mapping.bitmap().pages().unwrap().is_addr_set(address);
        assert!(marked || page.iter().all(|byte| *byte == 0), "{address:#x} was written and is not marked");
    }
}

/// One queue as a driver sees it. Queue n has its rings at n * 4 KiB; tests use memory from 0x2000 for buffers unless they
/// have more queues.
pub struct Driver {
    pub memory: Memory,
    interrupt: Interrupt,
    base: u64,
    size: u16,
    free: u16,
    available: u16,
    seen: u16,
}

impl Driver {
    pub fn new(memory: Memory, index: u64, size: u16) -> Self {
        let interrupt = Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap());
        Driver { memory, interrupt, base: index * 0x1000, size, free: 0, available: 0, seen: 0 }
    }

    pub fn interrupt(&self) -> Interrupt {
        self.interrupt.clone()
    }

    pub fn interrupts(&self) -> u64 {
        self.interrupt.line().read().unwrap_or(0)
    }

    pub fn config(&self, max: u16) -> QueueConfig {
        QueueConfig {
            max,
            size: u32::from(self.size),
            descriptors: self.base,
            available: self.base + 0x400,
            used: self.base + 0x800,
            ready: true,
        }
    }

    pub fn queue(&self) -> Queue {
        self.config(64).freeze(&self.memory, &self.interrupt, false).unwrap()
    }

    pub fn set_descriptor(&mut self, index: u16, descriptor: (u64, u32, u16, u16)) {
        self.write_descriptor(self.base + u64::from(index) * 16, descriptor);
    }

    pub fn write_descriptor(&mut self, at: u64, (address, length, flags, next): (u64, u32, u16, u16)) {
        self.memory.write_obj(address, GuestAddress(at)).unwrap();
        self.memory.write_obj(length, GuestAddress(at + 8)).unwrap();
        self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Makes the chain that starts at `head` available.
    pub fn offer(&mut self, head: u16) {
        let slot = self.base + 0x404 + u64::from(self.available % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available_index(self.available.wrapping_add(1));
    }

    pub fn set_available_index(&mut self, index: u16) {
        self.available = index;
        self.memory.write_obj(index, GuestAddress(self.base + 0x402)).unwrap();
    }

    /// Adds a chain of `(address, length, writable)` and returns its head. Descriptors are reused in turn.
    pub fn add(&mut self, buffers: &[(u64, u32, bool)]) -> u16 {
        let head = self.free;
        for (n, (address, length, writable)) in buffers.iter().enumerate() {
            let next = (self.free + 1) % self.size;
            let flags = if *writable { WRITE } else { 0 } | if n + 1 < buffers.len() { NEXT } else { 0 };
            self.set_descriptor(self.free, (*address, *length, flags, next));
            self.free = next;
        }
        self.offer(head);
        head
    }

    /// What the device gave back since the last call: heads and lengths.
    pub fn used(&mut self) -> Vec<(u32, u32)> {
        let index: u16 = self.memory.read_obj(GuestAddress(self.base + 0x802)).unwrap();
        let mut used = Vec::new();
        while self.seen != index {
            let slot = self.base + 0x804 + u64::from(self.seen % self.size) * 8;
            let head: u32 = self.memory.read_obj(GuestAddress(slot)).unwrap();
            let length: u32 = self.memory.read_obj(GuestAddress(slot + 4)).unwrap();
            used.push((head, length));
            self.seen = self.seen.wrapping_add(1);
        }
        used
    }

    pub fn put(&self, address: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}

/// A device behind its transport, brought up as a driver would, with every queue on a [`Driver`].
pub struct Rig<D> {
    pub transport: Transport<D>,
    pub drivers: Vec<Driver>,
}

impl<D: Device> Rig<D> {
    pub fn new(device: D) -> Self {
        Self::with_features(device, u64::MAX)
    }

    /// Accepts those of the offered features that are in `mask`.
    pub fn with_features(device: D, mask: u64) -> Self {
        let memory = memory();
        let mut drivers: Vec<Driver> =
            (0..device.queue_sizes().len() as u64).map(|n| Driver::new(memory.clone(), n, 16)).collect();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let mut transport = Transport::new(device, memory, line).unwrap();
        // Event indices would ask for interrupts at moments of their own.
        transport.bring_up(mask & !(1 << 29), &drivers.iter().map(|d| d.config(64)).collect::<Vec<_>>());
        for driver in &mut drivers {
            driver.interrupt = transport.interrupt().clone();
        }
        Rig { transport, drivers }
    }

    pub fn kick(&mut self, queue: usize) {
        self.transport.notify(queue);
    }
}

impl<D: Device> Transport<D> {
    /// What a well-behaved driver does (virtio 1.2, section 3.1).
    pub fn bring_up(&mut self, mask: u64, queues: &[QueueConfig]) {
        self.write_u32(register::STATUS, 0);
        self.write_u32(register::STATUS, 1);
        self.write_u32(register::STATUS, 3);
        for half in 0..2 {
            self.write_u32(register::DEVICE_FEATURES_SEL, half);
            let offered = self.read_u32(register::DEVICE_FEATURES);
            self.write_u32(register::DRIVER_FEATURES_SEL, half);
            self.write_u32(register::DRIVER_FEATURES, offered & (mask >> (32 * half)) as u32);
        }
        self.write_u32(register::STATUS, 11);
        assert_eq!(self.read_u32(register::STATUS), 11);
        for (index, queue) in queues.iter().enumerate() {
            self.write_u32(register::QUEUE_SEL, index as u32);
            self.write_u32(register::QUEUE_NUM, queue.size);
            for (low, address) in [
                (register::QUEUE_DESC_LOW, queue.descriptors),
                (register::QUEUE_DRIVER_LOW, queue.available),
                (register::QUEUE_DEVICE_LOW, queue.used),
            ] {
                self.write_u32(low, address as u32);
                self.write_u32(low + 4, (address >> 32) as u32);
            }
            self.write_u32(register::QUEUE_READY, u32::from(queue.ready));
        }
        self.write_u32(register::STATUS, 15);
    }

    /// Writes a register.
    pub fn write_u32(&mut self, offset: u64, value: u32) {
        self.write(offset, &value.to_le_bytes());
    }

    /// Reads a register.
    pub fn read_u32(&mut self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }
}

/// A small generator with a fixed seed (xorshift64*), so that a failing run can be repeated.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    fn one_of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.below(values.len() as u64) as usize]
    }
}

/// Runs a device against drivers that write nonsense, near-valid and valid requests, registers and resets in turn. The
/// device must neither panic nor take long, whatever happens. `payload` makes the contents of a request's first buffer;
/// it is given a place where it may put bytes that look like the device's own requests. There are so many rounds, unless somebody
/// wants more ([`kapsel_testkit::fuzz::longer`]).
pub fn fuzz<D: Device>(
    rounds: u64,
    mut make: impl FnMut() -> D,
    mut payload: impl FnMut(&mut Random) -> Vec<u8>,
) {
    let (started, longer) = (Instant::now(), kapsel_testkit::fuzz::longer());
    let first = longer.map_or(0, |_| kapsel_testkit::fuzz::seed());
    let mut round = 0;
    while longer.map_or(round < rounds, |longer| started.elapsed() < longer) {
        let (seed, begun) = (first.wrapping_add(round), Instant::now());
        let one = std::panic::AssertUnwindSafe(|| one_round(seed, &mut make, &mut payload));
        assert!(std::panic::catch_unwind(one).is_ok(), "round {round} failed, with seed {seed:#x}");
        assert!(begun.elapsed() < ROUND, "the device is slow on hostile input, with seed {seed:#x}");
        round += 1;
    }
    println!("{}: {round} rounds of {STEPS}, first seed {first:#x}", std::any::type_name::<D>());
}

/// The longest that a round may take.
const ROUND: Duration = Duration::from_secs(20);
/// What a driver does in a round.
const STEPS: usize = 24;

fn one_round<D: Device>(
    seed: u64,
    make: &mut impl FnMut() -> D,
    payload: &mut impl FnMut(&mut Random) -> Vec<u8>,
) {
    let mut random = Random::new(seed.wrapping_add(1));
    let mut rig = Rig::with_features(make(), random.one_of(&[u64::MAX, random_features(seed)]));
    for _ in 0..STEPS {
        one_step(&mut rig, &mut random, payload);
    }
    assert_marked(&rig.drivers[0].memory);
}

fn random_features(seed: u64) -> u64 {
    // VERSION_1 has to stay.
    Random::new(seed ^ 0xfeed).next() | 1 << 32
}

fn one_step<D: Device>(
    rig: &mut Rig<D>,
    random: &mut Random,
    payload: &mut impl FnMut(&mut Random) -> Vec<u8>,
) {
    let queue = random.below(rig.drivers.len() as u64) as usize;
    let driver = &mut rig.drivers[queue];
    match random.below(16) {
        0 => driver.set_available_index(random.next() as u16),
        1 => {
            let offset = random
                .one_of(&[0x20, 0x24, 0x30, 0x38, 0x44, 0x50, 0x64, 0x70, 0x80, 0x94, 0xa0, 0x100, 0x108]);
            rig.transport.write_u32(offset, random.one_of(&[0, 1, 2, 3, 11, 15, 128, u32::MAX]));
        }
        2 => {
            let length = random.one_of(&[1, 2, 3, 4, 8]);
            let mut bytes = vec![0xff; length];
            rig.transport.read(random.below(0x1100), &mut bytes);
            rig.transport.write(0x100 + random.below(0x1000), &bytes);
        }
        3 => {
            let configs: Vec<_> = rig.drivers.iter().map(|d| d.config(64)).collect();
            rig.transport.write_u32(register::STATUS, 0);
            rig.transport.bring_up(!(1 << 29), &configs);
            for driver in &mut rig.drivers {
                driver.put(driver.base, &[0; 0x1000]);
                (driver.available, driver.seen, driver.free) = (0, 0, 0);
            }
        }
        _ => {
            let head = hostile_chain(driver, random, payload);
            driver.offer(head);
            rig.kick(queue);
        }
    }
    for queue in 0..rig.drivers.len() {
        rig.kick(queue);
    }
    for source in 0..rig.transport.device().sources().len() {
        rig.transport.source(source);
    }
}

fn hostile_chain(
    driver: &mut Driver,
    random: &mut Random,
    payload: &mut impl FnMut(&mut Random) -> Vec<u8>,
) -> u16 {
    const BUFFERS: u64 = 0x2_0000;
    let bytes = payload(random);
    driver.put(BUFFERS, &bytes);
    let head = random.below(u64::from(driver.size)) as u16;
    let count = random.below(5) as u16 + 1;
    let mut writable = false;
    for n in 0..count {
        let index = (head + n) % driver.size;
        writable |= n > 0 && random.below(3) > 0;
        let mut address = BUFFERS + if n == 0 { 0 } else { 0x1000 * random.below(64) };
        let mut length =
            if n == 0 { bytes.len() as u32 } else { random.one_of(&[0, 1, 16, 511, 512, 513, 4096, 65536]) };
        let mut flags = if writable { WRITE } else { 0 } | if n + 1 < count { NEXT } else { 0 };
        let mut next = (index + 1) % driver.size;
        match random.below(24) {
            0 => address = random.one_of(&[0xf_fff0, 0x10_0000, u64::MAX - 8, u64::MAX]),
            1 => length = random.one_of(&[0, 3, u32::MAX, 0x8000_0000]),
            2 => flags = random.next() as u16 & 7,
            3 => next = random.next() as u16,
            4 => next = head,
            _ => {}
        }
        driver.set_descriptor(index, (address, length, flags, next));
    }
    head
}
