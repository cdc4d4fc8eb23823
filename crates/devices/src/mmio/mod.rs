//! The virtio-mmio transport (virtio 1.2, section 4.2), without the legacy interface.

mod state;

use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::calls::SystemCalls;
use crate::interrupt::USED_BUFFER;
use crate::queue::{QueueConfig, QueueError};
use crate::state::{Reader, StateError, Writer};
use crate::{Activation, Device, Event, Interrupt, Kind, Memory, Metric};

/// Size of a device's window in guest physical memory, in bytes.
pub const WINDOW: u64 = 0x1000;

/// Feature bits that belong to the transport and the queues.
pub mod feature {
    /// Indirect descriptors.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// Event indices instead of flags.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// Not the legacy interface; devices here have no other.
    pub const VERSION_1: u64 = 1 << 32;
    /// Those that are a matter of how queues are served.
    pub const OF_QUEUES: u64 = INDIRECT_DESC | EVENT_IDX;
    /// All of them.
    pub const OF_TRANSPORT: u64 = OF_QUEUES | VERSION_1;
}

/// Offsets of registers (section 4.2.2).
pub mod register {
    /// "virt".
    pub const MAGIC: u64 = 0x000;
    /// Version of the transport.
    pub const VERSION: u64 = 0x004;
    /// The device's type.
    pub const DEVICE_ID: u64 = 0x008;
    /// The device's maker.
    pub const VENDOR_ID: u64 = 0x00c;
    /// The selected word of the offered features.
    pub const DEVICE_FEATURES: u64 = 0x010;
    /// Selects it.
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    /// The selected word of the accepted features.
    pub const DRIVER_FEATURES: u64 = 0x020;
    /// Selects it.
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    /// Selects the queue that the following registers are about.
    pub const QUEUE_SEL: u64 = 0x030;
    /// Its largest size.
    pub const QUEUE_NUM_MAX: u64 = 0x034;
    /// Its size.
    pub const QUEUE_NUM: u64 = 0x038;
    /// Whether it may be used.
    pub const QUEUE_READY: u64 = 0x044;
    /// The number written is of a queue with new buffers.
    pub const QUEUE_NOTIFY: u64 = 0x050;
    /// Reasons of the interrupt.
    pub const INTERRUPT_STATUS: u64 = 0x060;
    /// Clears them.
    pub const INTERRUPT_ACK: u64 = 0x064;
    /// How far the driver has come.
    pub const STATUS: u64 = 0x070;
    /// Address of the descriptor table; the high half follows.
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    /// Address of the available ring; the high half follows.
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    /// Address of the used ring; the high half follows.
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    /// Length of the selected shared memory region; all ones when there is none.
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    /// Its high half.
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    /// Changes with the configuration.
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    /// The device's configuration space begins here.
    pub const CONFIG: u64 = 0x100;
}

/// Bits of the status register (section 2.1).
mod status {
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"kaps");

/// The guest reads at `offset` of a place that is announced and has no device: a placeholder, which drivers leave alone
/// (section 4.2.2).
pub fn read_empty(offset: u64, data: &mut [u8]) {
    let value: u32 = match offset {
        register::MAGIC => MAGIC,
        register::VERSION => VERSION,
        _ => 0,
    };
    match <&mut [u8; 4]>::try_from(&mut *data) {
        Ok(word) => *word = value.to_le_bytes(),
        Err(_) => data.fill(0),
    }
}

