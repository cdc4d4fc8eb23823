//! Containers of containerd's, each from its bundle to a sandbox and back.

mod making;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use containerd_shim_protos::{
    api, events::task as message, protobuf::MessageField, sandbox_api::CreateSandboxRequest,
};
use kapsel_sandbox::{
    life::{Container, Error, Process, Sandbox},
    record::Exit,
};
use tokio::{sync::watch, task::JoinHandle};

use super::{
    Host,
    events::{Event, Events},
    flags::Flags,
    pod_bundle, rootfs, sandbox_file,
};
use crate::{convert, task::TaskService};

/// How long output may wait for its reader once its container is deleted.
const UNREAD: Duration = Duration::from_secs(2);

/// Between two events about memory that ran out.
const OOM_PAUSE: Duration = Duration::from_secs(1);

/// The containers that this process answers for.
pub struct Tasks {
    host: Host,
    flags: Flags,
    events: Events,
    /// By containerd's ids; `None` while one is being made.
    tasks: Mutex<HashMap<String, Option<Arc<Task>>>>,
    /// How many there are, and whether there was one.
    count: watch::Sender<Count>,
}

/// What decides whether this process is still needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Containers now.
    pub now: usize,
    /// Whether there was ever one.
    pub begun: bool,
    /// Whether containerd has no more for this process.
    pub dismissed: bool,
}

/// One container.
pub struct Task {
    /// containerd's id.
    pub id: String,
    /// containerd's bundle.
    pub bundle: PathBuf,
    /// Its sandbox, which a pod's containers have together.
    pub sandbox: Arc<Sandbox>,
    /// Itself.
    pub container: Arc<Container>,
    /// Answers for it.
    pub service: TaskService,
    /// Of the process on the host that stands for it.
    pub pid: u32,
    /// It is a pod of the Sandbox API, of which the Task API does not tell.
    pub is_pod: bool,
    /// Nanoseconds since 1970.
    pub created_at: u64,
    /// Those that tell of the ends of added processes.
    added: Mutex<Vec<JoinHandle<()>>>,
}

impl Tasks {
    /// None yet.
    pub fn new(host: Host, flags: Flags, events: Events) -> Arc<Self> {
        Arc::new(Self { host, flags, events, tasks: Mutex::default(), count: watch::Sender::default() })
    }

    /// What decides whether this process is still needed.
    pub fn count(&self) -> watch::Receiver<Count> {
        self.count.subscribe()
    }

    /// containerd has no more for this process.
    pub fn dismiss(&self) {
        self.count.send_modify(|count| count.dismissed = true);
    }

