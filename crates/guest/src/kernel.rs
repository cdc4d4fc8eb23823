//! The guest's kernel.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::Context;
use crate::lock::Lock;
use crate::package::Package;
use crate::{Error, Progress, Result, image, modules};

/// Version of `meta.json`.
const FORMAT: u32 = 1;

/// Where the kernel comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KernelSource {
    /// Debian's cloud kernel, by way of apt. A kernel that is in the cache is used without asking apt again.
    Debian,
    /// A `vmlinux` or `bzImage` that needs no modules, such as the one of `make kernel`.
    Path(PathBuf),
}

/// A kernel, ready to boot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// The ELF file.
    pub vmlinux: PathBuf,
    /// What `uname -r` says in the guest.
    pub release: String,
    /// The modules that the guest needs, in the order to load them in.
    pub modules: Vec<PathBuf>,
}

#[derive(Serialize, Deserialize)]
struct Meta {
    version: u32,
    release: String,
    modules: Vec<String>,
    /// The modules that were asked for when these were picked.
    #[serde(default)]
    needed: Vec<String>,
}

impl Kernel {
    /// The kernel of `source`, from the cache below `data_dir` or put there now. Several processes may ask at once.
    ///
    /// # Errors
    /// [`Error::NoKernel`] when there is no apt or it has no kernel; [`Error::BadKernel`]; [`Error::NoModule`]; I/O errors.
    pub fn ensure(
        data_dir: &Path,
        source: &KernelSource,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Kernel> {
        let dir = data_dir.join("kernels");
        match source {
            KernelSource::Debian => match newest_cached(&dir)? {
                Some(kernel) => Ok(kernel),
                None => fetch(&dir, progress),
            },
            KernelSource::Path(path) => from_path(&dir, path, progress),
        }
    }
}

impl Kernel {
    /// The kernel of `source` if it is in the cache below `data_dir`; never fetches or extracts.
    ///
    /// # Errors
    /// [`Error::Newer`], and when the file of [`KernelSource::Path`] cannot be looked at.
    pub fn cached(data_dir: &Path, source: &KernelSource) -> Result<Option<Kernel>> {
        let dir = data_dir.join("kernels");
        match source {
            KernelSource::Debian => newest_cached(&dir),
            KernelSource::Path(path) => cached(&own_entry(&dir, path)?, &[]),
        }
    }
}

/// Where a kernel that was given by path is cached.
fn own_entry(dir: &Path, path: &Path) -> Result<PathBuf> {
    let meta = fs::metadata(path)
        .map_err(|error| Error::BadKernel { path: path.to_owned(), what: error.to_string() })?;
    let identity =
        format!("{}\0{} {} {}.{}", path.display(), meta.ino(), meta.size(), meta.mtime(), meta.mtime_nsec());
    Ok(dir.join(format!("own-{}", hex::encode(&Sha256::digest(identity)[..8]))))
}

/// Reads a cache entry with the modules for `needed`. `None` when there is none.
fn cached(entry: &Path, needed: &[&str]) -> Result<Option<Kernel>> {
    let Ok(text) = fs::read(entry.join("meta.json")) else { return Ok(None) };
    let Ok(meta) = serde_json::from_slice::<Meta>(&text) else { return Ok(None) };
    if meta.version > FORMAT {
        return Err(Error::Newer { path: entry.to_owned(), found: meta.version, known: FORMAT });
    }
    if meta.needed != needed {
        // Another kapsel's choice.
        return Ok(None);
    }
    let modules = meta.modules.iter().map(|name| entry.join("modules").join(name)).collect();
    let kernel = Kernel { vmlinux: entry.join("vmlinux"), release: meta.release, modules };
    Ok(kernel.vmlinux.exists().then_some(kernel))
}

/// The most recently fetched package's kernel.
fn newest_cached(dir: &Path) -> Result<Option<Kernel>> {
    let mut newest = None;
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let fetched = name.to_str().is_some_and(|name| name.starts_with("linux-image-"));
        let Ok(meta) = entry.metadata() else { continue };
        let made = (meta.mtime(), meta.mtime_nsec());
        if fetched
            && newest.as_ref().is_none_or(|(time, _)| *time < made)
            && let Some(kernel) = cached(&entry.path(), modules::NEEDED)?
        {
            newest = Some((made, kernel));
        }
    }
    Ok(newest.map(|(_, kernel)| kernel))
}

fn fetch(dir: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Kernel> {
    let _lock = Lock::take(dir, || progress(Progress::Waiting))?;
    if let Some(kernel) = newest_cached(dir)? {
        return Ok(kernel);
    }
    let package = Package::newest()?;
    let work = work_dir(dir)?;
    let (incoming, unpacked) = (work.path().join("deb"), work.path().join("unpacked"));
    for dir in [&incoming, &unpacked] {
        fs::create_dir(dir).context(|| format!("cannot create {}", dir.display()))?;
    }
    let deb = package.download(&incoming, progress)?;
    progress(Progress::Extracting);
    Package::unpack(&deb, &unpacked)?;
    let boot = unpacked.join("boot");
    let (vmlinuz, release) = fs::read_dir(&boot)
        .into_iter()
        .flatten()
        .flatten()
        .find_map(|entry| {
            let release = entry.file_name().to_str()?.strip_prefix("vmlinuz-")?.to_owned();
            Some((entry.path(), release))
        })
        .ok_or_else(|| Error::BadKernel { path: deb, what: "the package has no boot/vmlinuz".into() })?;
    let modules = modules::needed(&unpacked.join("lib/modules").join(&release), &release)?;
    store(&dir.join(format!("{}_{}", package.name, package.version)), &vmlinuz, Some((&release, modules)))
}

fn from_path(dir: &Path, path: &Path, progress: &mut dyn FnMut(Progress)) -> Result<Kernel> {
    let entry = own_entry(dir, path)?;
    if let Some(kernel) = cached(&entry, &[])? {
        return Ok(kernel);
    }
    let _lock = Lock::take(dir, || progress(Progress::Waiting))?;
    if let Some(kernel) = cached(&entry, &[])? {
        return Ok(kernel);
    }
    progress(Progress::Extracting);
    store(&entry, path, None)
}

fn work_dir(dir: &Path) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix(".new-")
        .tempdir_in(dir)
        .context(|| format!("cannot create a directory in {}", dir.display()))
}

