//! The kernel of the box, which is the guest's as well: Debian's for clouds, unpacked into a cache and never installed.

use std::fs;
use std::path::{Path, PathBuf};

use kapsel_guest::package::Package;

use crate::{Error, Result};

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
    let package = Package::newest()?;
    let archive = package.download(work.path(), &mut |_| {})?;
    let tree = work.path().join("tree");
    Package::unpack(&archive, &tree)?;
    let bzimage = only_entry_starting(&tree.join("boot"), "vmlinuz-")?;
    let image = fs::read(&bzimage).map_err(|e| Error::io("read", &bzimage, e))?;
    let elf = kapsel_guest::vmlinux(&image)
        .map_err(|what| kapsel_guest::Error::BadKernel { path: bzimage.clone(), what })?;
    let vmlinux = tree.join("vmlinux");
    fs::write(&vmlinux, elf).map_err(|e| Error::io("write", &vmlinux, e))?;
    fs::write(tree.join("complete"), package.name).map_err(|e| Error::io("write", &tree, e))?;
    if unpacked.exists() {
        fs::remove_dir_all(unpacked).map_err(|e| Error::io("remove", unpacked, e))?;
    }
    fs::rename(&tree, unpacked).map_err(|e| Error::io("rename", &tree, e))
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
        .ok_or_else(|| Error::Incomplete(directory.join(format!("{prefix}*"))))
}
