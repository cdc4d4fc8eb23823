//! `run` and `do`: what a new sandbox is made of.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::{Args, ValueEnum};

use kapsel_sandbox::annotations;
use kapsel_sandbox::config::{self, parse_size};
use kapsel_sandbox::network::Network;
use kapsel_sandbox::publish::Published;
use kapsel_sandbox::spec::{Tmpfs, Ulimit, Volume};

use super::value::{DetachKeys, EnvVar, Label, cpus, signal};

/// Run a command in a new container
///
/// Makes a container from IMAGE in a microVM of its own and runs COMMAND, or the image's own command, in it.
/// The exit code is the command's own; 125 when kapsel itself failed, 126 when COMMAND cannot be executed, 127 when
/// it is not found, 128+N when signal N ended it.
#[derive(Args, Debug)]
#[command(override_usage = "kapsel run [OPTIONS] IMAGE [COMMAND [ARG]...]")]
pub struct Run {
    /// Start the container, print its id and leave it running
    #[arg(short, long)]
    pub detach: bool,
    /// Pass standard input on to the container
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the container a terminal
    #[arg(short = 't', long = "tty")]
    pub terminal: bool,
    /// Have a small process be the container's first, which passes signals on to the command and reaps orphans
    #[arg(long)]
    pub init: bool,
    /// Remove the container when it ends
    #[arg(long = "rm")]
    pub remove: bool,
    /// Name of the container, instead of an invented one
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Replace the image's entrypoint; an empty one removes it
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<String>,
    /// When to fetch the image from its registry [default: missing]
    #[arg(long, value_enum, value_name = "WHEN")]
    pub pull: Option<PullPolicy>,
    /// Host name of the container, instead of the beginning of its id
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Note something about the container; 'ps' and 'inspect' show it
    #[arg(short, long = "label", value_name = "NAME=VALUE")]
    pub labels: Vec<Label>,
    /// Signal that 'kapsel stop' sends first, instead of the image's
    #[arg(long, value_name = "SIGNAL", value_parser = signal)]
    pub stop_signal: Option<i32>,
    /// Keys that let go of the terminal and leave the container running; empty for none
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: DetachKeys,

    /// What the process gets.
    #[command(flatten)]
    pub process: ProcessFlags,
    /// What the file system holds.
    #[command(flatten)]
    pub files: FileFlags,
    /// Whom it can reach.
    #[command(flatten)]
    pub network: NetworkFlags,
    /// What the machine has.
    #[command(flatten)]
    pub machine: MachineFlags,

    /// The image, then the command and its arguments.
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, hide = true, value_name = "IMAGE")]
    pub target: Vec<String>,
}

/// Run a command of this machine in a microVM that sees the file system read-only
///
/// COMMAND sees this machine's files as they are, below a scratch layer: it can change anything, and nothing that it
/// changes is kept. It starts in the current directory as the current user, with standard input passed on, and with a
/// terminal when there is one. A directory given with --rw is shared for real.
#[derive(Args, Debug)]
#[command(override_usage = "kapsel do [OPTIONS] COMMAND [ARG]...")]
pub struct Do {
    /// Let the command change this directory for real; can be given again
    #[arg(long = "rw", value_name = "DIR")]
    pub writable: Vec<PathBuf>,
    /// Set a variable (KEY=VALUE), or pass one of this environment on (KEY)
    ///
    /// Without it the command gets PATH, HOME, USER, LOGNAME, SHELL, TERM, LANG, LC_* and TZ: what else is in the
    /// environment may be a secret.
    #[arg(short, long = "env", value_name = "KEY[=VALUE]")]
    pub env: Vec<EnvVar>,
    /// What the machine has.
    #[command(flatten)]
    pub machine: MachineFlags,

