//! What can go wrong with the guest's files.

use std::io;
use std::path::PathBuf;

/// Why there is no kernel or no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no apt here, or it knows no kernel.
    #[error(
        "cannot fetch a guest kernel: {what}; name one with KAPSEL_KERNEL=/path/to/vmlinux or the key `kernel` of the configuration"
    )]
    NoKernel {
        /// What was tried and what it said.
        what: String,
    },
    /// The file is not a kernel that can be booted.
    #[error(
        "{} is not a usable kernel: {what}; set the key `kernel` of the configuration to a vmlinux, or leave it out for Debian's",
        path.display()
    )]
    BadKernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A module that the guest needs is neither in the kernel nor beside it.
    #[error(
        "the kernel {release} has no {module}, which the guest needs; build it in, or leave the key `kernel` of the configuration out for Debian's"
    )]
    NoModule {
        /// The kernel.
        release: String,
        /// The module.
        module: String,
    },
    /// A cache entry was written by a newer kapsel.
    #[error("{} was written by a newer kapsel (format {found}, this one knows {known}); remove it or upgrade", path.display())]
    Newer {
        /// The entry.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// A file or a program failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// Adds what was tried to an I/O error.
pub(crate) trait Context<T> {
    /// `what` tells what was tried, on what.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| Error::Io { what: what(), source: error.into() })
    }
}
