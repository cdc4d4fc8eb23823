//! OCI images: pull, verify, import, unpack to EROFS, garbage-collect.
//!
//! A [`Store`] is a directory in the standard OCI layout. Images come into it by [`Store::pull`] or
//! [`Store::import`], and [`Store::rootfs`] makes of one a read-only EROFS disk for a sandbox: once per image, without
//! root, the same bytes every time.
//!
//! Everything in an image is hostile input. Digests are verified before anything is used, sizes are bounded by
//! [`Limits`], and layers are merged in memory: no path of an image ever names a file of the host.

mod decode;
mod digest;
mod erofs;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod import;
mod layer;
mod limits;
mod options;
mod progress;
mod reference;
mod registry;
mod rootfs;
mod store;
mod tar;
mod tree;

pub use digest::Digest;
pub use error::{Error, Result};
pub use limits::Limits;
pub use oci_spec::image::{ImageConfiguration, ImageManifest};
pub use options::{Auth, ImportOptions, Platform, PullOptions, PullPolicy, Source};
pub use progress::{Phase, Progress, ProgressItem, Silent};
pub use reference::Reference;
pub use rootfs::Rootfs;
pub use store::{Image, Inspection, PruneOptions, Pruned, Store, Usage};

/// The apparent size in bytes of every [`Rootfs`] file, so that all sandboxes' disks have one shape. The files are
/// sparse: they take the space of their content.
pub const DISK_CAPACITY: u64 = 64 << 30;
