//! Speaking to a sandbox's shim: containerd's Task API over ttrpc, with a deadline on everything but waiting for exit.

use std::{io, path::PathBuf, time::Duration};

use containerd_shim_protos::{
    api,
    cgroups_v2::metrics::Metrics,
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim_async::TaskClient,
    types::task::Status as TaskStatus,
};
use oci_spec::runtime::{LinuxResources, Process};
use serde::{Deserialize, Serialize};
use ttrpc::{Code, asynchronous::Client as Connection, context};

use crate::paths::{Bundle, Id};

/// For calls that the shim can answer without its guest, or with a guest that is well.
pub const CALL: Duration = Duration::from_secs(20);

/// How much longer than the caller the shim itself waits, so that it is the caller who gives up first.
const GRACE: Duration = Duration::from_secs(1);

/// A type name as containerd gives it to an OCI process.
pub const PROCESS_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// A type name as containerd gives it to OCI resources.
pub const RESOURCES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Why a sandbox did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens.
    #[error(
        "sandbox {id} cannot be reached at {path}: {source}; its shim is gone, `kapsel rm -f {id}` clears it away"
    )]
    Unreachable {
        /// Short id.
        id: String,
        /// The socket.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The program is not in the container.
    #[error("{0}")]
    ProgramNotFound(String),
    /// The program is there but cannot be executed.
    #[error("{0}")]
    NotExecutable(String),
    /// No such container or process in it.
    #[error("{0}")]
    NotFound(String),
    /// The answer did not come in time.
    #[error("sandbox {id} did not answer {call} within {seconds} s; `kapsel rm -f {id}` ends it by force")]
    Timeout {
        /// Short id.
        id: String,
        /// The call.
        call: &'static str,
        /// How long it was given.
        seconds: u64,
    },
    /// The shim ended while it was asked.
    #[error("the shim of sandbox {id} ended during {call}{hint}")]
    Gone {
        /// Short id.
        id: String,
        /// The call.
        call: &'static str,
        /// The last lines of its log.
        hint: String,
    },
    /// The shim said no.
    #[error("{message}")]
    Refused {
        /// Why, as a class.
        code: Code,
        /// Why, in words.
        message: String,
    },
    /// The answer makes no sense.
    #[error("sandbox {id} gave a wrong answer to {call}: {reason}")]
    BadAnswer {
        /// Short id.
        id: String,
        /// The call.
        call: &'static str,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    /// What `kapsel run` and `exec` exit with, as Docker: 127 not found, 126 not executable, else 125.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::ProgramNotFound(_) => 127,
            Self::NotExecutable(_) => 126,
            _ => 125,
        }
    }
}

/// Where a process's streams go: a FIFO's path, `file:///path`, or [`Io::KAPSEL`]. Empty: nowhere.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Io {
    /// URI of the input.
    pub stdin: String,
    /// URI of the output.
    pub stdout: String,
    /// URI of the errors.
    pub stderr: String,
    /// One stream for all three.
    pub terminal: bool,
}

impl Io {
    /// `attach.sock` serves the stream, and output goes to the log.
    pub const KAPSEL: &'static str = "kapsel:";
    /// `attach.sock` serves the stream; nothing is logged.
    pub const KAPSEL_NO_LOG: &'static str = "kapsel:?log=off";

    /// All streams by `attach.sock`.
    pub fn attached(stdin: bool, terminal: bool, log: bool) -> Self {
        let out = if log { Self::KAPSEL } else { Self::KAPSEL_NO_LOG };
        Self {
            stdin: if stdin { Self::KAPSEL.into() } else { String::new() },
            stdout: out.into(),
            stderr: if terminal { String::new() } else { out.into() },
            terminal,
        }
    }
}

/// One mount of a container's root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootfsMount {
    /// `erofs` for an image's file, `bind` for a directory.
    pub kind: String,
    /// The host's path.
    pub source: PathBuf,
    /// `ro` or `rw`.
    pub options: Vec<String>,
}

impl RootfsMount {
    /// The root file system that an image was turned into.
    pub fn erofs(source: impl Into<PathBuf>) -> Self {
        Self { kind: "erofs".into(), source: source.into(), options: vec!["ro".into()] }
    }

