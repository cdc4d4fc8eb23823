//! A running machine: its processors in threads, its devices in the event loop of the thread that owns it.

use std::io::{self, Stdin};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kapsel_devices::Kind;
use kapsel_devices::balloon::{Balloon, Statistics, StatisticsError};
use kapsel_devices::block::{self, Block};
use kapsel_devices::mem::{InvalidSize, Mem};
use kapsel_devices::mmio::Transport;
use kapsel_devices::net::Net;
use kapsel_devices::rate::Limits;
use kapsel_devices::state::Writer;
use kapsel_devices::timer::Timer;
use kapsel_devices::vhost_user::{self, VhostUser};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::EventFd;

use crate::api::Server;
use crate::api::control::Running;
use crate::bus::{Bus, lock};
use crate::config::Config;
use crate::confine::Filter;
use crate::events::{Events, Source};
use crate::metrics::{self, Metrics};
use crate::mmds;
use crate::snapshot::{self, format::Sections};
use crate::vcpu::Processors;
use crate::x86::state;

pub use crate::bus::{End, Exits};

/// Devices that can be changed while the machine runs.
#[derive(Default)]
pub(crate) struct Handles {
    /// Names of the devices in the order of their places, for those that have one.
    pub names: Vec<Option<String>>,
    pub disks: Vec<Disk>,
    pub served_disks: Vec<ServedDisk>,
    pub interfaces: Vec<Interface>,
    pub balloon: Option<SharedBalloon>,
    pub hotplug: Option<SharedMem>,
}

/// Memory that can be plugged.
pub(crate) type SharedMem = Arc<Mutex<Transport<Mem>>>;
/// The balloon.
pub(crate) type SharedBalloon = Arc<Mutex<Transport<Balloon>>>;
/// A network card by its name.
pub(crate) type Interface = (String, Arc<Mutex<Transport<Net>>>);
/// A disk by its name.
pub(crate) type Disk = (String, Arc<Mutex<Transport<Block>>>);
/// A disk of another process by its name.
pub(crate) type ServedDisk = (String, Arc<Mutex<Transport<VhostUser>>>);

/// Firecracker's word for the counters of such devices.
fn group(kind: Kind) -> &'static str {
    match kind {
        Kind::Net => "net",
        Kind::Block => "block",
        Kind::Rng => "entropy",
        Kind::Balloon => "balloon",
        Kind::Vsock => "vsock",
        Kind::FileSystem => "fs",
        Kind::Mem => "memory_hotplug",
    }
}

/// A machine, built and not yet running.
pub struct Machine {
    // Fields are dropped in this order: processors end before the memory that they run on goes.
    processors: Processors,
    bus: Arc<Bus>,
    events: Events,
    input: Option<Input>,
    handles: Handles,
    api: Option<(Server, Running)>,
    filter: Filter,
    metrics: Metrics,
    flush: Timer,
    mmds: mmds::Shared,
    hardware: Hardware,
}

/// What the processors run on.
pub(crate) struct Hardware {
    /// The registers that a processor is saved with.
    pub msrs: Vec<u32>,
    pub vm: Arc<VmFd>,
    pub memory: kapsel_devices::Memory,
    /// What keeps another process in charge of the memory, if one is.
    pub served: Option<OwnedFd>,
}

/// What is typed.
struct Input {
    stdin: Stdin,
    drained: EventFd,
    watched: bool,
}

impl Machine {
    pub(crate) fn new(
        processors: Processors,
        bus: Arc<Bus>,
        handles: Handles,
        drained: EventFd,
        filter: Filter,
        mmds: mmds::Shared,
        hardware: Hardware,
    ) -> io::Result<Self> {
        let mut events = Events::new()?;
        events.watch_event(bus.stop.event(), Source::Stop)?;
        for (device, slot) in bus.slots.iter().enumerate() {
            let slot = lock(slot);
            let queues = if slot.served_elsewhere() { &[] } else { slot.queue_events() };
            for (queue, event) in queues.iter().enumerate() {
                events.watch_event(event, Source::Queue(device, queue))?;
            }
            for (index, descriptor) in slot.sources().into_iter().enumerate() {
                events.watch(descriptor, Source::Device(device, index))?;
            }
        }
        let flush = Timer::new()?;
        events.watch(&flush, Source::Metrics)?;
        let mut machine = Machine {
            processors,
            bus,
            events,
            input: None,
            handles,
            api: None,
            filter,
            metrics: Metrics::default(),
            flush,
            mmds,
            hardware,
        };
        machine.watch_input(drained)?;
        Ok(machine)
    }

    /// Keeps what keeps another process in charge of the memory.
    pub(crate) fn memory_is_served_by(&mut self, descriptor: Option<OwnedFd>) {
        self.hardware.served = descriptor;
    }

    /// A standard input that cannot be waited for (a file, /dev/null) has nothing to type.
    fn watch_input(&mut self, drained: EventFd) -> io::Result<()> {
        let stdin = io::stdin();
        if self.events.watch(&stdin, Source::Input).is_ok() {
            self.events.watch_event(&drained, Source::InputRoom)?;
            self.input = Some(Input { stdin, drained, watched: true });
        }
        Ok(())
    }

