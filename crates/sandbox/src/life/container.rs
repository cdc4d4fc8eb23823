//! One container of a sandbox, and what can be asked of it while its machine lives.
//!
//! Each sandbox has a main one, which it lives and dies with. Those that are added to it come and go.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, Weak},
    time::Duration,
};

use kapsel_protocol::{api, limits};
use oci_spec::runtime::{Process as OciProcess, Spec};

use super::{
    Cause, Error, Guest, IoRequest, Later, Process, Sandbox, State, Wanted, end, lock, size, update::Share,
};
use crate::{
    record::{Exit, Status},
    seccomp,
    stdio::{Streams, announce, token},
};

/// How long a guest may take for SIGKILL before its machine is killed.
const KILL_DEADLINE: Duration = Duration::from_secs(5);
/// How long the output of a process may wait for its reader once the process is deleted.
const UNREAD: Duration = Duration::from_secs(2);

/// A container.
pub struct Container {
    /// Its name in the guest.
    pub(super) name: String,
    sandbox: Weak<Sandbox>,
    pub(super) main: bool,
    /// The process that it begins with.
    pub init: Arc<Process>,
    pub(super) execs: Mutex<HashMap<String, Arc<Process>>>,
    paused: Mutex<bool>,
    /// The first process of a container that was made before it was known what to run.
    pub(super) first: Mutex<Option<Later>>,
    /// Its first process's id in the guest.
    pub(super) pid: OnceLock<u32>,
    /// Places of the [pod's directory](super::tree) that it uses.
    pub(super) places: Mutex<Vec<u32>>,
    /// What it may have of the machine.
    pub(super) share: Mutex<Share>,
}

impl Container {
    /// The one that a sandbox lives and dies with.
    pub(super) fn main(sandbox: Weak<Sandbox>, name: &str, spec: &Spec) -> Arc<Self> {
        Self::new(sandbox, name, spec, true)
    }

    /// One that is added to a sandbox.
    pub(super) fn added(sandbox: Weak<Sandbox>, name: &str, spec: &Spec) -> Arc<Self> {
        Self::new(sandbox, name, spec, false)
    }