    /// A directory of the host beneath a scratch overlay: never written.
    pub fn directory(source: impl Into<PathBuf>) -> Self {
        Self { kind: "bind".into(), source: source.into(), options: vec!["ro".into()] }
    }
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitStatus {
    /// 0..=255; 128 + n when signal n ended it.
    pub code: u32,
    /// Nanoseconds since 1970.
    pub at: u64,
}

/// What `State` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct State {
    /// Where the process is in its life.
    pub status: ProcessStatus,
    /// In the guest.
    pub pid: u32,
    /// Once it ended.
    pub exit: Option<ExitStatus>,
}

/// Why a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// By itself, or somebody ended it; or it has not ended.
    Ordinary,
    /// The container used up its memory; in words.
    OutOfMemory(String),
    /// Something that the sandbox needs failed; in words.
    Lost(String),
}

/// Where a process is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProcessStatus {
    /// Not started.
    Created,
    /// Runs.
    Running,
    /// Frozen.
    Paused,
    /// Ended.
    Stopped,
}

/// A connection to one shim. Cheap to clone; calls may overlap.
#[derive(Clone)]
pub struct Client {
    task: TaskClient,
    id: String,
    short: String,
    bundle: Bundle,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the shim of a bundle. Returns at once: a shim that listens but does not answer shows at the first
    /// call, by its deadline.
    ///
    /// # Errors
    /// When nobody listens.
    pub async fn connect(bundle: &Bundle, id: &Id) -> Result<Self, Error> {
        let path = bundle.shim_socket();
        let unreachable = |source| Error::Unreachable { id: id.short().into(), path: path.clone(), source };
        let connecting = tokio::net::UnixStream::connect(&path);
        // A full backlog makes connect(2) wait: that shim is stuck.
        let stream = tokio::time::timeout(CALL, connecting)
            .await
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(unreachable)?;
        Ok(Self::over(stream, bundle.clone(), id))
    }

    pub(crate) fn over(stream: tokio::net::UnixStream, bundle: Bundle, id: &Id) -> Self {
        let task = TaskClient::new(Connection::new(stream.into()));
        Self { task, id: id.as_str().into(), short: id.short().into(), bundle }
    }

