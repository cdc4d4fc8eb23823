//! What KVM knows of a machine beside its memory: processors, interrupt controllers, the clock.

use kapsel_devices::state::{Reader, StateError, Writer};
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, Msrs,
    kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Why KVM does not tell or take a state.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused.
    #[error("KVM did not {0}: {1}")]
    Kvm(&'static str, kvm_ioctls::Error),
    /// A register cannot be set to what it was.
    #[error(
        "KVM does not set the model-specific register {0:#x} to its saved value; is this another processor?"
    )]
    Msr(u32),
    /// The saved state is none.
    #[error(transparent)]
    State(#[from] StateError),
}

fn failed(what: &'static str) -> impl Fn(kvm_ioctls::Error) -> Error {
    move |error| Error::Kvm(what, error)
}

/// The numbers of the registers that KVM can save.
///
/// # Errors
/// [`Error::Kvm`].
pub fn msr_indices(kvm: &Kvm) -> Result<Vec<u32>, Error> {
    let list = kvm.get_msr_index_list().map_err(failed("list its registers"))?;
    Ok(list.as_slice().to_vec())
}

/// Saves clock and interrupt controllers.
///
/// # Errors
/// [`Error::Kvm`].
pub fn save_machine(vm: &VmFd) -> Result<Vec<u8>, Error> {
    let mut writer = Writer::default();
    let clock = vm.get_clock().map_err(failed("tell its clock"))?;
    writer.raw(clock.as_bytes());
    for chip_id in CHIPS {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        vm.get_irqchip(&mut chip).map_err(failed("tell an interrupt controller"))?;
        writer.raw(chip.as_bytes());
    }
    Ok(writer.finish())
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Clock and interrupt controllers as they were saved.
pub struct MachineState {
    clock: u64,
    chips: [kvm_irqchip; CHIPS.len()],
}

impl MachineState {
    /// Reads what [`save_machine`] gave.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn read(state: &[u8]) -> Result<Self, StateError> {
        let mut reader = Reader::new(state);
        let clock: kvm_clock_data = plain(&mut reader)?;
        let chips: [kvm_irqchip; CHIPS.len()] = plain(&mut reader)?;
        if chips.iter().map(|chip| chip.chip_id).ne(CHIPS) {
            return Err(StateError::Invalid("an interrupt controller"));
        }
        reader.finish()?;
        Ok(MachineState { clock: clock.clock, chips })
    }

    /// Has KVM take them up.
    ///
    /// # Errors
    /// [`Error::Kvm`].
    pub fn restore(&self, vm: &VmFd) -> Result<(), Error> {
        // Without flags the guest's clock goes on where it stood. With the time of day, which is saved too, it would jump.
        let clock = kvm_clock_data { clock: self.clock, ..Default::default() };
        vm.set_clock(&clock).map_err(failed("set its clock"))?;
        for chip in &self.chips {
            vm.set_irqchip(chip).map_err(failed("set an interrupt controller"))?;
        }
        Ok(())
    }
}

/// A value of a type for which every pattern of bytes is one.
fn plain<T: FromBytes>(reader: &mut Reader<'_>) -> Result<T, StateError> {
    let bytes = reader.raw(size_of::<T>())?;
    T::read_from_bytes(bytes).map_err(|_| StateError::Truncated)
}

fn list<T: IntoBytes + Immutable>(writer: &mut Writer, entries: &[T]) {
    writer.u32(entries.len() as u32);
    writer.raw(entries.as_bytes());
}

fn read_list<T: FromBytes>(reader: &mut Reader<'_>, max: usize) -> Result<Vec<T>, StateError> {
    let count = reader.u32()? as usize;
    if count > max {
        return Err(StateError::Invalid("a list is too long"));
    }
    (0..count).map(|_| plain(reader)).collect()
}

/// More registers than KVM has.
const MSRS_MAX: usize = 1024;