/// A device's place on the bus, whatever the device is.
pub trait Slot: Send {
    /// The guest reads at `offset` of the device's window.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// The guest writes at `offset` of the device's window.
    fn write(&mut self, offset: u64, data: &[u8]);
    /// The events by which the driver announces buffers, one per queue, to be bound to [`register::QUEUE_NOTIFY`].
    fn queue_events(&self) -> &[EventFd];
    /// The interrupt line.
    fn interrupt(&self) -> &Interrupt;
    /// Works on a queue whose event was signalled.
    fn notify(&mut self, queue: usize);
    /// Works on a ready descriptor of [`Device::sources`].
    fn source(&mut self, index: usize);
    /// The descriptors of [`Device::sources`].
    fn sources(&self) -> Vec<std::os::fd::BorrowedFd<'_>>;
    /// The calls of [`Device::system_calls`].
    fn system_calls(&self) -> SystemCalls;
    /// Adds registers, queues and the device's own state. The guest may not run meanwhile.
    fn save(&self, writer: &mut Writer);
    /// Takes up what was saved; the device has to be as it was made.
    ///
    /// # Errors
    /// [`StateError`]; the device is of no use any more then.
    fn restore(&mut self, reader: &mut Reader<'_>) -> Result<(), StateError>;
    /// The device's type.
    fn kind(&self) -> Kind;
    /// The counters of [`Device::metrics`].
    fn metrics(&self) -> Vec<Metric>;
    /// [`Device::served_elsewhere`].
    fn served_elsewhere(&self) -> bool;
}

/// The registers in front of a device.
#[derive(Debug)]
pub struct Transport<D> {
    device: D,
    memory: Memory,
    interrupt: Interrupt,
    events: Arc<[EventFd]>,
    queues: Vec<QueueConfig>,
    status: u32,
    features: u64,
    device_features_word: u32,
    driver_features_word: u32,
    selected: u32,
    generation: u32,
}

impl<D: Device> Transport<D> {
    /// Puts `device` behind registers; `line` becomes its interrupt.
    ///
    /// # Errors
    /// When no more event descriptors can be made.
    pub fn new(device: D, memory: Memory, line: EventFd) -> std::io::Result<Self> {
        let events =
            device.queue_sizes().iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<Result<_, _>>()?;
        let queues = empty_queues(&device);
        Ok(Transport {
            device,
            memory,
            interrupt: Interrupt::new(line),
            events,
            queues,
            status: 0,
            features: 0,
            device_features_word: 0,
            driver_features_word: 0,
            selected: 0,
            generation: 0,
        })
    }

    /// The device.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// The device, to be changed in a way that its driver need not know.
    pub fn device_mut(&mut self) -> &mut D {
        &mut self.device
    }

    /// Changes the device's configuration and tells the driver.
    pub fn reconfigure<T>(&mut self, change: impl FnOnce(&mut D) -> T) -> T {
        let result = change(&mut self.device);
        self.generation = self.generation.wrapping_add(1);
        if self.active() {
            self.interrupt.configuration();
        }
        result
    }

    /// Whether the device has its queues.
    pub fn active(&self) -> bool {
        self.status & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    fn offered(&self) -> u64 {
        self.device.features() | self.device.queue_features() | feature::VERSION_1
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.selected as usize);
        match offset {
            register::MAGIC => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.device.kind() as u32,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => word(self.offered(), self.device_features_word),
            register::QUEUE_NUM_MAX => queue.map_or(0, |queue| u32::from(queue.max)),
            register::QUEUE_READY => queue.map_or(0, |queue| u32::from(queue.ready)),
            register::INTERRUPT_STATUS => self.interrupt.status() | self.elsewhere(),
            register::STATUS => self.status,
            register::SHM_LEN_LOW | register::SHM_LEN_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.generation,
            _ => 0,
        }
    }

    /// Another process raises the interrupt and cannot say why: there may always be used buffers, which a driver then looks for.
    fn elsewhere(&self) -> u32 {
        if self.device.served_elsewhere() && self.active() { USED_BUFFER } else { 0 }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.device_features_word = value,
            register::DRIVER_FEATURES_SEL => self.driver_features_word = value,
            register::DRIVER_FEATURES
                if self.status & (status::DRIVER | status::FEATURES_OK) == status::DRIVER =>
            {
                set_word(&mut self.features, self.driver_features_word, value);
            }
            register::QUEUE_SEL => self.selected = value,
            register::QUEUE_NOTIFY => self.signal(value as usize),
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.write_status(value),
            _ => self.write_queue_register(offset, value),
        }
    }

    /// Queues are described between FEATURES_OK and DRIVER_OK, and at no other time.
    fn write_queue_register(&mut self, offset: u64, value: u32) {
        if self.status & (status::FEATURES_OK | status::DRIVER_OK | status::FAILED) != status::FEATURES_OK {
            return;
        }
        let Some(queue) = self.queues.get_mut(self.selected as usize) else { return };
        match offset {
            register::QUEUE_NUM => queue.size = value,
            register::QUEUE_READY => queue.ready = value == 1,
            register::QUEUE_DESC_LOW => set_word(&mut queue.descriptors, 0, value),
            0x084 => set_word(&mut queue.descriptors, 1, value),
            register::QUEUE_DRIVER_LOW => set_word(&mut queue.available, 0, value),
            0x094 => set_word(&mut queue.available, 1, value),
            register::QUEUE_DEVICE_LOW => set_word(&mut queue.used, 0, value),
            0x0a4 => set_word(&mut queue.used, 1, value),
            _ => {}
        }
    }

