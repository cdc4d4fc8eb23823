//! The command line, which programs write and not people: no abbreviations, no help.

use std::{
    collections::HashMap,
    ffi::{OsStr, OsString},
    os::fd::RawFd,
    path::PathBuf,
};

use anyhow::{Context, bail};
use kapsel_sandbox::paths::Id;

use crate::engine::flags::{self, Call};

/// What this process shall do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command {
    /// Own a sandbox.
    Serve(Serve),
    /// Build the template for sandboxes with these annotations; with a root file system the one that holds the container which the
    /// request on standard input makes.
    BuildTemplate {
        /// Of the sandboxes.
        annotations: HashMap<String, String>,
        /// Of the container.
        rootfs: Option<PathBuf>,
        /// Where its program may be.
        programs: Vec<String>,
    },
    /// What containerd wants.
    Engine(Call),
}

/// Which sandbox to own.
#[derive(Debug, PartialEq, Eq)]
pub struct Serve {
    /// Listens; the Task API.
    pub socket: RawFd,
    /// Listens; streams.
    pub attach: RawFd,
    /// Ends with the process that holds the other end.
    pub leash: Option<RawFd>,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The sandbox.
    pub id: Id,
    /// Its machine stands by first.
    pub standby: Option<Standby>,
}

/// How to stand by.
#[derive(Debug, PartialEq, Eq)]
pub struct Standby {
    /// Listens; where the machine is taken.
    pub socket: RawFd,
    /// A lock: one machine is made at a time.
    pub making: RawFd,
    /// The disk with the container's root file system.
    pub rootfs: PathBuf,
}

/// Reads the arguments after the program's name.
pub fn parse(args: impl Iterator<Item = OsString>) -> anyhow::Result<Command> {
    let mut args = args.peekable();
    let flag = args.peek().and_then(|first| first.to_str()).is_some_and(|first| first.starts_with('-'));
    // containerd begins with flags, and kapsel with a command.
    if flag {
        return Ok(Command::Engine(flags::parse(args)?));
    }
    let command = args.next().unwrap_or_default();
    match command.to_str() {
        Some("serve") => serve(&options(args)?),
        Some("build-template") => {
            let mut options = options(args)?;
            let rootfs = options.extract_if(.., |(name, _)| name == "--rootfs").next();
            let rootfs = rootfs.map(|(_, path)| path.into());
            let programs = options.extract_if(.., |(name, _)| name == "--program");
            let programs = programs.map(|(_, path)| path.to_string_lossy().into_owned()).collect();
            Ok(Command::BuildTemplate { annotations: annotations(&options)?, rootfs, programs })
        }
        _ => bail!(
            "{command:?} is no command of this program, which kapsel starts by itself: use `kapsel run` to get a sandbox"
        ),
    }
}

type Options = Vec<(String, OsString)>;

fn options(mut args: impl Iterator<Item = OsString>) -> anyhow::Result<Options> {
    let mut options = Vec::new();
    while let Some(name) = args.next() {
        let name =
            name.to_str().filter(|name| name.starts_with("--")).context("expected an option")?.to_owned();
        let value = args.next().with_context(|| format!("{name} has no value"))?;
        options.push((name, value));
    }
    Ok(options)
}

fn serve(options: &Options) -> anyhow::Result<Command> {
    let known = [
        "--socket-fd",
        "--attach-fd",
        "--leash-fd",
        "--bundle",
        "--id",
        "--standby-fd",
        "--making-fd",
        "--rootfs",
    ];
    if let Some((unknown, _)) = options.iter().find(|(name, _)| !known.contains(&name.as_str())) {
        bail!("unknown option {unknown}");
    }
    let find = |name: &str| options.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_os_str());
    let need = |name: &str| find(name).with_context(|| format!("{name} is missing"));
    let text = |value: &OsStr| value.to_str().map(str::to_owned).context("expected UTF-8");
    let fd = |name: &'static str, value: &OsStr| -> anyhow::Result<RawFd> {
        // 0, 1 and 2 are not for sockets.
        let fd = value.to_str().and_then(|v| v.parse().ok()).filter(|fd| *fd > 2);
        fd.with_context(|| format!("{name} {value:?} is no descriptor"))
    };
    let standby = |socket: &OsStr| -> anyhow::Result<Standby> {
        Ok(Standby {
            socket: fd("--standby-fd", socket)?,
            making: fd("--making-fd", need("--making-fd")?)?,
            rootfs: need("--rootfs")?.into(),
        })
    };
    Ok(Command::Serve(Serve {
        socket: fd("--socket-fd", need("--socket-fd")?)?,
        attach: fd("--attach-fd", need("--attach-fd")?)?,
        leash: find("--leash-fd").map(|value| fd("--leash-fd", value)).transpose()?,
        bundle: need("--bundle")?.into(),
        id: text(need("--id")?)?.parse()?,
        standby: find("--standby-fd").map(standby).transpose()?,
    }))
}

fn annotations(options: &Options) -> anyhow::Result<HashMap<String, String>> {
    options
        .iter()
        .map(|(name, value)| {
            let pair = value.to_str().and_then(|value| value.split_once('='));
            match (name.as_str(), pair) {
                ("--annotation", Some((key, value))) => Ok((key.to_owned(), value.to_owned())),
                _ => bail!("expected --annotation KEY=VALUE, not {name} {value:?}"),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> anyhow::Result<Command> {
        parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn what_kapsel_writes_is_understood() {
        let id = "a".repeat(64);
        let line = format!("serve --bundle /b --id {id} --socket-fd 3 --attach-fd 4 --leash-fd 5");
        let Command::Serve(serve) = run(&line).unwrap() else { panic!("{line}") };
        assert_eq!((serve.socket, serve.attach, serve.leash), (3, 4, Some(5)));
        assert_eq!(
            (serve.bundle, serve.id.as_str(), serve.standby),
            (PathBuf::from("/b"), id.as_str(), None)
        );
        let line = format!(
            "serve --bundle /b --id {id} --socket-fd 3 --attach-fd 4 --standby-fd 5 --making-fd 6 --rootfs /x"
        );
        let Command::Serve(serve) = run(&line).unwrap() else { panic!("{line}") };
        assert_eq!(serve.standby, Some(Standby { socket: 5, making: 6, rootfs: "/x".into() }));
        let Command::BuildTemplate { annotations, rootfs, programs } =
            run("build-template --annotation a=b=c --program /bin/a --rootfs /x --program /b").unwrap()
        else {
            panic!("a template")
        };
        assert_eq!((annotations["a"].as_str(), rootfs), ("b=c", Some("/x".into())));
        assert_eq!(programs, ["/bin/a", "/b"]);
        assert_eq!(run("--version").unwrap(), Command::Engine(Call::Version));
    }

    #[test]
    fn nothing_is_guessed() {
        let id = "a".repeat(64);
        for line in [
            String::new(),
            "run".into(),
            "serve".into(),
            format!("serve --bundle /b --id {id} --socket-fd 3"),
            format!("serve --bundle /b --id {id} --socket-fd 1 --attach-fd 4"),
            format!("serve --bundle /b --id {id} --socket-fd 3 --attach-fd 4 --standby-fd 5 --making-fd 6"),
            format!("serve --bundle /b --id {id} --socket-fd 3 --attach-fd 4 --fast yes"),
            "serve --bundle /b --id abc --socket-fd 3 --attach-fd 4".into(),
            "serve --bundle".into(),
            "build-template --annotation ab".into(),
        ] {
            assert!(run(&line).is_err(), "{line}");
        }
    }
}
