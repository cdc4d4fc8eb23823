//! The Task API for containerd's containers: each call goes to the container's own service, and what containerd must know of it is told
//! here.

use std::sync::Arc;

use containerd_shim_protos::{
    api, events::task as message, shim_async::Task as TaskApi, types::task::ProcessInfo,
};
use kapsel_sandbox::life::Error;
use ttrpc::{Result, asynchronous::TtrpcContext};

use super::{
    events::Event,
    tasks::{Task, Tasks},
};
use crate::{
    convert,
    task::{to_the_end, told, unimplemented},
};

/// The service.
pub struct Service {
    tasks: Arc<Tasks>,
}

impl Service {
    /// Serves these containers.
    pub fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks }
    }

    fn task(&self, id: &str) -> Result<Arc<Task>> {
        told(self.tasks.get(id))
    }
}

#[async_trait::async_trait]
impl TaskApi for Service {
    async fn state(&self, context: &TtrpcContext, request: api::StateRequest) -> Result<api::StateResponse> {
        let task = self.task(&request.id)?;
        let mut state = task.service.state(context, request).await?;
        // Of the host: the guest's numbers would be other processes here.
        state.pid = task.pid;
        state.bundle = task.bundle.display().to_string();
        Ok(state)
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> Result<api::CreateTaskResponse> {
        if !request.checkpoint.is_empty() {
            return Err(unimplemented("a container cannot be restored from a checkpoint"));
        }
        let tasks = self.tasks.clone();
        let task = to_the_end(async move { tasks.create(request).await }).await?;
        Ok(api::CreateTaskResponse { pid: task.pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> Result<api::StartResponse> {
        let (tasks, task) = (self.tasks.clone(), self.task(&request.id)?);
        let pid = task.pid;
        to_the_end(async move { tasks.start(&task, &request.exec_id).await }).await?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(
        &self,
        context: &TtrpcContext,
        request: api::DeleteRequest,
    ) -> Result<api::DeleteResponse> {
        let (tasks, task) = (self.tasks.clone(), self.task(&request.id)?);
        let pid = task.pid;
        if !request.exec_id.is_empty() {
            let response = task.service.delete(context, request).await?;
            return Ok(api::DeleteResponse { pid, ..response });
        }
        let exit = to_the_end(async move { tasks.delete(&task).await }).await?;
        Ok(api::DeleteResponse {
            pid,
            exit_status: exit.code,
            exited_at: convert::timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> Result<api::PidsResponse> {
        let task = self.task(&request.id)?;
        // Clients look processes up on the host, where the guest's numbers are those of others. That the guest answers says that there
        // is one: after a restart containerd takes a shim without processes for a leaked one.
        told(task.container.pids().await)?;
        let monitor = ProcessInfo { pid: task.pid, ..Default::default() };
        Ok(api::PidsResponse { processes: vec![monitor], ..Default::default() })
    }

    async fn pause(&self, context: &TtrpcContext, request: api::PauseRequest) -> Result<api::Empty> {
        let task = self.task(&request.id)?;
        let done = task.service.pause(context, request).await?;
        let event = message::TaskPaused { container_id: task.id.clone(), ..Default::default() };
        self.tasks.tell(&Event::Paused(event));
        Ok(done)
    }

    async fn resume(&self, context: &TtrpcContext, request: api::ResumeRequest) -> Result<api::Empty> {
        let task = self.task(&request.id)?;
        let done = task.service.resume(context, request).await?;
        let event = message::TaskResumed { container_id: task.id.clone(), ..Default::default() };
        self.tasks.tell(&Event::Resumed(event));
        Ok(done)
    }

    async fn checkpoint(
        &self,
        context: &TtrpcContext,
        request: api::CheckpointTaskRequest,
    ) -> Result<api::Empty> {
        self.task(&request.id)?.service.checkpoint(context, request).await
    }

    async fn kill(&self, context: &TtrpcContext, request: api::KillRequest) -> Result<api::Empty> {
        const KILL: u32 = rustix::process::Signal::KILL.as_raw() as u32;
        let task = self.task(&request.id)?;
        let thaw = request.signal == KILL && task.container.is_paused();
        let done = task.service.kill(context, request).await?;
        if thaw {
            // Frozen processes do not even die. One that is dead already cannot be thawed any more.
            let _ = task.container.resume().await;
        }
        Ok(done)
    }

    async fn exec(&self, context: &TtrpcContext, request: api::ExecProcessRequest) -> Result<api::Empty> {
        let task = self.task(&request.id)?;
        let exec_id = request.exec_id.clone();
        let done = task.service.exec(context, request).await?;
        let event = message::TaskExecAdded { container_id: task.id.clone(), exec_id, ..Default::default() };
        self.tasks.tell(&Event::ExecAdded(event));
        Ok(done)
    }

    async fn resize_pty(&self, context: &TtrpcContext, request: api::ResizePtyRequest) -> Result<api::Empty> {
        self.task(&request.id)?.service.resize_pty(context, request).await
    }

    async fn close_io(&self, context: &TtrpcContext, request: api::CloseIORequest) -> Result<api::Empty> {
        self.task(&request.id)?.service.close_io(context, request).await
    }

    async fn update(&self, context: &TtrpcContext, request: api::UpdateTaskRequest) -> Result<api::Empty> {
        self.task(&request.id)?.service.update(context, request).await
    }

    async fn wait(&self, context: &TtrpcContext, request: api::WaitRequest) -> Result<api::WaitResponse> {
        self.task(&request.id)?.service.wait(context, request).await
    }

    async fn stats(&self, context: &TtrpcContext, request: api::StatsRequest) -> Result<api::StatsResponse> {
        self.task(&request.id)?.service.stats(context, request).await
    }

    async fn connect(&self, _: &TtrpcContext, request: api::ConnectRequest) -> Result<api::ConnectResponse> {
        // containerd connects to a shim before it asks for a container.
        let task_pid = match self.tasks.get(&request.id) {
            Ok(task) => task.pid,
            Err(Error::NotFound(_)) => 0,
            Err(error) => return Err(convert::status(&error)),
        };
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: api::ShutdownRequest) -> Result<api::Empty> {
        // As the API says: a shim that still has containers goes on. It is asked after each.
        self.tasks.dismiss();
        Ok(api::Empty::default())
    }
}