    /// The driver climbs one step after the other (section 3.1.1) and can only fall back to the ground.
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        for (step, needs) in [
            (status::ACKNOWLEDGE, 0),
            (status::DRIVER, status::ACKNOWLEDGE),
            (status::FEATURES_OK, status::DRIVER),
            (status::DRIVER_OK, status::FEATURES_OK),
            (status::FAILED, 0),
        ] {
            let new = value & step != 0 && self.status & step == 0;
            if !new
                || self.status & needs != needs
                || self.status & (status::NEEDS_RESET | status::FAILED) != 0
            {
                continue;
            }
            match step {
                status::FEATURES_OK if !self.features_fit() => continue,
                status::DRIVER_OK => self.activate(),
                _ => {}
            }
            self.status |= step;
        }
    }

    fn features_fit(&self) -> bool {
        self.features & !self.offered() == 0 && self.features & feature::VERSION_1 != 0
    }

    fn activate(&mut self) {
        let event_idx = self.features & feature::EVENT_IDX != 0;
        let frozen: Result<Vec<_>, _> = self
            .queues
            .iter()
            .map(|queue| {
                queue.ready.then(|| queue.freeze(&self.memory, &self.interrupt, event_idx)).transpose()
            })
            .collect();
        let activated = frozen.and_then(|queues| {
            let (features, interrupt, events) = (self.features, self.interrupt.clone(), self.events.clone());
            self.device.activate(Activation { features, queues, interrupt, events })
        });
        match activated {
            // Drivers may have made buffers available before, such as Linux's balloon; their notification came too early.
            Ok(()) => (0..self.events.len()).for_each(|queue| self.signal(queue)),
            Err(error) => self.fail(&error),
        }
    }

    /// The device cannot go on with what its driver did; the driver is told to reset it (section 2.1.2).
    fn fail(&mut self, error: &QueueError) {
        tracing::warn!(device = ?self.device.kind(), %error, "the driver has to reset the device");
        self.device.reset();
        self.status |= status::NEEDS_RESET;
        self.interrupt.configuration();
    }

    fn reset(&mut self) {
        self.device.reset();
        self.queues = empty_queues(&self.device);
        self.interrupt.acknowledge(u32::MAX);
        self.status = 0;
        self.features = 0;
        self.device_features_word = 0;
        self.driver_features_word = 0;
        self.selected = 0;
    }

    fn handle(&mut self, event: Event) -> bool {
        if !self.active() {
            return false;
        }
        match self.device.handle(event) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    /// Has the event loop look at a queue, after the other devices that are waiting for it.
    ///
    /// Not if that waits for nothing: who else has the event could have it block the one who writes to it.
    fn signal(&self, queue: usize) {
        if self.device.served_elsewhere() {
            return;
        }
        if let Some(Err(error)) = self.events.get(queue).map(|event| event.write(1)) {
            tracing::debug!(%error, queue, "a queue is looked at only with its next event");
        }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.device.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(config.len());
        let count = data.len().min(config.len() - start);
        data[..count].copy_from_slice(&config[start..start + count]);
    }
}

impl<D: Device> Slot for Transport<D> {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= register::CONFIG {
            self.read_config(offset - register::CONFIG, data);
        } else if let (0, Ok(word)) = (offset % 4, <&mut [u8; 4]>::try_from(data)) {
            *word = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= register::CONFIG {
            if self.status & status::DRIVER != 0 && self.status & status::FAILED == 0 {
                self.device.write_config(offset - register::CONFIG, data);
            }
        } else if let (0, Ok(word)) = (offset % 4, <[u8; 4]>::try_from(data)) {
            self.write_register(offset, u32::from_le_bytes(word));
        }
    }

    fn queue_events(&self) -> &[EventFd] {
        &self.events
    }

    fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    fn notify(&mut self, queue: usize) {
        let Some(event) = self.events.get(queue) else { return };
        // Empty when somebody else was faster, which is no reason not to look.
        let _ = event.read();
        if self.handle(Event::Queue(queue)) {
            self.signal(queue);
        }
    }

    fn source(&mut self, index: usize) {
        if self.handle(Event::Source(index)) {
            self.signal(0);
        }
    }

