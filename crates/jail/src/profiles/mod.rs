//! The jails of the programs that kapsel runs.

mod forward;
mod fsd;
mod kapsel_vmm;
mod qemu;

use std::path::Path;

use crate::elf;
use crate::error::Result;
use crate::jail::Jail;

pub use forward::forward;
pub use fsd::{Share, fsd};
pub use kapsel_vmm::kapsel_vmm;
pub use qemu::qemu;

impl Jail {
    /// Sets the program to a host file, shown at the same path inside, with its loader and exactly the libraries that it needs.
    ///
    /// # Errors
    /// When the program is no ELF file, or a library is missing.
    pub fn program_with_libraries(self, host: &Path) -> Result<Jail> {
        self.program_with_plugins(host, &[])
    }

    /// As [`Jail::program_with_libraries`], with further objects that the program loads by itself from fixed places.
    fn program_with_plugins(self, host: &Path, plugins: &[&Path]) -> Result<Jail> {
        let mut needs = elf::needs(host)?;
        let mut jail = self.bind_exec(host, host).program(host);
        for plugin in plugins {
            jail = jail.bind_exec(plugin, *plugin);
            needs.libraries.extend(elf::needs(plugin)?.libraries);
        }
        let Some(loader) = needs.loader else { return Ok(jail) };
        jail = jail.bind_exec(&loader, &loader);
        // Where the loader looks without a cache: the directory that the C library is in.
        let libc = needs.libraries.get("libc.so.6").and_then(|path| path.parent());
        let directory = libc.unwrap_or(Path::new("/lib/x86_64-linux-gnu")).to_owned();
        for (name, path) in needs.libraries {
            jail = jail.bind_exec(path, directory.join(name));
        }
        Ok(jail)
    }
}
