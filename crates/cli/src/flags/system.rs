//! Commands about this machine and about kapsel itself.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use kapsel_sandbox::config::parse_size;

use super::run::Isolation;
use super::value::cpus;

/// Look after the snapshots from which sandboxes start fast
///
/// A template is a booted machine without a container, saved with its memory. The first run makes one by itself, in the
/// background.
#[derive(Debug, Subcommand)]
#[command(
    subcommand_required = true,
    arg_required_else_help = true,
    disable_help_subcommand = true,
    override_usage = "kapsel template COMMAND ..."
)]
pub enum Template {
    Ls(TemplateLs),
    Build(TemplateBuild),
    Rm(TemplateRm),
}

/// List templates
#[derive(Args, Debug)]
pub struct TemplateLs {
    /// Print JSON, one array
    #[arg(long)]
    pub json: bool,
}

/// Make the template that a run with these flags would use, now
#[derive(Args, Debug)]
pub struct TemplateBuild {
    /// Memory of the machine
    #[arg(short, long, value_name = "BYTES", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// CPUs of the machine
    #[arg(long, value_name = "NUMBER", value_parser = cpus)]
    pub cpus: Option<f64>,
    /// How the machine is kept apart from this one
    #[arg(long, value_enum, value_name = "HOW")]
    pub isolation: Option<Isolation>,
}

/// Remove templates; the next run makes what it needs again
#[derive(Args, Debug)]
pub struct TemplateRm {
    /// All of them
    #[arg(short, long, conflicts_with = "keys")]
    pub all: bool,
    /// None of them, but the machines that stand by
    #[arg(long, conflicts_with_all = ["keys", "all"])]
    pub standby: bool,
    /// Keys, or the beginnings of keys
    #[arg(value_name = "KEY", required_unless_present_any = ["all", "standby"])]
    pub keys: Vec<String>,
}

/// Remove what is not in use
///
/// Removes containers that have ended with their logs, what is left of sandboxes that were killed, and parts of images
/// that belong to none.
#[derive(Args, Debug)]
pub struct Prune {
    /// Also images that no container uses, and templates: the next run makes what it needs again
    #[arg(short, long)]
    pub all: bool,
    /// Do not ask
    #[arg(short, long)]
    pub force: bool,
    /// Print JSON: what was removed
    #[arg(long)]
    pub json: bool,
}

/// Check what this machine offers, and say which isolation is chosen and why
///
/// The exit code is 0 when containers can run here, else 1.
#[derive(Args, Debug)]
pub struct Doctor {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Tell an engine where kapsel is: show the change of its configuration, ask, and write it
///
/// Podman gets a file of its own in /etc/containers/containers.conf.d, Docker an entry in the runtimes of
/// /etc/docker/daemon.json, containerd a runtime of its CRI plug-in in /etc/containerd/config.toml. Everything else in
/// these files stays, and a file that cannot be understood is left alone.
#[derive(Args, Debug)]
pub struct Install {
    /// Which
    #[arg(value_enum, value_name = "ENGINE")]
    pub engine: Engine,
    /// Do not ask
    #[arg(short, long, conflicts_with = "dry_run")]
    pub yes: bool,
    /// Show the change, and write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Have the engine run all containers so that name no runtime
    #[arg(long)]
    pub default: bool,
    /// Find the engine's files below DIR instead of /, as when an image of a machine is made
    #[arg(long, value_name = "DIR")]
    pub destdir: Option<PathBuf>,
}

/// An engine that can be told of kapsel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Engine {
    /// Podman.
    Podman,
    /// Docker.
    Docker,
    /// The CRI plug-in of containerd, for Kubernetes.
    Containerd,
}

/// Print the configuration in force, and where each value comes from
#[derive(Args, Debug)]
pub struct Config {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Print the version
#[derive(Args, Debug)]
pub struct Version {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Write the man pages
#[derive(Args, Debug)]
pub struct Man {
    /// Where to: kapsel.1, kapsel-run.1, ...
    #[arg(value_name = "DIR")]
    pub directory: PathBuf,
}

/// Print a completion script
#[derive(Args, Debug)]
pub struct Completions {
    /// For which shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}
