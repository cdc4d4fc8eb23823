//! The image store.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::{Digest, ImageConfiguration, ImageManifest, Limits, Progress, Reference, Result};

/// A directory of images in the OCI layout (`oci-layout`, `index.json`, `blobs/sha256`), with the rootfs files made of
/// them beside it (`rootfs`). Any number of processes may use it at once. Cheap to clone.
///
/// All methods but [`pull`](Store::pull) block; call them from a blocking thread in async code.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
    limits: Limits,
}

/// An image in a [`Store`].
#[derive(Clone, Debug, Serialize)]
pub struct Image {
    /// The name, or `None` for an image whose name has moved on to another one.
    pub reference: Option<Reference>,
    /// The digest of the image's manifest. Its hex digits are the image's id.
    pub digest: Digest,
}

/// What [`Store::inspect`] tells of an image.
#[derive(Clone, Debug, Serialize)]
pub struct Inspection {
    /// The image.
    pub image: Image,
    /// All names of the image.
    pub references: Vec<Reference>,
    /// Bytes of its blobs (manifest, configuration, layers) as stored; layers shared with other images included.
    pub size: u64,
    /// The rootfs, if it has been made already.
    pub rootfs: Option<Rootfs>,
    /// The manifest.
    pub manifest: ImageManifest,
    /// The configuration.
    pub config: ImageConfiguration,
}

/// The root file system of an image: a read-only EROFS disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rootfs {
    /// The file, of apparent size [`DISK_CAPACITY`](crate::DISK_CAPACITY). Its name is bound to the content of the
    /// image's layers and to the version of the writer, so it never changes once it is there.
    pub path: PathBuf,
    /// Bytes of the file system itself.
    pub size: u64,
    /// Bytes that the file takes on the disk.
    pub allocated: u64,
}

/// The platform to choose from a multi-platform image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// The operating system, `linux`.
    pub os: String,
    /// The architecture as Go names it: `amd64`, `arm64`.
    pub architecture: String,
}

impl Default for Platform {
    /// Linux on this machine's architecture.
    fn default() -> Platform {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Platform { os: "linux".into(), architecture: architecture.into() }
    }
}

/// When [`Store::pull`] asks the registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// Only when the image is not here.
    #[default]
    Missing,
    /// Always; what is here already is not downloaded again.
    Always,
    /// Never: the image must be here.
    Never,
}

/// The credentials for a registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// As `docker login` left them: `config.json` in `$DOCKER_CONFIG` or `~/.docker`, with its credential helpers;
    /// anonymous where that has none for the registry.
    #[default]
    Docker,
    /// None.
    Anonymous,
    /// A user name and a password or token.
    Basic {
        /// The user.
        username: String,
        /// The password.
        password: String,
    },
}

/// How to pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// The platform to choose from a multi-platform image.
    pub platform: Platform,
    /// When to ask the registry.
    pub policy: PullPolicy,
    /// The credentials.
    pub auth: Auth,
}

/// Where [`Store::import`] reads from.
pub enum Source<'a> {
    /// A file (archive or rootfs tar) or a directory in OCI layout.
    Path(&'a Path),
    /// A stream of an archive or rootfs tar, such as standard input.
    Reader(&'a mut (dyn std::io::Read + Send)),
}

/// How to import.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// The name for the image; an archive's own names where absent. An archive of several images takes none.
    pub reference: Option<Reference>,
    /// The platform to choose from a multi-platform archive, and to write in the configuration of a rootfs tar's image.
    pub platform: Platform,
    /// The command of an image that is made of a rootfs tar (`CMD`).
    pub cmd: Vec<String>,
    /// The entry point of an image that is made of a rootfs tar (`ENTRYPOINT`).
    pub entrypoint: Vec<String>,
    /// Environment variables, `NAME=value`, of an image that is made of a rootfs tar.
    pub env: Vec<String>,
}

