//! The guest's memory in a file: its regions one after the other, with holes where it is zero.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kapsel_devices::Memory;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress,
};

use super::Error;
use crate::memory::ranges;

/// Memory is looked at in pieces of this size, in bytes.
const PIECE: usize = 64 * 1024;

/// Writes all memory. The guest and its devices may not change it meanwhile.
///
/// # Errors
/// [`Error::File`], such as when the disk is full; the file is of no use then.
pub fn save(memory: &Memory, path: &Path) -> Result<(), Error> {
    let failed = |e| Error::file("write the memory", path, e);
    let file = File::create(path).map_err(failed)?;
    let mut offset = 0;
    let mut piece = vec![0; PIECE];
    for region in memory.iter() {
        let mut at = 0;
        while at < region.len() {
            let length = (region.len() - at).min(PIECE as u64) as usize;
            let piece = &mut piece[..length];
            region
                .read_slice(piece, MemoryRegionAddress(at))
                .map_err(|e| failed(std::io::Error::other(e)))?;
            if piece.iter().any(|byte| *byte != 0) {
                file.write_all_at(piece, offset + at).map_err(failed)?;
            }
            at += length as u64;
        }
        offset += region.len();
    }
    file.set_len(offset).map_err(failed)?;
    file.sync_all().map_err(failed)
}

/// Maps a file as the memory of a guest with so many MiB. What the guest writes is its own and not in the file.
///
/// # Errors
/// [`Error::File`] when it cannot be mapped, [`Error::MemorySize`] when it is not of that size.
pub fn load(mib: u64, path: &Path) -> Result<Memory, Error> {
    let failed = |e| Error::file("map the memory", path, e);
    let file = File::open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?.len();
    if found != mib << 20 {
        return Err(Error::MemorySize { expected: mib << 20, found });
    }
    let mut regions = Vec::new();
    let mut offset = 0;
    for (start, size) in ranges(mib) {
        let other = |e: String| failed(std::io::Error::other(e));
        let handle = file.try_clone().map_err(failed)?;
        let mapping = MmapRegionBuilder::new(usize::try_from(size).map_err(|e| other(e.to_string()))?)
            .with_file_offset(FileOffset::new(handle, offset))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_NORESERVE)
            .build()
            .map_err(|e| other(e.to_string()))?;
        let region = GuestRegionMmap::new(mapping, GuestAddress(start));
        regions.push(region.ok_or_else(|| other("a region ends beyond the address space".into()))?);
        offset += size;
    }
    Memory::from_regions(regions).map_err(|e| failed(std::io::Error::other(e)))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;
    use crate::memory::{HugePages, allocate};

    #[test]
    fn memory_comes_back_as_it_was_and_the_file_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let memory = allocate(8, HugePages::None).unwrap();
        memory.write_slice(b"hello", GuestAddress(0x12_3456)).unwrap();
        save(&memory, &path).unwrap();
        let metadata = path.metadata().unwrap();
        assert_eq!(metadata.len(), 8 << 20);
        assert!(metadata.blocks() * 512 <= 128 * 1024, "zeroes take no space");
        for _ in 0..2 {
            let loaded = load(8, &path).unwrap();
            let mut bytes = [0; 5];
            loaded.read_slice(&mut bytes, GuestAddress(0x12_3456)).unwrap();
            assert_eq!(&bytes, b"hello");
            loaded.write_slice(b"other", GuestAddress(0x12_3456)).unwrap();
        }
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((8 << 20) - 1).unwrap();
        assert!(matches!(load(8, file.path()), Err(Error::MemorySize { .. })));
        assert!(matches!(load(8, Path::new("/nonexistent")), Err(Error::File { .. })));
    }
}
