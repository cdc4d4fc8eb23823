//! One sandbox from its first instruction to its last: the one place where image, machine, file servers and agent meet.
//!
//! [`Sandbox::create`] is the start, one readable sequence. [`Sandbox::end`] is the end, whoever asks for it: the
//! container itself, a client, the leash, or the death of a process that the sandbox needs.

pub mod agent;
pub mod blueprint;
mod copy;
mod end;
mod error;
mod forward;
pub mod guest_spec;
mod names;
mod network;
mod process;
mod resources;
mod shares;
mod start;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

pub use copy::{CopyIn, CopyOut};
pub use end::Cause;
pub use error::Error;
use kapsel_channel::Channel;
use kapsel_machine::Machine;
/// What a container uses.
pub use kapsel_protocol::api::StatsResponse as Stats;
use kapsel_protocol::{api, limits};
use oci_spec::runtime::{Process as OciProcess, Spec};
pub use process::{Process, State, Wanted};
pub use start::{CreateRequest, IoRequest};
use tokio::sync::{Notify, OnceCell, watch};

use crate::{
    annotations::Wishes,
    config::Config,
    paths::{Bundle, Id, Paths},
    record::{Exit, Record, Status},
    seccomp,
    stdio::{Log, Plan, Streams, announce, token},
    template,
    timings::Stopwatch,
};

/// How long a guest may take for SIGKILL before its machine is killed.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// How long the output of a process may wait for its reader once the process is deleted.
const UNREAD: Duration = Duration::from_secs(2);
/// The exit code of processes whose machine failed under them, as containerd has it.
const LOST: u32 = 255;

/// One sandbox, owned by this process.
pub struct Sandbox {
    paths: Paths,
    config: Config,
    bundle: Bundle,
    id: Id,
    spec: Spec,
    wishes: Wishes,
    /// The process that the container began with.
    pub init: Arc<Process>,
    execs: Mutex<HashMap<String, Arc<Process>>>,
    record: Mutex<Record>,
    guest: OnceCell<Guest>,
    /// Whether `create` was called.
    begun: Mutex<bool>,
    /// What it has on the host, to be freed at the end.
    host: Mutex<Host>,
    paused: Mutex<bool>,
    /// The first process of a container that was made before it was known what to run.
    first: Mutex<Option<Later>>,
    ended: watch::Sender<Ended>,
    /// An end is under way and somebody wants it at once.
    insisted: Notify,
    watch: Stopwatch,
}

/// The guest, as long as it lives.
struct Guest {
    machine: Arc<dyn Machine>,
    channel: Arc<dyn Channel>,
    agent: agent::Agent,
    /// Whether the guest writes to directories of the host.
    writes_host: bool,
}

/// A process that is made after its container.
struct Later {
    /// OCI Process.
    process: OciProcess,
    seccomp: seccomp::Filter,
    plan: Plan,
    log: Option<Log>,
}

/// What a sandbox has on the host besides its bundle.
#[derive(Default)]
struct Host {
    machine: Option<Arc<dyn Machine>>,
    servers: shares::Servers,
    network: network::Connection,
    forwarder: Option<forward::Forwarder>,
    cgroup: Option<kapsel_jail::Cgroup>,
}

/// How far the end has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Ended {
    #[default]
    No,
    Ending,
    /// Nothing of the sandbox is left on the host but its bundle, or not even that.
    Done,
}

