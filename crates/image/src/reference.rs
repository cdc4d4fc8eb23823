//! Names of images.

use std::fmt;
use std::str::FromStr;

use oci_spec::distribution::Reference as OciReference;
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::error::{Error, Result};

/// The registry of names that tell none.
const DEFAULT_REGISTRY: &str = env!("KAPSEL_DEFAULT_REGISTRY");
/// Where that registry has official images.
const OFFICIAL_PREFIX: &str = env!("KAPSEL_OFFICIAL_PREFIX");
/// The tag of names that tell neither tag nor digest.
const DEFAULT_TAG: &str = "latest";
/// The most bytes of a repository.
const LONGEST: usize = 255;

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
        match complete.strip_prefix(DEFAULT_REGISTRY).and_then(|rest| rest.strip_prefix('/')) {
            Some(rest) => match rest.strip_prefix(OFFICIAL_PREFIX) {
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

    /// Parses by hand what the library parses with a regular expression; see `build.rs`. The tests hold the two against
    /// each other.
    fn from_str(text: &str) -> Result<Reference> {
        let invalid = |reason: &str| Error::ReferenceSyntax {
            text: text.chars().take(128).collect(),
            reason: reason.into(),
        };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => {
                let digest: Digest = digest.parse().map_err(|e: Error| invalid(&e.to_string()))?;
                (rest, Some(digest.to_string()))
            }
            None => (text, None),
        };
        // A colon before the last slash belongs to the registry's port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(invalid("the part after the colon is no tag"));
        }
        let (registry, repository) = split(name);
        if !registry.is_none_or(is_registry) {
            return Err(invalid("the part before the first slash is no registry"));
        }
        if repository.is_empty() || !repository.split('/').all(is_component) {
            return Err(invalid(
                "a name has lower-case letters and digits, separated by '.', '_', '-' or '/'",
            ));
        }
        let (registry, repository) = normal(registry, repository);
        if repository.len() > LONGEST {
            return Err(invalid("it is too long"));
        }
        Ok(Reference(match (tag.map(str::to_owned), digest) {
            (Some(tag), Some(digest)) => OciReference::with_tag_and_digest(registry, repository, tag, digest),
            (None, Some(digest)) => OciReference::with_digest(registry, repository, digest),
            (Some(tag), None) => OciReference::with_tag(registry, repository, tag),
            (None, None) => OciReference::with_tag(registry, repository, DEFAULT_TAG.into()),
        }))
    }
}

/// Tells a registry from the first part of a repository, as Docker does.
fn split(name: &str) -> (Option<&str>, &str) {
    match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => (Some(first), rest),
        _ => (None, name),
    }
}

/// Puts in what was left out.
fn normal(registry: Option<&str>, repository: &str) -> (String, String) {
    let registry = match registry {
        None => DEFAULT_REGISTRY,
        // The default registry has an older name, which means the same.
        Some(old) if old.strip_prefix("index.") == Some(DEFAULT_REGISTRY) => DEFAULT_REGISTRY,
        Some(registry) => registry,
    };
    let official = registry == DEFAULT_REGISTRY && !repository.contains('/');
    (registry.to_owned(), format!("{}{repository}", if official { OFFICIAL_PREFIX } else { "" }))
}

/// `host` or `host:port`.
fn is_registry(text: &str) -> bool {
    let (host, port) = text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port)));
    let inner = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
    let label = |label: &str| {
        !label.is_empty() && !label.starts_with('-') && !label.ends_with('-') && label.bytes().all(inner)
    };
    host.split('.').all(label)
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// Words of lower-case letters and digits, with `.`, `_`, `__` or any number of `-` between two.
fn is_component(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let separators = text.split(|c: char| u8::try_from(c).is_ok_and(word));
    let between = |s: &str| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|byte| byte == b'-');
    text.bytes().next().is_some_and(word)
        && text.bytes().next_back().is_some_and(word)
        && separators.into_iter().all(between)
}

fn is_tag(text: &str) -> bool {
    let word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=128).contains(&text.len())
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|byte| word(byte) || matches!(byte, b'.' | b'-'))
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
    use proptest::prelude::*;

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

    proptest! {
        /// What the library makes of a name is what we make of it.
        #[test]
        fn the_library_reads_names_alike(
            text in "([a-zA-Z0-9.-]{0,6}(:[0-9a-z]{0,3})?/)?([a-z0-9._-]{0,5}/){0,2}[a-zA-Z0-9._-]{0,5}(:[a-zA-Z0-9_.-]{0,4})?"
        ) {
            // The library mixes the two up in a first part that is only one of them: capitals in what it takes for a
            // repository, underscores in what it takes for a registry. Both are refused here.
            let sound = |theirs: &OciReference| {
                !theirs.repository().contains(|c: char| c.is_ascii_uppercase()) && is_registry(theirs.registry())
            };
            let theirs = text.parse::<OciReference>().ok().filter(sound);
            let ours = text.parse::<Reference>().ok();
            prop_assert_eq!(ours.map(|reference| reference.0), theirs, "{:?}", text);
        }

        #[test]
        fn no_text_makes_the_parser_panic(text in "\\PC{0,40}") {
            let _ = text.parse::<Reference>();
        }
    }
}