/// Saves a processor that stands still. The order matters to KVM: pending events are told last.
///
/// # Errors
/// [`Error::Kvm`].
pub fn save_processor(vcpu: &VcpuFd, msrs: &[u32]) -> Result<Vec<u8>, Error> {
    let mut writer = Writer::default();
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(failed("tell what a processor can do"))?;
    list(&mut writer, cpuid.as_slice());
    writer.u32(vcpu.get_tsc_khz().map_err(failed("tell the rate of a time stamp counter"))?);
    writer.raw(vcpu.get_mp_state().map_err(failed("tell whether a processor runs"))?.as_bytes());
    writer.raw(vcpu.get_regs().map_err(failed("tell registers"))?.as_bytes());
    writer.raw(vcpu.get_sregs().map_err(failed("tell system registers"))?.as_bytes());
    writer.raw(vcpu.get_xsave().map_err(failed("tell extended registers"))?.as_bytes());
    writer.raw(vcpu.get_xcrs().map_err(failed("tell extended control registers"))?.as_bytes());
    writer.raw(vcpu.get_debug_regs().map_err(failed("tell debug registers"))?.as_bytes());
    writer.raw(vcpu.get_lapic().map_err(failed("tell a local APIC"))?.as_bytes());
    list(&mut writer, &get_msrs(vcpu, msrs)?);
    writer.raw(vcpu.get_vcpu_events().map_err(failed("tell pending events"))?.as_bytes());
    Ok(writer.finish())
}

/// A processor as it was saved.
pub struct ProcessorState {
    cpuid: CpuId,
    tsc_khz: u32,
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

impl ProcessorState {
    /// Reads what [`save_processor`] gave.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn read(state: &[u8]) -> Result<Self, StateError> {
        let mut reader = Reader::new(state);
        let entries: Vec<kvm_cpuid_entry2> = read_list(&mut reader, KVM_MAX_CPUID_ENTRIES)?;
        let invalid = |_| StateError::Invalid("what a processor can do");
        let state = ProcessorState {
            cpuid: CpuId::from_entries(&entries).map_err(invalid)?,
            tsc_khz: reader.u32()?,
            mp_state: plain(&mut reader)?,
            regs: plain(&mut reader)?,
            sregs: plain(&mut reader)?,
            xsave: plain(&mut reader)?,
            xcrs: plain(&mut reader)?,
            debug_regs: plain(&mut reader)?,
            lapic: plain(&mut reader)?,
            msrs: read_list(&mut reader, MSRS_MAX)?,
            events: plain(&mut reader)?,
        };
        reader.finish()?;
        Ok(state)
    }

    /// Has KVM take it up. The order matters to KVM: what a processor can do comes first, its timers after its APIC.
    ///
    /// # Errors
    /// [`Error`].
    pub fn restore(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        vcpu.set_cpuid2(&self.cpuid).map_err(failed("take what a processor can do"))?;
        if vcpu.get_tsc_khz().map_err(failed("tell the rate of a time stamp counter"))? != self.tsc_khz {
            vcpu.set_tsc_khz(self.tsc_khz).map_err(failed("set the rate of a time stamp counter"))?;
        }
        vcpu.set_mp_state(self.mp_state).map_err(failed("set whether a processor runs"))?;
        vcpu.set_regs(&self.regs).map_err(failed("set registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(failed("set system registers"))?;
        // SAFETY: the request reads 4096 bytes, which the structure has; no larger state was ever asked for.
        unsafe { vcpu.set_xsave(&self.xsave) }.map_err(failed("set extended registers"))?;
        vcpu.set_xcrs(&self.xcrs).map_err(failed("set extended control registers"))?;
        vcpu.set_debug_regs(&self.debug_regs).map_err(failed("set debug registers"))?;
        vcpu.set_lapic(&self.lapic).map_err(failed("set a local APIC"))?;
        set_msrs(vcpu, &self.msrs)?;
        vcpu.set_vcpu_events(&self.events).map_err(failed("set pending events"))
    }
}

/// Those of the registers that this processor has.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, Error> {
    let mut found = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let entries: Vec<_> =
            rest.iter().map(|index| kvm_msr_entry { index: *index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| Error::Msr(rest[0]))?;
        let count = vcpu.get_msrs(&mut msrs).map_err(failed("tell model-specific registers"))?;
        found.extend_from_slice(&msrs.as_slice()[..count]);
        // KVM stops at the first that this processor does not have.
        rest = rest.get(count + 1..).unwrap_or_default();
    }
    Ok(found)
}

/// A register that cannot be set has to have its value already.
fn set_msrs(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), Error> {
    let mut rest = entries;
    while let Some(first) = rest.first() {
        let msrs = Msrs::from_entries(rest).map_err(|_| Error::Msr(first.index))?;
        let count = vcpu.set_msrs(&msrs).map_err(failed("set model-specific registers"))?;
        let Some(refused) = rest.get(count) else { break };
        let has = get_msrs(vcpu, &[refused.index])?;
        if !has.iter().any(|entry| entry.data == refused.data) {
            return Err(Error::Msr(refused.index));
        }
        rest = &rest[count + 1..];
    }
    Ok(())
}
