//! The guest's kernel and initramfs: fetched, extracted, put together and cached.
//!
//! Nothing is installed on the host: Debian's kernel package is downloaded by apt, which verifies it, and only the kernel
//! image and the few modules that a sandbox needs are kept below the data directory.

mod acpi;
mod archive;
pub mod cpio;
mod error;
mod image;
mod initramfs;
mod kernel;
mod lighten;
mod lock;
mod modules;
pub mod package;

pub use error::Error;
pub use image::vmlinux;
pub use initramfs::Initramfs;
pub use kernel::{Kernel, KernelSource};

/// `Result` with this crate's error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What [`Kernel::ensure`] is doing, for whoever waits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// Another process is fetching the kernel.
    Waiting,
    /// The package is coming in.
    Downloading {
        /// The package and its version.
        package: String,
        /// Bytes that are here.
        done: u64,
        /// Bytes of the whole, 0 when unknown.
        total: u64,
    },
    /// The package is here, its kernel and modules are being extracted.
    Extracting,
}
