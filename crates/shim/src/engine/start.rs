//! `start`: makes the socket, starts the process that answers on it, and tells containerd where it is.

use std::{
    fs,
    io::{IsTerminal, Read, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{
            fs::OpenOptionsExt,
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, bail};
use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message,
};
use kapsel_sandbox::launch::inherit;
use rustix::fs::OFlags;
use serde_json::json;

use super::{Host, flags::Flags, pod::Place};

/// The most that containerd says on standard input.
const INPUT_MAX: u64 = 10 << 20;
/// The newest Task API that is answered; version 2 is answered too, under its name.
const TASK_API: u32 = 3;
/// Says which versions of the Task API a containerd of 1.7 to 2.2 knows.
const MAX_VERSION: &str = "MAX_SHIM_VERSION";
/// Where containerd takes events.
pub const TTRPC_ADDRESS: &str = "TTRPC_ADDRESS";

/// `start`.
pub fn start(host: &Host, flags: &Flags) -> anyhow::Result<()> {
    let asked = Asked::of(&input()?, flags);
    let bundle = std::env::current_dir().context("cannot tell containerd's bundle: the working directory")?;
    host.paths.prepare()?;
    let place = Place::read(&bundle)?;
    let socket = socket_path(host, flags, place.group(&flags.id));
    match &place {
        Place::Member(pod) => {
            UnixStream::connect(&socket).with_context(|| {
                format!("the container is of pod {pod}, whose shim does not answer at {}", socket.display())
            })?;
        }
        Place::Alone | Place::Sandbox => begin(&bundle, flags, &asked, &socket)?,
    }
    let address = format!("unix://{}", socket.display());
    // From here a containerd that is started anew knows it; older ones rely on the shim for that.
    fs::write(bundle.join("address"), &address)
        .with_context(|| format!("cannot write {}", bundle.join("address").display()))?;
    std::io::stdout().write_all(&asked.reply(&address)?).context("cannot tell the address")
}

/// Starts a process for a container or pod that has none yet.
fn begin(bundle: &Path, flags: &Flags, asked: &Asked, socket: &Path) -> anyhow::Result<()> {
    let listener = listen(socket)?;
    let flags = Flags { bundle: Some(bundle.to_owned()), ..flags.clone() };
    let started = spawn(bundle, &flags, asked.ttrpc_address(), listener);
    if started.is_err() {
        let _ = fs::remove_file(socket);
    }
    started
}

fn input() -> anyhow::Result<Vec<u8>> {
    let mut input = Vec::new();
    if !std::io::stdin().is_terminal() {
        std::io::stdin().take(INPUT_MAX).read_to_end(&mut input).context("cannot read standard input")?;
    }
    Ok(input)
}

/// Where the process for container or pod `id` listens.
pub fn socket_path(host: &Host, flags: &Flags, id: &str) -> PathBuf {
    host.paths.engine_socket(&[&flags.address, &flags.namespace, id])
}

fn listen(path: &Path) -> anyhow::Result<UnixListener> {
    if UnixStream::connect(path).is_ok() {
        bail!("a shim answers at {} already", path.display());
    }
    let _ = fs::remove_file(path);
    UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))
}

/// Starts the process that stays. It has nothing of this one's but the socket: containerd waits for the others to be closed.
fn spawn(bundle: &Path, flags: &Flags, ttrpc: Option<&str>, listener: UnixListener) -> anyhow::Result<()> {
    let exe = std::env::current_exe().context("cannot tell where this program is")?;
    let mut command = Command::new(&exe);
    let socket = OwnedFd::from(listener);
    command.args(flags.to_args()).arg("-socket-fd").arg(socket.as_raw_fd().to_string()).arg("daemon");
    command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log(bundle));
    if let Some(address) = ttrpc {
        command.env(TTRPC_ADDRESS, address);
    }
    inherit(&mut command, vec![socket]);
    command.spawn().with_context(|| format!("cannot start {}", exe.display()))?;
    Ok(())
}