impl Sandbox {
    /// Reads a bundle. Nothing is started yet, but whoever wants may attach.
    ///
    /// # Errors
    /// When the bundle's specification or record cannot be read or followed.
    pub fn open(
        paths: Paths,
        config: Config,
        bundle: Bundle,
        id: Id,
        watch: Stopwatch,
    ) -> Result<Arc<Self>, Error> {
        let bad = |reason: String| Error::Spec { path: bundle.spec(), reason };
        let json = std::fs::read(bundle.spec()).map_err(|e| bad(e.to_string()))?;
        if json.len() > limits::SPEC_MAX {
            return Err(bad(format!(
                "it has {} bytes, at most {} go to a guest",
                json.len(),
                limits::SPEC_MAX
            )));
        }
        let spec: Spec = serde_json::from_slice(&json).map_err(|e| bad(e.to_string()))?;
        let wishes = Wishes::of(&spec)?;
        let record = match Record::read(&bundle) {
            Ok(record) => record,
            // A bundle that containerd made has none.
            Err(crate::record::Error::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
                let args = spec.process().as_ref().and_then(|p| p.args().clone()).unwrap_or_default();
                Record::new(id.clone(), String::new(), args)
            }
            Err(error) => return Err(error.into()),
        };
        Ok(Arc::new(Self {
            paths,
            config,
            bundle,
            id,
            spec,
            wishes,
            init: Process::new(""),
            execs: Mutex::default(),
            record: Mutex::new(record),
            guest: OnceCell::new(),
            begun: Mutex::default(),
            host: Mutex::default(),
            paused: Mutex::default(),
            first: Mutex::default(),
            ended: watch::Sender::default(),
            insisted: Notify::new(),
            watch,
        }))
    }

    /// Its identity.
    pub fn id(&self) -> &Id {
        &self.id
    }

    /// Its directory.
    pub fn bundle(&self) -> &Bundle {
        &self.bundle
    }

