//! What containerd's CRI plug-in says of a container: whether it is a pod's, and which.

use std::{collections::HashMap, path::Path};

use anyhow::{Context, bail};
use kapsel_sandbox::engine::read_config;
use serde::Deserialize;

pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";

/// A container's place among others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// By itself.
    Alone,
    /// The first one of a pod, which is called by its id.
    Sandbox,
    /// A further one of this pod.
    Member(String),
}

impl Place {
    /// From the annotations of a container's specification.
    ///
    /// # Errors
    /// When they make no sense.
    pub fn of(annotations: &HashMap<String, String>) -> anyhow::Result<Self> {
        match annotations.get(CONTAINER_TYPE).map(String::as_str) {
            None => Ok(Self::Alone),
            Some("sandbox") => Ok(Self::Sandbox),
            Some("container") => {
                let pod = annotations.get(SANDBOX_ID).filter(|id| !id.is_empty());
                pod.cloned().map(Self::Member).with_context(|| {
                    format!(
                        "{CONTAINER_TYPE} says that it is a pod's container, and no {SANDBOX_ID} of which"
                    )
                })
            }
            Some(other) => bail!("{CONTAINER_TYPE} is neither sandbox nor container: {other:?}"),
        }
    }

    /// From containerd's bundle. Its other parts are read and checked when the container is made.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(bundle: &Path) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Annotated {
            #[serde(default)]
            annotations: HashMap<String, String>,
        }
        let path = bundle.join("config.json");
        if !path.exists() {
            // Nothing can be made of it, which is said to whoever asks for that.
            return Ok(Self::Alone);
        }
        let annotated: Annotated = serde_json::from_slice(&read_config(&path)?)
            .with_context(|| format!("{} is no specification", path.display()))?;
        Self::of(&annotated.annotations)
    }

    /// By which of containerd's ids the process is found that answers for container `id`.
    pub fn group<'a>(&'a self, id: &'a str) -> &'a str {
        match self {
            Self::Alone | Self::Sandbox => id,
            Self::Member(pod) => pod,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_annotations_say_who_is_whose() {
        let of = |pairs: &[(&str, &str)]| {
            let pairs = pairs.iter().map(|&(key, value)| (key.to_owned(), value.to_owned()));
            Place::of(&pairs.collect())
        };
        assert_eq!(of(&[("a", "b")]).unwrap(), Place::Alone);
        assert_eq!(of(&[(CONTAINER_TYPE, "sandbox"), (SANDBOX_ID, "p")]).unwrap().group("p"), "p");
        let member = of(&[(CONTAINER_TYPE, "container"), (SANDBOX_ID, "p")]).unwrap();
        assert_eq!(member.group("c"), "p");
        assert!(of(&[(CONTAINER_TYPE, "container")]).is_err());
        assert!(of(&[(CONTAINER_TYPE, "x")]).is_err());
    }
}