/// Makes the cache entry under a temporary name, and renames it: it is there completely or not at all. A package's kernel
/// has a release and modules.
fn store(entry: &Path, image: &Path, package: Option<(&str, Vec<modules::Module>)>) -> Result<Kernel> {
    let bytes = fs::read(image).context(|| format!("cannot read {}", image.display()))?;
    let vmlinux = image::vmlinux(&bytes).map_err(|what| Error::BadKernel { path: image.to_owned(), what })?;
    let (release, modules, needed) = match package {
        Some((release, modules)) => (release.to_owned(), modules, modules::NEEDED),
        None => (image::release(&vmlinux).unwrap_or_else(|| "unknown".into()), Vec::new(), &[][..]),
    };
    let work = work_dir(entry.parent().unwrap_or(Path::new(".")))?;
    let write = |name: &Path, bytes: &[u8]| {
        let path = work.path().join(name);
        let written = fs::File::create(&path).and_then(|mut file| {
            // The monitor reads it under another user.
            file.set_permissions(fs::Permissions::from_mode(0o644))?;
            file.write_all(bytes)?;
            file.sync_all()
        });
        written.context(|| format!("cannot write {}", path.display()))
    };
    let dir = work.path().join("modules");
    fs::create_dir(&dir).context(|| format!("cannot create {}", dir.display()))?;
    write(Path::new("vmlinux"), &vmlinux)?;
    let mut names = Vec::new();
    for module in modules {
        let name = format!("{}.ko", module.name);
        write(&Path::new("modules").join(&name), &module.bytes)?;
        names.push(name);
    }
    let meta = Meta {
        version: FORMAT,
        release,
        modules: names,
        needed: needed.iter().map(|&name| name.to_owned()).collect(),
    };
    write(
        Path::new("meta.json"),
        &serde_json::to_vec_pretty(&meta).map_err(std::io::Error::from).context(|| "meta.json".into())?,
    )?;
    if entry.exists() {
        // Incomplete, or it would have been used.
        fs::remove_dir_all(entry).context(|| format!("cannot replace {}", entry.display()))?;
    }
    fs::rename(work.path(), entry).context(|| format!("cannot create {}", entry.display()))?;
    cached(entry, needed)?.ok_or_else(|| Error::BadKernel {
        path: entry.to_owned(),
        what: "the cache entry cannot be read back".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elf(dir: &Path) -> PathBuf {
        let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
        elf.resize(18, 0);
        elf.extend([62, 0]);
        elf.extend(b"Linux version 6.12.1-mine (me@here) #1");
        let path = dir.join("vmlinux-mine");
        fs::write(&path, elf).unwrap();
        path
    }

    #[test]
    fn a_kernel_of_ones_own_is_cached_and_noticed_when_it_changes() {
        let dir = tempfile::tempdir().unwrap();
        let path = elf(dir.path());
        let source = KernelSource::Path(path.clone());
        let first = Kernel::ensure(dir.path(), &source, &mut |_| {}).unwrap();
        assert_eq!(first.release, "6.12.1-mine");
        assert_eq!(Kernel::cached(dir.path(), &source).unwrap(), Some(first.clone()));
        assert_eq!(Kernel::cached(dir.path(), &KernelSource::Debian).unwrap(), None);
        let mut asked = false;
        assert_eq!(Kernel::ensure(dir.path(), &source, &mut |_| asked = true).unwrap(), first);
        assert!(!asked);
        let mut bytes = fs::read(&path).unwrap();
        bytes.push(0);
        fs::write(&path, bytes).unwrap();
        assert_ne!(Kernel::ensure(dir.path(), &source, &mut |_| {}).unwrap(), first);
    }

    #[test]
    fn what_is_no_kernel_is_refused_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("script");
        fs::write(&path, "#!/bin/sh\n").unwrap();
        let error = Kernel::ensure(dir.path(), &KernelSource::Path(path), &mut |_| {}).unwrap_err();
        assert!(matches!(error, Error::BadKernel { .. }));
        let left: Vec<_> =
            fs::read_dir(dir.path().join("kernels")).unwrap().flatten().map(|e| e.file_name()).collect();
        assert_eq!(left, [".lock"]);
    }

    #[test]
    fn a_newer_format_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("meta.json"), r#"{"version": 2, "release": "7", "modules": []}"#).unwrap();
        assert!(matches!(cached(dir.path(), &[]), Err(Error::Newer { found: 2, .. })));
    }

    #[test]
    fn an_entry_with_other_modules_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("vmlinux"), "").unwrap();
        let meta = r#"{"version": 1, "release": "6", "modules": ["a.ko"], "needed": ["a"]}"#;
        fs::write(dir.path().join("meta.json"), meta).unwrap();
        assert!(cached(dir.path(), &["a"]).unwrap().is_some());
        assert_eq!(cached(dir.path(), &["a", "b"]).unwrap(), None);
    }
}
