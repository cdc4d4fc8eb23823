//! The memory of saved machines.
//!
//! It is a sparse file that the saved machine wrote to while it ran (`x-ignore-shared` keeps it out of the state). A machine that
//! continues from it gets a copy of the file's data in a memfd of its own.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom};

use crate::error::Context;
use crate::{MachineSpec, Result};

/// Zeroes become a hole by so many bytes: smaller ones make more work than they save.
const HOLE: u64 = 64 << 10;

/// Creates a memory file of the machine's size.
pub(super) fn create_memory(path: &Path, spec: &MachineSpec) -> Result<()> {
    let file = File::options().create_new(true).read(true).write(true).mode(0o600).open(path);
    let file = file.context(|| format!("cannot create {}", path.display()))?;
    file.set_len(u64::from(spec.memory_mib) << 20).context(|| format!("cannot size {}", path.display()))
}

/// Gives up the storage of zeroes in a memory file: they become holes, which no clone has to copy.
pub(super) fn dig_holes(path: &Path) -> Result<()> {
    dig(path).context(|| format!("cannot make the memory {} sparse", path.display()))
}

fn dig(path: &Path) -> std::io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let size = file.metadata()?.len();
    let mut chunk = vec![0; HOLE as usize];
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        at = data / HOLE * HOLE;
        let end = rustix::fs::seek(&file, SeekFrom::Hole(data))?;
        while at < end {
            let n = HOLE.min(size - at);
            let chunk = &mut chunk[..n as usize];
            file.read_exact_at(chunk, at)?;
            if chunk.iter().all(|byte| *byte == 0) {
                rustix::fs::fallocate(&file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, at, n)?;
            }
            at += n;
        }
    }
    Ok(())
}

/// The copying of a template's memory into a clone's, ready to run.
pub(super) struct Copy {
    from: File,
    to: File,
    path: PathBuf,
}

/// Prepares to copy the data of the memory file `path` into `to`, which is empty; holes stay holes.
pub(super) fn copy_memory(path: &Path, to: &OwnedFd) -> Result<Copy> {
    let from = File::open(path).context(|| format!("cannot open {}", path.display()))?;
    let to = to.try_clone().context(|| "cannot duplicate a descriptor".into())?.into();
    Ok(Copy { from, to, path: path.to_owned() })
}

impl Copy {
    /// Copies.
    pub(super) fn run(self) -> Result<()> {
        self.copy().context(|| format!("cannot copy the memory {}", self.path.display()))
    }

    fn copy(&self) -> std::io::Result<()> {
        let size = self.from.metadata()?.len();
        let mut at = 0;
        let mut buffer = vec![0; 1 << 20];
        while at < size {
            let Ok(data) = rustix::fs::seek(&self.from, SeekFrom::Data(at)) else { break };
            let end = rustix::fs::seek(&self.from, SeekFrom::Hole(data))?;
            at = data;
            while at < end {
                let n = buffer.len().min((end - at) as usize);
                self.from.read_exact_at(&mut buffer[..n], at)?;
                self.to.write_all_at(&buffer[..n], at)?;
                at += n as u64;
            }
        }
        Ok(())
    }
}

/// Opens a memory file to write.
pub(super) fn open_memory(path: &Path) -> Result<OwnedFd> {
    let file = File::options().write(true).open(path);
    file.map(OwnedFd::from).context(|| format!("cannot open {}", path.display()))
}

/// An empty memfd of the machine's size.
pub(super) fn empty_memory(spec: &MachineSpec) -> Result<OwnedFd> {
    memfd(u64::from(spec.memory_mib) << 20).map(OwnedFd::from).context(|| "cannot create memory".into())
}

fn memfd(size: u64) -> std::io::Result<File> {
    let file = File::from(rustix::fs::memfd_create("kapsel-memory", MemfdFlags::CLOEXEC)?);
    file.set_len(size)?;
    // The monitor opens it again under its own user.
    rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(0o666))?;
    Ok(file)
}
