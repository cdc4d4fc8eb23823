//! Pulling images from registries (OCI distribution spec).

mod auth;
mod certificates;
mod credentials;
mod download;
mod session;

use futures::{StreamExt, TryStreamExt, stream};
use oci_spec::image::{Descriptor, ImageIndex, MediaType};
use session::{Document, Session};

use crate::error::Result;
use crate::import::no_platform;
use crate::options::{Platform, PullOptions, PullPolicy};
use crate::progress::Progress;
use crate::store::{Image, Lock, LockMode, Store, digest_of, parse, parse_manifest};
use crate::{Error, Reference};

/// Blobs that are downloaded at the same time, as many as Docker does.
const PARALLEL: usize = 3;

/// Pulls the image, as the policy says.
pub(crate) async fn pull(
    store: &Store,
    reference: &Reference,
    options: &PullOptions,
    progress: &dyn Progress,
) -> Result<Image> {
    match options.policy {
        PullPolicy::Never => return store.find(&reference.to_string()),
        PullPolicy::Missing => match store.find(&reference.to_string()) {
            Err(Error::NotFound { .. }) => {}
            found => return found,
        },
        PullPolicy::Always => {}
    }
    let _lock = keep_blobs(store).await?;
    let session = Session::open(reference, options, store.limits().document_size).await?;
    let document = find_manifest(&session, options).await?;
    let what = format!("manifest {}", document.digest);
    let manifest = parse_manifest(&document.json, &what, store.limits())?;

    let blobs = manifest.layers().iter().chain([manifest.config()]);
    // One layer may be there twice, and would then wait for itself.
    let mut unique: Vec<Descriptor> = Vec::new();
    for blob in blobs {
        if !unique.iter().any(|known| known.digest() == blob.digest()) {
            unique.push(blob.clone());
        }
    }
    let downloads = unique.into_iter().map(|blob| download::blob(store, &session, blob, progress));
    stream::iter(downloads).buffer_unordered(PARALLEL).try_collect::<()>().await?;

    let config = store.blobs().config(&manifest)?;
    let (os, architecture) = (config.os().to_string(), config.architecture().to_string());
    if os != options.platform.os || architecture != options.platform.architecture {
        tracing::warn!("{} is for {os}/{architecture}, not {}", reference.familiar(), options.platform);
    }
    store.blobs().put(&document.json)?;
    store.add(
        Descriptor::new(document.media_type, document.json.len() as u64, document.digest),
        Some(reference),
    )
}

/// Gets the manifest for the platform, by way of an index if there is one.
async fn find_manifest(session: &Session, options: &PullOptions) -> Result<Document> {
    let document = session.manifest(None).await?;
    if !document.is_index {
        return Ok(document);
    }
    let index: ImageIndex = parse(&document.json, &format!("index {}", document.digest))?;
    // An entry that does not say its platform may be an index again, which registries do not serve in practice.
    let Some(entry) =
        index.manifests().iter().find(|entry| entry.platform().is_some() && options.platform.fits(entry))
    else {
        let platforms = index.manifests().iter().filter_map(|entry| entry.platform().as_ref());
        let available: Vec<String> = platforms.map(|platform| Platform::from(platform).to_string()).collect();
        return Err(no_platform(&session.reference().familiar(), &options.platform, &available));
    };
    let digest = digest_of(entry)?;
    let chosen = session.manifest(Some(digest)).await?;
    if chosen.is_index {
        return Err(Error::malformed(
            format!("index {}", document.digest),
            "its entry for the platform is an index",
        ));
    }
    Ok(chosen)
}

/// As [`Store::keep_blobs`], without blocking.
async fn keep_blobs(store: &Store) -> Result<Lock> {
    let deadline = tokio::time::Instant::now() + crate::store::COLLECT_PATIENCE;
    loop {
        if let Some(lock) = Lock::try_take(&store.layout().collect_lock(), LockMode::Shared)? {
            return Ok(lock);
        }
        if tokio::time::Instant::now() > deadline {
            let holder = "another process removes what is not needed";
            return Err(Error::Busy { path: store.layout().dir.clone(), holder });
        }
        tokio::time::sleep(crate::store::LOCK_POLL).await;
    }
}

/// The media types of manifests and indexes that can be used.
const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// The media type as far as this library knows it.
fn known_type(text: &str) -> Option<MediaType> {
    // A Content-Type may have parameters.
    let text = text.split(';').next().unwrap_or_default().trim();
    MANIFEST_TYPES.contains(&text).then(|| MediaType::from(text))
}
