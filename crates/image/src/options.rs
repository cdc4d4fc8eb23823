//! How images are pulled and imported.

use std::fmt;
use std::path::Path;

use oci_spec::image::Descriptor;

use crate::Reference;

/// The platform to choose from a multi-platform image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// The operating system, `linux`.
    pub os: String,
    /// The architecture as Go names it: `amd64`, `arm64`.
    pub architecture: String,
}

impl Default for Platform {
    /// Linux on this machine's architecture.
    fn default() -> Platform {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Platform { os: "linux".into(), architecture: architecture.into() }
    }
}

impl Platform {
    /// Whether a manifest is for this platform; one that does not say is.
    pub(crate) fn fits(&self, manifest: &Descriptor) -> bool {
        manifest.platform().as_ref().is_none_or(|platform| {
            platform.os().to_string() == self.os && platform.architecture().to_string() == self.architecture
        })
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)
    }
}

/// When [`Store::pull`](crate::Store::pull) asks the registry.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PullPolicy {
    /// Only when the image is not here.
    #[default]
    Missing,
    /// Always; what is here already is not downloaded again.
    Always,
    /// Never: the image must be here.
    Never,
}

/// The credentials for a registry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Auth {
    /// As `docker login` left them: `config.json` in `$DOCKER_CONFIG` or `~/.docker`, with its credential helpers;
    /// anonymous where that has none for the registry.
    #[default]
    Docker,
    /// None.
    Anonymous,
    /// A user name and a password or token.
    Basic {
        /// The user.
        username: String,
        /// The password.
        password: String,
    },
}

/// How to pull.
#[derive(Clone, Debug, Default)]
pub struct PullOptions {
    /// The platform to choose from a multi-platform image.
    pub platform: Platform,
    /// When to ask the registry.
    pub policy: PullPolicy,
    /// The credentials.
    pub auth: Auth,
}

/// Where [`Store::import`](crate::Store::import) reads from.
pub enum Source<'a> {
    /// A file (archive or rootfs tar) or a directory in OCI layout.
    Path(&'a Path),
    /// A stream of an archive or rootfs tar, such as standard input.
    Reader(&'a mut (dyn std::io::Read + Send)),
}

/// How to import.
#[derive(Clone, Debug, Default)]
pub struct ImportOptions {
    /// The name for the image; an archive's own names where absent. An archive of several images takes none.
    pub reference: Option<Reference>,
    /// The platform to choose from a multi-platform archive, and to write in the configuration of a rootfs tar's image.
    pub platform: Platform,
    /// The command of an image that is made of a rootfs tar (`CMD`).
    pub cmd: Vec<String>,
    /// The entry point of an image that is made of a rootfs tar (`ENTRYPOINT`).
    pub entrypoint: Vec<String>,
    /// Environment variables, `NAME=value`, of an image that is made of a rootfs tar.
    pub env: Vec<String>,
}
