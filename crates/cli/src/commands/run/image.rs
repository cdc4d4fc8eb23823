//! From an image's name to what a container needs of it.

use std::path::PathBuf;

use kapsel_image::{Error, Image, PullOptions, PullPolicy, Reference, Store};
use kapsel_sandbox::spec::ImageDefaults;

use crate::commands::host::Host;
use crate::commands::image::fetch;
use crate::failure::Failure;
use crate::flags::run;
use crate::progress::Bars;

/// What a container needs of its image.
pub struct Found {
    /// As people write it.
    pub name: String,
    /// Of the manifest.
    pub digest: String,
    /// How it wants to be run.
    pub defaults: ImageDefaults,
    /// The EROFS file.
    pub rootfs: PathBuf,
}

/// Finds the image, brings it here when it is not, and makes its root file system when there is none yet.
///
/// # Errors
/// When there is no such image.
pub fn find(host: &Host, name: &str, policy: Option<run::PullPolicy>) -> Result<Found, Failure> {
    let store = host.images()?;
    let image = match policy.map_or_else(|| configured(host), PullPolicy::from) {
        PullPolicy::Always => pull(&store, name)?,
        PullPolicy::Never => store.find(name)?,
        PullPolicy::Missing => match store.find(name) {
            Err(Error::NotFound { .. }) => pull(&store, name)?,
            found => found?,
        },
    };
    let defaults = ImageDefaults::from(&store.config(&image)?);
    let rootfs = store.rootfs(&image, &Bars::new())?.path;
    let name = image.reference.as_ref().map_or_else(|| name.to_owned(), Reference::familiar);
    Ok(Found { name, digest: image.digest.to_string(), defaults, rootfs })
}

fn pull(store: &Store, name: &str) -> Result<Image, Failure> {
    let reference: Reference = name.parse()?;
    let options = PullOptions { policy: PullPolicy::Always, ..PullOptions::default() };
    fetch(store, &reference, &options, &Bars::new())
}

fn configured(host: &Host) -> PullPolicy {
    match host.config.pull() {
        "always" => PullPolicy::Always,
        "never" => PullPolicy::Never,
        // The configuration accepts no fourth word.
        _ => PullPolicy::Missing,
    }
}

impl From<run::PullPolicy> for PullPolicy {
    fn from(policy: run::PullPolicy) -> Self {
        match policy {
            run::PullPolicy::Missing => PullPolicy::Missing,
            run::PullPolicy::Always => PullPolicy::Always,
            run::PullPolicy::Never => PullPolicy::Never,
        }
    }
}
