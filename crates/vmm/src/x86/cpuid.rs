//! What the guest's processors say about themselves: what KVM can do, less what a microVM does not have, the same on every
//! processor but for its number.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// One processor among those of its machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Its number, which is its APIC's too.
    pub cpu: u8,
    /// How many there are.
    pub cpus: u8,
}

/// Leaf 1, ECX: debug store, power management, nested virtualisation and the like, which are not given to guests.
const HIDDEN_1_ECX: u32 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8 | 1 << 15;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: debug store, thermal monitors; several logical processors.
const HIDDEN_1_EDX: u32 = 1 << 21 | 1 << 22 | 1 << 29;
const HTT: u32 = 1 << 28;
/// Leaf 6, EAX: the local APIC's timer does not stop when the processor sleeps (ARAT).
const ALWAYS_RUNNING_TIMER: u32 = 1 << 2;
/// Leaf 7, EBX: SGX.
const HIDDEN_7_EBX: u32 = 1 << 2;
/// Leaf 7, EDX: AMX, whose state the host's kernel would have to permit first.
const HIDDEN_7_EDX: u32 = 1 << 22 | 1 << 24 | 1 << 25;
/// Leaf 0x80000001, ECX: nested virtualisation, performance counters.
const HIDDEN_EXT_1_ECX: u32 = 1 << 2 | 1 << 23 | 1 << 24 | 1 << 28;

/// The answers for one processor, from what KVM supports.
pub fn for_processor(supported: &CpuId, position: Position) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        normalise(entry, position);
    }
    cpuid
}

fn normalise(entry: &mut kvm_cpuid_entry2, Position { cpu, cpus }: Position) {
    let (apic, shift) = (u32::from(cpu), apic_id_bits(cpus));
    match entry.function {
        0x1 => {
            entry.ebx = entry.ebx & 0xff00 | apic << 24 | (1 << shift) << 16 | entry.ebx & 0xff;
            entry.ecx = entry.ecx & !HIDDEN_1_ECX | HYPERVISOR | TSC_DEADLINE;
            entry.edx = entry.edx & !(HIDDEN_1_EDX | HTT) | if cpus > 1 { HTT } else { 0 };
        }
        // Caches: the first two levels belong to a processor, the third to all.
        0x4 if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { (1 << shift) - 1 } else { 0 };
            entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << shift) - 1) << 26;
        }
        0x8000_001d if entry.eax & 0x1f != 0 => {
            let sharing = if entry.eax >> 5 & 7 >= 3 { u32::from(cpus) - 1 } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
        }
        // Power management: none, but a timer that runs in all states, as KVM's does. Without the bit Linux waits for a second
        // timer to take over, which is not there, and ticks for ever instead of sleeping until something is due.
        0x6 => {
            clear(entry);
            entry.eax = ALWAYS_RUNNING_TIMER;
        }
        // Performance counters, monitoring, resource control, SGX, processor trace: none.
        0x5 | 0xa | 0xf | 0x10 | 0x12 | 0x14 | 0x8000_001b | 0x8000_0022 => clear(entry),
        0x7 if entry.index == 0 => {
            entry.ebx &= !HIDDEN_7_EBX;
            entry.edx &= !HIDDEN_7_EDX;
        }
        0xb | 0x1f => topology(entry, apic, shift, cpus),
        // SVM itself is hidden, so is what it can do.
        0x8000_000a => clear(entry),
        0x8000_0001 => entry.ecx &= !HIDDEN_EXT_1_ECX,
        0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | shift << 12 | (u32::from(cpus) - 1),
        0x8000_001e => {
            entry.eax = apic;
            entry.ebx = apic & 0xff;
            entry.ecx = 0;
        }
        _ => {}
    }
}

/// One thread a core, all cores in one package.
fn topology(entry: &mut kvm_cpuid_entry2, apic: u32, shift: u32, cpus: u8) {
    let (bits, count, kind) = match entry.index {
        0 => (0, 1, 1),
        1 => (shift, u32::from(cpus), 2),
        _ => (0, 0, 0),
    };
    entry.eax = bits;
    entry.ebx = count;
    entry.ecx = entry.index & 0xff | kind << 8;
    entry.edx = apic;
}

fn clear(entry: &mut kvm_cpuid_entry2) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
}

/// Bits that tell the processors' numbers apart.
fn apic_id_bits(cpus: u8) -> u32 {
    u32::from(cpus).next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, position: Position) -> kvm_cpuid_entry2 {
        let entry = kvm_cpuid_entry2 {
            function,
            index,
            eax: 0xffff_ffff,
            ebx: 0xffff_ffff,
            ecx: 0xffff_ffff,
            edx: 0xffff_ffff,
            ..Default::default()
        };
        let supported = CpuId::from_entries(&[entry]).unwrap();
        for_processor(&supported, position).as_slice()[0]
    }

    #[test]
    fn a_processor_knows_its_number_and_how_many_there_are() {
        let position = Position { cpu: 2, cpus: 3 };
        let one = leaf(1, 0, position);
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff, one.edx & HTT), (2, 4, HTT));
        assert_eq!(leaf(1, 0, Position { cpu: 0, cpus: 1 }).edx & HTT, 0);
        let cores = leaf(0xb, 1, position);
        assert_eq!((cores.eax, cores.ebx, cores.ecx, cores.edx), (2, 3, 0x201, 2));
        let end = leaf(0xb, 2, position);
        assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
        assert_eq!(leaf(0x8000_0008, 0, position).ecx & 0xf0ff, 0x2002);
    }

    #[test]
    fn what_a_microvm_does_not_have_is_not_shown() {
        let position = Position { cpu: 0, cpus: 1 };
        let one = leaf(1, 0, position);
        assert_eq!(one.ecx & (1 << 5 | 1 << 3), 0);
        assert_ne!(one.ecx & HYPERVISOR, 0);
        assert_eq!(leaf(0x8000_0001, 0, position).ecx & 1 << 2, 0);
        assert_eq!(leaf(0xa, 0, position).eax, 0);
        let power = leaf(6, 0, position);
        assert_eq!((power.eax, power.ebx, power.ecx, power.edx), (ALWAYS_RUNNING_TIMER, 0, 0, 0));
        assert_eq!(leaf(7, 0, position).edx & HIDDEN_7_EDX, 0);
        assert_eq!(leaf(7, 1, position).edx, u32::MAX);
    }
}
