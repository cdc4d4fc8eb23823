//! Commands about images.

use clap::Args;
use kapsel_image::{Platform, Reference};

use super::value::EnvVar;

/// Fetch an image from a registry
#[derive(Args, Debug)]
pub struct Pull {
    /// For another platform than this machine's, such as linux/arm64
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    pub platform: Option<Platform>,
    /// Print only the digest
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print JSON, as 'kapsel images' does, for this image
    #[arg(long)]
    pub json: bool,
    /// Which, such as debian:12 or localhost:5000/name@sha256:...
    #[arg(value_name = "IMAGE")]
    pub image: String,
}

/// List images
#[derive(Args, Debug)]
pub struct Images {
    /// Only their digests
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print JSON, one array
    #[arg(long)]
    pub json: bool,
}

/// Make an image from an archive
///
/// FILE is a docker archive ('docker save'), an OCI archive, or a tar of a root file system, each plain or compressed
/// with gzip or zstd; '-' for standard input. Without NAME, each image keeps the names that it has in the archive.
///
/// The options --cmd, --entrypoint and --env are for a root file system, which says nothing about how to run it.
#[derive(Args, Debug)]
#[command(allow_missing_positional = true)]
pub struct Import {
    /// Command of the image; a program and its arguments, separated by blanks
    #[arg(long, value_name = "COMMAND")]
    pub cmd: Option<String>,
    /// Entrypoint of the image; a program and its arguments, separated by blanks
    #[arg(long, value_name = "COMMAND")]
    pub entrypoint: Option<String>,
    /// Variable that the image sets; can be given again
    #[arg(short, long = "env", value_name = "KEY=VALUE")]
    pub env: Vec<EnvVar>,
    /// Print JSON, as 'kapsel images' does, for the imported images
    #[arg(long)]
    pub json: bool,
    /// Name to give the image; a root file system needs one
    #[arg(value_name = "NAME")]
    pub name: Option<Reference>,
    /// The archive, or '-'
    #[arg(value_name = "FILE", required = true)]
    pub file: std::path::PathBuf,
}

/// Remove images
#[derive(Args, Debug)]
pub struct Rmi {
    /// Also when a container uses it, and do not mind names that are unknown
    #[arg(short, long)]
    pub force: bool,
    /// Names or digests
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}
