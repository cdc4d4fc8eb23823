//! The guest's memory in a file: its regions one after the other, with holes where it is zero or was not written.
//!
//! The file is never cut when it has the memory's size already. So it may be the one that this very machine was loaded
//! from, of which pages are mapped, and a [`Kind::Diff`] onto the file of the snapshot before is merged into it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kapsel_devices::Memory;
use kapsel_devices::dirty::{Dirty, PAGE};
use rustix::fs::{FallocateFlags, SeekFrom};
use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress};

use super::{Error, Kind};
use crate::memory::{HugePages, Size, map, share};

/// Memory is looked at in pieces of this size, in bytes.
const PIECE: u64 = 64 * 1024;

/// Writes all memory, or those pages that are marked as written. The guest and its devices may not change it meanwhile.
///
/// # Errors
/// [`Error::File`], such as when the disk is full; the file is of no use then.
pub fn save(memory: &Memory, path: &Path, kind: Kind) -> Result<(), Error> {
    write(memory, path, kind).map_err(|e| Error::file("write the memory", path, e))
}

fn write(memory: &Memory, path: &Path, kind: Kind) -> io::Result<()> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    let size = memory.iter().map(|region| region.len()).sum();
    let there = file.metadata()?.len() == size;
    if !there {
        file.set_len(0)?;
        file.set_len(size)?;
    }
    let mut writer = Writer { file, there, kind, piece: vec![0; PIECE as usize] };
    let mut offset = 0;
    for region in memory.iter() {
        writer.region(region, offset)?;
        offset += region.len();
    }
    writer.file.sync_all()
}

struct Writer {
    file: File,
    /// The file may have something where memory is zero.
    there: bool,
    kind: Kind,
    piece: Vec<u8>,
}

impl Writer {
    fn region(&mut self, region: &GuestRegionMmap<Dirty>, offset: u64) -> io::Result<()> {
        let mapping = region.get_mmap();
        let Some(pages) = mapping.bitmap().pages().filter(|_| self.kind == Kind::Diff) else {
            return self.range(region, 0..region.len(), offset);
        };
        let page = PAGE.get() as u64;
        let written = |at: &u64| pages.is_addr_set(*at as usize);
        let mut at = 0;
        while at < region.len() {
            let end = (at..region.len()).step_by(PAGE.get()).find(|at| !written(at)).unwrap_or(region.len());
            self.range(region, at..end, offset)?;
            at = end.max(at + page);
        }
        Ok(())
    }

    fn range(
        &mut self,
        region: &GuestRegionMmap<Dirty>,
        range: std::ops::Range<u64>,
        offset: u64,
    ) -> io::Result<()> {
        let mut at = range.start;
        while at < range.end {
            let length = (range.end - at).min(PIECE);
            let piece = &mut self.piece[..length as usize];
            region.read_slice(piece, MemoryRegionAddress(at)).map_err(io::Error::other)?;
            // A hole in what is to be merged would leave what was there before.
            if self.kind == Kind::Diff || piece.iter().any(|byte| *byte != 0) {
                self.file.write_all_at(piece, offset + at)?;
            } else if self.there {
                self.zero(offset + at, length)?;
            }
            at += length;
        }
        Ok(())
    }

    fn zero(&self, offset: u64, length: u64) -> io::Result<()> {
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, hole, offset, length) {
            Err(rustix::io::Errno::OPNOTSUPP) => {
                self.file.write_all_at(&self.piece[..length as usize], offset)
            }
            other => Ok(other?),
        }
    }
}

/// Maps a file as the memory of a guest of such a size. What the guest writes is its own and not in the file; `tracked`
/// has what the monitor writes marked.
///
/// # Errors
/// [`Error::File`] when it cannot be mapped, [`Error::MemorySize`] when it is not of that size.
pub fn load(size: Size, path: &Path, tracked: bool) -> Result<Memory, Error> {
    const ACTION: &str = "map the memory";
    let file = open(size, path, ACTION)?;
    map(size, Some(&file), libc::MAP_PRIVATE, tracked).map_err(|e| Error::file(ACTION, path, e))
}

/// Opens a file with memory of such a size.
fn open(size: Size, path: &Path, action: &'static str) -> Result<File, Error> {
    let failed = |e| Error::file(action, path, e);
    let file = File::open(path).map_err(failed)?;
    let found = file.metadata().map_err(failed)?.len();
    match found == size.bytes() {
        true => Ok(file),
        false => Err(Error::MemorySize { expected: size.bytes(), found }),
    }
}

