//! How images are pulled and imported.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use oci_spec::image::Descriptor;

use crate::Reference;
use crate::error::{Error, Result};

/// The platform to choose from a multi-platform image, written `linux/amd64` or `linux/arm/v7`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// The operating system, `linux`.
    pub os: String,
    /// The architecture as Go names it: `amd64`, `arm64`.
    pub architecture: String,
    /// The architecture's variant, such as `v7` of `arm`; any where absent.
    pub variant: Option<String>,
}

impl Default for Platform {
    /// Linux on this machine's architecture.
    fn default() -> Platform {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        Platform { os: "linux".into(), architecture: architecture.into(), variant: None }
    }
}

impl Platform {
    /// Whether a manifest is for this platform; one that does not say is.
    pub(crate) fn fits(&self, manifest: &Descriptor) -> bool {
        manifest.platform().as_ref().map(Platform::from).is_none_or(|platform| {
            // The only variant of arm64 that there is, which many indexes leave out.
            let implied = (platform.architecture == "arm64").then_some("v8");
            let variant = platform.variant.as_deref().or(implied);
            platform.os == self.os
                && platform.architecture == self.architecture
                && self.variant.as_deref().is_none_or(|wanted| variant == Some(wanted))
        })
    }
}

impl FromStr for Platform {
    type Err = Error;

    fn from_str(text: &str) -> Result<Platform> {
        let word = |part: &&str| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        };
        let parts: Vec<&str> = text.split('/').collect();
        match parts[..] {
            [os, architecture, ref variant @ ..] if variant.len() <= 1 && parts.iter().all(word) => {
                let variant = variant.first().map(|&variant| variant.to_owned());
                Ok(Platform { os: os.to_owned(), architecture: architecture.to_owned(), variant })
            }
            _ => Err(Error::PlatformSyntax { text: text.chars().take(80).collect() }),
        }
    }
}

impl From<&oci_spec::image::Platform> for Platform {
    fn from(platform: &oci_spec::image::Platform) -> Platform {
        Platform {
            os: platform.os().to_string(),
            architecture: platform.architecture().to_string(),
            variant: platform.variant().clone(),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
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
#[derive(Clone, Debug)]
pub struct PullOptions {
    /// The platform to choose from a multi-platform image.
    pub platform: Platform,
    /// When to ask the registry.
    pub policy: PullPolicy,
    /// The credentials.
    pub auth: Auth,
    /// Where a directory named `HOST[:PORT]` may hold certificates for that registry: authorities (`*.crt`) beside the
    /// system's, and a pair to identify us (`NAME.cert`, `NAME.key`).
    pub certificates: Vec<PathBuf>,
}

impl Default for PullOptions {
    /// As Docker pulls, and with the certificates that it and Podman have been given.
    fn default() -> PullOptions {
        let home = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from);
        let own = |path: &str| home.as_ref().map(|home| home.join(path));
        let certificates = [
            Some("/etc/containers/certs.d".into()),
            Some("/etc/docker/certs.d".into()),
            own(".config/containers/certs.d"),
            own(".config/docker/certs.d"),
        ];
        PullOptions {
            platform: Platform::default(),
            policy: PullPolicy::default(),
            auth: Auth::default(),
            certificates: certificates.into_iter().flatten().collect(),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_round_trip_and_choose() {
        let entry = |platform: &str| -> Descriptor {
            let platform: Platform = platform.parse().unwrap();
            let mut json = serde_json::json!({ "os": platform.os, "architecture": platform.architecture });
            if let Some(variant) = platform.variant {
                json["variant"] = variant.into();
            }
            let digest = crate::Digest::of(b"").to_string();
            let media_type = "application/vnd.oci.image.manifest.v1+json";
            let json =
                serde_json::json!({ "mediaType": media_type, "digest": digest, "size": 1, "platform": json });
            serde_json::from_value(json).unwrap()
        };
        for (wanted, there, fits) in [
            ("linux/amd64", "linux/amd64", true),
            ("linux/amd64", "linux/arm64", false),
            ("linux/amd64", "windows/amd64", false),
            ("linux/arm/v7", "linux/arm/v7", true),
            ("linux/arm/v7", "linux/arm/v6", false),
            ("linux/arm", "linux/arm/v6", true),
            ("linux/arm64/v8", "linux/arm64", true),
            ("linux/arm64", "linux/arm64/v8", true),
        ] {
            let platform: Platform = wanted.parse().unwrap();
            assert_eq!(platform.to_string(), wanted);
            assert_eq!(platform.fits(&entry(there)), fits, "{wanted} {there}");
        }
        for bad in ["", "linux", "linux/", "/amd64", "a/b/c/d", "Linux/AMD64", "linux/amd64 "] {
            assert!(bad.parse::<Platform>().is_err(), "{bad:?}");
        }
    }
}
