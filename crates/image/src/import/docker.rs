//! Archives of `docker save` (Docker Image Specification v1.2, "Combined Image JSON + Filesystem Changeset Format").

use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifestBuilder, MediaType, SCHEMA_VERSION};
use serde::Deserialize;

use super::archive::Archive;
use super::{Import, Result};
use crate::decode::Compression;
use crate::progress::Phase;
use crate::store::{Image, Store, parse, verify};
use crate::{Digest, Error, Limits, Reference};

/// An image in `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Item {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The archive's `manifest.json`; `None` if it is no archive of `docker save`, such as a rootfs that happens to have a
/// file of that name.
pub(super) fn manifest(archive: &Archive, limits: &Limits) -> Result<Option<Vec<Item>>> {
    if !archive.has("manifest.json") {
        return Ok(None);
    }
    let json = archive.read("manifest.json", limits.document_size)?;
    let items: Option<Vec<Item>> = serde_json::from_slice(&json).ok();
    Ok(items.filter(|items| items.iter().all(|item| archive.has(&item.config))))
}

pub(super) fn import(import: &Import<'_>, archive: &Archive, items: Vec<Item>) -> Result<Vec<Image>> {
    if import.options.reference.is_some() && items.len() != 1 {
        return Err(several(items.len()));
    }
    let mut images = Vec::new();
    for item in items {
        images.extend(image(import, archive, &item)?);
    }
    Ok(images)
}

/// The error for one name for several images.
pub(super) fn several(count: usize) -> Error {
    Error::Unsupported {
        what: format!("one name for an archive of {count} images"),
        advice: "import it without a name: each image keeps its own",
    }
}

fn image(import: &Import<'_>, archive: &Archive, item: &Item) -> Result<Vec<Image>> {
    let limits = import.store.limits();
    if item.layers.len() > limits.layers {
        let what = format!("an image of {} layers", item.layers.len());
        return Err(Error::limit(what, "layers", limits.layers as u64));
    }
    let json = archive.read(&item.config, limits.document_size)?;
    let config: ImageConfiguration = parse(&json, &item.config)?;
    let diff_ids = config.rootfs().diff_ids();
    if diff_ids.len() != item.layers.len() {
        let reason = format!("it has {} diff_ids for {} layers", diff_ids.len(), item.layers.len());
        return Err(Error::malformed(item.config.clone(), reason));
    }
    let mut layers = Vec::new();
    for (name, diff_id) in item.layers.iter().zip(diff_ids) {
        layers.push(layer(import, archive, name, diff_id.parse()?)?);
    }
    let mut references = Vec::new();
    match &import.options.reference {
        Some(reference) => references.push(reference.clone()),
        None => {
            for tag in item.repo_tags.iter().flatten() {
                references.push(tag.parse::<Reference>()?);
            }
        }
    }
    let config = descriptor(MediaType::ImageConfig, json.len() as u64, &import.store.blobs().put(&json)?)?;
    let manifest = write_manifest(import.store, config, layers)?;
    if references.is_empty() {
        return Ok(vec![import.store.add(manifest, None)?]);
    }
    references.iter().map(|reference| import.store.add(manifest.clone(), Some(reference))).collect()
}

fn layer(import: &Import<'_>, archive: &Archive, name: &str, diff_id: Digest) -> Result<Descriptor> {
    let mut open = archive.open(name)?;
    let mut prefix = Vec::new();
    let what = format!("layer {name}");
    use std::io::Read;
    let read = (&mut open.reader).take(Compression::PREFIX as u64).read_to_end(&mut prefix);
    read.map_err(|error| Error::malformed(what.clone(), error))?;
    let compression = Compression::detect(&prefix);
    // An uncompressed layer's blob is its content, so its digest is known; a compressed one's content is verified
    // when it is unpacked.
    let announced = (compression == Compression::None).then_some((diff_id, open.size));
    let size = open.size;
    let mut item = import.progress.start(Phase::Import, &diff_id.short(), Some(size));
    let blobs = import.store.blobs();
    let (digest, size) = if announced.is_some() && blobs.has(&diff_id, size)? {
        item.advance(size);
        (diff_id, size)
    } else {
        let mut input = prefix.as_slice().chain(open.reader);
        blobs.put_stream(&mut input, &what, announced, &mut |bytes| item.advance(bytes))?
    };
    item.done();
    descriptor(layer_type(compression), size, &digest)
}

/// The media type of a layer.
pub(super) fn layer_type(compression: Compression) -> MediaType {
    match compression {
        Compression::None => MediaType::ImageLayer,
        Compression::Gzip => MediaType::ImageLayerGzip,
        Compression::Zstd => MediaType::ImageLayerZstd,
    }
}

pub(super) fn descriptor(media_type: MediaType, size: u64, digest: &Digest) -> Result<Descriptor> {
    let digest: oci_spec::image::Digest =
        digest.to_string().parse().map_err(|error| Error::malformed(digest.to_string(), error))?;
    Ok(Descriptor::new(media_type, size, digest))
}

/// Writes the manifest of an image whose blobs are in the store. Equal images give equal manifests.
pub(super) fn write_manifest(
    store: &Store,
    config: Descriptor,
    layers: Vec<Descriptor>,
) -> Result<Descriptor> {
    let builder =
        ImageManifestBuilder::default().schema_version(SCHEMA_VERSION).media_type(MediaType::ImageManifest);
    let what = "the new manifest";
    let manifest =
        builder.config(config).layers(layers).build().map_err(|error| Error::malformed(what, error))?;
    let json = serde_json::to_vec(&manifest).map_err(|error| Error::malformed(what, error))?;
    let digest = store.blobs().put(&json)?;
    // Read back as an image's would be, so that nothing is added that cannot be used.
    let written = store.blobs().manifest(&digest)?;
    store.blobs().config(&written)?;
    verify(what, &digest, &Digest::of(&json))?;
    descriptor(MediaType::ImageManifest, json.len() as u64, &digest)
}
