//! The Sandbox API of containerd 2: a pod is there before its containers, and is none of them. Its containers come by the Task API.

use std::sync::Arc;

use containerd_shim_protos::{
    protobuf::MessageField,
    sandbox_api::{
        CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
        PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
        SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
        StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
        WaitSandboxResponse,
    },
    sandbox_async::Sandbox as SandboxApi,
    types::platform::Platform,
};
use kapsel_sandbox::{
    life::{Cause, Error, State, Stats},
    record::{Exit, now},
};
use ttrpc::{Result, asynchronous::TtrpcContext};

use super::tasks::{Task, Tasks};
use crate::{
    convert,
    task::{to_the_end, told},
};

/// As the CRI plug-in calls the states.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";

/// The service.
pub struct Service {
    tasks: Arc<Tasks>,
}

impl Service {
    /// Serves the pod of these containers.
    pub fn new(tasks: Arc<Tasks>) -> Self {
        Self { tasks }
    }

    fn pod(&self, id: &str) -> Result<Arc<Task>> {
        told(self.tasks.get(id).and_then(|task| match task.is_pod {
            true => Ok(task),
            false => Err(Error::NotFound(format!("{id:?} is a container, and no sandbox"))),
        }))
    }
}

#[async_trait::async_trait]
impl SandboxApi for Service {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        request: CreateSandboxRequest,
    ) -> Result<CreateSandboxResponse> {
        let tasks = self.tasks.clone();
        to_the_end(async move { tasks.create_pod(request).await }).await?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        request: StartSandboxRequest,
    ) -> Result<StartSandboxResponse> {
        // It runs since it was created: there is nothing of its own that could be started.
        let pod = self.pod(&request.sandbox_id)?;
        let created_at = convert::timestamp(pod.created_at);
        Ok(StartSandboxResponse { pid: pod.pid, created_at, ..Default::default() })
    }

    async fn platform(&self, _: &TtrpcContext, request: PlatformRequest) -> Result<PlatformResponse> {
        self.pod(&request.sandbox_id)?;
        let platform = Platform { os: "linux".into(), architecture: "amd64".into(), ..Default::default() };
        Ok(PlatformResponse { platform: MessageField::some(platform), ..Default::default() })
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        request: StopSandboxRequest,
    ) -> Result<StopSandboxResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        let exit = Exit { code: 0, at: now(), oom: false, reason: Some("the pod was stopped".into()) };
        to_the_end(async move {
            pod.sandbox.end(Cause::Exited(exit)).await;
            Ok(())
        })
        .await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        request: WaitSandboxRequest,
    ) -> Result<WaitSandboxResponse> {
        let exit = self.pod(&request.sandbox_id)?.container.init.exited().await;
        let exited_at = convert::timestamp(exit.at);
        Ok(WaitSandboxResponse { exit_status: exit.code, exited_at, ..Default::default() })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        request: SandboxStatusRequest,
    ) -> Result<SandboxStatusResponse> {
        let pod = self.pod(&request.sandbox_id)?;
        let (state, exited_at) = match pod.container.init.state() {
            State::Exited(exit) => (NOT_READY, convert::timestamp(exit.at)),
            _ => (READY, MessageField::none()),
        };
        Ok(SandboxStatusResponse {
            sandbox_id: request.sandbox_id,
            pid: pod.pid,
            state: state.into(),
            created_at: convert::timestamp(pod.created_at),
            exited_at,
            ..Default::default()
        })
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, request: PingRequest) -> Result<PingResponse> {
        // The guest answers, or it does not.
        told(self.pod(&request.sandbox_id)?.container.pids().await)?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        request: ShutdownSandboxRequest,
    ) -> Result<ShutdownSandboxResponse> {
        let tasks = self.tasks.clone();
        match self.tasks.get(&request.sandbox_id) {
            // containerd asks for this too after a pod could not be made.
            Err(Error::NotFound(_)) => {}
            _ => drop(self.pod(&request.sandbox_id)?),
        }
        to_the_end(async move { tasks.shut_down().await }).await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        request: SandboxMetricsRequest,
    ) -> Result<SandboxMetricsResponse> {
        self.pod(&request.sandbox_id)?;
        let mut sum = Stats::default();
        for task in self.tasks.all() {
            // One that has ended uses nothing.
            if let Ok(stats) = task.container.stats().await {
                add(&mut sum, &stats);
            }
        }
        let mut response = SandboxMetricsResponse::default();
        let metrics = response.metrics.mut_or_insert_default();
        metrics.timestamp = convert::timestamp(now());
        metrics.id = request.sandbox_id;
        metrics.data = MessageField::some(convert::metrics(&sum)?);
        Ok(response)
    }
}

/// What all containers use; limits are each one's.
fn add(sum: &mut Stats, one: &Stats) {
    for (sum, one) in [
        (&mut sum.memory_current, one.memory_current),
        (&mut sum.swap_current, one.swap_current),
        (&mut sum.memory_inactive_file, one.memory_inactive_file),
        (&mut sum.cpu_usage_us, one.cpu_usage_us),
        (&mut sum.cpu_user_us, one.cpu_user_us),
        (&mut sum.cpu_system_us, one.cpu_system_us),
        (&mut sum.cpu_throttled_us, one.cpu_throttled_us),
        (&mut sum.pids_current, one.pids_current),
        (&mut sum.io_read_bytes, one.io_read_bytes),
        (&mut sum.io_write_bytes, one.io_write_bytes),
        (&mut sum.oom_kills, one.oom_kills),
    ] {
        // The guest's numbers may be anything.
        *sum = sum.saturating_add(one);
    }
    sum.memory_limit = u64::MAX;
    sum.pids_limit = u64::MAX;
}
