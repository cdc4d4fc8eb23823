//! From a configuration to a machine, in the order in which a computer is put together.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kapsel_devices::mmio::{Transport, register};
use kapsel_devices::net::metadata::Metadata;
use kapsel_devices::state::{Reader, StateError};
use kapsel_devices::{Device, Memory, balloon, block, mem, net, rng, vhost_user, vsock};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::backends::{self, Backends};
use crate::boot_timer::BootTimer;
use crate::bus::{Bus, Exits, SharedSlot, Stop, lock};
use crate::config::{self, Backing, CacheType, Config, Drive, NetworkInterface, RateLimiter};
use crate::confine::{self, Policy, Thread};
use crate::console::Console;
use crate::hotplug;
use crate::kernel;
use crate::keyboard::Keyboard;
use crate::machine::{Handles, Hardware, Machine};
use crate::memory;
use crate::mmds;
use crate::serial::Output;
use crate::snapshot::{self, Saved, format::State};
use crate::vcpu::Processors;
use crate::x86::acpi::{self, Place};
use crate::x86::state::{MachineState, ProcessorState};
use crate::x86::template::{self, Template};
use crate::x86::{self, boot, cpuid, layout, processor};

/// Why a machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no KVM, or not for this user.
    #[error("cannot open /dev/kvm: {0}; is KVM there, and may this user use it?")]
    NoKvm(kvm_ioctls::Error),
    /// KVM is too old or too small.
    #[error("KVM cannot do {0:?}, which every machine needs")]
    Capability(Cap),
    /// As a CPU template wants.
    #[error("KVM cannot do {0}, which the CPU template asks for")]
    TemplateCapability(u32),
    /// A request to KVM failed.
    #[error("KVM refused to {0}: {1}")]
    Kvm(&'static str, kvm_ioctls::Error),
    /// The host has no more descriptors or threads.
    #[error("the host has no more descriptors or threads: {0}")]
    Host(#[from] io::Error),
    /// More devices than there are interrupts.
    #[error("a machine has room for {max} devices", max = layout::DEVICES_MAX)]
    TooManyDevices,
    /// Nothing to start from.
    #[error("the configuration has no kernel (boot-source)")]
    NoKernel,
    /// Memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Kernel or initrd.
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// The kernel's description of the machine.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// ACPI.
    #[error(transparent)]
    Acpi(#[from] acpi::TooLarge),
    /// A processor's first state.
    #[error(transparent)]
    Processor(#[from] processor::Error),
    /// The serial console's output.
    #[error("cannot open the serial console's output {path}: {source}")]
    Serial {
        /// Where it should go.
        path: std::path::PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A CPU template.
    #[error(transparent)]
    Template(#[from] template::Error),
    /// A thread's filter.
    #[error(transparent)]
    Confine(#[from] confine::Error),
    /// KVM does not tell what there is to save.
    #[error(transparent)]
    State(#[from] x86::state::Error),
    /// The serial port's saved state.
    #[error(transparent)]
    Console(#[from] StateError),
    /// A disk.
    #[error(transparent)]
    Block(#[from] block::Error),
    /// The configuration is impossible.
    #[error(transparent)]
    Config(#[from] config::Error),
    /// A device of another process.
    #[error("the back end of {0}: {1}")]
    Backend(String, #[source] vhost_user::Error),
    /// A network card.
    #[error(transparent)]
    Net(#[from] net::Error),
    /// The socket device.
    #[error(transparent)]
    Vsock(#[from] vsock::Error),
}

/// What a machine has of its monitor.
pub struct Surroundings {
    /// How its threads are confined.
    pub policy: Policy,
    /// What the guest can read, where the configuration lets it.
    pub mmds: mmds::Shared,
    /// What takes the time until the guest has booted, if anything does.
    pub boot_timer: Option<BootTimer>,
}

/// Builds a machine whose console is `output`, with the sessions that were begun for its disks. Nothing of the guest runs yet.
///
/// # Errors
/// [`Error`]; nothing is left behind but the socket of a socket device.
pub fn build(
    config: &Config,
    output: Output,
    surroundings: &Surroundings,
    backends: &mut Backends,
) -> Result<Machine, Error> {
    let boot_source = config.boot_source.as_ref().ok_or(Error::NoKernel)?;
    let machine = &config.machine_config;
    let allocate = if config.served_elsewhere().is_empty() { memory::allocate } else { memory::share };
    let memory = allocate(config.into(), machine.huge_pages, machine.track_dirty_pages)?;
    let console = |line, drained| Ok(Console::new(line, drained, output));
    let parts = Parts::assemble(config, memory, console, surroundings, backends)?;

    let memory = &memory::at_start(&parts.memory, config.into())?;
    let kernel = kernel::load(memory, &boot_source.kernel_image_path)?;
    let initrd = boot_source.initrd_path.as_deref();
    let initrd = initrd.map(|path| kernel::load_initrd(memory, &kernel, path)).transpose()?;
    boot::describe(memory, &kernel, initrd, &config.command_line())?;
    acpi::write(memory, config.machine_config.vcpu_count, &parts.places)?;
    write_generation(memory)?;

    describe_processors(&parts)?;
    if let Some(first) = parts.vcpus.first() {
        processor::point_at(first, memory, &kernel)?;
    }
    parts.start(surroundings)
}

/// Builds a machine that goes on where another one was saved. It waits to be resumed.
///
/// # Errors
/// [`snapshot::Error`]; as for [`build`].
pub fn restore(
    load: &snapshot::Load,
    output: Output,
    surroundings: &Surroundings,
) -> Result<(Config, Machine), snapshot::Error> {
    let state = State::read(&load.snapshot_path)?;
    let Saved { mut config, machine, cpus, console, keyboard, mut devices } = Saved::find(&state)?;
    load.apply(&mut config)?;
    let cpus = cpus.into_iter().map(ProcessorState::read).collect::<Result<Vec<_>, _>>()?;
    let machine = MachineState::read(machine)?;

    let (memory, served) = load.memory(&config)?;
    let built = |error: Error| snapshot::Error::from(Box::new(error));
    let console = |line, drained| Ok(Console::restored(line, drained, output, console)?);
    let parts = Parts::assemble(&config, memory, console, surroundings, &mut Backends::default());
    let parts = parts.map_err(built)?;
    lock(&parts.bus.keyboard).restore(keyboard)?;
    for (vcpu, state) in parts.vcpus.iter().zip(cpus) {
        state.restore(vcpu)?;
    }
    machine.restore(&parts.vm)?;
    // Only now: interrupts that devices raise as they go on would be lost with the controllers' earlier state.
    // Those that are new were not saved, and are the last ones.
    lock(&parts.bus.console).go_on();
    let new = load.network_additions.len() + load.share_additions.len();
    let saved = parts.bus.slots.len().saturating_sub(new);
    for slot in &parts.bus.slots[..saved] {
        let mut reader = Reader::new(devices.take("device")?);
        lock(slot).restore(&mut reader)?;
        reader.finish()?;
    }
    devices.finish()?;
    write_generation(&parts.memory).map_err(built)?;
    // Its driver learns that the random numbers of this machine are not its own any more.
    line(&parts.vm, layout::GENERATION_GSI).and_then(|line| Ok(line.write(1)?)).map_err(built)?;
    let mut machine = parts.start(surroundings).map_err(built)?;
    machine.memory_is_served_by(served);
    Ok((config, machine))
}

/// Hardware: all that is the same in a machine that boots and in one that goes on.
struct Parts {
    kvm: Kvm,
    bus: Arc<Bus>,
    places: Vec<Place>,
    handles: Handles,
    calls: confine::Machine,
    drained: EventFd,
    vcpus: Vec<VcpuFd>,
    vm: Arc<VmFd>,
    memory: Memory,
    template: Template,
}

impl Parts {
    /// `console` makes the serial port from its interrupt and the event of its empty buffer.
    fn assemble(
        config: &Config,
        memory: Memory,
        console: impl FnOnce(EventFd, EventFd) -> Result<Console, Error>,
        surroundings: &Surroundings,
        backends: &mut Backends,
    ) -> Result<Self, Error> {
        let template = config.cpu_config.as_ref().map(template::Source::template).transpose()?;
        let template = template.unwrap_or_default().into_owned();
        let kvm = open_kvm(&template)?;
        let size = memory::Size::from(config);
        let vm = Arc::new(create_vm(&kvm, &memory, memory::ranges(size.mib).len())?);
        let drained = event()?;
        let console = console(line(&vm, layout::SERIAL_GSI)?, drained.try_clone()?)?;
        let Slots { slots, mut places, handles, .. } =
            create_devices(&vm, &memory, config, &surroundings.mmds, backends)?;
        let spare = usize::from(config.spare_places) - config.late_network_interfaces.len();
        for index in slots.len()..slots.len() + spare {
            places.push(Place::of(index).ok_or(Error::TooManyDevices)?);
        }
        let mut calls: Vec<_> = slots.iter().map(|slot| lock(slot).system_calls()).collect();
        calls.extend(config.memory_hotplug.map(|_| hotplug::system_calls()));
        let bus = Arc::new(Bus {
            console: Mutex::new(console),
            keyboard: Mutex::new(Keyboard::new(line(&vm, layout::KEYBOARD_GSI)?)),
            boot_timer: surroundings.boot_timer,
            slots,
            spare,
            stop: Stop::new(event()?),
            exits: Exits::default(),
        });
        let vcpus = (0..config.machine_config.vcpu_count)
            .map(|cpu| vm.create_vcpu(cpu.into()).map_err(|e| Error::Kvm("create a processor", e)))
            .collect::<Result<_, _>>()?;
        let calls = confine::machine(&calls);
        Ok(Parts { kvm, bus, places, handles, calls, drained, vcpus, vm, memory, template })
    }

    /// Gives each processor its thread. They wait.
    fn start(self, surroundings: &Surroundings) -> Result<Machine, Error> {
        let policy = &surroundings.policy;
        let mut msrs = x86::state::msr_indices(&self.kvm)?;
        msrs.extend(self.template.msrs());
        msrs.sort_unstable();
        msrs.dedup();
        let filter = policy.filter(Thread::Processor, &self.calls.processor)?;
        let processors = Processors::start(self.vcpus, &self.bus, &filter)?;
        let filter = policy.filter(Thread::EventLoop, &self.calls.event_loop)?;
        let hardware = Hardware { msrs, vm: self.vm, memory: self.memory, served: None };
        Ok(Machine::new(
            processors,
            self.bus,
            self.handles,
            self.drained,
            filter,
            surroundings.mmds.clone(),
            hardware,
        )?)
    }
}

/// Another one each time.
fn write_generation(memory: &Memory) -> Result<(), Error> {
    let mut generation = [0; layout::GENERATION_SIZE];
    // So few bytes always come at once.
    rustix::rand::getrandom(&mut generation, rustix::rand::GetRandomFlags::empty())
        .map_err(io::Error::from)?;
    let written = memory.write_slice(&generation, GuestAddress(layout::GENERATION));
    written.map_err(|error| Error::Host(io::Error::other(error)))
}

fn open_kvm(template: &Template) -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(Error::NoKvm)?;
    for capability in
        [Cap::Irqchip, Cap::Irqfd, Cap::Ioeventfd, Cap::UserMemory, Cap::SetTssAddr, Cap::ExtCpuid]
    {
        if template.needs(capability as u32, true) && !kvm.check_extension(capability) {
            return Err(Error::Capability(capability));
        }
    }
    for number in template.kvm_capabilities.iter().map(|capability| capability.number) {
        if template.needs(number, false) && kvm.check_extension_raw(number.into()) <= 0 {
            return Err(Error::TemplateCapability(number));
        }
    }
    Ok(kvm)
}

/// A machine with interrupt controllers and the first `regions` of the memory; what is left can be plugged.
fn create_vm(kvm: &Kvm, memory: &Memory, regions: usize) -> Result<VmFd, Error> {
    let vm = kvm.create_vm().map_err(|e| Error::Kvm("create a machine", e))?;
    vm.set_tss_address(layout::KVM_TSS).map_err(|e| Error::Kvm("place its own pages", e))?;
    vm.create_irq_chip().map_err(|e| Error::Kvm("create interrupt controllers", e))?;
    for (slot, region) in memory.iter().take(regions).enumerate() {
        let region = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: if region.get_mmap().bitmap().pages().is_some() { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is a mapping that the machine owns and drops after the descriptor of the machine, and no two
        // regions overlap.
        unsafe { vm.set_user_memory_region(region) }.map_err(|e| Error::Kvm("take the guest's memory", e))?;
    }
    Ok(vm)
}

/// An event that KVM turns into an interrupt.
fn line(vm: &VmFd, gsi: u32) -> Result<EventFd, Error> {
    let line = event()?;
    vm.register_irqfd(&line, gsi).map_err(|e| Error::Kvm("connect an interrupt", e))?;
    Ok(line)
}

fn create_devices<'a>(
    vm: &'a Arc<VmFd>,
    memory: &'a Memory,
    config: &Config,
    mmds: &mmds::Shared,
    backends: &mut Backends,
) -> Result<Slots<'a>, Error> {
    let mut slots = Slots { vm, memory, slots: Vec::new(), places: Vec::new(), handles: Handles::default() };
    let served = config.mmds_config.as_ref().map(|config| (config, mmds));
    if let Some((config, mmds)) = served {
        lock(mmds).configure(config);
    }
    config.ordered_drives().into_iter().try_for_each(|drive| slots.plug_disk(drive, backends))?;
    config.network_interfaces.iter().try_for_each(|interface| slots.plug_card(interface, served))?;
    if let Some(vsock) = &config.vsock {
        slots.plug(vsock::Vsock::new(u64::from(vsock.guest_cid), &vsock.uds_path)?, None)?;
    }
    if let Some(wanted) = config.balloon {
        let config = balloon::Config {
            mib: wanted.amount_mib,
            deflate_on_oom: wanted.deflate_on_oom,
            reporting: wanted.free_page_reporting,
            statistics: Duration::from_secs(wanted.stats_polling_interval_s.into()),
        };
        slots.handles.balloon = Some(slots.plug(balloon::Balloon::new(config)?, None)?);
    }
    if let Some(entropy) = &config.entropy {
        slots.plug(rng::Rng::new(entropy.rate_limiter.unwrap_or_default().into())?, None)?;
    }
    if let Some(device) = config.memory_hotplug.and_then(|wanted| hotplug::device(&wanted, config.into())) {
        let first = memory::ranges(config.machine_config.mem_size_mib).len() as u32;
        let host = hotplug::Slots::new(vm.clone(), memory.clone(), first, device);
        slots.handles.hotplug = Some(slots.plug(mem::Mem::new(device, Box::new(host)), None)?);
    }
    // After all others, whose places are those of the saved machine.
    config.late_network_interfaces.iter().try_for_each(|interface| slots.plug_card(interface, served))?;
    for share in &config.shares {
        let session = backends::directory(share).map_err(|e| Error::Backend(share.tag.clone(), e))?;
        slots.plug(session, Some(&share.tag))?;
    }
    Ok(slots)
}

struct Slots<'a> {
    vm: &'a Arc<VmFd>,
    memory: &'a Memory,
    slots: Vec<SharedSlot>,
    places: Vec<Place>,
    handles: Handles,
}

impl Slots<'_> {
    fn plug_disk(&mut self, drive: &Drive, backends: &mut Backends) -> Result<(), Error> {
        let name = &drive.drive_id;
        match drive.backing()? {
            Backing::File(path) => {
                let block = block::Block::new(block::Config {
                    serial: name.clone(),
                    path: path.to_owned(),
                    read_only: drive.read_only(),
                    flush: drive.cache_type == CacheType::Writeback,
                    limits: drive.rate_limiter.unwrap_or_default().into(),
                })?;
                let disk = self.plug(block, Some(name))?;
                self.handles.disks.push((name.clone(), disk));
            }
            Backing::Socket(socket) => {
                let session = backends.take(drive, socket).map_err(|e| Error::Backend(name.clone(), e))?;
                let disk = self.plug(session, Some(name))?;
                self.handles.served_disks.push((name.clone(), disk));
            }
        }
        Ok(())
    }

    fn plug_card(
        &mut self,
        interface: &NetworkInterface,
        mmds: Option<(&mmds::Config, &mmds::Shared)>,
    ) -> Result<(), Error> {
        let limits = |limiter: Option<RateLimiter>| limiter.unwrap_or_default().into();
        let name = &interface.iface_id;
        let mut card = net::Net::new(net::Config {
            tap: interface.host_dev_name.clone(),
            mac: interface.guest_mac.map(|mac| mac.0),
            mtu: interface.mtu,
            receive: limits(interface.rx_rate_limiter),
            transmit: limits(interface.tx_rate_limiter),
        })?;
        if let Some((config, mmds)) = mmds.filter(|(config, _)| config.network_interfaces.contains(name)) {
            card.serve(Metadata::new(config.address(), mmds.clone()))?;
        }
        let card = self.plug(card, Some(name))?;
        self.handles.interfaces.push((name.clone(), card));
        Ok(())
    }

    /// Gives a device the next place. Neither its interrupts nor its driver's notifications pass through the monitor's
    /// processor threads: KVM signals and is signalled.
    fn plug<D: Device + 'static>(
        &mut self,
        device: D,
        name: Option<&str>,
    ) -> Result<Arc<Mutex<Transport<D>>>, Error> {
        let place = Place::of(self.slots.len()).ok_or(Error::TooManyDevices)?;
        let line = line(self.vm, place.gsi)?;
        let transport = Arc::new(Mutex::new(Transport::new(device, self.memory.clone(), line)?));
        let slot: SharedSlot = transport.clone();
        let notify = IoEventAddress::Mmio(place.address + register::QUEUE_NOTIFY);
        for (queue, event) in lock(&slot).queue_events().iter().enumerate() {
            let connected = self.vm.register_ioevent(event, &notify, queue as u32);
            connected.map_err(|e| Error::Kvm("connect a queue", e))?;
        }
        self.slots.push(slot);
        self.handles.names.push(name.map(str::to_owned));
        self.places.push(place);
        Ok(transport)
    }
}

fn describe_processors(Parts { kvm, vcpus, template, .. }: &Parts) -> Result<(), Error> {
    let mut supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| Error::Kvm("describe the processor", e))?;
    template.change(&mut supported)?;
    for (cpu, vcpu) in vcpus.iter().enumerate() {
        let position = cpuid::Position { cpu: cpu as u8, cpus: vcpus.len() as u8 };
        let answers = cpuid::for_processor(&supported, position);
        vcpu.set_cpuid2(&answers).map_err(|e| Error::Kvm("take a processor's description", e))?;
        template.change_msrs(vcpu)?;
        processor::configure(vcpu)?;
    }
    Ok(())
}

fn event() -> io::Result<EventFd> {
    EventFd::new(EFD_NONBLOCK)
}
