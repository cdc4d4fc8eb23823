//! What a person can ask for, and what an image says of itself.

use std::{net::IpAddr, path::PathBuf, str::FromStr};

use oci_spec::image::ImageConfiguration;

use super::Error;
use crate::config::{Isolation, parse_size};
use crate::network::Network;
use crate::publish::Publish;

/// What an image says how it wants to be run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ImageDefaults {
    /// Comes before the command.
    pub entrypoint: Vec<String>,
    /// Used when the person gives no command.
    pub cmd: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group`, …
    pub user: Option<String>,
    /// Working directory.
    pub workdir: Option<String>,
    /// Asks the container to stop.
    pub stop_signal: Option<String>,
    /// Places that the image writes to.
    pub volumes: Vec<String>,
}

impl From<&ImageConfiguration> for ImageDefaults {
    fn from(image: &ImageConfiguration) -> Self {
        let Some(config) = image.config() else { return Self::default() };
        let text = |value: &Option<String>| value.clone().filter(|v| !v.is_empty());
        let list = |value: &Option<Vec<String>>| value.clone().unwrap_or_default();
        Self {
            entrypoint: list(config.entrypoint()),
            cmd: list(config.cmd()),
            env: list(config.env()),
            user: text(config.user()),
            workdir: text(config.working_dir()),
            stop_signal: text(config.stop_signal()),
            volumes: list(config.volumes()),
        }
    }
}

/// What a container may use. `None`: as much as the machine has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Limits {
    /// Bytes.
    pub memory: Option<u64>,
    /// Processors, also fractions of one.
    pub cpus: Option<f64>,
    /// Processes and threads; 0 and `None`: no limit.
    pub pids: Option<i64>,
}

/// Which system calls a container may make.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Seccomp {
    /// kapsel's own list, like Docker's.
    #[default]
    Default,
    /// All.
    Unconfined,
    /// An OCI `linux.seccomp` object in a file.
    File(PathBuf),
}

impl FromStr for Seccomp {
    type Err = std::convert::Infallible;

    fn from_str(s: &str) -> Result<Self, Self::Err> {
        Ok(match s {
            "default" => Self::Default,
            "unconfined" => Self::Unconfined,
            path => Self::File(path.into()),
        })
    }
}

/// Everything that `kapsel run` takes and that ends up in the specification.
#[derive(Clone, Debug, Default)]
pub struct RunOptions {
    /// Replaces the image's command.
    pub args: Vec<String>,
    /// Replaces the image's entrypoint; `Some(vec![])` takes it away.
    pub entrypoint: Option<Vec<String>>,
    /// Whether a process of kapsel's own is process 1, which passes signals on and reaps.
    pub init: bool,
    /// `NAME=value`; added to the image's, the later one wins.
    pub env: Vec<String>,
    /// `user`, `uid`, `user:group`, …
    pub user: Option<String>,
    /// Working directory, absolute.
    pub workdir: Option<String>,
    /// Host name.
    pub hostname: Option<String>,
    /// Whether the process gets a terminal.
    pub terminal: bool,
    /// Columns and rows of the terminal at the start.
    pub terminal_size: Option<(u16, u16)>,
    /// Whether the root file system is read-only.
    pub read_only: bool,
    /// File systems in memory.
    pub tmpfs: Vec<Tmpfs>,
    /// The host's directories and files.
    pub volumes: Vec<Volume>,
    /// Resource limits of the processes.
    pub ulimits: Vec<Ulimit>,
    /// Resource limits of the container.
    pub limits: Limits,
    /// Size of `/dev/shm` in bytes.
    pub shm_size: Option<u64>,
    /// Capabilities beyond the default.
    pub cap_add: Vec<String>,
    /// Capabilities taken from the default; `ALL` takes all.
    pub cap_drop: Vec<String>,
    /// Which system calls are allowed.
    pub seccomp: Seccomp,
    /// Which machine.
    pub isolation: Option<Isolation>,
    /// Use no template.
    pub cold: bool,
    /// Bytes of a scratch disk, instead of an overlay in memory.
    pub storage: Option<u64>,
    /// Which network.
    pub network: Network,
    /// Name servers; empty: those of the host.
    pub dns: Vec<IpAddr>,
    /// Names for `/etc/hosts`.
    pub add_hosts: Vec<(String, IpAddr)>,
    /// Published ports.
    pub publish: Vec<Publish>,
    /// Replaces the image's stop signal.
    pub stop_signal: Option<String>,
}

/// `-v SRC:DST[:ro]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The host's path.
    pub source: PathBuf,
    /// The container's path, absolute.
    pub destination: PathBuf,
    /// Whether the host refuses writes.
    pub read_only: bool,
}

