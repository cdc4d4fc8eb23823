//! Where things are in the guest's physical address space, and which interrupts they have.
//!
//! ```text
//! 0x0000_0500  GDT and IDT          0x0000_6000  PVH start info      0x0000_7000  zero page / memory map
//! 0x0000_9000  page tables          0x0002_0000  command line        0x000e_0000  ACPI tables
//! 0x0010_0000  kernel … initrd at the end of low memory
//! 0xc000_0000  hole: boot timer, virtio-mmio windows, I/O APIC, local APIC, KVM's own pages
//! 0x1_0000_0000  the rest of the memory
//! ```

/// GDT of the boot processor.
pub const GDT: u64 = 0x500;
/// IDT of the boot processor, empty.
pub const IDT: u64 = 0x520;
/// PVH's description of the machine.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH's list with the initrd.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH's memory map.
pub const PVH_MEMORY_MAP: u64 = 0x7000;
/// Linux's description of the machine; never together with PVH's.
pub const ZERO_PAGE: u64 = 0x7000;
/// The top level of page tables; the two others follow.
pub const PML4: u64 = 0x9000;
/// The kernel's command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line with its final zero, in bytes; the kernel's own limit.
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of the first megabyte's usable memory.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, up to [`GENERATION`].
pub const ACPI: u64 = 0xe_0000;
/// The machine's generation, which is another one in every machine that continues a snapshot.
pub const GENERATION: u64 = 0xf_f000;
/// Length of a generation, in bytes.
pub const GENERATION_SIZE: usize = 16;
/// Usable memory continues here; kernels do not go below.
pub const HIGH_RAM: u64 = 0x10_0000;
/// Memory is not here but devices are, up to [`HOLE_END`].
pub const HOLE: u64 = 0xc000_0000;
/// Memory continues here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// The boot timer, whether there is one or not.
pub const BOOT_TIMER: u64 = HOLE;
/// The first device's window.
pub const MMIO: u64 = BOOT_TIMER + 0x1000;
/// I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local APICs.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM needs on some Intel processors.
pub const KVM_TSS: usize = 0xfffb_d000;

/// Interrupt of the keyboard.
pub const KEYBOARD_GSI: u32 = 1;
/// Interrupt of the serial port.
pub const SERIAL_GSI: u32 = 4;
/// The first device's interrupt.
pub const FIRST_GSI: u32 = 5;
/// Interrupts that the I/O APIC has.
pub const GSIS: u32 = 24;
/// Interrupt of a new generation.
pub const GENERATION_GSI: u32 = GSIS - 1;
/// Devices that there are interrupts for.
pub const DEVICES_MAX: usize = (GENERATION_GSI - FIRST_GSI) as usize;

/// Ports of the serial port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The keyboard controller's data.
pub const KEYBOARD_DATA_PORT: u16 = 0x60;
/// The keyboard controller's commands and status.
pub const KEYBOARD_COMMAND_PORT: u16 = 0x64;
/// The register by which the guest goes to sleep (ACPI 6.5, section 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// Its status.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// Any write resets the machine.
pub const RESET_PORT: u16 = 0x602;
/// What the guest writes to sleep for good: SLP_EN and the type of `\_S5`.
pub const SLEEP_S5: u8 = 1 << 5 | S5_TYPE << 2;
/// The type that `\_S5` gives.
pub const S5_TYPE: u8 = 5;
