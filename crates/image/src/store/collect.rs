//! Removing what is not needed, and counting what is there.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use oci_spec::image::{Descriptor, ImageIndex};

use super::files::{self, Lock, LockMode};
use super::{Image, PruneOptions, Pruned, Store, Usage, index, parse};
use crate::{Digest, Error, Result, rootfs};

/// How long `prune` waits for pulls and imports to finish.
const PATIENCE: Duration = Duration::from_secs(30);
/// Indexes within indexes; the specification knows one level.
const MAX_NESTING: usize = 4;

/// Removes names, and the image with its last name.
pub(super) fn remove(store: &Store, name: &str, in_use: &[PathBuf], force: bool) -> Result<Pruned> {
    let image = store.find(name)?;
    let by_name = name.parse().ok() == image.reference && image.reference.is_some();
    let mut pruned = update_even_if_full(store, in_use, |index| {
        let gone = |other: &Image| {
            other.digest == image.digest
                && (!by_name || other.reference.is_none() || other.reference == image.reference)
        };
        let images = index::images(index);
        let last = !images.iter().any(|other| other.digest == image.digest && !gone(other));
        if last && !force && uses(store, &image, in_use) {
            return Err(Error::InUse { name: name.to_owned() });
        }
        let removed = images.iter().filter(|other| gone(other)).map(label).collect();
        index::retain(index, |entry| !index::image_of(entry).is_some_and(|image| gone(&image)));
        Ok((true, Pruned { images: removed, ..Pruned::default() }))
    })?;
    // While something is being pulled, its blobs cannot be told from garbage: a later removal or `prune` gets them.
    if let Some(_lock) = Lock::try_take(&store.layout().collect_lock(), LockMode::Exclusive)? {
        collect(store, in_use, false, &mut pruned)?;
    }
    Ok(pruned)
}

/// Removes everything that is not needed.
pub(super) fn prune(store: &Store, options: &PruneOptions) -> Result<Pruned> {
    let holder = "an image is being pulled, imported or unpacked";
    let _lock = Lock::take(&store.layout().collect_lock(), LockMode::Exclusive, PATIENCE, holder)?;
    let mut pruned = update_even_if_full(store, &options.in_use, |index| {
        let gone = |image: &Image| {
            (options.all || image.reference.is_none()) && !uses(store, image, &options.in_use)
        };
        let removed: Vec<String> =
            index::images(index).iter().filter(|image| gone(image)).map(label).collect();
        index::retain(index, |entry| !index::image_of(entry).is_some_and(|image| gone(&image)));
        Ok((!removed.is_empty(), Pruned { images: removed, ..Pruned::default() }))
    })?;
    collect(store, &options.in_use, true, &mut pruned)?;
    Ok(pruned)
}

/// Changes the index. On a full disk, where not even that can be written, room is made by removing rootfs files that
/// nobody uses: they can be made again, and are what takes the most space.
fn update_even_if_full(
    store: &Store,
    in_use: &[PathBuf],
    change: impl Fn(&mut ImageIndex) -> Result<(bool, Pruned)>,
) -> Result<Pruned> {
    let layout = store.layout();
    match index::update(layout, &change) {
        Err(Error::DiskFull { .. }) => {}
        done => return done,
    }
    let mut freed = Pruned::default();
    for path in files::list_dir(&layout.rootfs())? {
        if !in_use.iter().any(|used| same_file(used, &path)) {
            freed.remove(&path)?;
        }
    }
    let pruned = index::update(layout, &change)?;
    Ok(Pruned { images: pruned.images, ..freed })
}

/// Counts disk space.
pub(super) fn usage(store: &Store) -> Result<Usage> {
    let layout = store.layout();
    let sum = |dir: &Path| -> Result<u64> {
        files::list_dir(dir)?.iter().try_fold(0, |sum, path| Ok(sum + files::allocated(path)?.unwrap_or(0)))
    };
    let needed = needed(store, &[])?;
    let mut blobs_unreferenced = 0;
    for path in files::list_dir(&layout.blobs())? {
        if !needed.has_blob(&path) {
            blobs_unreferenced += files::allocated(&path)?.unwrap_or(0);
        }
    }
    Ok(Usage {
        images: store.list()?.len() as u64,
        blobs: sum(&layout.blobs())?,
        blobs_unreferenced,
        rootfs: sum(&layout.rootfs())?,
        partial: sum(&layout.partial())? + sum(&layout.temporary())?,
    })
}