    fn new(sandbox: Weak<Sandbox>, name: &str, spec: &Spec, main: bool) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            sandbox,
            main,
            init: Process::new(""),
            execs: Mutex::default(),
            paused: Mutex::default(),
            first: Mutex::default(),
            pid: OnceLock::new(),
            places: Mutex::default(),
            share: Mutex::new(Share::of(spec)),
        })
    }

    /// The sandbox that it is in.
    ///
    /// # Errors
    /// When nobody has that any more.
    pub fn sandbox(&self) -> Result<Arc<Sandbox>, Error> {
        self.sandbox.upgrade().ok_or_else(|| Error::Ended("it was removed".into()))
    }

    /// Its first process (`exec_id` empty) or an added one.
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

    /// Whether it is frozen.
    pub fn is_paused(&self) -> bool {
        *lock(&self.paused)
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
        let sandbox = self.sandbox()?;
        let guest = sandbox.guest()?;
        let phase = self.main.then(|| sandbox.watch.phase("start"));
        let added = process.wanted().and_then(|Wanted { plan, process, .. }| {
            Some(Later { process: process?, seccomp: seccomp::Filter::default(), plan, log: None })
        });
        let first = if exec_id.is_empty() { lock(&self.first).take() } else { None };
        let prepared = first.is_some();
        let started = match added.or(first) {
            Some(later) => self.start_later(guest, &process, later).await,
            None => guest.agent.start(&self.name, "").await,
        };
        drop(phase);
        match started {
            Ok(pid) => {
                process.set(State::Running { pid });
                if self.main && exec_id.is_empty() {
                    sandbox.note(|record| {
                        record.status = Status::Running;
                        record.started_at = Some(crate::record::now());
                    });
                    sandbox.watch.write(&sandbox.bundle);
                    if prepared {
                        sandbox.want_standby();
                    }
                }
                self.follow(sandbox, process);
                Ok(pid)
            }
            Err(error) => {
                self.not_started(&sandbox, &process, &error).await;
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
            id: self.name.clone(),
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
            guest.agent.start(&self.name, &process.exec_id),
            streams
        );
        added?;
        process.connected(streams?).await;
        started
    }

    async fn not_started(&self, sandbox: &Arc<Sandbox>, process: &Process, error: &Error) {
        process.cut().await;
        if self.main && process.exec_id.is_empty() {
            sandbox.end(Cause::NotStarted(error.to_string())).await;
            return;
        }
        process.set(State::Exited(end::failed(error.to_string())));
        // What there is of a container is deleted with it.
        if !process.exec_id.is_empty()
            && let Ok(guest) = sandbox.guest()
        {
            // Only the agent knows whether it got as far as to remember the process.
            let _ = guest.agent.delete(&self.name, &process.exec_id).await;
        }
    }

    /// Waits in the background for the end of a started process.
    fn follow(self: &Arc<Self>, sandbox: Arc<Sandbox>, process: Arc<Process>) {
        let container = self.clone();
        tokio::spawn(async move {
            let Ok(guest) = sandbox.guest() else { return };
            match guest.agent.wait(&container.name, &process.exec_id).await {
                Ok(exit) if container.main && process.exec_id.is_empty() => {
                    sandbox.end(Cause::Exited(exit)).await;
                }
                Ok(exit) => {
                    if process.exec_id.is_empty() {
                        container.end_added(&Cause::Exited(exit.clone()).exit(false));
                    }
                    process.set(State::Exited(exit));
                    process.drain().await;
                }
                // It has gone with its container, and the agent has nothing to say of it any more.
                Err(_) if matches!(process.state(), State::Exited(_)) => {}
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
    pub async fn kill(&self, exec_id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let process = self.process(exec_id)?;
        if !(1..=64).contains(&signal) {
            return Err(Error::Invalid(format!("{signal} is no signal")));
        }
        let sandbox = self.sandbox()?;
        let kill = exec_id.is_empty() && signal == libc::SIGKILL as u32;
        match process.state() {
            State::Exited(_) => return Err(Error::NotFound("the process has ended".into())),
            State::New => return Err(Error::State("the container is not created yet".into())),
            State::Created if kill => return self.kill_unstarted(&sandbox).await,
            State::Created | State::Running { .. } => {}
        }
        let guest = sandbox.guest()?;
        let sent = guest.agent.kill(&self.name, exec_id, signal, all, KILL_DEADLINE).await;
        match sent {
            Err(Error::Timeout { .. }) if kill => {
                let why = "the guest did not follow SIGKILL; its machine was killed";
                sandbox.end(Cause::Killed(why.into())).await;
                Ok(())
            }
            other => other,
        }
    }

    async fn kill_unstarted(&self, sandbox: &Arc<Sandbox>) -> Result<(), Error> {
        let cause = Cause::Killed("killed before it was started".into());
        if self.main {
            sandbox.end(cause).await;
            return Ok(());
        }
        sandbox.guest()?.agent.delete(&self.name, "").await?;
        self.init.set(State::Exited(cause.exit(false)));
        self.init.cut().await;
        Ok(())
    }

    /// Its added processes end with it.
    pub(super) fn end_added(&self, exit: &Exit) {
        let added: Vec<_> = lock(&self.execs).values().cloned().collect();
        added.iter().for_each(|process| process.set(State::Exited(exit.clone())));
    }

    /// Sets a terminal's size.
    ///
    /// # Errors
    /// When there is no such process, or it has ended; for lack of memory, if that was why.
    pub async fn resize(&self, exec_id: &str, columns: u32, rows: u32) -> Result<(), Error> {
        let state = self.process(exec_id)?.state();
        if matches!(state, State::Exited(Exit { oom: true, .. })) {
            return Err(Error::OutOfMemory);
        }
        let sandbox = self.sandbox()?;
        let guest = sandbox.guest()?;
        if matches!(state, State::Exited(_)) {
            return Err(Error::NotFound("the process has ended".into()));
        }
        guest.agent.resize(&self.name, exec_id, columns, rows).await
    }

    /// Freezes the container.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn pause(&self) -> Result<(), Error> {
        let sandbox = self.sandbox()?;
        sandbox.guest()?.agent.pause(&self.name).await?;
        *lock(&self.paused) = true;
        if self.main {
            sandbox.note(|record| record.status = Status::Paused);
        }
        Ok(())
    }

    /// Thaws the container.
    ///
    /// # Errors
    /// When it is not frozen.
    pub async fn resume(&self) -> Result<(), Error> {
        let sandbox = self.sandbox()?;
        sandbox.guest()?.agent.resume(&self.name).await?;
        *lock(&self.paused) = false;
        if self.main {
            sandbox.note(|record| record.status = Status::Running);
        }
        Ok(())
    }

    /// What the container uses.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn stats(&self) -> Result<api::StatsResponse, Error> {
        self.sandbox()?.guest()?.agent.stats(&self.name).await
    }

    /// Waits until the guest's kernel has killed more than `seen` of its processes for lack of memory, or it has ended; how many
    /// there are.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn oom_kills(&self, seen: u64) -> Result<u64, Error> {
        self.sandbox()?.guest()?.agent.oom_kills(&self.name, seen).await
    }

    /// Process ids in the guest, with the names of added processes.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub async fn pids(&self) -> Result<Vec<(u32, String)>, Error> {
        self.sandbox()?.guest()?.agent.pids(&self.name).await
    }

    /// Forgets a process that ended. Forgetting the first one waits until its output was read, and the container has left the host;
    /// with the main container that is all of the sandbox.
    ///
    /// # Errors
    /// When it still runs.
    pub async fn delete(&self, exec_id: &str) -> Result<Option<Exit>, Error> {
        let process = self.process(exec_id)?;
        let exit = match process.state() {
            State::Running { .. } => {
                return Err(Error::State("the process is running; kill it first".into()));
            }
            State::Exited(exit) => Some(exit),
            State::New | State::Created => None,
        };
        let sandbox = self.sandbox()?;
        if self.main && exec_id.is_empty() {
            sandbox.end(Cause::Deleted).await;
            return Ok(exit);
        }
        if exec_id.is_empty() {
            match exit {
                Some(_) => process.delivered().await,
                None => {
                    process.set(State::Exited(Cause::Deleted.exit(false)));
                    process.cut().await;
                }
            }
            sandbox.remove(self).await;
            return Ok(exit);
        }
        lock(&self.execs).remove(exec_id);
        // What nobody has read by then nobody wants.
        tokio::spawn(async move {
            tokio::time::sleep(UNREAD).await;
            process.abandon();
        });
        if exit.is_some()
            && let Ok(guest) = sandbox.guest()
        {
            // An agent that has forgotten it already is of the same opinion.
            match guest.agent.delete(&self.name, exec_id).await {
                Err(Error::Guest { code: ttrpc::Code::NOT_FOUND, .. }) | Ok(()) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(exit)
    }

    /// Drops the streams of all of its processes as they are.
    pub(super) async fn cut(&self) {
        self.init.cut().await;
        let added: Vec<_> = lock(&self.execs).values().cloned().collect();
        for process in added {
            process.cut().await;
        }
    }

    /// What its first process printed and nobody has read is dropped: a [`Self::delete`] under way goes on.
    pub fn abandon_output(&self) {
        self.init.abandon();
    }
}
