//! The guest's memory.

use std::fs::File;
use std::io;

use kapsel_devices::Memory;
use kapsel_devices::dirty::Dirty;
use rustix::fs::{MemfdFlags, SealFlags};
use serde::{Deserialize, Serialize};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionMmap};

use crate::config::Config;
use crate::x86::layout::{HOLE, HOLE_END};

/// The pages behind the guest's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum HugePages {
    /// The host's usual ones; transparent huge pages where the host has them.
    #[default]
    None,
    /// Reserved pages of 2 MiB (hugetlbfs).
    #[serde(rename = "2M")]
    TwoMegabytes,
}

/// Why there is no memory.
#[derive(Debug, thiserror::Error)]
#[error("cannot map {mib} MiB for the guest: {reason}")]
pub struct Error {
    mib: u64,
    reason: String,
}

impl Error {
    fn new(size: Size, reason: &io::Error) -> Self {
        Error { mib: size.bytes() >> 20, reason: reason.to_string() }
    }
}

/// Parts of the guest's physical address space with memory: start and size in bytes.
pub fn ranges(mib: u64) -> Vec<(u64, u64)> {
    let size = mib << 20;
    let low = size.min(HOLE);
    let mut ranges = vec![(0, low)];
    if size > low {
        ranges.push((HOLE_END, size - low));
    }
    ranges
}

/// How much memory a guest has, and may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// What it has from the start, in MiB.
    pub mib: u64,
    /// What can be plugged while it runs, in MiB.
    pub hotplug_mib: u64,
}

impl Size {
    /// Parts of the guest's physical address space that are mapped: as [`ranges`], and the last one is what can be plugged.
    pub fn ranges(self) -> Vec<(u64, u64)> {
        let mut ranges = ranges(self.mib);
        ranges.extend(hotplug_range(self));
        ranges
    }

    /// All of it, in bytes.
    pub fn bytes(self) -> u64 {
        (self.mib + self.hotplug_mib) << 20
    }
}

impl From<&Config> for Size {
    fn from(config: &Config) -> Self {
        let hotplug_mib = config.memory_hotplug.map_or(0, |hotplug| hotplug.total_size_mib.into());
        Size { mib: config.machine_config.mem_size_mib, hotplug_mib }
    }
}

/// Where memory that can be plugged begins, at the least. Kernels take memory in pieces of this size.
const HOTPLUG_ALIGNMENT: u64 = 2 << 30;

/// Start and size in bytes of the part that can be plugged: above everything else.
pub fn hotplug_range(size: Size) -> Option<(u64, u64)> {
    let end = ranges(size.mib).last().map_or(0, |(start, length)| start + length);
    let start = end.max(HOLE_END).next_multiple_of(HOTPLUG_ALIGNMENT);
    (size.hotplug_mib > 0).then_some((start, size.hotplug_mib << 20))
}

/// Maps memory for a guest. It is given by the host only as the guest touches it. `tracked` has the monitor's own writes
/// marked.
///
/// # Errors
/// When the address space, or the host's reserve of huge pages, does not suffice.
pub fn allocate(size: Size, pages: HugePages, tracked: bool) -> Result<Memory, Error> {
    let mut flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    if pages == HugePages::TwoMegabytes {
        flags |= libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    }
    let memory = map(size, None, flags, tracked).map_err(|e| Error::new(size, &e))?;
    if pages == HugePages::None {
        memory.iter().for_each(|region| prefer_huge_pages(&region.get_mmap()));
    }
    Ok(memory)
}

/// As [`allocate`], in a file that other processes can map as well. No memory is shared unless it has to be: a guest's first touch of a
/// page takes longer then.
///
/// # Errors
/// As for [`allocate`].
pub fn share(size: Size, pages: HugePages, tracked: bool) -> Result<Memory, Error> {
    let file = memory_file(size.bytes(), pages);
    let memory = file.and_then(|file| map(size, Some(&file), libc::MAP_SHARED, tracked));
    memory.map_err(|e| Error::new(size, &e))
}

