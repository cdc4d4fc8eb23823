//! The image store.

mod blobs;
mod collect;
mod files;
mod index;

use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::image::Descriptor;
use serde::{Deserialize, Serialize};

pub(crate) use blobs::{Blobs, Limit, copy, parse, parse_manifest, verify};
pub(crate) use files::{
    Claim, Claimed, LOCK_POLL, Layout, Lock, LockMode, TempFile, read_bounded, read_small, remove_file,
};
pub(crate) use index::{REF_NAME, digest_of, is_index};

use crate::error::Result;
use crate::options::{ImportOptions, PullOptions, Source};
use crate::{
    Digest, Error, ImageConfiguration, ImageManifest, Limits, Progress, Reference, Rootfs, import, registry,
    rootfs,
};

/// The version of the store's own files; the OCI layout has its own mark.
const STORE_VERSION: u32 = 1;
/// The version of the OCI layout that this library reads and writes.
const OCI_LAYOUT_VERSION: &str = "1.0.0";
/// How long a removal of garbage may hold the store.
pub(crate) const COLLECT_PATIENCE: Duration = Duration::from_secs(60);
/// Digits of a digest that [`Store::find`] wants at least.
const MIN_PREFIX: usize = 4;

/// A directory of images in the OCI layout (`oci-layout`, `index.json`, `blobs/sha256`), with the rootfs files made of
/// them beside it (`rootfs`). Any number of processes may use it at once. Cheap to clone.
///
/// All methods but [`pull`](Store::pull) block; call them from a blocking thread in async code.
#[derive(Clone, Debug)]
pub struct Store {
    blobs: Blobs,
}

/// The version mark of a store.
#[derive(Serialize, Deserialize)]
struct VersionMark {
    version: u32,
}

/// The mark of an OCI layout.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OciLayoutMark {
    image_layout_version: String,
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
        let layout = Layout { dir: dir.to_owned() };
        // Looked at before anything is made or removed in a directory that a newer version may understand better.
        let marked = check_version(&layout)?;
        for dir in [&layout.dir, &layout.blobs(), &layout.rootfs(), &layout.partial(), &layout.temporary()] {
            files::create_dir(dir)?;
        }
        files::collect_temporary(&layout.temporary())?;
        if !marked {
            initialise(&layout)?;
        }
        Ok(Store { blobs: Blobs { layout, limits } })
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
        registry::pull(self, reference, options, progress).await
    }

    /// Imports images from a rootfs tar, an archive of `docker save`, or an OCI archive or directory; tars may be
    /// compressed with gzip or zstd. A rootfs tar becomes an image of one layer, and needs a name.
    pub fn import(
        &self,
        source: Source<'_>,
        options: &ImportOptions,
        progress: &dyn Progress,
    ) -> Result<Vec<Image>> {
        import::import(self, source, options, progress)
    }

    /// All images, by name; those without a name last.
    pub fn list(&self) -> Result<Vec<Image>> {
        let mut images = index::images(&index::read(self.layout())?);
        images.sort_by_cached_key(|image| {
            (image.reference.is_none(), image.reference.as_ref().map(Reference::to_string), image.digest)
        });
        Ok(images)
    }

    /// The image with the name, digest, or at least 4 first hex digits of the digest.
    pub fn find(&self, name: &str) -> Result<Image> {
        let images = self.list()?;
        if let Ok(reference) = name.parse::<Reference>() {
            let named = |image: &&Image| {
                image.reference.as_ref().is_some_and(|known| names(known, &reference, image))
            };
            if let Some(image) = images.iter().find(named) {
                return Ok(image.clone());
            }
        }
        let prefix = name.strip_prefix("sha256:").unwrap_or(name);
        if prefix.len() < MIN_PREFIX
            || !prefix.bytes().all(|b| b.is_ascii_hexdigit() && !b.is_ascii_uppercase())
        {
            return Err(Error::NotFound { name: name.into() });
        }
        let mut found: Vec<Image> =
            images.into_iter().filter(|i| i.digest.hex().starts_with(prefix)).collect();
        found.dedup_by_key(|image| image.digest);
        let count = found.len();
        match found.pop() {
            None => Err(Error::NotFound { name: name.into() }),
            Some(image) if count == 1 => Ok(image),
            Some(_) => Err(Error::Ambiguous { prefix: name.into(), count }),
        }
    }

    /// Everything that is known of an image.
    pub fn inspect(&self, image: &Image) -> Result<Inspection> {
        let manifest = self.blobs.manifest(&image.digest)?;
        let config = self.blobs.config(&manifest)?;
        let (_, manifest_size) = self.blobs.open(&image.digest)?;
        let layers: u64 = manifest.layers().iter().map(Descriptor::size).sum();
        let same = self.list()?.into_iter().filter(|other| other.digest == image.digest);
        Ok(Inspection {
            image: image.clone(),
            references: same.filter_map(|image| image.reference).collect(),
            size: manifest_size + manifest.config().size() + layers,
            rootfs: rootfs::existing(self, &config)?,
            manifest,
            config,
        })
    }

    /// The image's configuration: command, environment, user, working directory, stop signal.
    pub fn config(&self, image: &Image) -> Result<ImageConfiguration> {
        self.blobs.config(&self.blobs.manifest(&image.digest)?)
    }

    /// Removes a name (or, with its digest, all names of an image), and with an image's last name the image with what
    /// only it needs. Refuses when the image's rootfs is among `in_use`, unless `force` is set or a name remains; a
    /// rootfs in use is never removed.
    pub fn remove(&self, name: &str, in_use: &[PathBuf], force: bool) -> Result<Pruned> {
        collect::remove(self, name, in_use, force)
    }

    /// Removes what is not needed: images without a name (all that are not in use, if so asked), blobs and rootfs
    /// files that belong to no image, and partial downloads. Waits for running pulls and imports.
    pub fn prune(&self, options: &PruneOptions) -> Result<Pruned> {
        collect::prune(self, options)
    }

    /// How much disk space is taken, for what.
    pub fn usage(&self) -> Result<Usage> {
        collect::usage(self)
    }

    /// The image's root file system, made now if it is not there. Several processes that ask at once get one file,
    /// made once.
    pub fn rootfs(&self, image: &Image, progress: &dyn Progress) -> Result<Rootfs> {
        rootfs::rootfs(self, image, progress)
    }

    pub(crate) fn blobs(&self) -> &Blobs {
        &self.blobs
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.blobs.layout
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.blobs.limits
    }

    /// Keeps others from removing blobs that no image needs yet, until it is dropped.
    pub(crate) fn keep_blobs(&self) -> Result<Lock> {
        let holder = "another process removes what is not needed";
        Lock::take(&self.layout().collect_lock(), LockMode::Shared, COLLECT_PATIENCE, holder)
    }

    /// Makes the manifest, all of whose blobs are here, an image.
    pub(crate) fn add(&self, manifest: Descriptor, reference: Option<&Reference>) -> Result<Image> {
        index::add(self.layout(), manifest, reference)
    }
}

