//! One container from its creation to its removal.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use kapsel_protocol::{api, limits};
use rustix::fs::{Mode, OFlags};
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::phases::Phases;
use crate::reaper::{Exit, Reaper};
use crate::stdio::Streams;
use crate::storage::Mounted;
use crate::sys;

use super::cgroup::{self, Cgroup};
use super::child::{self, Inheritance, Joined};
use super::order;
use super::plan::{self, Plan};
use super::process::{ProcessPlan, Seccomp};
use super::running::{Birthplace, Running, Stdio};

const NEW_PID: u64 = libc::CLONE_NEWPID as u64;

/// A container that was built.
#[derive(Debug)]
pub struct Container {
    id: String,
    plan: Plan,
    cgroup: Cgroup,
    storages: Mutex<Mounted>,
    init: Arc<Running>,
    /// Kept until the container is deleted: without its last user the kernel would take all of its mounts apart before it tells
    /// anybody that the first process has ended. A kernel that cannot give it (before 6.11) does that.
    mount_namespace: Mutex<Option<OwnedFd>>,
    started: AtomicBool,
    paused: AtomicBool,
    /// The first process, when it came after the container.
    given: OnceLock<Given>,
    execs: Mutex<HashMap<String, Arc<Added>>>,
}

/// A first process that was given to a container.
#[derive(Debug)]
struct Given {
    plan: ProcessPlan,
    request: api::ExecRequest,
}

/// A process added to a container.
#[derive(Debug)]
pub struct Added {
    plan: ProcessPlan,
    stdio: api::Stdio,
    running: watch::Sender<Option<Arc<Running>>>,
    oom_before: AtomicU64,
}

/// What belongs to the session and the guest rather than to the container.
#[derive(Clone, Copy, Debug)]
pub struct Surroundings<'a> {
    /// Watches children.
    pub reaper: &'a Reaper,
    /// Pairs streams.
    pub streams: &'a Streams,
}

/// Numbers cgroups, as one of an id that is used again may not be quite gone.
static SERIAL: AtomicU64 = AtomicU64::new(cgroup::FIRST);

impl Container {
    /// Its root file system's place in the guest.
    pub fn rootfs(&self) -> &std::ffi::CStr {
        &self.plan.rootfs
    }

    /// Builds a container up to the point where its program would be executed. In a guest that is not configured it must not have
    /// a program: the guest's randomness is not its own yet.
    ///
    /// # Errors
    /// Nothing of it is left then.
    pub async fn create(
        request: &api::CreateRequest,
        configured: bool,
        around: Surroundings<'_>,
        phases: &mut Phases,
    ) -> Result<Self> {
        let seccomp = Seccomp::new(request.seccomp.clone(), request.seccomp_flags)?;
        let mut plan = Plan::new(&request.spec, seccomp, request.terminal)?;
        if let Some(process) = &mut plan.process {
            if !configured {
                return Err(Error::State("the guest is not configured yet".into()));
            }
            process.set_size(request.width, request.height);
        }
        phases.lap("plan");
        let mut storages = Mounted::mount(&request.storages).await?;
        phases.lap("storages");
        let serial = SERIAL.fetch_add(1, Ordering::Relaxed);
        let cgroup = Cgroup::create(&format!("{serial}"), &plan.device_rules, &plan.cgroup);
        let cgroup = match cgroup {
            Ok(cgroup) => cgroup,
            Err(error) => {
                storages.unmount();
                return Err(error.into());
            }
        };
        phases.lap("cgroup");
        match Self::build(request, &plan, &cgroup, around, phases).await {
            Ok(init) => Ok(Self {
                id: request.id.clone(),
                plan,
                cgroup,
                storages: Mutex::new(storages),
                mount_namespace: Mutex::new(sys::mount_namespace(init.pidfd()).ok()),
                init: Arc::new(init),
                started: AtomicBool::new(false),
                paused: AtomicBool::new(false),
                given: OnceLock::new(),
                execs: Mutex::default(),
            }),
            Err(error) => {
                // The first error is the one to tell.
                if let Err(second) = cgroup.remove().await {
                    eprintln!("kapsel-agent: container {}: {second}", request.id);
                }
                storages.unmount();
                Err(error)
            }
        }
    }