    /// From now on the machine answers the API.
    ///
    /// # Errors
    /// When the API cannot be waited for.
    pub fn answer(&mut self, server: Server, running: Running) -> io::Result<()> {
        self.events.watch_event(server.event(), Source::Api)?;
        self.api = Some((server, running));
        Ok(())
    }

    /// Holds the processors. Devices finish what they were asked for.
    pub fn pause(&self) {
        self.processors.pause();
    }

    /// Lets the processors run.
    pub fn resume(&self) {
        self.processors.resume();
    }

    /// Continues a disk with another file and tells the guest its size. A name that no disk has changes nothing.
    ///
    /// # Errors
    /// When the file cannot be used; the disk stays as it was.
    pub fn replace_disk(&self, name: &str, path: &Path) -> Result<(), block::Error> {
        let disk = self.handles.disks.iter().find(|(other, _)| other == name);
        disk.map_or(Ok(()), |(_, disk)| lock(disk).reconfigure(|block| block.replace(path)))
    }

    /// Asks the process that serves a disk what it is like now, and tells the guest. False when it is no such disk.
    ///
    /// # Errors
    /// When that process does not say; the disk stays as it was.
    pub fn refresh_disk(&self, name: &str) -> Result<bool, vhost_user::Error> {
        match self.handles.served_disks.iter().find(|(other, _)| other == name) {
            Some((_, disk)) => lock(disk).reconfigure(VhostUser::refresh).map(|()| true),
            None => Ok(false),
        }
    }

    /// Changes how fast a disk may be; limits that are absent stay. A name that no disk has changes nothing.
    pub fn limit_disk(&self, name: &str, limits: Limits) {
        if let Some((_, disk)) = self.handles.disks.iter().find(|(other, _)| other == name) {
            lock(disk).device_mut().limit(limits);
        }
    }

    /// Changes how fast a network card may receive and send; limits that are absent stay. A name that no card has changes
    /// nothing.
    pub fn limit_interface(&self, name: &str, receive: Limits, transmit: Limits) {
        if let Some((_, interface)) = self.handles.interfaces.iter().find(|(other, _)| other == name) {
            lock(interface).device_mut().limit(receive, transmit);
        }
    }

    /// How many pages the balloon has and what the guest said about its memory, if there is a balloon.
    pub fn balloon_statistics(&self) -> Option<(u32, Result<Statistics, StatisticsError>)> {
        let balloon = lock(self.handles.balloon.as_ref()?);
        Some((balloon.device().actual_pages(), balloon.device().statistics()))
    }

    /// Asks for the balloon's statistics at another interval.
    ///
    /// # Errors
    /// When that would switch them on or off.
    pub fn poll_balloon_statistics(&self, interval: Duration) -> Result<(), StatisticsError> {
        let balloon = self.handles.balloon.as_ref();
        balloon.map_or(Ok(()), |balloon| lock(balloon).device_mut().poll_statistics(interval))
    }

    /// Presses Ctrl, Alt and Del. False when the guest has not read what was typed before.
    pub fn press_ctrl_alt_del(&self) -> bool {
        lock(&self.bus.keyboard).press_ctrl_alt_del()
    }

    /// From now on the machine counts in `metrics`, and tells them from time to time.
    pub fn count_in(&mut self, metrics: Metrics) {
        if metrics.wanted() {
            self.flush.every(metrics::INTERVAL);
        }
        self.metrics = metrics;
    }

