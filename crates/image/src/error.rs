//! What can go wrong with images.

use std::io;
use std::path::{Path, PathBuf};

use crate::digest::Digest;

/// The result of this library's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong with images. Every message says what failed, on what, and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// What was tried, as in "cannot … PATH".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },

    /// The disk, or the user's quota on it, is full. Nothing is lost: the store opens afterwards.
    #[error(
        "no space left to {action} {}; free some space (`kapsel prune` removes what is not in use) and try again",
        path.display()
    )]
    DiskFull {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
    },

    /// The store was written by a newer kapsel.
    #[error("{} has format version {found}, and this kapsel knows {supported}; use a newer kapsel", path.display())]
    StoreVersion {
        /// The file that has the version.
        path: PathBuf,
        /// The version in the file.
        found: String,
        /// The newest version known.
        supported: String,
    },

    /// A file of the store is damaged.
    #[error("{} is damaged: {reason}; restore it, or remove the directory to start with an empty store", path.display())]
    StoreDamaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },

    /// Another process holds the store for longer than a caller should wait.
    #[error("the image store {} is busy: {holder}; try again when it has finished", path.display())]
    Busy {
        /// The store.
        path: PathBuf,
        /// What kind of operation holds it.
        holder: &'static str,
    },

    /// No local image has the name or digest.
    #[error(
        "no image {name:?} here; `kapsel pull` or `kapsel import` brings one, `kapsel images` lists them"
    )]
    NotFound {
        /// What was asked for.
        name: String,
    },

    /// A digest prefix belongs to several images.
    #[error("{prefix:?} is the beginning of {count} images' digests; give more digits")]
    Ambiguous {
        /// The prefix.
        prefix: String,
        /// How many images it fits.
        count: usize,
    },

    /// The image is used by a sandbox.
    #[error("image {name} is in use; remove the sandboxes that use it, or force the removal")]
    InUse {
        /// The image.
        name: String,
    },

    /// A name is not an image reference.
    #[error("{text:?} is not an image name: {reason}; it looks like NAME, NAME:TAG or HOST[:PORT]/NAME:TAG")]
    ReferenceSyntax {
        /// The text.
        text: String,
        /// Why.
        reason: String,
    },

    /// A platform is not as it should be written.
    #[error("{text:?} is no platform; write OS/ARCH or OS/ARCH/VARIANT, such as linux/amd64 or linux/arm/v7")]
    PlatformSyntax {
        /// The text.
        text: String,
    },

    /// A digest is not `sha256:` and 64 lower-case hex digits.
    #[error("{text:?} is not a digest (sha256: and 64 lower-case hex digits)")]
    DigestSyntax {
        /// The text.
        text: String,
    },

    /// Content does not have the digest it was announced with.
    #[error(
        "{what} is corrupt: it should have digest {expected} and has {actual}; nothing of it was used; fetch it again, \
         and if that does not help, ask whoever serves it"
    )]
    DigestMismatch {
        /// Which blob or layer.
        what: String,
        /// The announced digest.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },

    /// Content does not have the size it was announced with.
    #[error(
        "{what} is corrupt or truncated: it should have {expected} bytes and has {actual}; nothing of it was used; \
         fetch it again"
    )]
    SizeMismatch {
        /// Which blob.
        what: String,
        /// The announced size.
        expected: u64,
        /// The size of what came.
        actual: u64,
    },

    /// A blob that an image needs is not in the store.
    #[error("blob {digest} is missing from the store; pull or import the image again")]
    BlobMissing {
        /// The blob.
        digest: Digest,
    },

    /// A manifest, index, configuration or archive does not follow its specification.
    #[error("{what} is malformed: {reason}; the image must be rebuilt or fetched again")]
    Malformed {
        /// Which document or file.
        what: String,
        /// What is wrong with it.
        reason: String,
    },

    /// A layer's tar stream is malformed, or tries something that no layer may.
    #[error("layer {layer} is refused: {reason} (at entry {entry:?}); do not use this image, or rebuild it")]
    Layer {
        /// The layer, by its digest or place.
        layer: String,
        /// The entry's path; bytes that are not UTF-8 are replaced, and a long path is cut.
        entry: String,
        /// What is wrong.
        reason: String,
    },

    /// The image exceeds a bound of [`Limits`](crate::Limits).
    #[error(
        "{what} exceeds the limit of {limit} ({name}); it may be an attack: do not use it, or rebuild it with less"
    )]
    Limit {
        /// What is too large.
        what: String,
        /// The field of [`Limits`](crate::Limits).
        name: &'static str,
        /// Its value.
        limit: u64,
    },

    /// The root file system does not fit on a sandbox's disk of [`DISK_CAPACITY`](crate::DISK_CAPACITY) bytes.
    #[error(
        "the image's root file system needs {size} bytes, and a sandbox's disk holds {capacity}; use a smaller image"
    )]
    TooLarge {
        /// Bytes needed.
        size: u64,
        /// Bytes there are.
        capacity: u64,
    },

    /// Something valid that this library does not handle.
    #[error("{what} is not supported; {advice}")]
    Unsupported {
        /// What.
        what: String,
        /// What to do instead.
        advice: &'static str,
    },

    /// An index has no image for the wanted platform.
    #[error("{what} has no image for {wanted}; it has: {available}")]
    NoPlatform {
        /// The image.
        what: String,
        /// The wanted platform.
        wanted: String,
        /// The platforms that there are.
        available: String,
    },

    /// A registry refused, or could not be reached.
    #[error("cannot {action} from registry {registry}: {reason}")]
    Registry {
        /// What was tried, as in "cannot … from registry HOST".
        action: String,
        /// Host and port.
        registry: String,
        /// Why, and where known what to do.
        reason: String,
    },

    /// Credentials cannot be had from the docker configuration, a credential helper or a directory of certificates.
    #[error("cannot read the credentials for {registry}: {reason}; check {}", path.display())]
    Credentials {
        /// The registry.
        registry: String,
        /// The configuration file, or the certificate.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// What to do about an error of the system, where that is known.
fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; check the path",
        io::ErrorKind::PermissionDenied => "; check its owner and mode, or run kapsel as another user",
        io::ErrorKind::ReadOnlyFilesystem => "; choose another place with --root",
        _ if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => "; check the disk",
        _ => "",
    }
}

impl Error {
    /// Wraps an error of the system, telling a full disk from everything else.
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Error::DiskFull { action, path: path.to_owned() }
            }
            _ => Error::Io { action, path: path.to_owned(), source },
        }
    }

    pub(crate) fn malformed(what: impl Into<String>, reason: impl ToString) -> Error {
        Error::Malformed { what: what.into(), reason: reason.to_string() }
    }

    pub(crate) fn limit(what: impl Into<String>, name: &'static str, limit: u64) -> Error {
        Error::Limit { what: what.into(), name, limit }
    }
}

/// Adds "what was tried on which file" to the system's errors.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::io(action, path, source.into()))
    }
}
