//! containerd's Task API for one container.
//!
//! Thin: a call is turned into one of [`Container`]'s. What must not stop halfway when its client goes (ttrpc drops the
//! handlers of a connection that closes) runs in a task of its own.

use std::{future::Future, sync::Arc};

use containerd_shim_protos::{api, protobuf::MessageField, shim_async::Task, types::task::ProcessInfo};
use kapsel_sandbox::{
    life::{Cause, Container, Error, IoRequest, State},
    stdio::Owner,
};
use oci_spec::runtime::Process;
use ttrpc::{Code, Result, asynchronous::TtrpcContext, get_status};

use crate::convert;

/// The service.
pub struct TaskService {
    container: Arc<Container>,
    /// What it is called by those who ask.
    name: String,
    /// In which that is unique.
    namespace: String,
}

impl TaskService {
    /// Serves `container`, which is called `name` in `namespace`.
    pub fn new(container: Arc<Container>, name: String, namespace: String) -> Self {
        Self { container, name, namespace }
    }

    /// The container, if that is its name.
    fn container(&self, id: &str) -> Result<&Arc<Container>> {
        if id == self.name {
            return Ok(&self.container);
        }
        let message = format!("this shim's container is {}, not {id:?}", self.name);
        Err(ttrpc::Error::RpcStatus(get_status(Code::NOT_FOUND, message)))
    }
}

/// Carries out `work` to its end, whether or not somebody still waits for it.
pub async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = std::result::Result<T, Error>> + Send + 'static,
) -> Result<T> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(|error| convert::status(&error)),
        Err(error) => Err(ttrpc::Error::RpcStatus(get_status(
            Code::INTERNAL,
            format!("a mistake in the shim: {error}"),
        ))),
    }
}

/// A result as the Task API has it.
pub fn told<T>(result: std::result::Result<T, Error>) -> Result<T> {
    result.map_err(|error| convert::status(&error))
}

fn invalid(message: String) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::INVALID_ARGUMENT, message))
}