    async fn build(
        request: &api::CreateRequest,
        plan: &Plan,
        cgroup: &Cgroup,
        around: Surroundings<'_>,
        phases: &mut Phases,
    ) -> Result<Running> {
        let stdio = Stdio::new(request.stdio.get_or_default(), request.terminal)?;
        let joined = open_namespaces(plan)?;
        let (pid_namespace, joined): (Vec<_>, Vec<_>) =
            joined.into_iter().partition(|(flag, _)| *flag == NEW_PID);
        let place = Birthplace {
            new_namespaces: plan.new_namespaces,
            pid_namespace: pid_namespace.first().map(|(_, fd)| std::os::fd::AsFd::as_fd(fd)),
            cgroup: cgroup.dir(),
        };
        let init = Running::birth(&place, around.reaper, stdio, around.streams, |socket, stdio| {
            child::container(&request.id, plan, cgroup.path(), &joined, &Inheritance { socket, stdio })
        })?;
        phases.lap("clone");
        let built = async {
            set_oom_score(init.pid, plan.process.as_ref().and_then(|process| process.oom_score_adj))?;
            let timings = init.until_ready(plan.id_maps.as_ref()).await?;
            Ok::<_, Error>(timings)
        };
        match built.await {
            Ok(timings) => {
                phases.child(&timings);
                phases.lap("child");
                init.pump_terminal(request.stdio.get_or_default(), around.streams);
                Ok(init)
            }
            Err(error) => {
                // It may have ended already.
                let _ = init.signal(libc::SIGKILL);
                init.wait().await;
                Err(error)
            }
        }
    }

    /// The first process's id.
    pub fn pid(&self) -> u32 {
        self.init.pid as u32
    }

    /// Executes the program.
    ///
    /// # Errors
    /// When it was started before, or cannot be executed; the container has then ended with code 127 or 126.
    pub async fn start(&self, around: Surroundings<'_>, phases: &mut Phases) -> Result<()> {
        if self.first_process().is_none() {
            return Err(Error::State(format!("container {} has no process yet", self.id)));
        }
        if self.started.swap(true, Ordering::Relaxed) {
            return Err(Error::State(format!("container {} was started before", self.id)));
        }
        match self.given.get() {
            None => self.init.release()?,
            Some(Given { plan, request }) => {
                set_oom_score(self.init.pid, plan.oom_score_adj)?;
                self.init.order(request, around.streams)?;
                self.init.until_ready(None).await?;
                self.init.pump_terminal(request.stdio.get_or_default(), around.streams);
            }
        }
        let timings = self.init.until_executed().await?;
        phases.child(&timings);
        phases.lap("start");
        Ok(())
    }

    /// Plans a process to be added.
    ///
    /// # Errors
    /// For a process that cannot be, and a name that is in use.
    pub fn exec(&self, request: &api::ExecRequest) -> Result<()> {
        if request.exec_id.is_empty() {
            return self.give_process(request);
        }
        let Some(first) = self.first_process() else {
            return Err(Error::State(format!("container {} has no process yet", self.id)));
        };
        if !request.seccomp.is_empty() || request.seccomp_flags != 0 {
            return Err(Error::Invalid(
                "an added process has its container's seccomp filter, not another".into(),
            ));
        }
        let mut plan = ProcessPlan::for_exec(&request.process, first, request.terminal)?;
        plan.set_size(request.width, request.height);
        let added = Added {
            plan,
            stdio: request.stdio.clone().unwrap_or_default(),
            running: watch::Sender::new(None),
            oom_before: AtomicU64::new(0),
        };
        let mut execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        if execs.contains_key(&request.exec_id) {
            return Err(Error::Exists(format!(
                "container {} has a process {} already",
                self.id, request.exec_id
            )));
        }
        execs.insert(request.exec_id.clone(), Arc::new(added));
        Ok(())
    }

