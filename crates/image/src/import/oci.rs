//! OCI archives and directories.

use oci_spec::image::{Descriptor, ImageIndex};

use super::archive::Archive;
use super::{Import, Result};
use crate::options::Platform;
use crate::progress::Phase;
use crate::store::{Image, REF_NAME, digest_of, is_index, parse, parse_manifest, verify};
use crate::{Digest, Error, Reference};

/// The annotation by which containerd and Docker give the complete name, where `ref.name` is the tag alone.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Indexes within indexes; the specification knows one level.
const MAX_NESTING: usize = 4;

pub(super) fn import(import: &Import<'_>, archive: &Archive) -> Result<Vec<Image>> {
    let limit = import.store.limits().document_size;
    let index: ImageIndex = parse(&archive.read("index.json", limit)?, "index.json")?;
    let mut found: Vec<(Descriptor, Option<Reference>)> = Vec::new();
    let mut platforms = Vec::new();
    for entry in index.manifests() {
        if let Some(manifest) = resolve(import, archive, entry, &mut platforms, 0)? {
            found.push((manifest, name(entry)));
        }
    }
    if found.is_empty() {
        return Err(no_platform(&archive.what(), &import.options.platform, &platforms));
    }
    if let Some(reference) = &import.options.reference {
        // The same image may be there under several names.
        found.dedup_by(|a, b| a.0.digest() == b.0.digest());
        match &mut found[..] {
            [(_, name)] => *name = Some(reference.clone()),
            _ => return Err(super::docker::several(found.len())),
        }
    }
    found.into_iter().map(|(manifest, name)| add(import, archive, manifest, name.as_ref())).collect()
}

fn name(entry: &Descriptor) -> Option<Reference> {
    let annotations = entry.annotations().as_ref()?;
    [CONTAINERD_NAME, REF_NAME].iter().find_map(|key| annotations.get(*key)?.parse().ok())
}

/// Finds the manifest for the platform; `None` if there is none.
fn resolve(
    import: &Import<'_>,
    archive: &Archive,
    entry: &Descriptor,
    platforms: &mut Vec<String>,
    nesting: usize,
) -> Result<Option<Descriptor>> {
    if !is_index(entry.media_type()) {
        let fits = import.options.platform.fits(entry);
        if !fits {
            platforms.extend(entry.platform().as_ref().map(|platform| Platform::from(platform).to_string()));
        }
        return Ok(fits.then(|| entry.clone()));
    }
    if nesting > MAX_NESTING {
        return Err(Error::malformed(archive.what(), format!("it has indexes nested {nesting} deep")));
    }
    let what = format!("index {}", entry.digest());
    let index: ImageIndex = parse(&small_blob(import, archive, entry)?, &what)?;
    for entry in index.manifests() {
        if let Some(manifest) = resolve(import, archive, entry, platforms, nesting + 1)? {
            return Ok(Some(manifest));
        }
    }
    Ok(None)
}

/// The error for an index without an image for the platform.
pub(crate) fn no_platform(what: &str, wanted: &Platform, available: &[String]) -> Error {
    let available = if available.is_empty() { "none".into() } else { available.join(", ") };
    Error::NoPlatform { what: what.into(), wanted: wanted.to_string(), available }
}

/// Copies the manifest's blobs into the store, each verified, and makes it an image.
fn add(import: &Import<'_>, archive: &Archive, entry: Descriptor, name: Option<&Reference>) -> Result<Image> {
    let json = small_blob(import, archive, &entry)?;
    let manifest = parse_manifest(&json, &format!("manifest {}", entry.digest()), import.store.limits())?;
    let blobs = import.store.blobs();
    for layer in manifest.layers() {
        let digest = digest_of(layer)?;
        if blobs.has(&digest, layer.size())? {
            continue;
        }
        let mut open = archive.open(&member(&digest))?;
        let mut item = import.progress.start(Phase::Import, &digest.short(), Some(layer.size()));
        let announced = Some((digest, layer.size()));
        let what = format!("layer {digest}");
        blobs.put_stream(&mut open.reader, &what, announced, &mut |bytes| item.advance(bytes))?;
        item.done();
    }
    blobs.put(&small_blob(import, archive, manifest.config())?)?;
    blobs.config(&manifest)?;
    blobs.put(&json)?;
    let mut descriptor =
        Descriptor::new(entry.media_type().clone(), json.len() as u64, entry.digest().clone());
    descriptor.set_platform(entry.platform().clone());
    import.store.add(descriptor, name)
}

/// Reads a manifest, index or configuration, and verifies it.
fn small_blob(import: &Import<'_>, archive: &Archive, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let digest = digest_of(descriptor)?;
    let data = archive.read(&member(&digest), import.store.limits().document_size)?;
    let what = format!("blob {digest}");
    if data.len() as u64 != descriptor.size() {
        return Err(Error::SizeMismatch { what, expected: descriptor.size(), actual: data.len() as u64 });
    }
    verify(&what, &digest, &Digest::of(&data))?;
    Ok(data)
}

fn member(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}