impl FromStr for Volume {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let bad =
            || Error::BadValue { what: "volume", value: s.into(), expected: "SRC:DST[:ro], DST absolute" };
        let mut parts = s.split(':');
        let source = parts.next().filter(|s| !s.is_empty()).ok_or_else(bad)?;
        let destination = parts.next().filter(|d| d.starts_with('/') && *d != "/").ok_or_else(bad)?;
        let read_only = match parts.next() {
            None | Some("rw") => false,
            Some("ro") => true,
            Some(_) => return Err(bad()),
        };
        if parts.next().is_some() || destination.split('/').any(|part| part == "..") {
            return Err(bad());
        }
        Ok(Self { source: source.into(), destination: normal(destination), read_only })
    }
}

/// `--tmpfs DST[:OPTIONS]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tmpfs {
    /// The container's path, absolute.
    pub destination: PathBuf,
    /// As in mount(8): `size=64m`, `mode=1777`, `exec`, …
    pub options: Vec<String>,
}

impl FromStr for Tmpfs {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let bad =
            || Error::BadValue { what: "tmpfs", value: s.into(), expected: "DST[:OPTION,…], DST absolute" };
        let (destination, options) = s.split_once(':').unwrap_or((s, ""));
        if !destination.starts_with('/')
            || destination == "/"
            || destination.split('/').any(|part| part == "..")
        {
            return Err(bad());
        }
        let options: Vec<String> = options.split(',').filter(|o| !o.is_empty()).map(str::to_owned).collect();
        let known = |option: &String| {
            let (key, value) = option.split_once('=').map_or((option.as_str(), None), |(k, v)| (k, Some(v)));
            match (key, value) {
                ("ro" | "rw" | "exec" | "noexec" | "suid" | "nosuid" | "dev" | "nodev", None) => true,
                ("size", Some(size)) => size.ends_with('%') || parse_size(size).is_ok(),
                ("mode", Some(mode)) => u32::from_str_radix(mode, 8).is_ok_and(|mode| mode <= 0o7777),
                ("uid" | "gid" | "nr_inodes", Some(number)) => number.parse::<u32>().is_ok(),
                _ => false,
            }
        };
        if !options.iter().all(known) {
            return Err(bad());
        }
        Ok(Self { destination: normal(destination), options })
    }
}

/// Without doubled or trailing slashes, so that equal places compare equal.
fn normal(path: &str) -> PathBuf {
    std::path::Path::new(path).components().collect()
}

/// `--ulimit NAME=SOFT[:HARD]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ulimit {
    /// As in the specification: `RLIMIT_NOFILE`, …
    pub name: String,
    /// `u64::MAX`: no limit.
    pub soft: u64,
    /// `u64::MAX`: no limit.
    pub hard: u64,
}

impl FromStr for Ulimit {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self, Error> {
        let bad = || Error::BadValue {
            what: "ulimit",
            value: s.into(),
            expected: "NAME=SOFT[:HARD], as nofile=1024",
        };
        let (name, values) = s.split_once('=').ok_or_else(bad)?;
        let name = format!("RLIMIT_{}", name.to_ascii_uppercase());
        name.parse::<oci_spec::runtime::PosixRlimitType>().map_err(|_| bad())?;
        let number = |text: &str| match text {
            "unlimited" | "-1" => Ok(u64::MAX),
            text => text.parse().map_err(|_| bad()),
        };
        let (soft, hard) = values.split_once(':').unwrap_or((values, values));
        let (soft, hard) = (number(soft)?, number(hard)?);
        if soft > hard { Err(bad()) } else { Ok(Self { name, soft, hard }) }
    }
}
