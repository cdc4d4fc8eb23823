//! Images from files: rootfs tars, archives of `docker save`, OCI archives and directories.

mod archive;
mod docker;
mod oci;
mod rootfs;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek};
use std::path::Path;

use archive::Archive;
pub(crate) use oci::no_platform;

use crate::decode::{Compression, Decoder};
use crate::digest::Hasher;
use crate::error::{IoContext, Result};
use crate::options::{ImportOptions, Source};
use crate::progress::Phase;
use crate::store::{Image, Limit, Store, TempFile, copy};
use crate::{Digest, Error, Progress};

/// Imports what `source` has. Blobs that the images need are protected from collection until all is done.
pub(crate) fn import(
    store: &Store,
    source: Source<'_>,
    options: &ImportOptions,
    progress: &dyn Progress,
) -> Result<Vec<Image>> {
    let _lock = store.keep_blobs()?;
    let import = Import { store, options, progress };
    match source {
        Source::Path(path) if path.is_dir() => {
            let archive = Archive::directory(path)?;
            if !archive.has("oci-layout") {
                let what = format!("importing the directory {}", path.display());
                return Err(Error::Unsupported {
                    what,
                    advice: "it is not an OCI layout; pack a rootfs with `tar` first",
                });
            }
            oci::import(&import, &archive)
        }
        Source::Path(path) => import.file(path),
        Source::Reader(reader) => import.stream(reader, "the stream"),
    }
}

/// What the kinds of imports share.
pub(super) struct Import<'a> {
    pub store: &'a Store,
    pub options: &'a ImportOptions,
    pub progress: &'a dyn Progress,
}

/// The uncompressed tar that is imported.
pub(super) enum Tar {
    /// The file itself.
    File(File),
    /// A copy in the store, with its digest and size, that can become a blob.
    Copy(TempFile, Digest, u64),
}

impl Import<'_> {
    fn file(&self, path: &Path) -> Result<Vec<Image>> {
        let mut file = File::open(path).context("open", path)?;
        let what = path.display().to_string();
        let metadata = file.metadata().context("inspect", path)?;
        if !metadata.is_file() {
            // A pipe, such as a shell's `<(command)`.
            return self.stream(&mut file, &what);
        }
        let size = metadata.len();
        let mut prefix = Vec::new();
        (&mut file).take(Compression::PREFIX as u64).read_to_end(&mut prefix).context("read", path)?;
        file.rewind().context("read", path)?;
        if Compression::detect(&prefix) == Compression::None {
            return self.tar(Tar::File(file), &what);
        }
        let mut decoder = Decoder::start(file, size, &what, self.store.limits())?;
        let (copy, size) = self.spool(&mut decoder, &what, &mut |_| {})?;
        self.tar(Tar::Copy(copy, decoder.digest()?, size), &what)
    }

    fn stream(&self, reader: &mut (dyn Read + Send), what: &str) -> Result<Vec<Image>> {
        let mut input = BufReader::with_capacity(1 << 16, reader);
        let failed = |error| Error::malformed(what, error);
        let compression = Compression::detect(input.fill_buf().map_err(failed)?);
        let mut decoded = compression.reader(input).map_err(failed)?;
        let mut hasher = Hasher::default();
        let (copy, size) = self.spool(&mut decoded, what, &mut |data| hasher.update(data))?;
        self.tar(Tar::Copy(copy, hasher.finish(), size), what)
    }

    /// Copies an uncompressed stream to a temporary file, so that it can be read in any order; returns its size too.
    fn spool(
        &self,
        input: &mut dyn Read,
        what: &str,
        on_data: &mut dyn FnMut(&[u8]),
    ) -> Result<(TempFile, u64)> {
        let temporary = TempFile::new(&self.store.layout().temporary())?;
        let mut item = self.progress.start(Phase::Import, &file_label(what), None);
        let limit = Limit::AtMost(self.store.limits().blob_size);
        let size = copy(input, &temporary, what, limit, &mut |data| {
            on_data(data);
            item.advance(data.len() as u64);
        })?;
        item.done();
        Ok((temporary, size))
    }

    /// Finds out what kind of tar it is.
    fn tar(&self, tar: Tar, what: &str) -> Result<Vec<Image>> {
        let file = match &tar {
            Tar::File(file) => file.try_clone(),
            Tar::Copy(copy, ..) => copy.file.try_clone(),
        };
        let archive = Archive::tar(file.context("read", Path::new(what))?, what, self.store.limits())?;
        if archive.has("oci-layout") && archive.has("index.json") {
            return oci::import(self, &archive);
        }
        if let Some(manifest) = docker::manifest(&archive, self.store.limits())? {
            return docker::import(self, &archive, manifest);
        }
        rootfs::import(self, tar, what).map(|image| vec![image])
    }
}

/// The last part of a path, for progress.
fn file_label(what: &str) -> String {
    Path::new(what).file_name().map_or_else(|| what.to_owned(), |name| name.to_string_lossy().into_owned())
}