/// What [`Store::prune`] may remove.
#[derive(Clone, Debug, Default)]
pub struct PruneOptions {
    /// Named images that are not in use too, not only those without a name.
    pub all: bool,
    /// The rootfs files that sandboxes use ([`Rootfs::path`]). Neither they nor their images are removed.
    pub in_use: Vec<PathBuf>,
}

/// What [`Store::prune`] or [`Store::remove`] removed.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Pruned {
    /// Names that were removed, and digests of images that had none.
    pub images: Vec<String>,
    /// Files that were removed.
    pub files: u64,
    /// Bytes that were freed on the disk.
    pub bytes: u64,
}

/// The disk usage of a store, in bytes allocated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Images.
    pub images: u64,
    /// Blobs.
    pub blobs: u64,
    /// Blobs that no image needs.
    pub blobs_unreferenced: u64,
    /// Rootfs files.
    pub rootfs: u64,
    /// Partial downloads and temporary files.
    pub partial: u64,
}

impl Store {
    /// Opens the store in `dir`, which is made if it is not there. Temporary files that a killed process left behind
    /// are removed.
    pub fn open(dir: &Path) -> Result<Store> {
        Store::open_with(dir, Limits::default())
    }

    /// As [`open`](Store::open), with other limits than the default ones.
    pub fn open_with(dir: &Path, limits: Limits) -> Result<Store> {
        Ok(Store { dir: dir.to_owned(), limits })
    }

    /// Brings the image from its registry, verified and durable. Layers that are here already are not downloaded, and
    /// an interrupted download goes on where it stopped. Several pulls of one image at once, also by several
    /// processes, download it once.
    pub async fn pull(
        &self,
        reference: &Reference,
        options: &PullOptions,
        progress: &dyn Progress,
    ) -> Result<Image> {
        let _ = (reference, options, progress, &self.limits, &self.dir);
        todo!()
    }

    /// Imports images from a rootfs tar, an archive of `docker save`, or an OCI archive or directory; tars may be
    /// compressed with gzip or zstd. A rootfs tar becomes an image of one layer, and needs a name.
    pub fn import(
        &self,
        source: Source<'_>,
        options: &ImportOptions,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>> {
        let _ = (source, options, progress);
        todo!()
    }

    /// All images, by name; those without a name last.
    pub fn list(&self) -> Result<Vec<Image>> {
        todo!()
    }

    /// The image with the name, digest, or at least 4 first hex digits of the digest.
    pub fn find(&self, name: &str) -> Result<Image> {
        let _ = name;
        todo!()
    }

    /// Everything that is known of an image.
    pub fn inspect(&self, image: &Image) -> Result<Inspection> {
        let _ = image;
        todo!()
    }

    /// The image's configuration: command, environment, user, working directory, stop signal.
    pub fn config(&self, image: &Image) -> Result<ImageConfiguration> {
        let _ = image;
        todo!()
    }

    /// Removes a name (or digest), and with an image's last name the image with what only it needs.
    /// Refuses when the image's rootfs is among `in_use`, unless `force` is set or another name remains.
    pub fn remove(&self, name: &str, in_use: &[PathBuf], force: bool) -> Result<Pruned> {
        let _ = (name, in_use, force);
        todo!()
    }

    /// Removes what is not needed: images without a name (all that are not in use, if so asked), blobs and rootfs
    /// files that belong to no image, and partial downloads.
    pub fn prune(&self, options: &PruneOptions) -> Result<Pruned> {
        let _ = options;
        todo!()
    }

    /// How much disk space is taken, for what.
    pub fn usage(&self) -> Result<Usage> {
        todo!()
    }

    /// The image's root file system, made now if it is not there. Several processes that ask at once get one file,
    /// made once.
    pub fn rootfs(&self, image: &Image, progress: &dyn Progress) -> Result<Rootfs> {
        let _ = (image, progress);
        todo!()
    }
}