fn label(image: &Image) -> String {
    image.reference.as_ref().map_or_else(|| image.digest.to_string(), |reference| reference.familiar())
}

/// Whether a sandbox uses the image's rootfs. An image whose configuration cannot be read has none.
fn uses(store: &Store, image: &Image, in_use: &[PathBuf]) -> bool {
    let path = store.config(image).and_then(|config| rootfs::path_for(store, &config));
    path.is_ok_and(|path| in_use.iter().any(|used| same_file(used, &path)))
}

/// The store may be reached by several paths, but a rootfs file's name is unique.
fn same_file(a: &Path, b: &Path) -> bool {
    a.file_name().is_some() && a.file_name() == b.file_name()
}

/// What the images of a store need.
struct Needed {
    blobs: HashSet<Digest>,
    rootfs: Vec<PathBuf>,
}

impl Needed {
    /// Whether the file in the blobs' directory is needed. One that has no digest for a name is not a blob.
    fn has_blob(&self, path: &Path) -> bool {
        let digest = path.file_name().and_then(|name| name.to_str()).and_then(Digest::from_hex);
        digest.is_some_and(|digest| self.blobs.contains(&digest))
    }
}

fn needed(store: &Store, in_use: &[PathBuf]) -> Result<Needed> {
    let mut needed = Needed { blobs: HashSet::new(), rootfs: in_use.to_vec() };
    let mut pending: Vec<(Descriptor, usize)> =
        index::read(store.layout())?.manifests().iter().map(|entry| (entry.clone(), 0)).collect();
    while let Some((descriptor, nesting)) = pending.pop() {
        let Ok(digest) = index::digest_of(&descriptor) else { continue };
        if !needed.blobs.insert(digest) || nesting > MAX_NESTING {
            continue;
        }
        let walked = if index::is_index(descriptor.media_type()) {
            walk_index(store, &digest, nesting, &mut pending)
        } else {
            walk_manifest(store, &digest, &mut needed)
        };
        match walked {
            // An image that is damaged already needs nothing more.
            Err(Error::Io { .. }) | Ok(()) => walked?,
            Err(error) => tracing::warn!("skipping image {digest}: {error}"),
        }
    }
    Ok(needed)
}

fn walk_index(
    store: &Store,
    digest: &Digest,
    nesting: usize,
    pending: &mut Vec<(Descriptor, usize)>,
) -> Result<()> {
    let index: ImageIndex = parse(&store.blobs().read(digest)?, &format!("index {digest}"))?;
    pending.extend(index.manifests().iter().map(|entry| (entry.clone(), nesting + 1)));
    Ok(())
}

fn walk_manifest(store: &Store, digest: &Digest, needed: &mut Needed) -> Result<()> {
    let manifest = store.blobs().manifest(digest)?;
    for descriptor in manifest.layers().iter().chain([manifest.config()]) {
        needed.blobs.insert(index::digest_of(descriptor)?);
    }
    needed.rootfs.push(rootfs::path_for(store, &store.blobs().config(&manifest)?)?);
    Ok(())
}

/// Removes the files that no image needs. The caller holds the collection lock exclusively.
fn collect(store: &Store, in_use: &[PathBuf], partial: bool, pruned: &mut Pruned) -> Result<()> {
    let layout = store.layout();
    let needed = needed(store, in_use)?;
    for path in files::list_dir(&layout.blobs())?.iter().filter(|path| !needed.has_blob(path)) {
        pruned.remove(path)?;
    }
    for path in files::list_dir(&layout.rootfs())? {
        if !needed.rootfs.iter().any(|kept| same_file(kept, &path)) {
            pruned.remove(&path)?;
        }
    }
    if partial {
        for path in files::list_dir(&layout.partial())? {
            pruned.remove(&path)?;
        }
    }
    Ok(())
}

impl Pruned {
    /// Removes a file and counts it.
    fn remove(&mut self, path: &Path) -> Result<()> {
        if let Some(bytes) = files::remove_file(path)? {
            self.files += 1;
            self.bytes += bytes;
        }
        Ok(())
    }
}
