//! Where the guest's accesses to ports and device memory go.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kapsel_devices::mmio::{self, Slot, WINDOW};
use vmm_sys_util::eventfd::EventFd;

use crate::boot_timer::BootTimer;
use crate::console::Console;
use crate::keyboard::Keyboard;
use crate::x86::layout;

/// A device on the bus.
pub type SharedSlot = Arc<Mutex<dyn Slot>>;

/// How a machine ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The guest asked for power to be cut.
    PowerOff,
    /// The guest asked for a reset, or has made one necessary (triple fault).
    Reset,
    /// A processor cannot go on.
    Failure(String),
}

/// Says once how the machine ends and wakes whoever waits for that.
#[derive(Debug)]
pub struct Stop {
    end: OnceLock<End>,
    event: EventFd,
}

impl Stop {
    /// `event` becomes readable at the end.
    pub fn new(event: EventFd) -> Self {
        Stop { end: OnceLock::new(), event }
    }

    /// The first one counts.
    pub fn because(&self, end: End) {
        let _ = self.end.set(end);
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot tell the event loop that the machine ends");
        }
    }

    /// How it ended, if it did.
    pub fn end(&self) -> Option<&End> {
        self.end.get()
    }

    /// Readable at the end.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// How often the guest left to the monitor, by reason.
#[derive(Debug, Default)]
pub struct Exits {
    /// Reads of ports.
    pub port_reads: AtomicU64,
    /// Writes of ports.
    pub port_writes: AtomicU64,
    /// Reads of devices' memory.
    pub mmio_reads: AtomicU64,
    /// Writes of devices' memory; notifications of queues are not among them.
    pub mmio_writes: AtomicU64,
}