    /// Tells what was counted.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn flush_metrics(&mut self) -> Result<(), metrics::Error> {
        let exits = self.bus.exits.named().map(|(name, count)| (("vcpu".to_owned(), name), count));
        let mut counters = exits.to_vec();
        for (slot, name) in self.bus.slots.iter().zip(&self.handles.names) {
            let slot = lock(slot);
            let kind = group(slot.kind());
            let name = name.as_deref();
            let groups = if slot.served_elsewhere() {
                [name.map(|name| format!("vhost_user_{kind}_{name}")), None]
            } else {
                [Some(kind.to_owned()), name.map(|name| format!("{kind}_{name}"))]
            };
            for (counter, count) in slot.metrics() {
                counters.extend(groups.iter().flatten().map(|group| ((group.clone(), counter), count)));
            }
        }
        let dropped = lock(&self.bus.console).dropped();
        counters.push((("uart".to_owned(), "rate_limiter_dropped_bytes"), dropped));
        let mmds = lock(&self.mmds).counters();
        counters.extend(mmds.map(|(name, count)| (("mmds".to_owned(), name), count)));
        self.metrics.flush(counters)
    }

    /// Tells the guest how large its balloon shall be, in MiB. A machine without one does not change.
    pub fn resize_balloon(&self, mib: u32) {
        if let Some(balloon) = &self.handles.balloon {
            lock(balloon).reconfigure(|balloon| balloon.resize(mib));
        }
    }

    /// Asks the guest to have so many MiB plugged. A machine without such memory does not change.
    ///
    /// # Errors
    /// [`InvalidSize`].
    pub fn resize_memory(&self, mib: u32) -> Result<(), InvalidSize> {
        let bytes = u64::from(mib) << 20;
        self.handles.hotplug.as_ref().map_or(Ok(()), |mem| lock(mem).reconfigure(|mem| mem.resize(bytes)))
    }

    /// How many MiB the guest has plugged and how many it is asked for, if it can have any.
    pub fn plugged_memory(&self) -> Option<(u64, u64)> {
        let mem = lock(self.handles.hotplug.as_ref()?);
        Some((mem.device().plugged() >> 20, mem.device().requested() >> 20))
    }

    /// Saves the machine, which is made as `config` says. It has to be held.
    ///
    /// # Errors
    /// [`snapshot::Error`]; the machine goes on all the same, and the files are of no use.
    pub fn save(&self, config: &Config, to: &snapshot::Create) -> Result<(), snapshot::Error> {
        snapshot::Error::check_served(config)?;
        let mut sections = Sections::default();
        // Configurations are strings and numbers, which JSON always has.
        sections.add("config", &serde_json::to_vec(config).unwrap_or_default());
        sections.add("machine", &state::save_machine(&self.hardware.vm)?);
        for cpu in self.processors.each(|vcpu| state::save_processor(vcpu, &self.hardware.msrs))? {
            sections.add("cpu", &cpu);
        }
        sections.add("console", &lock(&self.bus.console).save());
        sections.add("keyboard", &lock(&self.bus.keyboard).save());
        for slot in &self.bus.slots {
            let mut writer = Writer::default();
            lock(slot).save(&mut writer);
            sections.add("device", &writer.finish());
        }
        let memory = &self.hardware.memory;
        let plugged =
            self.handles.hotplug.as_ref().map_or_else(Vec::new, |mem| lock(mem).device().slots().collect());
        let slots =
            config.memory_hotplug.map(|hotplug| (u64::from(hotplug.slot_size_mib) << 20, &plugged[..]));
        snapshot::dirty::collect(&self.hardware.vm, memory, slots)?;
        snapshot::memory::save(memory, &to.mem_file_path, to.snapshot_type)?;
        // Last: without it the memory is of no use to anybody.
        sections.write(&to.snapshot_path)?;
        snapshot::dirty::forget(memory);
        Ok(())
    }

    /// Runs the machine until it ends, once it is resumed. The calling thread is confined to what a running machine needs, for good.
    ///
    /// # Errors
    /// When the thread cannot be confined or the event loop cannot wait.
    pub fn run(&mut self) -> io::Result<End> {
        self.filter.apply().map_err(io::Error::other)?;
        loop {
            for source in self.events.wait()? {
                self.handle(source)?;
            }
            if let Some(end) = self.bus.stop.end() {
                self.processors.pause();
                return Ok(end.clone());
            }
        }
    }

    /// How often the guest left to the monitor so far.
    pub fn exits(&self) -> &Exits {
        &self.bus.exits
    }

    fn handle(&mut self, source: Source) -> io::Result<()> {
        match source {
            Source::Queue(device, queue) => lock(&self.bus.slots[device]).notify(queue),
            Source::Device(device, index) => lock(&self.bus.slots[device]).source(index),
            Source::Input => self.read_input()?,
            Source::InputRoom => self.reopen_input()?,
            Source::Api => self.answer_calls(),
            Source::Metrics => {
                self.flush.clear();
                if let Err(error) = self.flush_metrics() {
                    tracing::warn!(%error);
                }
            }
            Source::Stop => {}
        }
        Ok(())
    }

    fn answer_calls(&mut self) {
        let Some((server, mut running)) = self.api.take() else { return };
        while let Some(call) = server.next() {
            let counters = call.request.counters();
            let answer = running.handle(call.request, self);
            self.metrics.count_request(counters, answer.is_err());
            // A client that has gone does not want the answer.
            let _ = call.reply.send(answer);
        }
        self.api = Some((server, running));
    }

    /// Reads no more than the guest's console has room for; when it is full, the rest waits in the pipe.
    fn read_input(&mut self) -> io::Result<()> {
        let Some(input) = &mut self.input else { return Ok(()) };
        let mut console = lock(&self.bus.console);
        let mut bytes = [0; 64];
        let room = console.room().min(bytes.len());
        let ended = match room {
            0 => {
                self.events.forget(&input.stdin)?;
                input.watched = false;
                return Ok(());
            }
            // Not through the handle's buffer, which would read ahead.
            _ => match rustix::io::read(&input.stdin, &mut bytes[..room]) {
                Ok(0) => true,
                Ok(count) => {
                    console.input(&bytes[..count]);
                    false
                }
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => false,
                Err(_) => true,
            },
        };
        if ended {
            self.events.forget(&input.stdin)?;
            self.input = None;
        }
        Ok(())
    }

    fn reopen_input(&mut self) -> io::Result<()> {
        let Some(input) = &mut self.input else { return Ok(()) };
        let _ = input.drained.read();
        if !input.watched {
            self.events.watch(&input.stdin, Source::Input)?;
            input.watched = true;
        }
        Ok(())
    }
}