    /// Starts the machine and sets the container up in it.
    ///
    /// # Errors
    /// Why the sandbox could not start.
    pub async fn create(&self, rootfs: &RootfsMount, io: &Io, deadline: Duration) -> Result<(), Error> {
        let mut mount = api::Mount::new();
        mount.type_ = rootfs.kind.clone();
        mount.source = rootfs.source.to_string_lossy().into_owned();
        mount.options = rootfs.options.clone();
        let request = api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.bundle.dir().to_string_lossy().into_owned(),
            rootfs: vec![mount],
            terminal: io.terminal,
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            ..Default::default()
        };
        self.call("Create", deadline, self.task.create(context::with_duration(deadline + GRACE), &request))
            .await
            .map(drop)
    }

    /// Starts the container (`exec_id` empty) or a process added to it; returns its pid in the guest.
    ///
    /// # Errors
    /// [`Error::ProgramNotFound`] and [`Error::NotExecutable`] among others.
    pub async fn start(&self, exec_id: &str) -> Result<u32, Error> {
        let request =
            api::StartRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        let reply =
            self.call("Start", CALL, self.task.start(context::with_duration(CALL + GRACE), &request)).await?;
        Ok(reply.pid)
    }

    /// Waits, for as long as it takes, for the end of a process.
    ///
    /// # Errors
    /// When there is no such process, or the shim ends.
    pub async fn wait(&self, exec_id: &str) -> Result<ExitStatus, Error> {
        let request = api::WaitRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        let reply =
            self.call("Wait", Duration::MAX, self.task.wait(context::Context::default(), &request)).await?;
        Ok(ExitStatus { code: reply.exit_status, at: nanoseconds(&reply.exited_at) })
    }

    /// Adds a process to the container; it runs after [`Client::start`].
    ///
    /// # Errors
    /// When the container does not run.
    pub async fn exec(&self, exec_id: &str, process: &Process, io: &Io) -> Result<(), Error> {
        let value = serde_json::to_vec(process).map_err(|e| self.bad("Exec", e.to_string()))?;
        let request = api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            terminal: io.terminal,
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            spec: MessageField::some(Any { type_url: PROCESS_TYPE.into(), value, ..Default::default() }),
            ..Default::default()
        };
        self.call("Exec", CALL, self.task.exec(context::with_duration(CALL + GRACE), &request))
            .await
            .map(drop)
    }

    /// Sends a signal to one process, or to all of the container.
    ///
    /// # Errors
    /// [`Error::NotFound`] when it has ended.
    pub async fn kill(&self, exec_id: &str, signal: i32, all: bool) -> Result<(), Error> {
        let request = api::KillRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            signal: signal.unsigned_abs(),
            all,
            ..Default::default()
        };
        self.call("Kill", CALL, self.task.kill(context::with_duration(CALL + GRACE), &request))
            .await
            .map(drop)
    }

    /// Tells a terminal's new size.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn resize(&self, exec_id: &str, columns: u16, rows: u16) -> Result<(), Error> {
        let request = api::ResizePtyRequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            width: columns.into(),
            height: rows.into(),
            ..Default::default()
        };
        self.call("ResizePty", CALL, self.task.resize_pty(context::with_duration(CALL + GRACE), &request))
            .await
            .map(drop)
    }

    /// Ends a process's input.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn close_stdin(&self, exec_id: &str) -> Result<(), Error> {
        let request = api::CloseIORequest {
            id: self.id.clone(),
            exec_id: exec_id.into(),
            stdin: true,
            ..Default::default()
        };
        self.call("CloseIO", CALL, self.task.close_io(context::with_duration(CALL + GRACE), &request))
            .await
            .map(drop)
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn pause(&self) -> Result<(), Error> {
        let request = api::PauseRequest { id: self.id.clone(), ..Default::default() };
        self.call("Pause", CALL, self.task.pause(context::with_duration(CALL + GRACE), &request))
            .await
            .map(drop)
    }

    /// Thaws the container.
    ///
    /// # Errors
    /// When it is not paused.
    pub async fn resume(&self) -> Result<(), Error> {
        let request = api::ResumeRequest { id: self.id.clone(), ..Default::default() };
        self.call("Resume", CALL, self.task.resume(context::with_duration(CALL + GRACE), &request))
            .await
            .map(drop)
    }

    /// Changes the container's limits.
    ///
    /// # Errors
    /// When the guest cannot follow.
    pub async fn update(&self, resources: &LinuxResources) -> Result<(), Error> {
        let value = serde_json::to_vec(resources).map_err(|e| self.bad("Update", e.to_string()))?;
        let request = api::UpdateTaskRequest {
            id: self.id.clone(),
            resources: MessageField::some(Any {
                type_url: RESOURCES_TYPE.into(),
                value,
                ..Default::default()
            }),
            ..Default::default()
        };
        self.call("Update", CALL, self.task.update(context::with_duration(CALL + GRACE), &request))
            .await
            .map(drop)
    }

    /// What the container uses, as cgroup v2 counts it in the guest.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn stats(&self) -> Result<Metrics, Error> {
        let request = api::StatsRequest { id: self.id.clone(), ..Default::default() };
        let reply =
            self.call("Stats", CALL, self.task.stats(context::with_duration(CALL + GRACE), &request)).await?;
        let any = reply.stats.into_option().unwrap_or_default();
        Metrics::parse_from_bytes(&any.value).map_err(|e| self.bad("Stats", e.to_string()))
    }

    /// Process ids in the guest.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn pids(&self) -> Result<Vec<u32>, Error> {
        let request = api::PidsRequest { id: self.id.clone(), ..Default::default() };
        let reply =
            self.call("Pids", CALL, self.task.pids(context::with_duration(CALL + GRACE), &request)).await?;
        Ok(reply.processes.iter().map(|process| process.pid).collect())
    }

    /// Why a process ended that has: the container's first (`exec_id` empty), with which its sandbox ends, or an added one that is not
    /// deleted yet. The Task API has no call for it; but each that needs guest or process says why there is none.
    pub async fn fate(&self, exec_id: &str) -> Fate {
        match self.resize(exec_id, 0, 0).await {
            Err(Error::Refused { code: Code::RESOURCE_EXHAUSTED, message }) => Fate::OutOfMemory(message),
            Err(Error::Refused { code: Code::ABORTED, message }) => Fate::Lost(message),
            _ => Fate::Ordinary,
        }
    }

    /// Where a process is in its life.
    ///
    /// # Errors
    /// When there is no such process, or the shim is stuck.
    pub async fn state(&self, exec_id: &str, deadline: Duration) -> Result<State, Error> {
        let request =
            api::StateRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        let reply = self
            .call("State", deadline, self.task.state(context::with_duration(deadline + GRACE), &request))
            .await?;
        let status = match reply.status.enum_value() {
            Ok(TaskStatus::CREATED) => ProcessStatus::Created,
            Ok(TaskStatus::RUNNING) => ProcessStatus::Running,
            Ok(TaskStatus::PAUSED | TaskStatus::PAUSING) => ProcessStatus::Paused,
            Ok(TaskStatus::STOPPED) => ProcessStatus::Stopped,
            other => return Err(self.bad("State", format!("status {other:?}"))),
        };
        let exit = (status == ProcessStatus::Stopped)
            .then(|| ExitStatus { code: reply.exit_status, at: nanoseconds(&reply.exited_at) });
        Ok(State { status, pid: reply.pid, exit })
    }

    /// Forgets an ended process; the container itself (`exec_id` empty) together with its machine.
    ///
    /// # Errors
    /// When it still runs.
    pub async fn delete(&self, exec_id: &str) -> Result<ExitStatus, Error> {
        let request =
            api::DeleteRequest { id: self.id.clone(), exec_id: exec_id.into(), ..Default::default() };
        let reply = self
            .call("Delete", CALL, self.task.delete(context::with_duration(CALL + GRACE), &request))
            .await?;
        Ok(ExitStatus { code: reply.exit_status, at: nanoseconds(&reply.exited_at) })
    }

    /// Ends the shim with all that it owns; `now` also when the container runs.
    ///
    /// # Errors
    /// When the container runs and `now` is not set.
    pub async fn shutdown(&self, now: bool) -> Result<(), Error> {
        let request = api::ShutdownRequest { id: self.id.clone(), now, ..Default::default() };
        match self
            .call("Shutdown", CALL, self.task.shutdown(context::with_duration(CALL + GRACE), &request))
            .await
        {
            // It ended before its answer was through, which is what was asked for.
            Ok(_) | Err(Error::Gone { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn bad(&self, call: &'static str, reason: String) -> Error {
        Error::BadAnswer { id: self.short.clone(), call, reason }
    }

    async fn call<T>(
        &self,
        call: &'static str,
        deadline: Duration,
        reply: impl Future<Output = ttrpc::Result<T>>,
    ) -> Result<T, Error> {
        let id = || self.short.clone();
        let timeout = || Error::Timeout { id: id(), call, seconds: deadline.as_secs() };
        let Ok(answer) = tokio::time::timeout(deadline, reply).await else { return Err(timeout()) };
        let error = match answer {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        let ttrpc::Error::RpcStatus(status) = error else {
            return Err(Error::Gone { id: id(), call, hint: last_words(&self.bundle) });
        };
        let message = status.message().to_owned();
        Err(match status.code() {
            Code::DEADLINE_EXCEEDED => timeout(),
            Code::NOT_FOUND if message.starts_with("not found:") => Error::ProgramNotFound(message),
            Code::PERMISSION_DENIED if message.starts_with("not executable:") => {
                Error::NotExecutable(message)
            }
            Code::NOT_FOUND => Error::NotFound(message),
            code => Error::Refused { code, message },
        })
    }
}

/// The last lines of a shim's log, for an error message.
pub(crate) fn last_words(bundle: &Bundle) -> String {
    const LINES: usize = 5;
    const BYTES: u64 = 4096;
    let read = || -> io::Result<String> {
        use std::io::{Read, Seek, SeekFrom};
        let mut file = std::fs::File::open(bundle.shim_log())?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(BYTES)))?;
        let mut bytes = Vec::new();
        file.take(BYTES).read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    };
    let text = read().unwrap_or_default();
    let lines: Vec<&str> = text.lines().filter(|line| !line.is_empty()).collect();
    match lines.split_at(lines.len().saturating_sub(LINES)).1 {
        [] => "; it left no message".into(),
        last => format!("; its last words:\n  {}", last.join("\n  ")),
    }
}

fn nanoseconds(at: &MessageField<Timestamp>) -> u64 {
    at.as_ref().map_or(0, |at| {
        u64::try_from(at.seconds).unwrap_or(0).saturating_mul(1_000_000_000)
            + u64::from(at.nanos.unsigned_abs())
    })
}
