//! The kernel of the box, which is the guest's as well: Debian's for clouds, unpacked into a cache and never installed.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{Error, Result};

/// The package that depends on the newest build.
const PACKAGE: &str = "linux-image-6.12-cloud-amd64";

/// Offsets in a bzImage's setup header (Documentation/arch/x86/boot.rst).
mod setup {
    pub const MAGIC: usize = 0x202;
    pub const SECTORS: usize = 0x1f1;
    pub const PAYLOAD_OFFSET: usize = 0x248;
    pub const PAYLOAD_LENGTH: usize = 0x24c;
}

/// No kernel that this crate unpacks is larger than this, in bytes.
const VMLINUX_MAX: u64 = 512 << 20;

/// A kernel in the cache.
#[derive(Debug, Clone)]
pub struct Kernel {
    /// The compressed image, as the box boots it.
    pub bzimage: PathBuf,
    /// The ELF image, as a microVM monitor boots it.
    pub vmlinux: PathBuf,
    /// `lib/modules/<release>`.
    pub modules: PathBuf,
}

impl Kernel {
    /// The kernel in `cache`, which is downloaded from Debian's archive when it is not there yet.
    ///
    /// # Errors
    /// When apt does not know or cannot fetch the package, or the disk is full.
    pub fn ensure(cache: &Path) -> Result<Kernel> {
        let unpacked = cache.join("kernel");
        if !unpacked.join("complete").exists() {
            fs::create_dir_all(cache).map_err(|e| Error::io("create", cache, e))?;
            let lock_path = cache.join("lock");
            let lock = fs::File::create(&lock_path).map_err(|e| Error::io("create", &lock_path, e))?;
            lock.lock().map_err(|e| Error::io("lock", &lock_path, e))?;
            if !unpacked.join("complete").exists() {
                fetch(cache, &unpacked)?;
            }
        }
        Kernel::open(&unpacked)
    }

    fn open(unpacked: &Path) -> Result<Kernel> {
        let modules = only_entry(&unpacked.join("lib/modules"))?;
        let release = modules.file_name().unwrap_or_default().to_string_lossy();
        Ok(Kernel {
            bzimage: unpacked.join(format!("boot/vmlinuz-{release}")),
            vmlinux: unpacked.join("vmlinux"),
            modules: modules.clone(),
        })
    }

    /// A module's file by its path under `kernel/`, without the suffixes.
    pub fn module(&self, name: &str) -> PathBuf {
        self.modules.join(format!("kernel/{name}.ko.xz"))
    }
}

fn fetch(cache: &Path, unpacked: &Path) -> Result<()> {
    let work = tempfile::tempdir_in(cache).map_err(|e| Error::io("create a directory in", cache, e))?;
    let listing = run(Command::new("apt-cache").args(["depends", PACKAGE]))?;
    let package = listing
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
        .ok_or_else(|| Error::Kernel(format!("apt does not know {PACKAGE}; run `apt-get update`")))?
        .to_owned();
    // apt drops to a user of its own, who may not enter the directory.
    run(Command::new("apt-get")
        .args(["download", "-q", "-o", "APT::Sandbox::User=root", &package])
        .current_dir(work.path()))?;
    let archive = only_entry(work.path())?;
    let tree = work.path().join("tree");
    run(Command::new("dpkg-deb").arg("-x").arg(&archive).arg(&tree))?;
    let bzimage = only_entry_starting(&tree.join("boot"), "vmlinuz-")?;
    let image = fs::read(&bzimage).map_err(|e| Error::io("read", &bzimage, e))?;
    let vmlinux = tree.join("vmlinux");
    fs::write(&vmlinux, extract(&image)?).map_err(|e| Error::io("write", &vmlinux, e))?;
    fs::write(tree.join("complete"), package).map_err(|e| Error::io("write", &tree, e))?;
    if unpacked.exists() {
        fs::remove_dir_all(unpacked).map_err(|e| Error::io("remove", unpacked, e))?;
    }
    fs::rename(&tree, unpacked).map_err(|e| Error::io("rename", &tree, e))
}

/// The ELF image in a bzImage whose payload is compressed with zstd, as Debian's are.
fn extract(image: &[u8]) -> Result<Vec<u8>> {
    let bad = |what: &str| Error::Kernel(format!("the kernel image {what}"));
    let word = |at: usize| {
        image
            .get(at..at + 4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize)
            .ok_or_else(|| bad("is truncated"))
    };
    if image.get(setup::MAGIC..setup::MAGIC + 4) != Some(b"HdrS") {
        return Err(bad("is not a bzImage"));
    }
    let sectors = match image[setup::SECTORS] {
        0 => 4,
        n => usize::from(n),
    };
    let start = (sectors + 1) * 512 + word(setup::PAYLOAD_OFFSET)?;
    let end = start + word(setup::PAYLOAD_LENGTH)?;
    // The last four bytes are the uncompressed size, which is not part of the zstd frame.
    let payload = image.get(start..end.saturating_sub(4)).ok_or_else(|| bad("is truncated"))?;
    let mut elf = Vec::new();
    zstd::stream::read::Decoder::with_buffer(payload)
        .map(|decoder| decoder.single_frame().take(VMLINUX_MAX))
        .and_then(|mut decoder| decoder.read_to_end(&mut elf))
        .map_err(|e| bad(&format!("cannot be unpacked: {e}")))?;
    if elf.starts_with(b"\x7fELF") { Ok(elf) } else { Err(bad("does not hold an ELF image")) }
}

fn only_entry(directory: &Path) -> Result<PathBuf> {
    only_entry_starting(directory, "")
}

fn only_entry_starting(directory: &Path, prefix: &str) -> Result<PathBuf> {
    fs::read_dir(directory)
        .map_err(|e| Error::io("list", directory, e))?
        .filter_map(|entry| entry.ok())
        .find(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path())
        .ok_or_else(|| Error::Kernel(format!("{} has no file {prefix}*", directory.display())))
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().map_err(|e| Error::Kernel(format!("cannot start {command:?}: {e}")))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    Err(Error::Kernel(format!("{command:?} failed ({}): {}", output.status, stderr.trim())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; 1024];
        image[setup::SECTORS] = 1;
        image[setup::MAGIC..setup::MAGIC + 4].copy_from_slice(b"HdrS");
        image[setup::PAYLOAD_LENGTH..setup::PAYLOAD_LENGTH + 4]
            .copy_from_slice(&(payload.len() as u32 + 4).to_le_bytes());
        image.extend_from_slice(payload);
        image.extend_from_slice(&[0; 4]);
        image
    }

    #[test]
    fn the_elf_image_is_unpacked() {
        let elf = b"\x7fELF and so on";
        let payload = zstd::encode_all(&elf[..], 1).unwrap();
        assert_eq!(extract(&bzimage(&payload)).unwrap(), elf);
    }

    #[test]
    fn what_is_not_a_kernel_is_an_error() {
        assert!(extract(b"MZ").is_err());
        assert!(extract(&bzimage(&zstd::encode_all(&b"text"[..], 1).unwrap())).is_err());
        assert!(extract(&bzimage(b"not compressed")).is_err());
        let mut beyond = bzimage(b"");
        beyond[setup::PAYLOAD_OFFSET + 3] = 0xff;
        assert!(extract(&beyond).is_err());
    }
}