    /// Plans the first process of a container that was created without one.
    fn give_process(&self, request: &api::ExecRequest) -> Result<()> {
        let mut plan = order::plan(request)?;
        if !self.plan.early_seccomp.program.is_empty() {
            if !plan.seccomp.program.is_empty() {
                return Err(Error::Invalid("the container has its seccomp filter already".into()));
            }
            // What is added later has it from the first process.
            plan.seccomp = self.plan.early_seccomp.clone();
        }
        let twice = || Error::Exists(format!("container {} has its first process already", self.id));
        if self.plan.process.is_some() {
            return Err(twice());
        }
        self.given.set(Given { plan, request: request.clone() }).map_err(|_| twice())
    }

    fn first_process(&self) -> Option<&ProcessPlan> {
        self.plan.process.as_ref().or_else(|| self.given.get().map(|given| &given.plan))
    }

    /// How many processes were added and not yet deleted.
    pub fn exec_count(&self) -> usize {
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn added(&self, exec_id: &str) -> Result<Arc<Added>> {
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        let not_found = || Error::NotFound(format!("container {} has no process {exec_id}", self.id));
        execs.get(exec_id).cloned().ok_or_else(not_found)
    }

    /// Starts an added process.
    ///
    /// # Errors
    /// When the container is not running, or the program cannot be executed.
    pub async fn start_added(
        &self,
        exec_id: &str,
        around: Surroundings<'_>,
        phases: &mut Phases,
    ) -> Result<u32> {
        let added = self.added(exec_id)?;
        if added.running.borrow().is_some() {
            return Err(Error::State(format!("process {exec_id} was started before")));
        }
        if !self.started.load(Ordering::Relaxed) || self.init.exit().is_some() {
            return Err(Error::State(format!("container {} is not running", self.id)));
        }
        if self.paused.load(Ordering::Relaxed) {
            return Err(Error::State(format!("container {} is paused; resume it first", self.id)));
        }
        added.oom_before.store(self.cgroup.oom_kills(), Ordering::Relaxed);
        let running = Arc::new(self.birth_added(&added, around)?);
        added.running.send_replace(Some(running.clone()));
        phases.lap("clone");
        set_oom_score(running.pid, added.plan.oom_score_adj)?;
        running.until_ready(None).await?;
        running.pump_terminal(&added.stdio, around.streams);
        let timings = running.until_executed().await?;
        phases.child(&timings);
        phases.lap("start");
        Ok(running.pid as u32)
    }

    fn birth_added(&self, added: &Added, around: Surroundings<'_>) -> Result<Running> {
        let all = self.namespaces();
        let stdio = Stdio::new(&added.stdio, added.plan.terminal.is_some())?;
        let init = self.init.pidfd();
        let birth = |cgroup| {
            let place =
                Birthplace { new_namespaces: 0, pid_namespace: (all & NEW_PID != 0).then_some(init), cgroup };
            Running::birth(&place, around.reaper, stdio, around.streams, |socket, stdio| {
                child::added(
                    &added.plan,
                    &Joined { init, namespaces: all & !NEW_PID },
                    &Inheritance { socket, stdio },
                )
            })
        };
        match self.inner_cgroup() {
            Some(inner) => birth(std::os::fd::AsFd::as_fd(&inner)),
            None => birth(self.cgroup.dir()),
        }
    }

    /// Where the container's first process is when it has divided its cgroup: processes can then be in the leaves only.
    fn inner_cgroup(&self) -> Option<OwnedFd> {
        if self.cgroup.read("cgroup.subtree_control").is_ok_and(|c| c.trim().is_empty()) {
            return None;
        }
        let line = std::fs::read_to_string(format!("/proc/{}/cgroup", self.init.pid)).ok()?;
        let path = line.lines().find_map(|l| l.strip_prefix("0::"))?.to_owned();
        let flags = OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(format!("/sys/fs/cgroup{path}"), flags, Mode::empty()).ok()
    }

    /// CLONE_NEW* of all that it does not share with the agent.
    fn namespaces(&self) -> u64 {
        let cgroup = if self.plan.new_cgroup_namespace { libc::CLONE_NEWCGROUP as u64 } else { 0 };
        self.plan.joined.iter().fold(self.plan.new_namespaces | cgroup, |all, (flag, _)| all | flag)
    }

    /// A process of the container by name, empty for the first; waits for one that was not started yet.
    ///
    /// # Errors
    /// When there is none.
    pub async fn process(&self, exec_id: &str) -> Result<Arc<Running>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let mut running = self.added(exec_id)?.running.subscribe();
        let gone = || Error::NotFound(format!("process {exec_id} was deleted"));
        running.wait_for(Option::is_some).await.map_err(|_| gone())?.clone().ok_or_else(gone)
    }

