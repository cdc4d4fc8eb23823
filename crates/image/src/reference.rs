//! Names of images.

use std::fmt;
use std::str::FromStr;

use oci_client::Reference as OciReference;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// The name of an image, normalised as Docker does: `busybox` is the tag `latest` of the official repository
/// `busybox` in the default registry. [`Display`](fmt::Display) gives the complete normalised name, and
/// [`familiar`](Reference::familiar) the short one that people type.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Reference(OciReference);

impl Reference {
    /// The name with everything left out that normalisation would put back: `busybox:latest`.
    pub fn familiar(&self) -> String {
        let complete = self.to_string();
        // What normalisation adds is learnt from the library instead of being repeated here.
        let Ok(probe) = OciReference::try_from("x") else { return complete };
        let host = format!("{}/", probe.registry());
        let official = probe.repository().strip_suffix('x').unwrap_or_default();
        match complete.strip_prefix(&host) {
            Some(rest) => match rest.strip_prefix(official) {
                Some(name) if !name.contains('/') => name.to_owned(),
                _ => rest.to_owned(),
            },
            None => complete,
        }
    }

    /// The registry that serves the image, as `host` or `host:port`.
    pub fn registry(&self) -> &str {
        self.0.registry()
    }

    /// The repository within the registry.
    pub fn repository(&self) -> &str {
        self.0.repository()
    }

    /// The tag, unless the image is named by its digest only.
    pub fn tag(&self) -> Option<&str> {
        self.0.tag()
    }

    /// The digest, where the name has one.
    pub fn digest(&self) -> Option<Digest> {
        self.0.digest().and_then(|digest| digest.parse().ok())
    }

    pub(crate) fn as_oci(&self) -> &OciReference {
        &self.0
    }
}

impl FromStr for Reference {
    type Err = Error;

    fn from_str(text: &str) -> Result<Reference> {
        let invalid =
            |reason: String| Error::ReferenceSyntax { text: text.chars().take(128).collect(), reason };
        let reference: OciReference =
            text.parse().map_err(|e: oci_client::ParseError| invalid(e.to_string()))?;
        if let Some(digest) = reference.digest() {
            digest.parse::<Digest>().map_err(|e| invalid(e.to_string()))?;
        }
        Ok(Reference(reference))
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl TryFrom<String> for Reference {
    type Error = Error;

    fn try_from(text: String) -> Result<Reference> {
        text.parse()
    }
}

impl From<Reference> for String {
    fn from(reference: Reference) -> String {
        reference.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn normalises_as_docker_does() {
        let digest = Digest::of(b"");
        for (typed, familiar) in [
            ("busybox", "busybox:latest"),
            ("busybox:1.36", "busybox:1.36"),
            ("library/busybox", "busybox:latest"),
            ("someone/tool:v1", "someone/tool:v1"),
            ("localhost:5000/busybox", "localhost:5000/busybox:latest"),
            ("127.0.0.1:5000/a/b/c:d", "127.0.0.1:5000/a/b/c:d"),
        ] {
            let reference: Reference = typed.parse().unwrap();
            assert_eq!(reference.familiar(), familiar);
            assert_eq!(reference.to_string().parse::<Reference>().unwrap(), reference);
            assert_eq!(familiar.parse::<Reference>().unwrap(), reference);
        }
        let pinned: Reference = format!("busybox@{digest}").parse().unwrap();
        assert_eq!(pinned.tag(), None);
        assert_eq!(pinned.digest(), Some(digest));
        assert_eq!(pinned.familiar(), format!("busybox@{digest}"));
    }

    #[test]
    fn refuses_nonsense() {
        for bad in ["", "UPPER", "a//b", "-x", "x:", "x@sha256:12", "x:y:z", "../x", "x y"] {
            assert!(bad.parse::<Reference>().is_err(), "{bad:?} was accepted");
        }
    }
}
