//! What a kernel finds in memory when it starts: the command line and a description of the machine, in PVH's format or
//! in Linux's.

use kapsel_devices::Memory;
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::layout;
use crate::kernel::{Initrd, Kernel, Protocol};

const RAM: u32 = 1;
const RESERVED: u32 = 2;
const PVH_MAGIC: u32 = 0x336e_c578;
const SETUP_MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.15, for a kernel without a setup header of its own.
const SETUP_VERSION: u16 = 0x020f;
/// "Undefined": no loader of the kernel's list.
const LOADER_UNDEFINED: u8 = 0xff;

/// Why a kernel cannot be told about its machine.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Too long, or with a zero in it.
    #[error("the kernel's command line must have less than {max} bytes and no zero byte; it has {0} bytes", max = layout::COMMAND_LINE_MAX)]
    CommandLine(usize),
    /// The first megabyte is not there.
    #[error("the guest's memory is too small for what a kernel needs to start: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// A part of the guest's physical memory map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area {
    start: u64,
    size: u64,
    kind: u32,
}

fn memory_map(memory: &Memory) -> Vec<Area> {
    let area = |start, end, kind| Area { start, size: end - start, kind };
    let mut map = vec![area(0, layout::LOW_RAM_END, RAM), area(layout::ACPI, layout::HIGH_RAM, RESERVED)];
    for region in memory.iter() {
        let start = region.start_addr().0.max(layout::HIGH_RAM);
        map.push(area(start, region.start_addr().0 + region.len(), RAM));
    }
    map
}

/// Writes everything that the kernel's protocol asks for, except ACPI's tables.
///
/// # Errors
/// [`Error`].
pub fn describe(
    memory: &Memory,
    kernel: &Kernel,
    initrd: Option<Initrd>,
    command_line: &str,
) -> Result<(), Error> {
    if command_line.len() >= layout::COMMAND_LINE_MAX || command_line.contains('\0') {
        return Err(Error::CommandLine(command_line.len()));
    }
    memory.write_slice(command_line.as_bytes(), GuestAddress(layout::COMMAND_LINE))?;
    memory.write_obj(0u8, GuestAddress(layout::COMMAND_LINE + command_line.len() as u64))?;
    match &kernel.protocol {
        Protocol::Pvh => describe_pvh(memory, initrd),
        Protocol::Linux(header) => describe_linux(memory, header, initrd, command_line.len()),
    }
}

fn describe_pvh(memory: &Memory, initrd: Option<Initrd>) -> Result<(), Error> {
    let mut start = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: layout::COMMAND_LINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.size, ..Default::default() };
        memory.write_slice(Plain(module).as_slice(), GuestAddress(layout::PVH_MODULES))?;
        start.nr_modules = 1;
        start.modlist_paddr = layout::PVH_MODULES;
    }
    let mut at = layout::PVH_MEMORY_MAP;
    for Area { start: addr, size, kind } in memory_map(memory) {
        let entry = hvm_memmap_table_entry { addr, size, type_: kind, reserved: 0 };
        memory.write_slice(Plain(entry).as_slice(), GuestAddress(at))?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
        start.memmap_entries += 1;
    }
    memory.write_slice(Plain(start).as_slice(), GuestAddress(layout::PVH_START_INFO))?;
    Ok(())
}

fn describe_linux(
    memory: &Memory,
    header: &setup_header,
    initrd: Option<Initrd>,
    command_line: usize,
) -> Result<(), Error> {
    let mut page = boot_params { hdr: *header, acpi_rsdp_addr: layout::ACPI, ..Default::default() };
    if page.hdr.header != SETUP_MAGIC {
        page.hdr.header = SETUP_MAGIC;
        page.hdr.version = SETUP_VERSION;
        page.hdr.kernel_alignment = 0x0100_0000;
    }
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.boot_flag = 0xaa55;
    page.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    page.hdr.cmdline_size = command_line as u32;
    if let Some(initrd) = initrd {
        // Below the hole, so 32 bits hold it.
        page.hdr.ramdisk_image = initrd.address as u32;
        page.hdr.ramdisk_size = initrd.size as u32;
    }
    for (entry, Area { start: addr, size, kind }) in page.e820_table.iter_mut().zip(memory_map(memory)) {
        *entry = boot_e820_entry { addr, size, r#type: kind };
        page.e820_entries += 1;
    }
    memory.write_slice(Plain(page).as_slice(), GuestAddress(layout::ZERO_PAGE))?;
    Ok(())
}

/// Bytes of a structure of a boot protocol.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Plain<T>(T);

// SAFETY: the structures are integers and arrays of them, laid out by the protocols without padding; they are only written.
unsafe impl ByteValued for Plain<hvm_start_info> {}
// SAFETY: as above.
unsafe impl ByteValued for Plain<hvm_modlist_entry> {}
// SAFETY: as above.
unsafe impl ByteValued for Plain<hvm_memmap_table_entry> {}
// SAFETY: as above; `boot_params` is packed.
unsafe impl ByteValued for Plain<boot_params> {}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> Memory {
        Memory::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap()
    }

    fn kernel(protocol: Protocol) -> Kernel {
        Kernel { entry: GuestAddress(0x10_0000), protocol, end: 0x20_0000 }
    }

    #[test]
    fn pvh_finds_everything_from_its_start_info() {
        let memory = memory();
        let initrd = Initrd { address: 0x30_0000, size: 77 };
        describe(&memory, &kernel(Protocol::Pvh), Some(initrd), "quiet").unwrap();
        let word = |at: u64| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        let start = layout::PVH_START_INFO;
        assert_eq!(word(start) as u32, PVH_MAGIC);
        assert_eq!(word(word(start + 16)), 0x30_0000);
        assert_eq!(word(word(start + 16) + 8), 77);
        assert_eq!(word(word(start + 24)).to_le_bytes()[..6], *b"quiet\0");
        assert_eq!(word(start + 32), layout::ACPI);
        assert_eq!((word(start + 40), word(start + 48)), (layout::PVH_MEMORY_MAP, 3));
        assert_eq!(word(layout::PVH_MEMORY_MAP + 2 * 24), layout::HIGH_RAM);
        assert_eq!(word(layout::PVH_MEMORY_MAP + 2 * 24 + 8), (64 << 20) - layout::HIGH_RAM);
    }

    #[test]
    fn linux_finds_everything_in_its_zero_page() {
        let memory = memory();
        describe(&memory, &kernel(Protocol::Linux(Box::default())), None, "quiet").unwrap();
        let at = |offset: u64| GuestAddress(layout::ZERO_PAGE + offset);
        assert_eq!(memory.read_obj::<u8>(at(0x1e8)).unwrap(), 3);
        assert_eq!(memory.read_obj::<u32>(at(0x202)).unwrap(), SETUP_MAGIC);
        assert_eq!(memory.read_obj::<u32>(at(0x228)).unwrap(), layout::COMMAND_LINE as u32);
        assert_eq!(memory.read_obj::<u64>(at(0x70)).unwrap(), layout::ACPI);
        assert_eq!(memory.read_obj::<u64>(at(0x2d0 + 40)).unwrap(), layout::HIGH_RAM);
    }

    #[test]
    fn a_long_command_line_is_refused() {
        let (memory, kernel) = (memory(), kernel(Protocol::Pvh));
        assert!(describe(&memory, &kernel, None, &"x".repeat(layout::COMMAND_LINE_MAX - 1)).is_ok());
        assert!(describe(&memory, &kernel, None, &"x".repeat(layout::COMMAND_LINE_MAX)).is_err());
        assert!(describe(&memory, &kernel, None, "a\0b").is_err());
    }
}