/// Maps the parts of such a memory, those of `file` one after the other if there is one; `flags` are MAP_PRIVATE or MAP_SHARED and
/// what comes with it.
///
/// # Errors
/// Those of mmap(2).
pub fn map(size: Size, file: Option<&File>, flags: i32, tracked: bool) -> io::Result<Memory> {
    let (mut regions, mut offset) = (Vec::new(), 0);
    for (start, length) in size.ranges() {
        let mapped = usize::try_from(length).map_err(io::Error::other)?;
        let mut builder = MmapRegionBuilder::new_with_bitmap(mapped, Dirty::new(mapped, tracked))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags | libc::MAP_NORESERVE);
        if let Some(file) = file {
            builder = builder.with_file_offset(FileOffset::new(file.try_clone()?, offset));
        }
        let mapping = builder.build().map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        regions.push(region.ok_or_else(|| io::Error::other("a region ends beyond the address space"))?);
        offset += length;
    }
    Memory::from_regions(regions).map_err(io::Error::other)
}

/// A file of that size without a name. Nobody who has it can make it shorter, which would end this process at the next touch.
fn memory_file(size: u64, pages: HugePages) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(match pages {
        HugePages::None => rustix::fs::memfd_create("guest-memory", flags)?,
        HugePages::TwoMegabytes => {
            rustix::fs::memfd_create("guest-memory", flags | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?
        }
    });
    file.set_len(size)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

/// Fewer faults and shorter page walks; a host that has no transparent huge pages loses nothing.
fn prefer_huge_pages(mapping: &vm_memory::MmapRegion<Dirty>) {
    // SAFETY: the range is a private anonymous mapping that was just made and is owned by `mapping`; the advice changes no
    // contents.
    let result = unsafe { libc::madvise(mapping.as_ptr().cast(), mapping.size(), libc::MADV_HUGEPAGE) };
    if result != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "no transparent huge pages");
    }
}

/// The part of `memory`, which is of that size, that the guest has from the start.
///
/// # Errors
/// When what can be plugged is not there.
pub fn at_start(memory: &Memory, size: Size) -> Result<Memory, Error> {
    let Some((start, length)) = hotplug_range(size) else { return Ok(memory.clone()) };
    let removed = memory.remove_region(GuestAddress(start), length);
    let (rest, _) = removed.map_err(|e| Error { mib: size.hotplug_mib, reason: e.to_string() })?;
    Ok(rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_goes_around_the_hole() {
        assert_eq!(ranges(128), [(0, 128 << 20)]);
        assert_eq!(ranges(3072), [(0, HOLE)]);
        assert_eq!(ranges(65536), [(0, HOLE), (HOLE_END, (65536 << 20) - HOLE)]);
    }

    #[test]
    fn shared_memory_is_one_file_that_stays_as_long_as_it_is() {
        use vm_memory::{Bytes, GuestMemoryRegion};

        let memory = share(Size { mib: 4096, hotplug_mib: 0 }, HugePages::None, true).unwrap();
        memory.write_slice(b"high", GuestAddress(HOLE_END + 0x1000)).unwrap();
        let files: Vec<_> = memory.iter().map(|region| region.file_offset().unwrap()).collect();
        assert_eq!((files[0].start(), files[1].start()), (0, HOLE));
        let mut bytes = [0; 4];
        std::os::unix::fs::FileExt::read_exact_at(files[0].file(), &mut bytes, HOLE + 0x1000).unwrap();
        assert_eq!(&bytes, b"high");
        assert!(files[0].file().set_len(0).is_err());
    }

    #[test]
    fn sixty_four_gibibytes_can_be_promised() {
        let size = Size { mib: 65536, hotplug_mib: 65536 };
        let memory = allocate(size, HugePages::None, false).unwrap();
        assert!(memory.address_in_range(GuestAddress(HOLE - 1)));
        assert!(!memory.address_in_range(GuestAddress(HOLE)));
        assert!(memory.address_in_range(GuestAddress(HOLE_END)));
        let (start, length) = hotplug_range(size).unwrap();
        assert_eq!((start, length), (66 << 30, 64 << 30));
        assert!(memory.address_in_range(GuestAddress(start + length - 1)));
    }

    #[test]
    fn what_can_be_plugged_is_above_everything_else() {
        let range = |mib, hotplug_mib| hotplug_range(Size { mib, hotplug_mib });
        assert_eq!(range(128, 0), None);
        assert_eq!(range(128, 128), Some((HOLE_END, 128 << 20)));
        assert_eq!(range(4096, 256), Some((6 << 30, 256 << 20)));
    }
}
