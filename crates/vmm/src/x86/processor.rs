//! The state in which a processor starts.

use kapsel_devices::Memory;
use kvm_bindings::{Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::kernel::{Kernel, Protocol};

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// In page tables: present, writable, and a large page.
const PAGE: u64 = 0b11;
const LARGE_PAGE: u64 = PAGE | 1 << 7;

/// Where a stack may be until the kernel has one of its own.
const STACK: u64 = 0x8ff0;

/// Why a processor cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// KVM refused.
    #[error("KVM did not take the processor's {0}: {1}")]
    Kvm(&'static str, kvm_ioctls::Error),
    /// KVM took fewer registers than it was given.
    #[error("KVM does not know the model-specific register {0:#x}")]
    Msr(u32),
    /// Tables cannot be written.
    #[error("cannot write the processor's tables: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Sets what every processor needs: model-specific registers, floating point, the local APIC's lines.
///
/// # Errors
/// [`Error`].
pub fn configure(vcpu: &VcpuFd) -> Result<(), Error> {
    set_msrs(vcpu)?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(|e| Error::Kvm("floating point registers", e))?;
    let mut lapic = vcpu.get_lapic().map_err(|e| Error::Kvm("local APIC", e))?;
    // Line 0 takes interrupts of the old controllers, line 1 non-maskable ones (Intel's manual, volume 3, section 11.5.1).
    set_delivery(&mut lapic, 0x350, 7);
    set_delivery(&mut lapic, 0x360, 4);
    vcpu.set_lapic(&lapic).map_err(|e| Error::Kvm("local APIC", e))
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let bytes: [u8; 4] = std::array::from_fn(|n| lapic.regs[register + n] as u8);
    let value = u32::from_le_bytes(bytes) & !0x700 | mode << 8;
    for (n, byte) in value.to_le_bytes().into_iter().enumerate() {
        lapic.regs[register + n] = byte as std::ffi::c_char;
    }
}

fn set_msrs(vcpu: &VcpuFd) -> Result<(), Error> {
    // System call entries are zero until the kernel sets them; fast strings are on; memory is write-back by default.
    let values = [
        (0x174, 0),
        (0x175, 0),
        (0x176, 0),
        (0xc000_0081, 0),
        (0xc000_0082, 0),
        (0xc000_0083, 0),
        (0xc000_0084, 0),
        (0xc000_0102, 0),
        (0x10, 0),
        (0x1a0, 1),
        (0x2ff, 1 << 11 | 6),
    ];
    let entries = values.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|_| Error::Msr(0))?;
    let taken = vcpu.set_msrs(&msrs).map_err(|e| Error::Kvm("model-specific registers", e))?;
    values.get(taken).map_or(Ok(()), |(index, _)| Err(Error::Msr(*index)))
}

/// Points the boot processor at the kernel. The others wait for it.
///
/// # Errors
/// [`Error`].
pub fn point_at(vcpu: &VcpuFd, memory: &Memory, kernel: &Kernel) -> Result<(), Error> {
    let (code, data, cr0) = match kernel.protocol {
        Protocol::Pvh => (segment(1, 0xb, false), segment(2, 0x3, false), CR0_PE | CR0_ET),
        Protocol::Linux(_) => (segment(2, 0xb, true), segment(3, 0x3, false), CR0_PE | CR0_ET | CR0_PG),
    };
    let mut sregs = vcpu.get_sregs().map_err(|e| Error::Kvm("system registers", e))?;
    sregs.cs = code;
    for register in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *register = data;
    }
    sregs.tr = kvm_segment { base: 0, limit: 0x67, type_: 0xb, present: 1, ..Default::default() };
    let table: Vec<u8> = gdt(&[code, data]).iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory.write_slice(&table, GuestAddress(layout::GDT))?;
    memory.write_obj(0u64, GuestAddress(layout::IDT))?;
    (sregs.gdt.base, sregs.gdt.limit) = (layout::GDT, table.len() as u16 - 1);
    (sregs.idt.base, sregs.idt.limit) = (layout::IDT, 7);
    sregs.cr0 = cr0;
    sregs.cr4 = 0;
    sregs.efer = 0;
    if let Protocol::Linux(_) = kernel.protocol {
        write_page_tables(memory)?;
        sregs.cr3 = layout::PML4;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LME | EFER_LMA;
    }
    vcpu.set_sregs(&sregs).map_err(|e| Error::Kvm("system registers", e))?;
    let regs = kvm_regs {
        rflags: 2,
        rip: kernel.entry.0,
        rsp: STACK,
        rbp: STACK,
        rbx: if let Protocol::Pvh = kernel.protocol { layout::PVH_START_INFO } else { 0 },
        rsi: if let Protocol::Linux(_) = kernel.protocol { layout::ZERO_PAGE } else { 0 },
        ..Default::default()
    };
    vcpu.set_regs(&regs).map_err(|e| Error::Kvm("registers", e))
}

/// A flat segment whose descriptor is entry `index` of the table.
fn segment(index: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: index * 8,
        type_,
        present: 1,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// The descriptor table with these segments where their selectors say.
fn gdt(segments: &[kvm_segment]) -> [u64; 4] {
    let mut table = [0; 4];
    for segment in segments {
        let flags = u64::from(segment.g) << 3 | u64::from(segment.db) << 2 | u64::from(segment.l) << 1;
        let access = u64::from(segment.present) << 7 | u64::from(segment.s) << 4 | u64::from(segment.type_);
        // Limit 0xfffff in pages, base 0.
        table[usize::from(segment.selector / 8)] = 0xffff | 0xf << 48 | access << 40 | flags << 52;
    }
    table
}

/// The first gigabyte at its own addresses, in pages of 2 MiB.
fn write_page_tables(memory: &Memory) -> Result<(), Error> {
    let (directory_pointers, directory) = (layout::PML4 + 0x1000, layout::PML4 + 0x2000);
    memory.write_obj(directory_pointers | PAGE, GuestAddress(layout::PML4))?;
    memory.write_obj(directory | PAGE, GuestAddress(directory_pointers))?;
    for page in 0..512 {
        memory.write_obj((page << 21) | LARGE_PAGE, GuestAddress(directory + page * 8))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_what_the_manuals_show() {
        let table = gdt(&[segment(1, 0xb, false), segment(2, 0x3, false)]);
        assert_eq!(table, [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0]);
        assert_eq!(gdt(&[segment(2, 0xb, true)])[2], 0x00af_9b00_0000_ffff);
    }

    #[test]
    fn page_tables_map_the_first_gigabyte_to_itself() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        write_page_tables(&memory).unwrap();
        let entry = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        let directory = entry(entry(layout::PML4) & !0xfff) & !0xfff;
        assert_eq!(entry(directory + 8 * 511), 511 << 21 | LARGE_PAGE);
    }
}
