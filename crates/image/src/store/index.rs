//! `index.json`: which images there are, and their names.

use std::time::Duration;

use oci_spec::image::{Descriptor, ImageIndex, MediaType};

use super::Image;
use super::files::{self, Layout, Lock, LockMode};
use crate::error::Result;
use crate::{Digest, Error, Reference};

/// The annotation that names an image in an OCI layout (OCI image spec, "Pre-Defined Annotation Keys").
pub(crate) const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// How long another process may hold the index: it does so for one small write.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes of `index.json`: some 100,000 images.
const MAX_INDEX: u64 = 64 << 20;

/// Reads the index; an absent one is empty.
pub(crate) fn read(layout: &Layout) -> Result<ImageIndex> {
    let path = layout.index();
    let damaged = |reason: String| Error::StoreDamaged { path: path.clone(), reason };
    match files::read_small(&path, MAX_INDEX)? {
        Some(json) => serde_json::from_slice(&json).map_err(|error| damaged(error.to_string())),
        None => empty().map_err(damaged),
    }
}

fn empty() -> Result<ImageIndex, String> {
    let builder = oci_spec::image::ImageIndexBuilder::default();
    let builder = builder.schema_version(2u32).media_type(MediaType::ImageIndex).manifests(Vec::new());
    builder.build().map_err(|error| error.to_string())
}

/// Changes the index under its lock; it is written only if `change` returns true with its value.
pub(crate) fn update<T>(
    layout: &Layout,
    change: impl FnOnce(&mut ImageIndex) -> Result<(bool, T)>,
) -> Result<T> {
    let _lock =
        Lock::take(&layout.index_lock(), LockMode::Exclusive, PATIENCE, "another process changes its index")?;
    let mut index = read(layout)?;
    let (changed, value) = change(&mut index)?;
    if changed || !layout.index().exists() {
        let json =
            serde_json::to_vec_pretty(&index).map_err(|error| Error::malformed("index.json", error))?;
        files::write_atomic(&layout.temporary(), &layout.index(), &json)?;
    }
    Ok(value)
}

/// Adds an image. A name that another image has moves to this one, and the other stays without a name.
pub(crate) fn add(layout: &Layout, manifest: Descriptor, reference: Option<&Reference>) -> Result<Image> {
    let digest = digest_of(&manifest)?;
    update(layout, |index| {
        let mut entries = index.manifests().clone();
        if let Some(reference) = reference {
            for entry in entries.iter_mut().filter(|entry| name_of(entry).as_ref() == Some(reference)) {
                set_name(entry, None);
            }
        }
        // An image needs no entry without a name beside one with a name, nor two equal ones.
        let same = |entry: &Descriptor| digest_of(entry).is_ok_and(|other| other == digest);
        let named_elsewhere = |entry: &Descriptor| same(entry) && name_of(entry).is_some();
        if reference.is_some() || !entries.iter().any(named_elsewhere) {
            entries.retain(|entry| !(same(entry) && name_of(entry).is_none()));
            let mut entry = manifest;
            set_name(&mut entry, reference);
            entries.push(entry);
        }
        index.set_manifests(entries);
        Ok((true, Image { reference: reference.cloned(), digest }))
    })
}

/// Keeps the entries that `keep` wants.
pub(crate) fn retain(index: &mut ImageIndex, keep: impl FnMut(&Descriptor) -> bool) {
    let mut entries = index.manifests().clone();
    entries.retain(keep);
    index.set_manifests(entries);
}

/// All images: entries that are manifests. Others, which some other tool has put into the layout, are left alone.
pub(crate) fn images(index: &ImageIndex) -> Vec<Image> {
    index.manifests().iter().filter_map(image_of).collect()
}

/// The image that an entry is, if it is one.
pub(crate) fn image_of(entry: &Descriptor) -> Option<Image> {
    let manifest =
        matches!(entry.media_type(), MediaType::ImageManifest) || is_docker_manifest(entry.media_type());
    manifest.then_some(())?;
    Some(Image { reference: name_of(entry), digest: digest_of(entry).ok()? })
}

/// Whether it is Docker's own manifest type, which has the same fields.
pub(crate) fn is_docker_manifest(media_type: &MediaType) -> bool {
    media_type.as_ref() == "application/vnd.docker.distribution.manifest.v2+json"
}

/// Whether it is an index of manifests, OCI's or Docker's.
pub(crate) fn is_index(media_type: &MediaType) -> bool {
    matches!(media_type, MediaType::ImageIndex)
        || media_type.as_ref() == "application/vnd.docker.distribution.manifest.list.v2+json"
}

/// The name of an entry. Other tools write a tag alone, which is taken as a name.
pub(crate) fn name_of(entry: &Descriptor) -> Option<Reference> {
    entry.annotations().as_ref()?.get(REF_NAME)?.parse().ok()
}

pub(crate) fn set_name(entry: &mut Descriptor, reference: Option<&Reference>) {
    let mut annotations = entry.annotations().clone().unwrap_or_default();
    match reference {
        Some(reference) => drop(annotations.insert(REF_NAME.to_owned(), reference.to_string())),
        None => drop(annotations.remove(REF_NAME)),
    }
    entry.set_annotations((!annotations.is_empty()).then_some(annotations));
}

/// The digest in a descriptor, if it is one that this library handles.
pub(crate) fn digest_of(descriptor: &Descriptor) -> Result<Digest> {
    descriptor.digest().as_ref().parse()
}