impl Exits {
    fn count(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Each, by Firecracker's names.
    pub fn named(&self) -> [(&'static str, u64); 4] {
        [
            ("exit_io_in", &self.port_reads),
            ("exit_io_out", &self.port_writes),
            ("exit_mmio_read", &self.mmio_reads),
            ("exit_mmio_write", &self.mmio_writes),
        ]
        .map(|(name, counter)| (name, counter.load(Ordering::Relaxed)))
    }

    /// All together.
    pub fn total(&self) -> u64 {
        self.named().iter().map(|(_, count)| count).sum()
    }
}

/// The machine's ports and device memory, as all of its processors see them.
pub struct Bus {
    /// The serial port.
    pub console: Mutex<Console>,
    /// The keyboard.
    pub keyboard: Mutex<Keyboard>,
    /// Where the guest says that it has booted, if somebody wants to know.
    pub boot_timer: Option<BootTimer>,
    /// Virtio devices in the order of their windows.
    pub slots: Vec<SharedSlot>,
    /// Windows behind those that are announced to the guest and empty.
    pub spare: usize,
    /// Ends the machine.
    pub stop: Stop,
    /// Counters.
    pub exits: Exits,
}

impl Bus {
    /// The guest reads a port. What is not there reads as all ones, as on a real bus.
    pub fn read_port(&self, port: u16, data: &mut [u8]) {
        Exits::count(&self.exits.port_reads);
        data.fill(0xff);
        let [byte] = data else { return };
        *byte = match port {
            layout::SERIAL_PORT..0x400 => lock(&self.console).read((port - layout::SERIAL_PORT) as u8),
            layout::KEYBOARD_DATA_PORT => lock(&self.keyboard).data(),
            layout::KEYBOARD_COMMAND_PORT => lock(&self.keyboard).status(),
            // Nothing is asleep.
            layout::SLEEP_STATUS_PORT | layout::SLEEP_CONTROL_PORT => 0,
            _ => return,
        };
    }

    /// The guest writes to a port.
    pub fn write_port(&self, port: u16, data: &[u8]) {
        const PULSE_RESET: u8 = 0xfe;
        Exits::count(&self.exits.port_writes);
        let [byte] = data else { return };
        match (port, *byte) {
            (layout::SERIAL_PORT..0x400, byte) => {
                lock(&self.console).write((port - layout::SERIAL_PORT) as u8, byte)
            }
            (layout::KEYBOARD_COMMAND_PORT, PULSE_RESET) | (layout::RESET_PORT, _) => {
                self.stop.because(End::Reset)
            }
            (layout::KEYBOARD_COMMAND_PORT, command) => lock(&self.keyboard).command(command),
            (layout::KEYBOARD_DATA_PORT, byte) => lock(&self.keyboard).write_data(byte),
            (layout::SLEEP_CONTROL_PORT, layout::SLEEP_S5) => self.stop.because(End::PowerOff),
            _ => {}
        }
    }

    /// The guest reads memory where there is none.
    pub fn read_memory(&self, address: u64, data: &mut [u8]) {
        Exits::count(&self.exits.mmio_reads);
        match self.window(address, data.len()) {
            Some((index, offset)) => match self.slots.get(index) {
                Some(slot) => lock(slot).read(offset, data),
                None if index < self.slots.len() + self.spare => mmio::read_empty(offset, data),
                None => data.fill(0xff),
            },
            None => data.fill(0xff),
        }
    }

    /// The guest writes to memory where there is none.
    pub fn write_memory(&self, address: u64, data: &[u8]) {
        Exits::count(&self.exits.mmio_writes);
        if let Some((index, offset)) = self.window(address, data.len()) {
            if let Some(slot) = self.slots.get(index) {
                lock(slot).write(offset, data);
            }
        } else if let (Some(timer), Some(offset)) =
            (&self.boot_timer, address.checked_sub(layout::BOOT_TIMER))
        {
            timer.write(offset, data);
        }
    }

    /// The number of the window that an access is in, whether there is a device or not, and where in it.
    fn window(&self, address: u64, length: usize) -> Option<(usize, u64)> {
        let offset = address.checked_sub(layout::MMIO)?;
        let (index, within) = (usize::try_from(offset / WINDOW).ok()?, offset % WINDOW);
        (within + length as u64 <= WINDOW).then_some((index, within))
    }
}

/// A panic elsewhere has ended the process's usefulness, but not the data's consistency: devices are changed in steps that
/// each leave them whole.
pub fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use kapsel_devices::mmio::Transport;
    use kapsel_devices::rate::Limits;
    use kapsel_devices::rng::Rng;
    use vm_memory::GuestAddress;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn event() -> EventFd {
        EventFd::new(EFD_NONBLOCK).unwrap()
    }

    fn bus() -> Bus {
        let memory = kapsel_devices::Memory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let slot = Transport::new(Rng::new(Limits::default()).unwrap(), memory, event()).unwrap();
        let console = Console::new(event(), event(), crate::serial::Output::nowhere());
        let slots: Vec<SharedSlot> = vec![Arc::new(Mutex::new(slot))];
        Bus {
            console: Mutex::new(console),
            keyboard: Mutex::new(Keyboard::new(event())),
            boot_timer: Some(BootTimer::start()),
            slots,
            spare: 1,
            stop: Stop::new(event()),
            exits: Exits::default(),
        }
    }

    #[test]
    fn accesses_reach_the_device_in_its_window_and_nothing_else() {
        let bus = bus();
        let read = |address| {
            let mut bytes = [0; 4];
            bus.read_memory(address, &mut bytes);
            bytes
        };
        assert_eq!(read(layout::MMIO), *b"virt");
        // The next place is empty: it has no kind of device.
        assert_eq!(read(layout::MMIO + 0x1000), *b"virt");
        assert_eq!(read(layout::MMIO + 0x1008), [0; 4]);
        bus.write_memory(layout::MMIO + 0x1070, &[1, 0, 0, 0]);
        for address in [layout::MMIO + 0xffe, layout::MMIO + 0x2000, layout::MMIO - 4, 0, u64::MAX - 3] {
            assert_eq!(read(address), [0xff; 4], "{address:#x}");
            bus.write_memory(address, &[0; 4]);
        }
        assert_eq!(bus.exits.total(), 14);
    }

    #[test]
    fn unknown_ports_are_harmless_and_known_ones_end_the_machine() {
        for (port, byte, end) in [
            (0x64, 0xfe, Some(End::Reset)),
            (layout::RESET_PORT, 1, Some(End::Reset)),
            (layout::KEYBOARD_DATA_PORT, 0xfe, None),
            (layout::SLEEP_CONTROL_PORT, layout::SLEEP_S5, Some(End::PowerOff)),
            (layout::SLEEP_CONTROL_PORT, 0, None),
            (0x64, 0xd1, None),
            (0xcf8, 0, None),
        ] {
            let bus = bus();
            bus.write_port(port, &[byte]);
            bus.write_port(port, &[byte; 4]);
            assert_eq!(bus.stop.end(), end.as_ref(), "{port:#x}");
        }
        let mut bytes = [0; 4];
        bus().read_port(0xcfc, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
    }
}