/// Whether `known`, which `image` has, is what `wanted` means. A name with a digest fits any image of that repository
/// and digest.
fn names(known: &Reference, wanted: &Reference, image: &Image) -> bool {
    let repository =
        |reference: &Reference| (reference.registry().to_owned(), reference.repository().to_owned());
    known == wanted || wanted.digest() == Some(image.digest) && repository(known) == repository(wanted)
}

/// Checks the marks, and tells whether both are there.
fn check_version(layout: &Layout) -> Result<bool> {
    let damaged =
        |path: PathBuf, error: serde_json::Error| Error::StoreDamaged { path, reason: error.to_string() };
    let newer = |path, found: String, supported: String| Err(Error::StoreVersion { path, found, supported });
    let own = match files::read_small(&layout.version(), 1 << 16)? {
        Some(json) => {
            let mark: VersionMark =
                serde_json::from_slice(&json).map_err(|error| damaged(layout.version(), error))?;
            if mark.version > STORE_VERSION {
                return newer(layout.version(), mark.version.to_string(), STORE_VERSION.to_string());
            }
            true
        }
        None => false,
    };
    let oci = match files::read_small(&layout.oci_layout(), 1 << 16)? {
        Some(json) => {
            let mark: OciLayoutMark =
                serde_json::from_slice(&json).map_err(|error| damaged(layout.oci_layout(), error))?;
            if mark.image_layout_version != OCI_LAYOUT_VERSION {
                return newer(layout.oci_layout(), mark.image_layout_version, OCI_LAYOUT_VERSION.into());
            }
            true
        }
        None => false,
    };
    Ok(own && oci)
}

fn initialise(layout: &Layout) -> Result<()> {
    let write = |path: &Path, mark: serde_json::Result<Vec<u8>>| {
        let mark = mark.map_err(|error| Error::malformed("a version mark", error))?;
        files::write_atomic(&layout.temporary(), path, &mark)
    };
    // Changing nothing writes an empty index where there is none.
    index::update(layout, |_| Ok((false, ())))?;
    let oci = OciLayoutMark { image_layout_version: OCI_LAYOUT_VERSION.into() };
    write(&layout.oci_layout(), serde_json::to_vec(&oci))?;
    write(&layout.version(), serde_json::to_vec(&VersionMark { version: STORE_VERSION }))?;
    layout.dir.parent().filter(|parent| parent.is_dir()).map_or(Ok(()), files::sync_dir)
}
