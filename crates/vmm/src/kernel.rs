//! Kernel and initrd in the guest's memory.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use kapsel_devices::Memory;
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::x86::layout;

/// Why a kernel or an initrd cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file.
    #[error("cannot read {what} {path}: {source}")]
    File {
        /// Kernel or initrd.
        what: &'static str,
        /// Which.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Neither ELF nor bzImage, or broken.
    #[error("{path} is not a 64-bit ELF kernel or bzImage that fits the guest's memory: {reason}")]
    Format {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The initrd and the kernel do not fit together.
    #[error(
        "the initrd of {size} bytes does not fit between the kernel and {limit:#x}, the end of the guest's low memory"
    )]
    InitrdSize {
        /// The initrd's size.
        size: u64,
        /// Where it would have to end.
        limit: u64,
    },
}

/// How the guest's first instruction is reached.
#[derive(Debug, Clone)]
pub enum Protocol {
    /// 32-bit protected mode, with a start info (PVH's direct boot).
    Pvh,
    /// 64-bit mode, with a zero page.
    Linux(Box<setup_header>),
}

/// A kernel in memory.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// Where it starts.
    pub entry: GuestAddress,
    /// How.
    pub protocol: Protocol,
    /// The first address after it.
    pub(crate) end: u64,
}

/// An initrd in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// Its address.
    pub address: u64,
    /// Its size in bytes.
    pub size: u64,
}

/// Loads a 64-bit ELF image, to be started by PVH if it can be, or a bzImage.
///
/// # Errors
/// [`Error::File`] or [`Error::Format`].
pub fn load(memory: &Memory, path: &Path) -> Result<Kernel, Error> {
    let failed = |source| Error::File { what: "the kernel", path: path.to_owned(), source };
    let format = |reason: String| Error::Format { path: path.to_owned(), reason };
    let mut file = File::open(path).map_err(failed)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(failed)?;
    let above = Some(GuestAddress(layout::HIGH_RAM));
    if magic == *b"\x7fELF" {
        check_segments(&mut file).map_err(format)?;
        let loaded = Elf::load(memory, None, &mut file, above).map_err(|e| format(e.to_string()))?;
        let (entry, protocol) = match loaded.pvh_boot_cap {
            PvhBootCapability::PvhEntryPresent(entry) => (entry, Protocol::Pvh),
            _ => (loaded.kernel_load, Protocol::Linux(Box::default())),
        };
        return inside(memory, Kernel { entry, protocol, end: loaded.kernel_end }).map_err(format);
    }
    let loaded = BzImage::load(memory, None, &mut file, above).map_err(|e| format(e.to_string()))?;
    let header = loaded.setup_header.ok_or_else(|| format("it has no setup header".into()))?;
    // Bit 0: there is a 64-bit entry point, 0x200 bytes into the kernel (Documentation/arch/x86/boot.rst).
    if header.version < 0x020c || header.xloadflags & 1 == 0 {
        return Err(format("it has no 64-bit entry point".into()));
    }
    let entry = loaded.kernel_load.unchecked_add(0x200);
    // It unpacks itself to its preferred address and needs this much there.
    let unpacked = u64::from(header.init_size).checked_add(header.pref_address);
    let end =
        unpacked.ok_or_else(|| format("its preferred address is impossible".into()))?.max(loaded.kernel_end);
    inside(memory, Kernel { entry, protocol: Protocol::Linux(Box::new(header)), end }).map_err(format)
}

/// Segments that would lie on what the monitor puts below 1 MiB are refused before anything is copied.
fn check_segments(file: &mut File) -> Result<(), String> {
    let mut header = [0; 64];
    file.rewind().and_then(|()| file.read_exact(&mut header)).map_err(|e| e.to_string())?;
    let field = |at: usize| u64::from_le_bytes(std::array::from_fn(|n| header[at + n]));
    let (class, machine) = (header[4], u16::from_le_bytes([header[18], header[19]]));
    if class != 2 || machine != 62 {
        return Err("it is not for x86-64".into());
    }
    let (offset, count) = (field(32), u16::from_le_bytes([header[56], header[57]]));
    file.seek(SeekFrom::Start(offset)).map_err(|e| e.to_string())?;
    for _ in 0..count {
        let mut segment = [0; 56];
        file.read_exact(&mut segment).map_err(|e| e.to_string())?;
        let kind = u32::from_le_bytes([segment[0], segment[1], segment[2], segment[3]]);
        let address = u64::from_le_bytes(std::array::from_fn(|n| segment[24 + n]));
        if kind == 1 && address < layout::HIGH_RAM {
            return Err(format!("it wants to be loaded at {address:#x}, below 1 MiB"));
        }
    }
    Ok(())
}

fn inside(memory: &Memory, kernel: Kernel) -> Result<Kernel, String> {
    if kernel.end > low_end(memory) {
        return Err(format!("it ends at {:#x}, and the memory at {:#x}", kernel.end, low_end(memory)));
    }
    if !memory.address_in_range(kernel.entry) {
        return Err(format!("it starts at {:#x}, where there is no memory", kernel.entry.0));
    }
    Ok(kernel)
}

/// Loads an initrd as high as possible in low memory, where the kernel leaves the most room for it.
///
/// # Errors
/// [`Error::File`] or [`Error::InitrdSize`].
pub fn load_initrd(memory: &Memory, kernel: &Kernel, path: &Path) -> Result<Initrd, Error> {
    let failed = |source| Error::File { what: "the initrd", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    let limit = low_end(memory);
    let too_large = Error::InitrdSize { size, limit };
    let Some(address) = limit.checked_sub(size).map(|address| address & !0xfff) else {
        return Err(too_large);
    };
    if address < kernel.end {
        return Err(too_large);
    }
    let count = usize::try_from(size).map_err(|e| failed(io::Error::other(e)))?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, count)
        .map_err(|e| failed(io::Error::other(e.to_string())))?;
    Ok(Initrd { address, size })
}

/// The end of memory below the hole.
pub fn low_end(memory: &Memory) -> u64 {
    memory.find_region(GuestAddress(0)).map_or(0, |region| region.len())
}
