//! An ACPI table that tells the guest of virtio-mmio slots that are empty when it boots.
//!
//! QEMU's `microvm` machine describes only the slots that hold a device at start, and has no hotplug. A machine that is
//! restored from a snapshot may however have devices (shared directories) that the saved one did not have. So the
//! initramfs brings a table of its own (Documentation/admin-guide/acpi/initrd_table_override.rst) with the slots that
//! are kept for that; the guest's driver finds nothing there at boot and is told to look again after the restore. On other
//! machines, which have no such places, the devices of the table say that they are not there.

/// Slots for devices that come with a restore: the last ones of the 24 that the machine has.
pub(crate) const SLOTS: std::ops::Range<u32> = 8..24;

/// Where the kernel looks for tables in an initramfs.
pub(crate) const PATH: &str = "kernel/firmware/acpi/kapsel.aml";

/// Slots of QEMU's `microvm` with a second IOAPIC: 512 bytes each from here, one interrupt each.
const BASE: u32 = 0xfeb0_0000;
const SIZE: u32 = 0x200;
const FIRST_INTERRUPT: u32 = 24;

/// What QEMU's own table always has and no other machine's does: `\_SB.FWCF`, its configuration device.
const OF_QEMU: &[u8] = b"\\\x2e_SB_FWCF";

/// The table: `Scope (\_SB) { Device (K008) { … } … }`.
pub(crate) fn table() -> Vec<u8> {
    let mut scope = b"\\_SB_".to_vec();
    for slot in SLOTS {
        scope.extend(device(slot));
    }
    let body = package(&[0x10], &scope);
    let mut table = b"SSDT".to_vec();
    table.extend((36 + body.len() as u32).to_le_bytes());
    table.extend([2, 0]);
    table.extend(b"KAPSELMMIOSLOT");
    table.extend(1u32.to_le_bytes());
    table.extend(b"KPSL");
    table.extend(1u32.to_le_bytes());
    table.extend(body);
    table[9] = table.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    table
}

fn device(slot: u32) -> Vec<u8> {
    let mut body = format!("K{slot:03X}").into_bytes();
    body.extend(name(b"_HID", b"\x0dLNRO0005\0"));
    body.extend(name(b"_UID", &[0x0a, slot as u8]));
    let mut resources = vec![0x86, 9, 0, 1];
    resources.extend((BASE + slot * SIZE).to_le_bytes());
    resources.extend(SIZE.to_le_bytes());
    // An extended interrupt descriptor: consumer, level, active high, exclusive; then the end tag.
    resources.extend([0x89, 6, 0, 0b0001, 1]);
    resources.extend((FIRST_INTERRUPT + slot).to_le_bytes());
    resources.extend([0x79, 0]);
    let mut buffer = vec![0x0a, resources.len() as u8];
    buffer.extend(resources);
    body.extend(name(b"_CRS", &package(&[0x11], &buffer)));
    body.extend(status());
    package(&[0x5b, 0x82], &body)
}

/// `Method (_STA) { If (CondRefOf (\_SB.FWCF)) { Return (0x0f) } Return (Zero) }`: present, or not.
fn status() -> Vec<u8> {
    let condition = [&[0x5b, 0x12], OF_QEMU, &[0]].concat();
    let present = package(&[0xa0], &[&condition[..], &[0xa4, 0x0a, 0x0f]].concat());
    package(&[0x14], &[&b"_STA"[..], &[0], &present, &[0xa4, 0]].concat())
}

fn name(name: &[u8; 4], value: &[u8]) -> Vec<u8> {
    [&[0x08], &name[..], value].concat()
}

/// An opcode, the length of what follows (which counts itself; ACPI 6.5, 20.2.4), and that.
fn package(opcode: &[u8], body: &[u8]) -> Vec<u8> {
    let length = if body.len() + 1 < 0x40 {
        vec![body.len() as u8 + 1]
    } else {
        let total = body.len() + 2;
        vec![0x40 | (total & 0xf) as u8, (total >> 4) as u8]
    };
    [opcode, &length, body].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_well_formed() {
        let table = table();
        assert_eq!(table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        assert_eq!(u32::from_le_bytes(table[4..8].try_into().unwrap()) as usize, table.len());
        assert_eq!(table.windows(8).filter(|w| w == b"LNRO0005").count(), SLOTS.len());
        assert!(table.len() < 36 + 4096, "lengths of two bytes reach this far");
    }
}
