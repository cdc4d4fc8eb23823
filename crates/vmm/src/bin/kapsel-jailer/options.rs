//! What can be asked for, and whether it can be.

use std::ffi::OsString;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::Parser;
use rustix::process::Resource;

/// Run a monitor in a root of its own, as a user of its own. Needs root's rights and gives them up. What follows `--` goes
/// to the monitor.
#[derive(Parser)]
#[command(version, about)]
pub struct Options {
    /// The jail's name: 1 to 64 letters, digits and hyphens
    #[arg(long, value_parser = id)]
    pub id: String,
    /// The monitor, which has to be linked statically
    #[arg(long, value_name = "FILE")]
    pub exec_file: PathBuf,
    /// The user that the monitor runs as
    #[arg(long)]
    pub uid: u32,
    /// The group that the monitor runs as
    #[arg(long)]
    pub gid: u32,
    /// Where jails are: this one is <DIR>/<name of the exec file>/<id>/root
    #[arg(long, value_name = "DIR", default_value = "/srv/jailer")]
    pub chroot_base_dir: PathBuf,
    /// The network namespace that the monitor runs in
    #[arg(long, value_name = "FILE")]
    pub netns: Option<PathBuf>,
    /// Detach from the terminal: a new session, with /dev/null for the standard streams
    #[arg(long)]
    pub daemonize: bool,
    /// Run the monitor as process 1 of a new PID namespace
    #[arg(long)]
    pub new_pid_ns: bool,
    /// A setting of the monitor's cgroup, such as cpuset.cpus=0; can be given again
    #[arg(long, value_name = "FILE=VALUE")]
    pub cgroup: Vec<Setting>,
    /// The version of the cgroups
    #[arg(long, value_name = "VERSION", default_value = "1", value_parser = cgroup_version)]
    pub cgroup_version: Version,
    /// The cgroup in which the monitor's is made [default: the name of the exec file]
    #[arg(long, value_name = "PATH", value_parser = relative)]
    pub parent_cgroup: Option<PathBuf>,
    /// A limit: fsize (bytes of a file) or no-file (descriptors, 2048 if it is not given); can be given again
    #[arg(long, value_name = "RESOURCE=VALUE")]
    pub resource_limit: Vec<Limit>,
    /// For the monitor
    #[arg(last = true, value_name = "ARGUMENTS")]
    pub arguments: Vec<OsString>,
}

fn id(id: &str) -> Result<String, String> {
    if (1..=64).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        Ok(id.to_owned())
    } else {
        Err("an id is 1 to 64 letters, digits and hyphens".to_owned())
    }
}

/// The interface of cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy for each controller.
    V1,
    /// One for all.
    V2,
}

fn cgroup_version(text: &str) -> Result<Version, String> {
    match text {
        "1" => Ok(Version::V1),
        "2" => Ok(Version::V2),
        _ => Err("there are versions 1 and 2".to_owned()),
    }
}

/// A path that leads nowhere but further down.
fn relative(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let down = |component: Component<'_>| matches!(component, Component::Normal(_));
    if !text.is_empty() && path.components().all(down) {
        Ok(path.to_owned())
    } else {
        Err("a parent cgroup is a relative path without . and ..".to_owned())
    }
}

/// What is written to a file of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    /// The file's name, which begins with its controller's and a dot.
    pub file: String,
    /// What is written.
    pub value: String,
}

impl Setting {
    /// Which controller has the file.
    pub fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

impl std::str::FromStr for Setting {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parts = text.split_once('=');
        let (file, value) = parts.ok_or("a setting is FILE=VALUE, such as cpuset.cpus=0")?;
        let known = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        let mut words = file.split('.');
        if words.clone().count() < 2 || words.any(str::is_empty) || !file.chars().all(known) {
            return Err(format!("{file:?} is not a file of a cgroup's controller, such as cpuset.cpus"));
        }
        if value.is_empty() {
            return Err(format!("{file} needs a value"));
        }
        Ok(Setting { file: file.to_owned(), value: value.to_owned() })
    }
}

/// An upper bound for the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// As it is given.
    pub name: &'static str,
    /// As the kernel knows it.
    pub resource: Resource,
    /// The bound.
    pub value: u64,
}

impl std::str::FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("a limit is RESOURCE=VALUE, such as no-file=1024")?;
        let (name, resource) = match name {
            "fsize" => ("fsize", Resource::Fsize),
            "no-file" => ("no-file", Resource::Nofile),
            _ => return Err(format!("{name:?} cannot be limited, only fsize and no-file")),
        };
        let value = value.parse().map_err(|e| format!("{value:?} is not a limit: {e}"))?;
        Ok(Limit { name, resource, value })
    }
}

/// The limits that are asked for, and those that are there anyway.
pub fn limits(asked: &[Limit]) -> Vec<Limit> {
    const DEFAULT: Limit = Limit { name: "no-file", resource: Resource::Nofile, value: 2048 };
    let default = (!asked.iter().any(|limit| limit.name == DEFAULT.name)).then_some(DEFAULT);
    default.into_iter().chain(asked.iter().copied()).collect()
}

/// The program behind all links.
pub fn program(path: &Path) -> Result<PathBuf> {
    let failed = || format!("cannot use {} as the monitor", path.display());
    let program = path.canonicalize().with_context(failed)?;
    if !fs::metadata(&program).with_context(failed)?.is_file() {
        bail!("{} is not a file that can be run", path.display());
    }
    Ok(program)
}

/// Its name, which is a part of the jail's path.
pub fn program_name(program: &Path) -> Result<&str> {
    let name = program.file_name().and_then(|name| name.to_str());
    crate::plain_name(name.with_context(|| format!("{} has no name in UTF-8", program.display()))?)
}

/// Where jails are, behind all links: whoever runs the jailer says so.
pub fn base(path: &Path) -> Result<PathBuf> {
    let base = path.canonicalize().with_context(|| format!("cannot use {} for jails", path.display()))?;
    if !base.is_dir() {
        bail!("{} is not a directory for jails", path.display());
    }
    Ok(base)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_leads_out_of_its_place_is_refused() {
        for bad in ["", "..", "../x", "a/b", "a_b", "a.b", "ä", &"a".repeat(65)] {
            assert!(id(bad).is_err(), "{bad:?}");
        }
        assert_eq!(id(&"a".repeat(64)).unwrap().len(), 64);
        for bad in ["", "/", "/a", "..", "a/../b", "./a"] {
            assert!(relative(bad).is_err(), "{bad:?}");
        }
        assert_eq!(relative("all/of-them").unwrap(), Path::new("all/of-them"));
        for bad in
            ["cpuset.cpus", "=1", "tasks=1", "../cpu.x=1", "cpu/../x.y=1", ".x=1", "cpu.=1", "cpu.shares="]
        {
            assert!(bad.parse::<Setting>().is_err(), "{bad:?}");
        }
        let setting: Setting = "memory.limit_in_bytes=a=b".parse().unwrap();
        assert_eq!((setting.controller(), setting.value.as_str()), ("memory", "a=b"));
    }

    #[test]
    fn descriptors_are_limited_if_nothing_else_is_said() {
        let limit = |text: &str| text.parse::<Limit>().unwrap();
        assert_eq!(limits(&[])[0].value, 2048);
        assert_eq!(limits(&[limit("no-file=5")]), [limit("no-file=5")]);
        assert_eq!(limits(&[limit("fsize=1")]).len(), 2);
        for bad in ["no-file", "no-file=", "no-file=-1", "cpu=1", "fsize=18446744073709551616"] {
            assert!(bad.parse::<Limit>().is_err(), "{bad:?}");
        }
    }
}