    /// A process of the container by name that was started.
    ///
    /// # Errors
    /// When there is none.
    pub fn started(&self, exec_id: &str) -> Result<Arc<Running>> {
        if exec_id.is_empty() {
            return Ok(self.init.clone());
        }
        let running = self.added(exec_id)?.running.borrow().clone();
        running.ok_or_else(|| Error::State(format!("process {exec_id} was not started")))
    }

    /// Waits for the end of a process; also tells whether the kernel killed for lack of memory.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn wait(&self, exec_id: &str) -> Result<(Exit, bool)> {
        let process = self.process(exec_id).await?;
        let exit = process.wait().await;
        if exec_id.is_empty() && self.plan.new_namespaces & NEW_PID == 0 {
            // Without a pid namespace of its own nothing ends with the first process by itself.
            self.cgroup.signal(libc::SIGKILL)?;
        }
        Ok((exit, self.out_of_memory(exec_id, exit)))
    }

    /// Waits until the kernel has killed more than `seen` processes for lack of memory, or the first process has ended; how many.
    ///
    /// # Errors
    /// When the guest's kernel does not tell.
    pub async fn oom_kills_beyond(&self, seen: u64) -> Result<u64> {
        tokio::select! {
            kills = self.cgroup.oom_kills_beyond(seen) => Ok(kills?),
            _ = self.init.wait() => Ok(self.cgroup.oom_kills()),
        }
    }

    fn out_of_memory(&self, exec_id: &str, exit: Exit) -> bool {
        let before = match self.added(exec_id) {
            // Something else in the container may have been killed while this process ran.
            Ok(added) if exit.code == 137 => added.oom_before.load(Ordering::Relaxed),
            Ok(_) => return false,
            Err(_) => 0,
        };
        self.cgroup.oom_kills() > before
    }

    /// Sends a signal to one process or all.
    ///
    /// # Errors
    /// When there is no such process or it has ended.
    pub fn kill(&self, exec_id: &str, signal: i32, all: bool) -> Result<()> {
        match all {
            true => Ok(self.cgroup.signal(signal)?),
            false => self.started(exec_id)?.signal(signal),
        }
    }

    /// Freezes or thaws.
    ///
    /// # Errors
    /// When it is not running, is so already, or does not freeze in time.
    pub async fn freeze(&self, freeze: bool) -> Result<()> {
        if !self.started.load(Ordering::Relaxed) || self.init.exit().is_some() {
            return Err(Error::State(format!("container {} is not running", self.id)));
        }
        if self.paused.swap(freeze, Ordering::Relaxed) == freeze {
            let state = if freeze { "paused already" } else { "not paused" };
            return Err(Error::State(format!("container {} is {state}", self.id)));
        }
        let result = self.cgroup.freeze(freeze).await;
        if result.is_err() && freeze {
            self.paused.store(false, Ordering::Relaxed);
            // The attempt must not leave half of it frozen; the first error is the one to tell.
            let _ = self.cgroup.freeze(false).await;
        }
        Ok(result?)
    }

    /// Changes limits.
    ///
    /// # Errors
    /// As for those of a whole specification.
    pub fn update(&self, json: &[u8]) -> Result<()> {
        let (settings, rules) = plan::update(json)?;
        self.cgroup.apply(&settings)?;
        if let Some(rules) = rules {
            self.cgroup.set_rules(&rules).map_err(|e| match e.kind() {
                io::ErrorKind::Unsupported => Error::Unimplemented(e.to_string()),
                _ => Error::Internal(e.to_string()),
            })?;
        }
        Ok(())
    }

    /// Its cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// All processes, with the names of those that were added.
    pub fn processes(&self) -> Vec<(i32, String)> {
        let execs = self.execs.lock().unwrap_or_else(PoisonError::into_inner);
        let named: HashMap<i32, &String> =
            execs.iter().filter_map(|(id, added)| Some((added.running.borrow().as_ref()?.pid, id))).collect();
        let name = |pid| (pid, named.get(&pid).map(|id| (*id).clone()).unwrap_or_default());
        self.cgroup.pids().into_iter().take(limits::PIDS_MAX).map(name).collect()
    }

    /// The view of its files for a helper: its first process, while that lives, and the namespaces to join; or else its root.
    pub fn files(&self) -> (Option<&Running>, u64, &std::ffi::CStr) {
        let wanted = (libc::CLONE_NEWNS | libc::CLONE_NEWUSER) as u64;
        let alive = self.init.exit().is_none().then_some(&*self.init);
        (alive, self.namespaces() & wanted, &self.plan.rootfs)
    }

    /// Forgets an added process.
    ///
    /// # Errors
    /// While it runs, unless `force`.
    pub async fn delete_added(&self, exec_id: &str, force: bool) -> Result<Option<(Exit, bool)>> {
        let added = self.added(exec_id)?;
        let running = added.running.borrow().clone();
        let mut end = None;
        if let Some(running) = running {
            let exit =
                ended(&running, force, || format!("process {exec_id} is running; kill it first")).await?;
            end = Some((exit, self.out_of_memory(exec_id, exit)));
        }
        self.execs.lock().unwrap_or_else(PoisonError::into_inner).remove(exec_id);
        Ok(end)
    }

    /// Ends what is left and removes everything.
    ///
    /// # Errors
    /// While it runs, unless `force`; when a process cannot be killed in time.
    pub async fn delete(&self, force: bool) -> Result<Option<(Exit, bool)>> {
        let started = self.started.load(Ordering::Relaxed);
        let exit = ended(&self.init, force || !started, || {
            format!("container {} is running; kill it first", self.id)
        });
        let exit = exit.await?;
        let oom = self.out_of_memory("", exit);
        self.mount_namespace.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.cgroup.remove().await?;
        self.storages.lock().unwrap_or_else(PoisonError::into_inner).unmount();
        Ok(started.then_some((exit, oom)))
    }
}

async fn ended(running: &Running, force: bool, message: impl FnOnce() -> String) -> Result<Exit> {
    if running.exit().is_none() {
        if !force {
            return Err(Error::State(message()));
        }
        // It may end by itself meanwhile.
        let _ = running.signal(libc::SIGKILL);
    }
    tokio::time::timeout(limits::CALL_DEADLINE, running.wait())
        .await
        .map_err(|_| Error::Internal("the process does not die".into()))
}

fn set_oom_score(pid: i32, score: Option<i32>) -> Result<()> {
    let Some(score) = score.filter(|score| *score != 0) else { return Ok(()) };
    match std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
        // It has ended already, and says why itself.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result.map_err(|e| Error::Internal(format!("setting oom_score_adj to {score}: {e}"))),
    }
}

fn open_namespaces(plan: &Plan) -> Result<Vec<(u64, OwnedFd)>> {
    let open = |(flag, path): &(u64, std::ffi::CString)| {
        let fd = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        fd.map(|fd| (*flag, fd))
            .map_err(|e| Error::Invalid(format!("opening the namespace {}: {e}", path.to_string_lossy())))
    };
    plan.joined.iter().map(open).collect()
}
