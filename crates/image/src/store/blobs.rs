//! Blobs: content by digest.

use std::fs::File;
use std::io::{Read, Write};

use oci_spec::image::{Descriptor, ImageConfiguration, ImageManifest};
use serde::de::DeserializeOwned;

use super::files::{self, Layout, TempFile};
use super::index::digest_of;
use crate::digest::Hasher;
use crate::error::{IoContext, Result};
use crate::{Digest, Error, Limits};

/// Access to the blobs of a store.
#[derive(Clone, Debug)]
pub(crate) struct Blobs {
    pub layout: Layout,
    pub limits: Limits,
}

impl Blobs {
    /// Whether the blob is here; one of another size than announced is an error.
    pub(crate) fn has(&self, digest: &Digest, size: u64) -> Result<bool> {
        match std::fs::metadata(self.layout.blob(digest)) {
            Ok(metadata) if metadata.len() == size => Ok(true),
            Ok(metadata) => Err(Error::SizeMismatch {
                what: format!("blob {digest}"),
                expected: size,
                actual: metadata.len(),
            }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).context("inspect", &self.layout.blob(digest)),
        }
    }

    /// Opens a blob to stream it; returns its size too. What is in the store was verified when it came; the readers of
    /// layers verify again what they read.
    pub(crate) fn open(&self, digest: &Digest) -> Result<(File, u64)> {
        let path = self.layout.blob(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::BlobMissing { digest: *digest });
            }
            Err(error) => return Err(error).context("open", &path),
        };
        let size = file.metadata().context("inspect", &path)?.len();
        Ok((file, size))
    }

    /// Reads a small blob, and verifies it.
    pub(crate) fn read(&self, digest: &Digest) -> Result<Vec<u8>> {
        let (file, _) = self.open(digest)?;
        let what = format!("blob {digest}");
        let data = files::read_bounded(file, &what, self.limits.document_size, &self.layout.blob(digest))?;
        verify(&what, digest, &Digest::of(&data))?;
        Ok(data)
    }

    /// Stores a small blob.
    pub(crate) fn put(&self, data: &[u8]) -> Result<Digest> {
        let digest = Digest::of(data);
        let path = self.layout.blob(&digest);
        if !path.exists() {
            files::write_atomic(&self.layout.temporary(), &path, data)?;
        }
        Ok(digest)
    }

    /// Stores what `input` gives, of which `announced` may tell size and digest beforehand.
    pub(crate) fn put_stream(
        &self,
        input: &mut dyn Read,
        what: &str,
        announced: Option<(Digest, u64)>,
        on_bytes: &mut dyn FnMut(u64),
    ) -> Result<(Digest, u64)> {
        let temporary = TempFile::new(&self.layout.temporary())?;
        let mut hasher = Hasher::default();
        let limit = announced.map_or(Limit::AtMost(self.limits.blob_size), |(_, size)| Limit::Exactly(size));
        let size = copy(input, &temporary, what, limit, &mut |data| {
            hasher.update(data);
            on_bytes(data.len() as u64);
        })?;
        let digest = hasher.finish();
        if let Some((expected, _)) = announced {
            verify(what, &expected, &digest)?;
        }
        self.adopt(temporary, &digest)?;
        Ok((digest, size))
    }

    /// Makes a temporary file the blob with the digest, which is that of its content.
    pub(crate) fn adopt(&self, temporary: TempFile, digest: &Digest) -> Result<()> {
        let path = self.layout.blob(digest);
        if path.exists() { Ok(()) } else { temporary.persist(&path) }
    }

    /// Reads and checks a manifest.
    pub(crate) fn manifest(&self, digest: &Digest) -> Result<ImageManifest> {
        parse_manifest(&self.read(digest)?, &format!("manifest {digest}"), &self.limits)
    }

    /// Reads the image configuration of a manifest, and checks it against the manifest.
    pub(crate) fn config(&self, manifest: &ImageManifest) -> Result<ImageConfiguration> {
        let digest = digest_of(manifest.config())?;
        let what = format!("image configuration {digest}");
        let config: ImageConfiguration = parse(&self.read(&digest)?, &what)?;
        let (ids, layers) = (config.rootfs().diff_ids().len(), manifest.layers().len());
        if ids != layers {
            return Err(Error::malformed(
                what,
                format!("it has {ids} diff_ids, and the manifest {layers} layers"),
            ));
        }
        Ok(config)
    }
}

/// How many bytes there may be.
#[derive(Clone, Copy)]
pub(crate) enum Limit {
    /// As many as were announced.
    Exactly(u64),
    /// The limit on blobs.
    AtMost(u64),
}

/// Copies `input` to a temporary file, shows each piece to `on_data`, and returns how many bytes there were.
pub(crate) fn copy(
    input: &mut dyn Read,
    output: &TempFile,
    what: &str,
    limit: Limit,
    on_data: &mut dyn FnMut(&[u8]),
) -> Result<u64> {
    let mut buffer = vec![0; 256 << 10];
    let mut size = 0u64;
    loop {
        let length = match input.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => {
                return Err(error.downcast::<Error>().unwrap_or_else(|error| Error::malformed(what, error)));
            }
        };
        size += length as u64;
        match limit {
            Limit::Exactly(expected) if size > expected || length == 0 && size < expected => {
                return Err(Error::SizeMismatch { what: what.into(), expected, actual: size });
            }
            Limit::AtMost(limit) if size > limit => {
                return Err(Error::limit(format!("{what}, larger than {limit} bytes,"), "blob_size", limit));
            }
            _ if length == 0 => return Ok(size),
            _ => {}
        }
        let mut file = &output.file;
        file.write_all(&buffer[..length]).context("write", output.path())?;
        on_data(&buffer[..length]);
    }
}

pub(crate) fn verify(what: &str, expected: &Digest, actual: &Digest) -> Result<()> {
    if expected == actual {
        return Ok(());
    }
    Err(Error::DigestMismatch { what: what.into(), expected: *expected, actual: *actual })
}

/// Parses a JSON document.
pub(crate) fn parse<T: DeserializeOwned>(json: &[u8], what: &str) -> Result<T> {
    serde_json::from_slice(json).map_err(|error| Error::malformed(what, error))
}

/// Parses a manifest, and checks that this library can use it.
pub(crate) fn parse_manifest(json: &[u8], what: &str, limits: &Limits) -> Result<ImageManifest> {
    let manifest: ImageManifest = parse(json, what)?;
    if manifest.schema_version() != 2 {
        return Err(Error::malformed(
            what,
            format!("it has schemaVersion {}, not 2", manifest.schema_version()),
        ));
    }
    if manifest.layers().len() > limits.layers {
        let limit = limits.layers as u64;
        return Err(Error::limit(
            format!("{what}, with {} layers,", manifest.layers().len()),
            "layers",
            limit,
        ));
    }
    let check = |descriptor: &Descriptor, name, limit: u64| -> Result<()> {
        let digest = digest_of(descriptor)?;
        if descriptor.size() > limit {
            return Err(Error::limit(format!("blob {digest} of {} bytes", descriptor.size()), name, limit));
        }
        Ok(())
    };
    check(manifest.config(), "document_size", limits.document_size)?;
    for layer in manifest.layers() {
        check(layer, "blob_size", limits.blob_size)?;
    }
    Ok(manifest)
}