/// Copies a file into memory that other processes can map as well, for a guest of such a size: a private mapping of the file shows
/// them nothing of what the guest writes. What is zero takes no memory, also where the file system does not know its holes.
///
/// # Errors
/// As for [`load`]; [`Error::Build`] without memory.
pub fn copy(size: Size, path: &Path) -> Result<Memory, Error> {
    const ACTION: &str = "copy the memory";
    let failed = |e| Error::file(ACTION, path, e);
    let file = open(size, path, ACTION)?;
    let mut piece = vec![0; PIECE as usize];
    let memory = share(size, HugePages::None, false).map_err(|e| Box::new(e.into()))?;
    let mut offset = 0;
    for region in memory.iter() {
        let (start, end) = (offset, offset + region.len());
        while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(offset))
            && data < end
        {
            let hole = rustix::fs::seek(&file, SeekFrom::Hole(data)).map_err(|e| failed(e.into()))?.min(end);
            offset = data;
            while offset < hole {
                let piece = &mut piece[..PIECE.min(hole - offset) as usize];
                file.read_exact_at(piece, offset).map_err(failed)?;
                if piece.iter().any(|byte| *byte != 0) {
                    let written = region.write_slice(piece, MemoryRegionAddress(offset - start));
                    written.map_err(|e| failed(std::io::Error::other(e)))?;
                }
                offset += piece.len() as u64;
            }
        }
        offset = end;
    }
    Ok(memory)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use vm_memory::GuestAddress;

    use super::*;
    use crate::memory::allocate;

    fn mib(mib: u64) -> Size {
        Size { mib, hotplug_mib: 0 }
    }

    #[test]
    fn memory_comes_back_as_it_was_and_the_file_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let memory = allocate(mib(8), HugePages::None, false).unwrap();
        memory.write_slice(b"hello", GuestAddress(0x12_3456)).unwrap();
        save(&memory, &path, Kind::Full).unwrap();
        let metadata = path.metadata().unwrap();
        assert_eq!(metadata.len(), 8 << 20);
        assert!(metadata.blocks() * 512 <= 128 * 1024, "zeroes take no space");
        for _ in 0..2 {
            let loaded = load(mib(8), &path, false).unwrap();
            assert_eq!(bytes(&loaded, 0x12_3456), *b"hello");
            loaded.write_slice(b"other", GuestAddress(0x12_3456)).unwrap();
        }
    }

    fn bytes(memory: &Memory, address: u64) -> [u8; 5] {
        let mut bytes = [0; 5];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn a_diff_has_what_was_written_zeroes_too_and_merges_into_its_base() {
        let directory = tempfile::tempdir().unwrap();
        let (base, diff) = (directory.path().join("base"), directory.path().join("diff"));
        let memory = allocate(mib(8), HugePages::None, true).unwrap();
        memory.write_slice(b"first", GuestAddress(0x1000)).unwrap();
        memory.write_slice(b"stays", GuestAddress(0x2000)).unwrap();
        save(&memory, &base, Kind::Full).unwrap();
        crate::snapshot::dirty::forget(&memory);
        memory.write_slice(&[0; 5], GuestAddress(0x1000)).unwrap();
        memory.write_slice(b"after", GuestAddress(0x7f_fffb)).unwrap();
        save(&memory, &diff, Kind::Diff).unwrap();
        let metadata = diff.metadata().unwrap();
        assert_eq!((metadata.len(), metadata.blocks() * 512), (8 << 20, 8192), "two pages");
        // Marks are kept until the state is written, too.
        save(&memory, &base, Kind::Diff).unwrap();
        let merged = load(mib(8), &base, false).unwrap();
        assert_eq!(bytes(&merged, 0x1000), [0; 5]);
        assert_eq!(bytes(&merged, 0x2000), *b"stays");
        assert_eq!(bytes(&merged, 0x7f_fffb), *b"after");
    }

    #[test]
    fn without_marks_a_diff_is_everything() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        save(&allocate(mib(2), HugePages::None, false).unwrap(), &path, Kind::Diff).unwrap();
        assert_eq!(path.metadata().unwrap().blocks() * 512, 2 << 20);
    }

    #[test]
    fn a_machine_can_be_saved_onto_the_file_that_it_comes_from() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let memory = allocate(mib(2), HugePages::None, false).unwrap();
        memory.write_slice(b"first", GuestAddress(0x1000)).unwrap();
        memory.write_slice(b"stays", GuestAddress(0x2_0000)).unwrap();
        save(&memory, &path, Kind::Full).unwrap();
        let loaded = load(mib(2), &path, false).unwrap();
        loaded.write_slice(&[0; 5], GuestAddress(0x1000)).unwrap();
        save(&loaded, &path, Kind::Full).unwrap();
        assert_eq!(bytes(&loaded, 0x2_0000), *b"stays");
        let again = load(mib(2), &path, false).unwrap();
        assert_eq!((bytes(&again, 0x1000), bytes(&again, 0x2_0000)), ([0; 5], *b"stays"));
        assert!(path.metadata().unwrap().blocks() * 512 <= 64 * 1024, "zeroes take no space");
    }

    #[test]
    fn a_copy_has_what_the_file_has_and_its_holes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("memory");
        let memory = allocate(mib(4096), HugePages::None, false).unwrap();
        let places = [0x1000, 0x20_0ffc, 0xbfff_fffb, 0x1_0000_0000, 0x1_3fff_fffb];
        places.iter().for_each(|place| memory.write_slice(b"found", GuestAddress(*place)).unwrap());
        save(&memory, &path, Kind::Full).unwrap();
        let copied = copy(mib(4096), &path).unwrap();
        places.iter().for_each(|place| assert_eq!(&bytes(&copied, *place), b"found", "{place:#x}"));
        let file = copied.iter().next().unwrap().file_offset().unwrap();
        assert!(file.file().metadata().unwrap().blocks() * 512 <= 1 << 20, "zeroes take no memory");
        copied.write_slice(b"other", GuestAddress(0x1000)).unwrap();
        assert_eq!(
            &bytes(&load(mib(4096), &path, false).unwrap(), 0x1000),
            b"found",
            "the file stays as it is"
        );
    }

    #[test]
    fn a_file_of_another_size_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len((8 << 20) - 1).unwrap();
        assert!(matches!(copy(mib(8), file.path()), Err(Error::MemorySize { .. })));
        assert!(matches!(load(mib(8), file.path(), false), Err(Error::MemorySize { .. })));
        assert!(matches!(load(mib(8), Path::new("/nonexistent"), false), Err(Error::File { .. })));
    }
}