#[async_trait::async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, request: api::StateRequest) -> Result<api::StateResponse> {
        let container = self.container(&request.id)?;
        let process = told(container.process(&request.exec_id))?;
        let (status, pid, exit) = convert::state(&process.state(), container.is_paused());
        let wanted = process.wanted();
        let [stdin, stdout, stderr] = wanted.as_ref().map(|wanted| wanted.uris.clone()).unwrap_or_default();
        Ok(api::StateResponse {
            id: request.id,
            exec_id: request.exec_id,
            bundle: told(container.sandbox())?.bundle().dir().to_string_lossy().into_owned(),
            pid,
            status: status.into(),
            stdin,
            stdout,
            stderr,
            terminal: wanted.is_some_and(|wanted| wanted.plan.terminal),
            exit_status: exit.as_ref().map_or(0, |exit| exit.code),
            exited_at: exit.map_or_else(MessageField::none, |exit| convert::timestamp(exit.at)),
            ..Default::default()
        })
    }

    async fn create(
        &self,
        _: &TtrpcContext,
        request: api::CreateTaskRequest,
    ) -> Result<api::CreateTaskResponse> {
        let sandbox = told(self.container(&request.id)?.sandbox())?;
        if !request.checkpoint.is_empty() {
            return Err(unimplemented("a container cannot be restored from a checkpoint"));
        }
        let wanted = convert::create(&request, &self.namespace);
        let pid = to_the_end(async move { sandbox.create(wanted).await }).await?;
        Ok(api::CreateTaskResponse { pid, ..Default::default() })
    }

    async fn start(&self, _: &TtrpcContext, request: api::StartRequest) -> Result<api::StartResponse> {
        let container = self.container(&request.id)?.clone();
        let pid = to_the_end(async move { container.start(&request.exec_id).await }).await?;
        Ok(api::StartResponse { pid, ..Default::default() })
    }

    async fn delete(&self, _: &TtrpcContext, request: api::DeleteRequest) -> Result<api::DeleteResponse> {
        let container = self.container(&request.id)?.clone();
        let exit = to_the_end(async move { container.delete(&request.exec_id).await }).await?;
        let (code, at) = exit.map_or((0, 0), |exit| (exit.code, exit.at));
        Ok(api::DeleteResponse { exit_status: code, exited_at: convert::timestamp(at), ..Default::default() })
    }

    async fn pids(&self, _: &TtrpcContext, request: api::PidsRequest) -> Result<api::PidsResponse> {
        let pids = told(self.container(&request.id)?.pids().await)?;
        let processes = pids.into_iter().map(|(pid, _)| ProcessInfo { pid, ..Default::default() }).collect();
        Ok(api::PidsResponse { processes, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: api::PauseRequest) -> Result<api::Empty> {
        let container = self.container(&request.id)?.clone();
        to_the_end(async move { container.pause().await }).await?;
        Ok(api::Empty::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: api::ResumeRequest) -> Result<api::Empty> {
        let container = self.container(&request.id)?.clone();
        to_the_end(async move { container.resume().await }).await?;
        Ok(api::Empty::default())
    }

    async fn checkpoint(&self, _: &TtrpcContext, _: api::CheckpointTaskRequest) -> Result<api::Empty> {
        Err(unimplemented("a container with a kernel of its own cannot be checkpointed"))
    }

    async fn kill(&self, _: &TtrpcContext, request: api::KillRequest) -> Result<api::Empty> {
        let container = self.container(&request.id)?.clone();
        to_the_end(async move { container.kill(&request.exec_id, request.signal, request.all).await })
            .await?;
        Ok(api::Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, request: api::ExecProcessRequest) -> Result<api::Empty> {
        let container = self.container(&request.id)?;
        let json = &request.spec.get_or_default().value;
        let process: Process = serde_json::from_slice(json)
            .map_err(|e| invalid(format!("the process is not an OCI process: {e}")))?;
        let io = IoRequest {
            terminal: request.terminal,
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            owner: Owner { id: request.exec_id.clone(), namespace: self.namespace.clone() },
        };
        told(container.exec(&request.exec_id, process, &io))?;
        Ok(api::Empty::default())
    }

    async fn resize_pty(&self, _: &TtrpcContext, request: api::ResizePtyRequest) -> Result<api::Empty> {
        let container = self.container(&request.id)?;
        told(container.resize(&request.exec_id, request.width, request.height).await)?;
        Ok(api::Empty::default())
    }

    async fn close_io(&self, _: &TtrpcContext, request: api::CloseIORequest) -> Result<api::Empty> {
        let process = told(self.container(&request.id)?.process(&request.exec_id))?;
        if request.stdin {
            process.close_stdin().await;
        }
        Ok(api::Empty::default())
    }

    async fn update(&self, _: &TtrpcContext, request: api::UpdateTaskRequest) -> Result<api::Empty> {
        let container = self.container(&request.id)?.clone();
        let resources = request.resources.into_option().unwrap_or_default().value;
        to_the_end(async move { container.update(&resources).await }).await?;
        Ok(api::Empty::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: api::WaitRequest) -> Result<api::WaitResponse> {
        let process = told(self.container(&request.id)?.process(&request.exec_id))?;
        let exit = process.exited().await;
        Ok(api::WaitResponse {
            exit_status: exit.code,
            exited_at: convert::timestamp(exit.at),
            ..Default::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, request: api::StatsRequest) -> Result<api::StatsResponse> {
        let stats = told(self.container(&request.id)?.stats().await)?;
        Ok(api::StatsResponse { stats: MessageField::some(convert::metrics(&stats)?), ..Default::default() })
    }

    async fn connect(&self, _: &TtrpcContext, request: api::ConnectRequest) -> Result<api::ConnectResponse> {
        let container = self.container(&request.id)?;
        let task_pid = match container.init.state() {
            State::Running { pid } => pid,
            _ => 0,
        };
        Ok(api::ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            version: env!("CARGO_PKG_VERSION").into(),
            ..Default::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, request: api::ShutdownRequest) -> Result<api::Empty> {
        let container = self.container(&request.id)?.clone();
        let idle = matches!(container.init.state(), State::New | State::Exited(_));
        if !idle && !request.now {
            // As the API says: a shim that still has containers ignores this.
            return Ok(api::Empty::default());
        }
        let sandbox = told(container.sandbox())?;
        to_the_end(async move {
            sandbox.end(Cause::Killed("the sandbox was shut down".into())).await;
            Ok(())
        })
        .await?;
        Ok(api::Empty::default())
    }
}

/// What cannot be done.
pub fn unimplemented(message: &str) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(Code::UNIMPLEMENTED, message))
}