    /// The command and its arguments.
    #[arg(required = true, num_args = 1.., trailing_var_arg = true, hide = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

/// Flags about the process, the same for `run` and `exec`.
#[derive(Args, Debug)]
pub struct ProcessFlags {
    /// Set a variable (KEY=VALUE), or pass one of this environment on (KEY)
    #[arg(short, long = "env", value_name = "KEY[=VALUE]")]
    pub env: Vec<EnvVar>,
    /// Read variables from a file: one KEY=VALUE or KEY a line, '#' begins a comment
    #[arg(long = "env-file", value_name = "FILE")]
    pub env_files: Vec<PathBuf>,
    /// Directory in which the command starts
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<String>,
    /// User, and group, by name or number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
}

/// Flags about the container's file system.
#[derive(Args, Debug)]
#[command(next_help_heading = "Files")]
pub struct FileFlags {
    /// Show a file or directory of this machine at a place in the container
    #[arg(short, long = "volume", value_name = "SRC:DST[:ro]")]
    pub volumes: Vec<Volume>,
    /// Give the container a file system in memory
    #[arg(long, value_name = "DST[:OPTIONS]")]
    pub tmpfs: Vec<Tmpfs>,
    /// Refuse changes to the container's file system
    #[arg(long)]
    pub read_only: bool,
}

/// Flags about the network.
#[derive(Args, Debug)]
#[command(next_help_heading = "Network")]
pub struct NetworkFlags {
    /// Network of the container: none, bridge, or ns:PATH for the interfaces of a network namespace
    #[arg(long, value_name = "NETWORK", default_value = "none")]
    pub network: Network,
    /// Let a port of this machine lead to one of the container; by default on 127.0.0.1, and any port that is free
    #[arg(short, long, value_name = "[[HOST_IP:]HOST_PORT:]PORT[/PROTO]")]
    pub publish: Vec<Published>,
    /// Name server of the container, instead of those of this machine
    #[arg(long, value_name = "IP")]
    pub dns: Vec<IpAddr>,
    /// Let the container know an address by a name
    #[arg(long, value_name = "NAME:IP", value_parser = annotations::parse_host)]
    pub add_host: Vec<(String, IpAddr)>,
}

/// Flags about the machine, the same for `run` and `do`.
#[derive(Args, Debug)]
#[command(next_help_heading = "Machine")]
pub struct MachineFlags {
    /// Memory of the machine, such as 512m or 2g
    #[arg(short, long, value_name = "BYTES", value_parser = parse_size)]
    pub memory: Option<u64>,
    /// CPUs that the container may use, such as 2 or 0.5
    #[arg(long, value_name = "NUMBER", value_parser = cpus)]
    pub cpus: Option<f64>,
    /// Keep changes on a disk of this size, instead of in the machine's memory
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    pub storage: Option<u64>,
    /// How the machine is kept apart from this one
    #[arg(long, value_enum, value_name = "HOW")]
    pub isolation: Option<Isolation>,
    /// The most processes and threads that the container may have
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    pub pids_limit: Option<u32>,
    /// Limit a resource of each process
    #[arg(long = "ulimit", value_name = "TYPE=SOFT[:HARD]")]
    pub ulimits: Vec<Ulimit>,
    /// Boot a machine, instead of continuing a template
    #[arg(long)]
    pub cold: bool,
    /// Say on standard error where each millisecond went; 'json' for programs
    #[arg(long, value_enum, value_name = "FORM", num_args = 0..=1, require_equals = true, default_missing_value = "table")]
    pub timings: Option<TimingsForm>,
}

/// When an image is fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum PullPolicy {
    /// Only when it is not here
    Missing,
    /// Each time, to have the newest
    Always,
    /// Never
    Never,
}

/// What keeps a sandbox apart from the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Isolation {
    /// The strongest that works well here
    Auto,
    /// Hardware virtualisation, by kapsel-vmm where it can do what is asked for
    Kvm,
    /// Hardware virtualisation by kapsel-vmm
    KapselVmm,
    /// Hardware virtualisation by QEMU
    QemuKvm,
    /// QEMU's emulation, held by its jail; QEMU itself does not call it a security boundary
    Tcg,
}

impl From<Isolation> for config::Isolation {
    fn from(isolation: Isolation) -> Self {
        match isolation {
            Isolation::Auto => Self::Auto,
            Isolation::Kvm => Self::Kvm,
            Isolation::KapselVmm => Self::KapselVmm,
            Isolation::QemuKvm => Self::QemuKvm,
            Isolation::Tcg => Self::Tcg,
        }
    }
}

/// How timings are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TimingsForm {
    /// A table
    Table,
    /// One line of JSON
    Json,
}
