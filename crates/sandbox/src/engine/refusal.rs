//! Why a bundle is not followed.

use std::{fmt, io, path::PathBuf};

/// Why a sandbox cannot be made of a bundle.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory of the bundle.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// No specification needs so much.
    #[error("{path} has more than {limit} MiB, which no specification needs")]
    TooLarge {
        /// `config.json`.
        path: PathBuf,
        /// In MiB.
        limit: u64,
    },
    /// It asks for something that a machine cannot give, or makes no sense.
    #[error("cannot follow {path}: {refusal}")]
    Refused {
        /// `config.json`.
        path: PathBuf,
        /// Why.
        refusal: Refusal,
    },
}

/// Names what is asked for, why it cannot be had, and what to do instead.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refusal(pub(super) String);

impl From<crate::annotations::Error> for Refusal {
    fn from(error: crate::annotations::Error) -> Self {
        Self(error.to_string())
    }
}

/// Leaves with a [`Refusal`].
macro_rules! refuse {
    ($($words:tt)*) => { return Err($crate::engine::refusal::Refusal(format!($($words)*))) };
}
pub(super) use refuse;

/// Says what a failure, or something that is not there, means for the bundle.
pub(super) trait Why<T> {
    /// With these words first.
    fn why(self, words: &str) -> Result<T, Refusal>;
}

impl<T, E: fmt::Display> Why<T> for Result<T, E> {
    fn why(self, words: &str) -> Result<T, Refusal> {
        self.map_err(|error| Refusal(format!("{words}: {error}")))
    }
}

impl<T> Why<T> for Option<T> {
    fn why(self, words: &str) -> Result<T, Refusal> {
        self.ok_or_else(|| Refusal(words.into()))
    }
}
