//! The initramfs: the agent as `/init`, and the modules that its kernel needs.

use std::fs;
use std::io::{BufWriter, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::error::Context;
use crate::lighten::lighten;
use crate::lock::Lock;
use crate::{Kernel, Result, acpi, cpio};

/// Changes when the archive's layout or its content for the same parts does, so that cached ones are made again.
const LAYOUT: u32 = 4;

/// Where the agent finds the modules' paths, one a line, in the order to load them in.
const MODULES: &str = "lib/kapsel/modules";

/// Makes and caches initramfs archives.
#[derive(Debug)]
pub struct Initramfs;

impl Initramfs {
    /// The archive with `agent` (a static executable) as `/init` for `kernel`, made below `data_dir` unless it is there.
    ///
    /// It is found again by the identity of its parts (path, inode, size, time), so asking for it costs microseconds. The archive
    /// depends on nothing but their contents.
    ///
    /// # Errors
    /// When the agent or a module cannot be read, or the archive cannot be written.
    pub fn build(data_dir: &Path, agent: &Path, kernel: &Kernel) -> Result<PathBuf> {
        let dir = data_dir.join("initramfs");
        let path = dir.join(format!("{}.cpio", identity(agent, kernel)?));
        if path.exists() {
            return Ok(path);
        }
        let _lock = Lock::take(&dir, || {})?;
        if path.exists() {
            return Ok(path);
        }
        let file = tempfile::NamedTempFile::new_in(&dir);
        let mut file = file.context(|| format!("cannot create a file in {}", dir.display()))?;
        write(agent, kernel, file.as_file_mut())?;
        // The monitor reads it under another user.
        let readable = fs::Permissions::from_mode(0o644);
        file.as_file()
            .set_permissions(readable)
            .context(|| format!("cannot set the mode of {}", path.display()))?;
        file.as_file().sync_all().context(|| format!("cannot write {}", path.display()))?;
        file.persist(&path)
            .map_err(|error| error.error)
            .context(|| format!("cannot create {}", path.display()))?;
        Ok(path)
    }
}

fn identity(agent: &Path, kernel: &Kernel) -> Result<String> {
    let mut hash = Sha256::new();
    hash.update(LAYOUT.to_le_bytes());
    for path in [agent].into_iter().chain(kernel.modules.iter().map(PathBuf::as_path)) {
        let meta = fs::metadata(path).context(|| format!("cannot read {}", path.display()))?;
        hash.update(path.as_os_str().as_encoded_bytes());
        hash.update(format!(
            "\0{} {} {} {}.{}\n",
            meta.dev(),
            meta.ino(),
            meta.size(),
            meta.mtime(),
            meta.mtime_nsec()
        ));
    }
    Ok(hex::encode(&hash.finalize()[..16]))
}

fn write(agent: &Path, kernel: &Kernel, out: impl Write) -> Result<()> {
    let read = |path: &Path| fs::read(path).context(|| format!("cannot read {}", path.display()));
    let agent = read(agent)?;
    let mut modules = Vec::new();
    let mut list = String::new();
    for path in &kernel.modules {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        list.push_str(&format!("/lib/kapsel/{name}\n"));
        modules.push((format!("lib/kapsel/{name}"), lighten(read(path)?)));
    }
    let make = || {
        let mut archive = cpio::Writer::new(BufWriter::new(out));
        // The kernel looks for tables before it unpacks the archive.
        for dir in ["kernel", "kernel/firmware", "kernel/firmware/acpi"] {
            archive.directory(dir, 0o755)?;
        }
        archive.file(acpi::PATH, 0o644, &acpi::table())?;
        // The kernel opens the console for process 1 before anything is mounted, and mounts devtmpfs only later.
        archive.directory("dev", 0o755)?;
        archive.character_device("dev/console", 0o600, 5, 1)?;
        for dir in ["proc", "sys", "run", "lib", "lib/kapsel"] {
            archive.directory(dir, 0o755)?;
        }
        archive.file("init", 0o755, &agent)?;
        archive.file(MODULES, 0o644, list.as_bytes())?;
        for (path, bytes) in &modules {
            archive.file(path, 0o644, bytes)?;
        }
        archive.finish()?.flush()
    };
    make().context(|| "cannot write the initramfs".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn made_once_and_again_when_a_part_changes() {
        let dir = tempfile::tempdir().unwrap();
        let (agent, module) = (dir.path().join("agent"), dir.path().join("erofs.ko"));
        fs::write(&agent, "agent 1").unwrap();
        fs::write(&module, "module").unwrap();
        let kernel = Kernel { vmlinux: "k".into(), release: "6".into(), modules: vec![module] };
        let first = Initramfs::build(dir.path(), &agent, &kernel).unwrap();
        let bytes = fs::read(&first).unwrap();
        assert!(
            bytes.windows(7).any(|w| w == b"agent 1")
                && bytes.windows(20).any(|w| w == b"/lib/kapsel/erofs.ko")
        );
        assert_eq!(Initramfs::build(dir.path(), &agent, &kernel).unwrap(), first);
        fs::write(&agent, "agent two").unwrap();
        let second = Initramfs::build(dir.path(), &agent, &kernel).unwrap();
        assert_ne!(second, first);
        assert!(fs::read(second).unwrap().windows(9).any(|w| w == b"agent two"));
    }
}