    /// Tells containerd.
    pub fn tell(&self, event: &Event) {
        self.events.tell(event);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Option<Arc<Task>>>> {
        // Whole between statements, so a panic elsewhere does not spoil it.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        let now = self.lock().len();
        self.count.send_modify(|count| {
            count.now = now;
            count.begun |= now > 0;
        });
    }

    /// A container by containerd's id.
    ///
    /// # Errors
    /// When there is none, or not yet.
    pub fn get(&self, id: &str) -> Result<Arc<Task>, Error> {
        match self.lock().get(id) {
            Some(Some(task)) => Ok(task.clone()),
            Some(None) => Err(Error::State(format!("container {id} is being made"))),
            None => Err(Error::NotFound(format!("this shim has no container {id:?}"))),
        }
    }

    /// Those that are there.
    pub fn all(&self) -> Vec<Arc<Task>> {
        self.lock().values().flatten().cloned().collect()
    }

    /// Makes a container and its sandbox. On an error nothing of it is left.
    ///
    /// # Errors
    /// Why not.
    pub async fn create(self: &Arc<Self>, request: api::CreateTaskRequest) -> Result<Arc<Task>, Error> {
        self.create_as(request, false).await
    }

    /// Makes a pod without a container of its own.
    ///
    /// # Errors
    /// Why not.
    pub async fn create_pod(self: &Arc<Self>, request: CreateSandboxRequest) -> Result<(), Error> {
        if let Some(pod) = self.pod() {
            return Err(Error::AlreadyExists(format!("this shim has pod {} already", pod.id)));
        }
        let create = api::CreateTaskRequest {
            id: request.sandbox_id.clone(),
            bundle: request.bundle_path.clone(),
            rootfs: request.rootfs.clone(),
            ..Default::default()
        };
        pod_bundle::prepare(&request)?;
        self.create_as(create, true).await.map(drop)
    }

    /// The pod that was made by the Sandbox API. What is made by the Task API is in it then.
    fn pod(&self) -> Option<Arc<Task>> {
        self.all().into_iter().find(|task| task.is_pod)
    }

    async fn create_as(
        self: &Arc<Self>,
        request: api::CreateTaskRequest,
        is_pod: bool,
    ) -> Result<Arc<Task>, Error> {
        {
            let mut tasks = self.lock();
            if tasks.contains_key(&request.id) {
                return Err(Error::AlreadyExists(format!("container {} is there already", request.id)));
            }
            tasks.insert(request.id.clone(), None);
        }
        // containerd says after each container of a pod that it needs no more.
        self.count.send_modify(|count| count.dismissed = false);
        self.changed();
        let bundle = PathBuf::from(&request.bundle);
        match self.make(&request, &bundle, is_pod).await {
            Ok(task) => {
                self.lock().insert(request.id.clone(), Some(task.clone()));
                if is_pod {
                    return Ok(task);
                }
                self.tell(&created(&request, task.pid));
                let (tasks, ending) = (self.clone(), task.clone());
                tokio::spawn(async move { tasks.tell_end(&ending).await });
                Ok(task)
            }
            Err(error) => {
                let unmounted = rootfs::unmount(&bundle);
                let _ = std::fs::remove_file(sandbox_file(&bundle));
                self.lock().remove(&request.id);
                self.changed();
                match unmounted {
                    Ok(()) => Err(error),
                    Err(left) => Err(Error::Resources(format!("{error}; {left:#}"))),
                }
            }
        }
    }

    /// Tells of the end of a container's first process once those of the others are told.
    async fn tell_end(&self, task: &Task) {
        let (exit, kills) = tokio::join!(task.container.init.exited(), self.tell_oom(task));
        let added = std::mem::take(&mut *task.added());
        for telling in added {
            let _ = telling.await;
        }
        if exit.oom && kills == 0 {
            self.tell(&out_of_memory(task));
        }
        self.tell(&exited(task, "", &exit));
    }

    /// Tells each time that the guest's kernel has killed for lack of memory, until a container ends; how many it has told of. The
    /// last of them may be told by the end alone.
    async fn tell_oom(&self, task: &Task) -> u64 {
        let container = &task.container;
        container.init.started().await;
        let mut told = 0;
        loop {
            tokio::select! {
                biased;
                _ = container.init.exited() => return told,
                kills = container.oom_kills(told) => match kills {
                    Ok(kills) if kills > told => told = kills,
                    // It has ended, or is about to.
                    _ => return told,
                },
            }
            self.tell(&out_of_memory(task));
            // A guest may claim this as often as it likes.
            let _ = tokio::time::timeout(OOM_PAUSE, container.init.exited()).await;
        }
    }

    /// Starts a process, and tells of that and, in time, of its end.
    ///
    /// # Errors
    /// Why not.
    pub async fn start(self: &Arc<Self>, task: &Arc<Task>, exec_id: &str) -> Result<(), Error> {
        let process = task.container.process(exec_id)?;
        task.container.start(exec_id).await?;
        // Between these two nothing waits, and this process has one thread: an end that is told comes after the start.
        let (container_id, pid) = (task.id.clone(), task.pid);
        if exec_id.is_empty() {
            self.tell(&Event::Start(message::TaskStart { container_id, pid, ..Default::default() }));
            return Ok(());
        }
        let exec_id = exec_id.to_owned();
        let started = message::TaskExecStarted { container_id, exec_id, pid, ..Default::default() };
        self.tell(&Event::ExecStarted(started));
        let (tasks, of) = (self.clone(), task.clone());
        let telling = tokio::spawn(async move { tasks.tell_exec_end(&of, &process).await });
        let mut added = task.added();
        added.retain(|telling| !telling.is_finished());
        added.push(telling);
        Ok(())
    }

    async fn tell_exec_end(&self, task: &Task, process: &Process) {
        let exit = process.exited().await;
        self.tell(&exited(task, &process.exec_id, &exit));
    }

    /// Removes a container that does not run, and with it all that it had on the host.
    ///
    /// # Errors
    /// When it runs.
    pub async fn delete(&self, task: &Arc<Task>) -> Result<Exit, Error> {
        let container = &task.container;
        if let Ok(deleted) = tokio::time::timeout(UNREAD, container.delete("")).await {
            deleted?;
        } else {
            // Nobody reads what it has printed: its client has gone, and will not come back to a deleted container.
            container.abandon_output();
            container.delete("").await?;
        }
        let exit = container.init.exited().await;
        rootfs::unmount(&task.bundle).map_err(|error| Error::Resources(format!("{error:#}")))?;
        self.lock().remove(&task.id);
        if task.is_pod {
            return Ok(exit);
        }
        self.tell(&Event::Delete(message::TaskDelete {
            container_id: task.id.clone(),
            pid: task.pid,
            exit_status: exit.code,
            exited_at: convert::timestamp(exit.at),
            ..Default::default()
        }));
        self.changed();
        Ok(exit)
    }

    /// Removes the pod, if it came to be, and what is left in it. This process has no more to do then.
    ///
    /// # Errors
    /// When something of it stays.
    pub async fn shut_down(&self) -> Result<(), Error> {
        // First the pod, and with it all that runs in it.
        if let Some(pod) = self.pod() {
            self.delete(&pod).await?;
            for task in self.all() {
                self.delete(&task).await?;
            }
        }
        self.changed();
        self.count.send_modify(|count| (count.begun, count.dismissed) = (true, true));
        Ok(())
    }
}

impl Task {
    fn added(&self) -> MutexGuard<'_, Vec<JoinHandle<()>>> {
        self.added.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn created(request: &api::CreateTaskRequest, pid: u32) -> Event {
    let io = message::TaskIO {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
        ..Default::default()
    };
    Event::Create(message::TaskCreate {
        container_id: request.id.clone(),
        bundle: request.bundle.clone(),
        rootfs: request.rootfs.clone(),
        io: MessageField::some(io),
        checkpoint: request.checkpoint.clone(),
        pid,
        ..Default::default()
    })
}

fn out_of_memory(task: &Task) -> Event {
    Event::Oom(message::TaskOOM { container_id: task.id.clone(), ..Default::default() })
}

/// An end; the first process is called as its container.
fn exited(task: &Task, exec_id: &str, exit: &Exit) -> Event {
    Event::Exit(message::TaskExit {
        container_id: task.id.clone(),
        id: if exec_id.is_empty() { task.id.clone() } else { exec_id.into() },
        pid: task.pid,
        exit_status: exit.code,
        exited_at: convert::timestamp(exit.at),
        ..Default::default()
    })
}
