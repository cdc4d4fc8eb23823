//! Which modules the guest needs, and in which order they load.
//!
//! Debian's packages have no `modules.dep` (it is made on installation), so dependencies are read from the modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Context;
use crate::{Error, Result, archive};

/// What a sandbox's guest needs, as modules or built into the kernel.
pub(crate) const NEEDED: &[&str] = &[
    "virtio_mmio",
    "virtio_console",
    "vmw_vsock_virtio_transport",
    "virtio_blk",
    "erofs",
    "overlay",
    "virtiofs",
    "virtio_rng",
    "virtio_balloon",
    "virtio_net",
];

/// A module, unpacked.
pub(crate) struct Module {
    /// Its name, with underscores.
    pub name: String,
    /// The ELF file.
    pub bytes: Vec<u8>,
}

/// The modules of `tree` (a `lib/modules/RELEASE` directory) that the guest needs, each after those that it depends on.
pub(crate) fn needed(tree: &Path, release: &str) -> Result<Vec<Module>> {
    let mut files = BTreeMap::new();
    find(&tree.join("kernel"), &mut files)?;
    let builtin = fs::read_to_string(tree.join("modules.builtin")).unwrap_or_default();
    let builtin: BTreeSet<String> = builtin.lines().filter_map(|line| name_of(Path::new(line))).collect();
    let mut loader = Loader { files, builtin, release, seen: BTreeSet::new(), order: Vec::new() };
    for name in NEEDED {
        loader.add(name)?;
    }
    Ok(loader.order)
}

struct Loader<'a> {
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
    release: &'a str,
    seen: BTreeSet<String>,
    order: Vec<Module>,
}

impl Loader<'_> {
    fn add(&mut self, name: &str) -> Result<()> {
        if self.builtin.contains(name) || !self.seen.insert(name.to_owned()) {
            return Ok(());
        }
        let Some(path) = self.files.get(name) else {
            return Err(Error::NoModule { release: self.release.to_owned(), module: name.to_owned() });
        };
        let bytes = fs::read(path).and_then(|bytes| archive::unpack(&bytes));
        let bytes = bytes.context(|| format!("cannot read the module {}", path.display()))?;
        for dependency in depends(&bytes) {
            self.add(&dependency)?;
        }
        self.order.push(Module { name: name.to_owned(), bytes });
        Ok(())
    }
}

fn find(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    let entries = fs::read_dir(dir).context(|| format!("cannot list {}", dir.display()))?;
    for entry in entries {
        let entry = entry.context(|| format!("cannot list {}", dir.display()))?;
        let kind = entry.file_type().context(|| format!("cannot look at {}", entry.path().display()))?;
        if kind.is_dir() {
            find(&entry.path(), files)?;
        } else if let Some(name) = name_of(&entry.path()) {
            files.insert(name, entry.path());
        }
    }
    Ok(())
}

/// `virtio_rng` of `…/virtio-rng.ko.xz`.
fn name_of(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// The modules that a module says it depends on: `depends=a,b` in its `.modinfo`, which is NUL-separated text.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = &module[at + KEY.len()..];
    let value = &value[..value.iter().position(|byte| *byte == 0).unwrap_or(0)];
    let value = String::from_utf8_lossy(value);
    value.split(',').filter(|name| !name.is_empty()).map(|name| name.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(dir: &Path, file: &str, depends: &str) {
        let path = dir.join("kernel").join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, format!("\x7fELF\0license=GPL\0depends={depends}\0name=x\0")).unwrap();
    }

    #[test]
    fn dependencies_come_first_and_built_in_ones_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        for name in NEEDED {
            module(dir.path(), &format!("{name}.ko"), "");
        }
        module(dir.path(), "fs/erofs.ko", "lib-a,virtio");
        module(dir.path(), "lib/lib-a.ko", "lib_b");
        module(dir.path(), "lib/lib_b.ko", "");
        fs::write(dir.path().join("modules.builtin"), "kernel/x/virtio.ko\nkernel/x/virtio_mmio.ko\n")
            .unwrap();
        let order: Vec<_> = needed(dir.path(), "6").unwrap().into_iter().map(|m| m.name).collect();
        assert!(!order.contains(&"virtio_mmio".into()));
        let at = |name: &str| order.iter().position(|n| n == name).unwrap();
        assert!(at("lib_b") < at("lib_a") && at("lib_a") < at("erofs"));
    }

    #[test]
    fn a_missing_module_is_named() {
        let dir = tempfile::tempdir().unwrap();
        module(dir.path(), "a.ko", "");
        assert!(needed(dir.path(), "6.0").err().unwrap().to_string().contains("6.0 has no virtio_mmio"));
    }
}