    fn sources(&self) -> Vec<std::os::fd::BorrowedFd<'_>> {
        self.device.sources()
    }

    fn system_calls(&self) -> SystemCalls {
        self.device.system_calls()
    }

    fn save(&self, writer: &mut Writer) {
        self.save_state(writer);
    }

    fn restore(&mut self, reader: &mut Reader<'_>) -> Result<(), StateError> {
        self.restore_state(reader)
    }

    fn kind(&self) -> Kind {
        self.device.kind()
    }

    fn metrics(&self) -> Vec<Metric> {
        self.device.metrics()
    }

    fn served_elsewhere(&self) -> bool {
        self.device.served_elsewhere()
    }
}

fn empty_queues(device: &impl Device) -> Vec<QueueConfig> {
    device.queue_sizes().iter().map(|max| QueueConfig::new(*max)).collect()
}

fn word(value: u64, index: u32) -> u32 {
    match index {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_word(value: &mut u64, index: u32, word: u32) {
    match index {
        0 => *value = *value & !0xffff_ffff | u64::from(word),
        1 => *value = *value & 0xffff_ffff | u64::from(word) << 32,
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::Queue;
    use crate::testing::{Driver, memory};

    /// Has one queue that it needs and one that it does not, and counts what happens to it.
    #[derive(Default)]
    struct Probe {
        queue: Option<Queue>,
        served: usize,
        resets: usize,
        written: Vec<(u64, Vec<u8>)>,
    }

    impl Device for Probe {
        fn kind(&self) -> Kind {
            Kind::Rng
        }
        fn features(&self) -> u64 {
            0b101
        }
        fn queue_sizes(&self) -> &'static [u16] {
            &[64, 32]
        }
        fn config(&self) -> Vec<u8> {
            vec![1, 2, 3, 4, 5, 6]
        }
        fn write_config(&mut self, offset: u64, data: &[u8]) {
            self.written.push((offset, data.to_vec()));
        }
        fn activate(&mut self, mut activation: Activation) -> Result<(), QueueError> {
            self.queue = Some(activation.take(0)?);
            Ok(())
        }
        fn reset(&mut self) {
            self.queue = None;
            self.resets += 1;
        }
        fn positions(&self) -> Vec<Option<crate::queue::Position>> {
            vec![self.queue.as_ref().map(Queue::position), None]
        }
        fn handle(&mut self, _: Event) -> Result<bool, QueueError> {
            let served = &mut self.served;
            self.queue.as_mut().map_or(Ok(false), |queue| {
                queue.serve(|_| {
                    *served += 1;
                    Some(0)
                })
            })
        }
    }

    fn transport() -> (Transport<Probe>, Driver) {
        let memory = memory();
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        (Transport::new(Probe::default(), memory.clone(), line).unwrap(), Driver::new(memory, 0, 16))
    }

    #[test]
    fn the_identity_is_the_specifications() {
        let (mut transport, _) = transport();
        let identity = [0, 4, 8].map(|offset| transport.read_u32(offset));
        assert_eq!(identity, [0x7472_6976, 2, 4]);
        transport.write_u32(register::QUEUE_SEL, 1);
        assert_eq!(transport.read_u32(register::QUEUE_NUM_MAX), 32);
        transport.write_u32(register::QUEUE_SEL, 2);
        assert_eq!(transport.read_u32(register::QUEUE_NUM_MAX), 0);
    }

    #[test]
    fn a_driver_comes_up_and_its_requests_are_served() {
        let (mut transport, mut driver) = transport();
        transport.bring_up(!feature::EVENT_IDX, &[driver.config(64)]);
        assert!(transport.active());
        assert_eq!(transport.queue_events()[0].read().unwrap(), 1, "buffers may be there already");
        driver.add(&[(0x2000, 8, false)]);
        transport.write_u32(register::QUEUE_NOTIFY, 0);
        assert_eq!(transport.queue_events()[0].read().unwrap(), 1);
        transport.notify(0);
        assert_eq!((transport.device.served, driver.used().len()), (1, 1));
        assert_eq!(transport.read_u32(register::INTERRUPT_STATUS), 1);
        transport.write_u32(register::INTERRUPT_ACK, 1);
        assert_eq!(transport.read_u32(register::INTERRUPT_STATUS), 0);
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let (mut transport, _) = transport();
        for (low, high, accepted) in
            [(0b101, 1, true), (0b111, 1, false), (0b101, 0, false), (0b101, 3, false)]
        {
            transport.write_u32(register::STATUS, 0);
            transport.write_u32(register::STATUS, 3);
            for (index, value) in [(0, low), (1, high), (7, u32::MAX)] {
                transport.write_u32(register::DRIVER_FEATURES_SEL, index);
                transport.write_u32(register::DRIVER_FEATURES, value);
            }
            transport.write_u32(register::STATUS, 11);
            assert_eq!(transport.read_u32(register::STATUS) & 8 != 0, accepted, "{low:#b} {high:#b}");
        }
    }

    #[test]
    fn steps_cannot_be_left_out() {
        let (mut transport, _) = transport();
        transport.write_u32(register::STATUS, 4);
        assert_eq!(transport.read_u32(register::STATUS), 0);
        transport.write_u32(register::STATUS, 1 | 4);
        assert_eq!(transport.read_u32(register::STATUS), 1);
    }

    #[test]
    fn a_queue_cannot_change_under_a_running_device() {
        let (mut transport, driver) = transport();
        transport.bring_up(u64::MAX, &[driver.config(64)]);
        let before = transport.queues.clone();
        for offset in [0x38, 0x44, 0x80, 0x84, 0x90, 0x94, 0xa0, 0xa4] {
            transport.write_u32(register::QUEUE_SEL, 0);
            transport.write_u32(offset, 0x5000);
        }
        assert_eq!(transport.queues, before);
    }

    #[test]
    fn bad_and_missing_queues_ask_for_a_reset_which_helps() {
        let (mut transport, driver) = transport();
        let mut bad = driver.config(64);
        bad.used = 0xffff_fff0;
        let mut absent = driver.config(64);
        absent.ready = false;
        for config in [bad, absent] {
            transport.bring_up(u64::MAX, &[config]);
            assert!(!transport.active());
            assert_eq!(transport.read_u32(register::STATUS) & status::NEEDS_RESET, status::NEEDS_RESET);
            assert_eq!(transport.read_u32(register::INTERRUPT_STATUS), 2);
            transport.notify(0);
            assert_eq!(transport.device.served, 0);
        }
        transport.bring_up(u64::MAX, &[driver.config(64)]);
        assert!(transport.active());
    }

    #[test]
    fn a_broken_index_stops_the_device_until_it_is_reset() {
        let (mut transport, mut driver) = transport();
        transport.bring_up(u64::MAX, &[driver.config(64)]);
        driver.set_available_index(40);
        transport.notify(0);
        assert!(!transport.active());
        assert!(transport.device.queue.is_none());
        assert_eq!(transport.read_u32(register::INTERRUPT_STATUS), 2);
    }

    #[test]
    fn the_configuration_is_read_in_any_width_and_never_beyond() {
        let (mut transport, _) = transport();
        let mut read = |offset, length| {
            let mut bytes = vec![0xff; length];
            transport.read(offset, &mut bytes);
            bytes
        };
        assert_eq!(read(0x100, 8), [1, 2, 3, 4, 5, 6, 0, 0]);
        assert_eq!(read(0x104, 4), [5, 6, 0, 0]);
        assert_eq!(read(0x101, 1), [2]);
        assert_eq!(read(0x106, 2), [0, 0]);
        assert_eq!(read(u64::MAX, 4), [0; 4]);
        // Registers have one width only.
        assert_eq!(read(0x000, 2), [0; 2]);
        assert_eq!(read(0x002, 4), [0; 4]);
    }

    #[test]
    fn the_configuration_is_written_by_a_driver_only() {
        let (mut transport, _) = transport();
        transport.write(0x102, &[9]);
        assert_eq!(transport.device.written, []);
        transport.write_u32(register::STATUS, 3);
        transport.write(0x102, &[9]);
        assert_eq!(transport.device.written, [(2, vec![9])]);
    }

    #[test]
    fn a_changed_configuration_has_a_new_generation_and_an_interrupt() {
        let (mut transport, driver) = transport();
        let generation = transport.read_u32(register::CONFIG_GENERATION);
        transport.bring_up(u64::MAX, &[driver.config(64)]);
        transport.reconfigure(|_| ());
        assert_ne!(transport.read_u32(register::CONFIG_GENERATION), generation);
        assert_eq!(transport.read_u32(register::INTERRUPT_STATUS), 2);
    }
}
