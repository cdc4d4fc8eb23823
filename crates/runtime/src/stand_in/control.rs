//! What a stand-in and the command that started it say to each other: lines of JSON on a socket pair.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Write},
    os::{
        fd::{FromRawFd, OwnedFd, RawFd},
        unix::net::UnixStream,
    },
};

use anyhow::{Context, anyhow};
use kapsel_sandbox::{client::RootfsMount, engine::Network, paths::Id};
use oci_spec::runtime::{Process, Spec};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// What a stand-in is for.
#[derive(Debug, Serialize, Deserialize)]
pub enum Order {
    /// A container with a sandbox of its own.
    Container(Box<NewContainer>),
    /// Another process in a container.
    Process(Box<NewProcess>),
}

/// A container to be.
#[derive(Debug, Serialize, Deserialize)]
pub struct NewContainer {
    /// What its sandbox will be called.
    pub sandbox: Id,
    /// For the sandbox.
    pub spec: Spec,
    /// For the sandbox.
    pub rootfs: RootfsMount,
    /// Where the stand-in is.
    pub network: Network,
    /// `linux.cgroupsPath`, where the stand-in is too.
    pub cgroup: Option<String>,
    /// Whether its process has a terminal.
    pub terminal: bool,
    /// Whose it is, for `kapsel inspect`.
    pub labels: BTreeMap<String, String>,
}

/// A process to be.
#[derive(Debug, Serialize, Deserialize)]
pub struct NewProcess {
    /// Where.
    pub sandbox: Id,
    /// The container's `linux.cgroupsPath`.
    pub cgroup: Option<String>,
    /// What.
    pub process: Process,
    /// Whether it has a terminal.
    pub terminal: bool,
}

/// What a stand-in says.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// Its namespaces exist.
    Ready,
    /// What it was told is done.
    Done,
    /// It could not.
    Failed(String),
}

impl Answer {
    /// The error that an unexpected answer is.
    pub fn into_error(self) -> anyhow::Error {
        match self {
            Self::Failed(message) => anyhow!(message),
            other => anyhow!("the stand-in answered {other:?} out of turn"),
        }
    }
}

/// One end of the conversation.
pub struct Control(BufReader<UnixStream>);

impl Control {
    /// An end that is this process's.
    pub fn new(stream: UnixStream) -> Self {
        Self(BufReader::new(stream))
    }

    /// The end that was passed to this process.
    pub fn adopt(fd: RawFd) -> anyhow::Result<Self> {
        anyhow::ensure!(fd > 2, "{fd} is no descriptor for this");
        // SAFETY: `StandIn::start` passed `fd` to this process for this purpose alone; nothing here has used it before.
        let stream = UnixStream::from(unsafe { OwnedFd::from_raw_fd(fd) });
        stream.peer_addr().context("the descriptor is no socket")?;
        kapsel_sandbox::owner::close_on_exec(std::os::fd::AsFd::as_fd(&stream))?;
        Ok(Self::new(stream))
    }

    /// Says something.
    pub fn send(&mut self, message: &impl Serialize) -> anyhow::Result<()> {
        let mut line = serde_json::to_vec(message)?;
        line.push(b'\n');
        Ok(self.0.get_mut().write_all(&line)?)
    }

    /// Says why nothing comes of it; nobody may listen any more.
    pub fn fail(&mut self, error: &anyhow::Error) {
        let _ = self.send(&Answer::Failed(format!("{error:#}")));
    }

    /// Hears something. Both are one program, so nobody is distrusted; an end that comes instead is an error.
    pub fn receive<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let mut line = String::new();
        self.0.read_line(&mut line)?;
        if line.is_empty() {
            anyhow::bail!("the other process ended before it answered");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Ends the conversation.
    pub fn close(&mut self) {
        let _ = self.0.get_ref().shutdown(std::net::Shutdown::Both);
    }
}
