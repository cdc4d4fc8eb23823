//! The command line as containerd writes it: Go's flags, then an action.

use std::{ffi::OsString, os::fd::RawFd, path::PathBuf};

use anyhow::{Context, bail};

/// What containerd tells of the container that a call is about.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// containerd's namespace, in which ids are unique.
    pub namespace: String,
    /// containerd's gRPC socket.
    pub address: String,
    /// containerd itself, to publish events with.
    pub publish_binary: PathBuf,
    /// The container.
    pub id: String,
    /// Its directory; `start` is called in it.
    pub bundle: Option<PathBuf>,
    /// Whether to log what is done, too.
    pub debug: bool,
}

/// What to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Start the process that answers for the container, or find that of its pod.
    Start,
    /// Clear away what a dead one left.
    Delete,
    /// Say what this runtime is.
    Info,
}

/// The process that `start` starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Daemon {
    /// As `start` had them.
    pub flags: Flags,
    /// Listens; the Task API.
    pub socket: RawFd,
}

/// A call of containerd's, or of `start`'s.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    /// One that ends at once.
    Once(Flags, Action),
    /// One that stays.
    Daemon(Daemon),
    /// The version is asked for.
    Version,
}

impl Flags {
    /// As arguments, for the process that stays.
    pub fn to_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = Vec::new();
        let mut add = |name: &str, value: OsString| args.extend([name.into(), value]);
        add("-namespace", self.namespace.clone().into());
        add("-address", self.address.clone().into());
        add("-publish-binary", self.publish_binary.clone().into());
        add("-id", self.id.clone().into());
        if let Some(bundle) = &self.bundle {
            add("-bundle", bundle.clone().into());
        }
        if self.debug {
            args.push("-debug".into());
        }
        args
    }
}

/// Reads the arguments after the program's name.
pub fn parse(args: impl Iterator<Item = OsString>) -> anyhow::Result<Call> {
    let mut flags = Flags::default();
    let mut socket = None;
    let mut info = false;
    let mut action = None;
    let mut args = args.peekable();
    while let Some(word) = args.next() {
        let word = word.into_string().map_err(|word| anyhow::anyhow!("{word:?} is not UTF-8"))?;
        let Some(flag) = word.strip_prefix('-') else {
            action = Some(word);
            break;
        };
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let (name, given) = match flag.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (flag, None),
        };
        let yes = |given: Option<String>| given.is_none_or(|value| value == "true" || value == "1");
        match name {
            "debug" => flags.debug = yes(given),
            "info" => info = yes(given),
            "v" | "version" => return Ok(Call::Version),
            _ => {
                let value = match given {
                    Some(value) => value,
                    None => {
                        let next = args.next().with_context(|| format!("-{name} has no value"))?;
                        next.into_string().map_err(|value| anyhow::anyhow!("{value:?} is not UTF-8"))?
                    }
                };
                set(&mut flags, &mut socket, name, value)?;
            }
        }
    }
    if let Some(extra) = args.next() {
        bail!("{extra:?} after the action");
    }
    if info {
        return Ok(Call::Once(flags, Action::Info));
    }
    let missing = [("-id", flags.id.is_empty()), ("-namespace", flags.namespace.is_empty())];
    if let Some((name, _)) = missing.iter().find(|(_, missing)| *missing) {
        bail!("{name} is missing; this program is started by containerd or by `kapsel run`");
    }
    match (action.as_deref(), socket) {
        (Some("start"), None) => Ok(Call::Once(flags, Action::Start)),
        (Some("delete"), None) => Ok(Call::Once(flags, Action::Delete)),
        (Some("daemon"), Some(socket)) => Ok(Call::Daemon(Daemon { flags, socket })),
        (action, _) => bail!("{action:?} is no action of a shim; containerd knows `start` and `delete`"),
    }
}

fn set(flags: &mut Flags, socket: &mut Option<RawFd>, name: &str, value: String) -> anyhow::Result<()> {
    match name {
        "namespace" => flags.namespace = value,
        "address" => flags.address = value,
        "publish-binary" => flags.publish_binary = value.into(),
        "id" => flags.id = value,
        "bundle" => flags.bundle = Some(value).filter(|value| !value.is_empty()).map(PathBuf::from),
        "socket-fd" => {
            let fd = value.parse().ok().filter(|fd| *fd > 2);
            *socket = Some(fd.with_context(|| format!("-socket-fd {value:?} is no descriptor"))?);
        }
        _ => bail!("unknown flag -{name}"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> anyhow::Result<Call> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn what_containerd_writes_is_understood() {
        let line =
            "-namespace default -address /run/c.sock -publish-binary /usr/bin/containerd -id a.b_c start";
        let Call::Once(flags, Action::Start) = run(line).unwrap() else { panic!("{line}") };
        assert_eq!((flags.namespace.as_str(), flags.id.as_str()), ("default", "a.b_c"));
        assert_eq!(flags.address, "/run/c.sock");
        let line = "--namespace=k8s.io -address= -publish-binary /c -id x -bundle /b -debug delete";
        let Call::Once(flags, Action::Delete) = run(line).unwrap() else { panic!("{line}") };
        assert_eq!((flags.bundle.clone(), flags.debug), (Some("/b".into()), true));
        assert!(matches!(run("-info").unwrap(), Call::Once(_, Action::Info)));
        assert_eq!(run("-v").unwrap(), Call::Version);
        let mut args = flags.to_args();
        args.extend(["-socket-fd".into(), "3".into(), "daemon".into()]);
        assert_eq!(parse(args.into_iter()).unwrap(), Call::Daemon(Daemon { flags, socket: 3 }));
    }

    #[test]
    fn nothing_is_guessed() {
        for line in [
            "-id x start",
            "-namespace n start",
            "-namespace n -id x",
            "-namespace n -id x restart",
            "-namespace n -id x start now",
            "-namespace n -id x -colour red start",
            "-namespace n -id x daemon",
            "-namespace n -id x -socket-fd 1 daemon",
            "-namespace n -id",
        ] {
            assert!(run(line).is_err(), "{line}");
        }
    }
}