/// The FIFO from which containerd copies to its own log. Neither its absence nor a reader that is gone or slow is a reason to wait.
fn log(bundle: &Path) -> Stdio {
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
    let open = fs::OpenOptions::new().read(true).write(true).custom_flags(flags).open(bundle.join("log"));
    open.map_or_else(|_| Stdio::null(), Stdio::from)
}

/// How containerd asked, and so how it wants to be answered.
#[derive(Debug, PartialEq)]
enum Asked {
    /// containerd 1.6 and older: the address as text.
    Plainly,
    /// 1.7 to 2.2: JSON, with the version of the Task API, of which they know this and older ones.
    ForJson(u32),
    /// 2.3 and newer: messages both ways.
    WithParams(Box<BootstrapParams>),
}

impl Asked {
    fn of(input: &[u8], flags: &Flags) -> Self {
        let version = std::env::var(MAX_VERSION).ok();
        Self::parse(input, flags, version.as_deref())
    }

    /// Options of a runtime, which others send on standard input, are not taken for parameters: those name the container.
    fn parse(input: &[u8], flags: &Flags, version: Option<&str>) -> Self {
        match BootstrapParams::parse_from_bytes(input) {
            Ok(params) if params.instance_id == flags.id && params.namespace == flags.namespace => {
                Self::WithParams(Box::new(params))
            }
            _ => match version.and_then(|version| version.parse().ok()) {
                Some(version) => Self::ForJson(version),
                None => Self::Plainly,
            },
        }
    }

    fn ttrpc_address(&self) -> Option<&str> {
        match self {
            Self::WithParams(params) => {
                Some(params.containerd_ttrpc_address.as_str()).filter(|address| !address.is_empty())
            }
            Self::Plainly | Self::ForJson(_) => None,
        }
    }

    fn reply(&self, address: &str) -> anyhow::Result<Vec<u8>> {
        Ok(match self {
            Self::Plainly => address.into(),
            Self::ForJson(known) => {
                let version = TASK_API.min(*known);
                json!({ "version": version, "address": address, "protocol": "ttrpc" }).to_string().into()
            }
            Self::WithParams(_) => BootstrapResult {
                version: 3,
                address: address.into(),
                protocol: "ttrpc".into(),
                ..Default::default()
            }
            .write_to_bytes()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;

    #[test]
    fn every_containerd_is_answered_in_its_way() {
        let flags = Flags { id: "c1".into(), namespace: "default".into(), ..Default::default() };
        let options =
            Any { type_url: "containerd.runc.v1.Options".into(), value: vec![1], ..Default::default() };
        let options = options.write_to_bytes().unwrap();
        let plain = Asked::parse(&options, &flags, None);
        assert_eq!((plain.reply("unix:///s").unwrap(), plain.ttrpc_address()), (b"unix:///s".to_vec(), None));
        for (known, version) in [("2", 2), ("3", 3), ("9", 3)] {
            let reply = Asked::parse(&options, &flags, Some(known)).reply("unix:///s").unwrap();
            let reply: serde_json::Value = serde_json::from_slice(&reply).unwrap();
            assert_eq!(reply, json!({ "version": version, "address": "unix:///s", "protocol": "ttrpc" }));
        }
        let params = BootstrapParams {
            instance_id: "c1".into(),
            namespace: "default".into(),
            containerd_ttrpc_address: "/t".into(),
            ..Default::default()
        };
        let asked = Asked::parse(&params.write_to_bytes().unwrap(), &flags, Some("3"));
        assert_eq!(asked.ttrpc_address(), Some("/t"));
        let reply = BootstrapResult::parse_from_bytes(&asked.reply("unix:///s").unwrap()).unwrap();
        assert_eq!((reply.version, reply.address.as_str()), (3, "unix:///s"));
    }

    #[test]
    fn a_log_that_nobody_reads_holds_nothing_up() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = dir.path().join("log");
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let mut writer = Command::new("sh");
        writer.args(["-c", "head -c 300000 /dev/zero >&2; echo done"]).stderr(log(dir.path()));
        let output = writer.output().unwrap();
        assert_eq!(output.stdout, b"done\n");
    }
}
