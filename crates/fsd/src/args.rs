//! The command line. kapsel writes it, so it is parsed strictly and by hand: a parser library would be a third of this process's
//! memory.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow, bail, ensure};

const USAGE: &str = "usage: kapsel-fsd --socket-fd N --share DIR [--read-only] [--tag TAG] [--map-owner]

  --socket-fd N  listening Unix socket for the vhost-user connection of the monitor
  --share DIR    the directory to serve
  --read-only    refuse all changes
  --tag TAG      the tag to report to monitors that ask for it (1 to 36 bytes)
  --map-owner    show files of the user that runs this program as the guest's root's, and create them as such

kapsel starts this program by itself, in a jail.";

/// The parsed command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Args {
    /// Listening vhost-user socket.
    pub socket: RawFd,
    /// The directory to serve.
    pub share: PathBuf,
    /// Whether all changes are refused.
    pub read_only: bool,
    /// The virtio-fs tag, for monitors that read it from us.
    pub tag: Option<String>,
    /// Whether our own user stands for the guest's root.
    pub map_owner: bool,
}

impl Args {
    pub fn parse(mut words: impl Iterator<Item = OsString>) -> Result<Args> {
        let (mut socket, mut share, mut tag) = (None, None, None);
        let (mut read_only, mut map_owner) = (false, false);
        while let Some(word) = words.next() {
            let name = word.to_str().unwrap_or_default().to_owned();
            let mut value = || words.next().with_context(|| format!("{name} needs a value\n{USAGE}"));
            match name.as_str() {
                "--socket-fd" => socket = Some(number(value()?)?),
                "--share" => share = Some(PathBuf::from(value()?)),
                "--tag" => tag = Some(text(value()?)?),
                "--read-only" => read_only = true,
                "--map-owner" => map_owner = true,
                _ => bail!("unknown argument {}\n{USAGE}", word.display()),
            }
        }
        let missing = |what: &str| anyhow!("{what} is missing\n{USAGE}");
        Ok(Args {
            socket: socket.ok_or_else(|| missing("--socket-fd"))?,
            share: share.ok_or_else(|| missing("--share"))?,
            read_only,
            tag,
            map_owner,
        })
    }
}

fn number(value: OsString) -> Result<RawFd> {
    let fd = value.to_str().and_then(|v| v.parse().ok()).filter(|fd| *fd > 2);
    fd.ok_or_else(|| anyhow!("--socket-fd takes a descriptor number above 2, not {}", value.display()))
}

fn text(value: OsString) -> Result<String> {
    let tag = value.into_string().map_err(|_| anyhow!("--tag is not UTF-8"))?;
    ensure!((1..=virtiofsd::vhost_user::MAX_TAG_LEN).contains(&tag.len()), "--tag has 1 to 36 bytes");
    Ok(tag)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn arguments_are_strict() {
        let args = parse("--socket-fd 3 --share /share --read-only --tag t").unwrap();
        let expected = Args {
            socket: 3,
            share: "/share".into(),
            read_only: true,
            tag: Some("t".into()),
            map_owner: false,
        };
        assert_eq!(args, expected);
        for line in [
            "",
            "--share /s",
            "--socket-fd 3",
            "--socket-fd 1 --share /s",
            "--socket-fd x --share /s",
            "--socket-fd 3 --share",
            "--socket-fd 3 --share /s --writable",
            "--socket-fd 3 --share /s --tag 0123456789012345678901234567890123456789",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