    /// The container's first process (`exec_id` empty) or an added one.
    ///
    /// # Errors
    /// When there is no such process.
    pub fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let execs = lock(&self.execs);
        execs.get(exec_id).cloned().ok_or_else(|| Error::NotFound(format!("there is no process {exec_id:?}")))
    }

    /// The process on the host that runs the machine; 0 before it is there.
    pub fn monitor(&self) -> u32 {
        lock(&self.record).machine.as_ref().map_or(0, |machine| machine.monitor)
    }

    /// Whether anybody asked for the container.
    pub fn has_begun(&self) -> bool {
        *lock(&self.begun)
    }

    /// Whether the container is frozen.
    pub fn is_paused(&self) -> bool {
        *lock(&self.paused)
    }

    fn guest(&self) -> Result<&Guest, Error> {
        if *self.ended.borrow() != Ended::No {
            return Err(self.why_ended());
        }
        self.guest.get().ok_or_else(|| Error::State("the container is not created yet".into()))
    }

    fn why_ended(&self) -> Error {
        match self.init.state() {
            State::Exited(Exit { oom: true, .. }) => Error::OutOfMemory,
            State::Exited(Exit { code: LOST, reason: Some(reason), .. }) => Error::Lost(reason),
            _ => Error::Ended("its machine is gone".into()),
        }
    }

    /// The container's name in the guest: every sandbox's, so that a template can hold it.
    fn container(&self) -> &'static str {
        template::CONTAINER
    }

    /// Changes the record, here and on disk.
    fn note(&self, change: impl FnOnce(&mut Record)) {
        let mut record = lock(&self.record);
        change(&mut record);
        // A bundle that was removed meanwhile stays so.
        if self.bundle.dir().exists()
            && let Err(error) = record.write(&self.bundle)
        {
            tracing::warn!(%error, "cannot keep the record");
        }
    }

    /// Executes the program of a process; returns its pid in the guest.
    ///
    /// # Errors
    /// When there is no such program, among others; an added process is then forgotten, a first one ended.
    pub async fn start(self: &Arc<Self>, exec_id: &str) -> Result<u32, Error> {
        let process = self.process(exec_id)?;
        if process.state() != State::Created {
            return Err(Error::State("only a created process can be started, and only once".into()));
        }
        let guest = self.guest()?;
        let phase = self.watch.phase("start");
        let added = process.wanted().and_then(|Wanted { plan, process, .. }| {
            Some(Later { process: process?, seccomp: seccomp::Filter::default(), plan, log: None })
        });
        let first = if exec_id.is_empty() { lock(&self.first).take() } else { None };
        let started = match added.or(first) {
            Some(later) => self.start_later(guest, &process, later).await,
            None => guest.agent.start(self.container(), "").await,
        };
        drop(phase);
        match started {
            Ok(pid) => {
                process.set(State::Running { pid });
                if exec_id.is_empty() {
                    self.note(|record| {
                        record.status = Status::Running;
                        record.started_at = Some(crate::record::now());
                    });
                    self.watch.write(&self.bundle);
                }
                self.follow(process);
                Ok(pid)
            }
            Err(error) => {
                self.not_started(&process, &error).await;
                Err(error)
            }
        }
    }

    /// A process that was not made with the container is made and started in one go: the requests follow each other without
    /// waiting for answers.
    async fn start_later(&self, guest: &Guest, process: &Process, later: Later) -> Result<u32, Error> {
        let Later { process: oci, seccomp, plan, log } = later;
        let json = serde_json::to_vec(&oci).map_err(|e| Error::Invalid(e.to_string()))?;
        let token = token();
        let (width, height) = size(&oci);
        let request = api::ExecRequest {
            id: self.container().into(),
            exec_id: process.exec_id.clone(),
            process: json,
            terminal: plan.terminal,
            width,
            height,
            stdio: Some(announce(&plan, token)).into(),
            seccomp: seccomp.program,
            seccomp_flags: seccomp.flags,
            ..Default::default()
        };
        let streams = Streams::connect(&*guest.channel, token, &plan, &process.hub, log);
        let (added, started, streams) = tokio::join!(
            guest.agent.exec(&request),
            guest.agent.start(self.container(), &process.exec_id),
            streams
        );
        added?;
        process.connected(streams?).await;
        started
    }

    async fn not_started(self: &Arc<Self>, process: &Arc<Process>, error: &Error) {
        process.cut().await;
        if process.exec_id.is_empty() {
            self.end(Cause::NotStarted(error.to_string())).await;
        } else {
            process.set(State::Exited(end::failed(error.to_string())));
            if let Ok(guest) = self.guest() {
                // Only the agent knows whether it got as far as to remember the process.
                let _ = guest.agent.delete(self.container(), &process.exec_id).await;
            }
        }
    }

    /// Waits in the background for the end of a started process.
    fn follow(self: &Arc<Self>, process: Arc<Process>) {
        let sandbox = self.clone();
        tokio::spawn(async move {
            let Ok(guest) = sandbox.guest() else { return };
            match guest.agent.wait(sandbox.container(), &process.exec_id).await {
                Ok(exit) if process.exec_id.is_empty() => {
                    sandbox.end(Cause::Exited(exit)).await;
                }
                Ok(exit) => {
                    process.set(State::Exited(exit));
                    process.drain().await;
                }
                // The machine's own end says more, and comes by itself.
                Err(Error::Ended(reason)) => sandbox.end_unless_machine_tells(reason).await,
                Err(error) => sandbox.end(Cause::Broken(error.to_string())).await,
            }
        });
    }

    /// Announces a process to add.
    ///
    /// # Errors
    /// When the container does not run, or the name is in use.
    pub fn exec(&self, exec_id: &str, oci: OciProcess, io: &IoRequest) -> Result<(), Error> {
        if !limits::valid_id(exec_id) {
            return Err(Error::Invalid(format!("{exec_id:?} is no name for a process")));
        }
        if !matches!(self.init.state(), State::Running { .. }) {
            return Err(Error::State("the container is not running".into()));
        }
        let plan = io.plan()?;
        let mut execs = lock(&self.execs);
        if execs.contains_key(exec_id) {
            return Err(Error::AlreadyExists(format!("there is a process {exec_id:?} already")));
        }
        if execs.len() >= limits::PROCESSES_MAX - 1 {
            return Err(Error::Resources(format!("{} processes were added; delete some first", execs.len())));
        }
        let process = Process::new(exec_id);
        process.want(Wanted { plan, uris: io.uris(), process: Some(oci) });
        process.set(State::Created);
        execs.insert(exec_id.into(), process);
        Ok(())
    }

    /// Sends a signal. A guest that does not even follow SIGKILL loses its machine.
    ///
    /// # Errors
    /// When there is no such process, or it has ended.
    pub async fn kill(self: &Arc<Self>, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        if !(1..=64).contains(&signal) {
            return Err(Error::Invalid(format!("{signal} is no signal")));
        }
        match process.state() {
            State::Exited(_) => return Err(Error::NotFound("the process has ended".into())),
            State::New => return Err(Error::State("the container is not created yet".into())),
            State::Created if exec_id.is_empty() && signal == libc::SIGKILL as u32 => {
                self.end(Cause::Killed("killed before it was started".into())).await;
                return Ok(());
            }
            State::Created | State::Running { .. } => {}
        }
        let guest = self.guest()?;
        let sent = guest.agent.kill(self.container(), exec_id, signal, all, KILL_DEADLINE).await;
        match sent {
            Err(Error::Timeout { .. }) if exec_id.is_empty() && signal == libc::SIGKILL as u32 => {
                self.end(Cause::Killed("the guest did not follow SIGKILL; its machine was killed".into()))
                    .await;
                Ok(())
            }
            other => other,
        }
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn resize(&self, exec_id: &str, columns: u32, rows: u32) -> Result<(), Error> {
        self.process(exec_id)?;
        self.guest()?.agent.resize(self.container(), exec_id, columns, rows).await
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn pause(&self) -> Result<(), Error> {
        self.guest()?.agent.pause(self.container()).await?;
        *lock(&self.paused) = true;
        self.note(|record| record.status = Status::Paused);
        Ok(())
    }

    /// Thaws the container.
    ///
    /// # Errors
    /// When it is not frozen.
    pub async fn resume(&self) -> Result<(), Error> {
        self.guest()?.agent.resume(self.container()).await?;
        *lock(&self.paused) = false;
        self.note(|record| record.status = Status::Running);
        Ok(())
    }

    /// Changes limits; `resources` is OCI JSON.
    ///
    /// # Errors
    /// When the guest cannot follow.
    pub async fn update(&self, resources: Vec<u8>) -> Result<(), Error> {
        self.guest()?.agent.update(self.container(), resources).await
    }

    /// What the container uses.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn stats(&self) -> Result<api::StatsResponse, Error> {
        self.guest()?.agent.stats(self.container()).await
    }

    /// Process ids in the guest, with the names of added processes.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn pids(&self) -> Result<Vec<(u32, String)>, Error> {
        self.guest()?.agent.pids(self.container()).await
    }

    /// Forgets a process that ended. Forgetting the first one waits until the sandbox has left the host.
    ///
    /// # Errors
    /// When it still runs.
    pub async fn delete(self: &Arc<Self>, exec_id: &str) -> Result<Option<crate::record::Exit>, Error> {
        let process = self.process(exec_id)?;
        let exit = match process.state() {
            State::Running { .. } => {
                return Err(Error::State("the process is running; kill it first".into()));
            }
            State::Exited(exit) => Some(exit),
            State::New | State::Created => None,
        };
        if exec_id.is_empty() {
            self.end(Cause::Deleted).await;
            return Ok(exit);
        }
        lock(&self.execs).remove(exec_id);
        // What nobody has read by then nobody wants.
        tokio::spawn(async move {
            tokio::time::sleep(UNREAD).await;
            process.abandon();
        });
        if exit.is_some()
            && let Ok(guest) = self.guest()
        {
            // An agent that has forgotten it already is of the same opinion.
            match guest.agent.delete(self.container(), exec_id).await {
                Err(Error::Guest { code: ttrpc::Code::NOT_FOUND, .. }) | Ok(()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(exit)
    }
}

fn size(process: &OciProcess) -> (u32, u32) {
    let clamp = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    process.console_size().as_ref().map_or((0, 0), |size| (clamp(size.width()), clamp(size.height())))
}

/// Data behind these locks is whole between statements, so a panic elsewhere does not spoil it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
