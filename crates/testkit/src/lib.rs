//! Fixtures for the tests: tiny images, a local registry, hostile archives, what fuzzing and end-to-end suites share.
//!
//! Fixtures panic when they cannot be made, since a test without its fixture has failed.

#![allow(clippy::unwrap_used, reason = "fixtures panic; see above")]

pub mod fuzz;
pub mod image;
pub mod registry;
pub mod sandboxes;
pub mod tar;

pub use image::{ImageBuilder, Layer};
pub use registry::{Fault, Registry};
pub use tar::TarBuilder;
