//! The ACPI tables (hardware-reduced, ACPI 6.5): processors, interrupts, devices, sleep and reset.

use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink, aml};
use kapsel_devices::{Memory, mmio};
use vm_memory::{Bytes, GuestAddress};

use super::layout;

const OEM: [u8; 6] = *b"KAPSEL";
const TABLE: [u8; 8] = *b"KAPSELVM";
/// In the FADT's IAPC_BOOT_ARCH: a keyboard controller; no VGA to look for; no message signalled interrupts; no CMOS clock.
const BOOT_ARCH: u16 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 5;
/// The header of a system description table, in bytes.
const HEADER: u32 = 36;

/// A device's window and interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Guest address of its registers.
    pub address: u64,
    /// Its interrupt.
    pub gsi: u32,
}

impl Place {
    /// The place of the device of that index; `None` when all are taken.
    pub fn of(index: usize) -> Option<Self> {
        (index < layout::DEVICES_MAX).then(|| Place {
            address: layout::MMIO + index as u64 * mmio::WINDOW,
            gsi: layout::FIRST_GSI + index as u32,
        })
    }
}

/// The tables do not fit where they belong.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables do not fit below 1 MiB")]
pub struct TooLarge;

/// Writes the tables for `cpus` processors and a device in each of `places`; the root pointer is at [`layout::ACPI`].
///
/// # Errors
/// [`TooLarge`].
pub fn write(memory: &Memory, cpus: u8, places: &[Place]) -> Result<(), TooLarge> {
    let mut next = layout::ACPI + Rsdp::len().next_multiple_of(16) as u64;
    let mut place = |table: &dyn Aml| {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes as &mut dyn AmlSink);
        let address = next;
        next += bytes.len().next_multiple_of(16) as u64;
        if next > layout::GENERATION {
            return Err(TooLarge);
        }
        memory.write_slice(&bytes, GuestAddress(address)).map_err(|_| TooLarge)?;
        Ok(address)
    };
    let dsdt = place(&dsdt(places))?;
    let fadt = place(&fadt(dsdt))?;
    let madt = place(&madt(cpus))?;
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = place(&xsdt)?;
    let mut root = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut root);
    memory.write_slice(&root, GuestAddress(layout::ACPI)).map_err(|_| TooLarge)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(layout::RESET_PORT);
    fadt.reset_value = 1;
    fadt.sleep_control_reg = port(layout::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(layout::SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(TABLE).into();
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let mut madt = MADT::new(OEM, TABLE, 1, LocalInterruptController::Address(layout::LAPIC));
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt
}

fn dsdt(places: &[Place]) -> Sdt {
    let mut bytes = Vec::new();
    for (index, place) in places.iter().enumerate() {
        let path = format!("_SB_.V{index:03}");
        aml::Device::new(
            path.as_str().into(),
            vec![
                &aml::Name::new("_HID".into(), &"LNRO0005"),
                &aml::Name::new("_UID".into(), &(index as u32)),
                &aml::Name::new("_CCA".into(), &aml::ONE),
                &aml::Name::new(
                    "_CRS".into(),
                    &aml::ResourceTemplate::new(vec![
                        &aml::Memory32Fixed::new(true, place.address as u32, mmio::WINDOW as u32),
                        &aml::Interrupt::new(true, true, false, false, place.gsi),
                    ]),
                ),
            ],
        )
        .to_aml_bytes(&mut bytes);
    }
    aml::Device::new(
        "_SB_.COM1".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0501")),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &aml::IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, 8),
                    &aml::Interrupt::new(true, true, false, false, layout::SERIAL_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    let byte = |port: u16| aml::IO::new(port, port, 1, 1);
    aml::Device::new(
        "_SB_.PS2_".into(),
        vec![
            &aml::Name::new("_HID".into(), &aml::EISAName::new("PNP0303")),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![
                    &byte(layout::KEYBOARD_DATA_PORT),
                    &byte(layout::KEYBOARD_COMMAND_PORT),
                    &aml::Interrupt::new(true, true, false, false, layout::KEYBOARD_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    generation(&mut bytes);
    aml::Name::new("_S5_".into(), &aml::Package::new(vec![&layout::S5_TYPE])).to_aml_bytes(&mut bytes);
    let mut table = Sdt::new(*b"DSDT", HEADER, 6, OEM, TABLE, 1);
    table.append_slice(&bytes);
    table
}

/// Where the generation is (Microsoft's "Virtual Machine Generation ID"), and the interrupt that says that it is another one,
/// by a generic event device (ACPI 6.5, section 5.6.9).
fn generation(bytes: &mut Vec<u8>) {
    let (low, high) = (layout::GENERATION as u32, (layout::GENERATION >> 32) as u32);
    aml::Device::new(
        "_SB_.VGEN".into(),
        vec![
            &aml::Name::new("_HID".into(), &"VMGENCTR"),
            &aml::Name::new("_CID".into(), &"VM_Gen_Counter"),
            &aml::Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &aml::Name::new("ADDR".into(), &aml::Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(bytes);
    aml::Device::new(
        "_SB_.GED_".into(),
        vec![
            &aml::Name::new("_HID".into(), &"ACPI0013"),
            &aml::Name::new("_UID".into(), &aml::ZERO),
            &aml::Name::new(
                "_CRS".into(),
                &aml::ResourceTemplate::new(vec![&aml::Interrupt::new(
                    true,
                    true,
                    false,
                    false,
                    layout::GENERATION_GSI,
                )]),
            ),
            &aml::Method::new(
                "_EVT".into(),
                1,
                true,
                vec![&aml::If::new(
                    &aml::Equal::new(&aml::Arg(0), &layout::GENERATION_GSI),
                    vec![&aml::Notify::new(&aml::Path::new("\\_SB_.VGEN"), &0x80u8)],
                )],
            ),
        ],
    )
    .to_aml_bytes(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reads the table at `address`, whose bytes have to add up to zero.
    fn table(memory: &Memory, address: u64) -> (String, Vec<u8>) {
        let length: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; length as usize];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        assert_eq!(bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), 0);
        (String::from_utf8_lossy(&bytes[..4]).into_owned(), bytes)
    }

    #[test]
    fn the_tables_are_linked_and_sum_up() {
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
        let places: Vec<_> = (0..layout::DEVICES_MAX).map(|n| Place::of(n).unwrap()).collect();
        write(&memory, 32, &places).unwrap();
        let xsdt: u64 = memory.read_obj(GuestAddress(layout::ACPI + 24)).unwrap();
        let (name, xsdt) = table(&memory, xsdt);
        assert_eq!((name.as_str(), xsdt.len()), ("XSDT", 36 + 16));
        let entry = |n: usize| u64::from_le_bytes(xsdt[36 + n * 8..44 + n * 8].try_into().unwrap());
        let (name, fadt) = table(&memory, entry(0));
        assert_eq!(name, "FACP");
        let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
        let (name, dsdt) = table(&memory, dsdt);
        assert_eq!(name, "DSDT");
        assert_eq!(dsdt.windows(8).filter(|w| w == b"LNRO0005").count(), layout::DEVICES_MAX);
        let (name, madt) = table(&memory, entry(1));
        assert_eq!((name.as_str(), madt.len()), ("APIC", 44 + 12 + 32 * 8));
        assert_eq!(Place::of(layout::DEVICES_MAX), None);
    }
}
