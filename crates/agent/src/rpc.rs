//! The API of `agent.proto` for one session.

use std::sync::Arc;

use kapsel_protocol::api::*;
use kapsel_protocol::service::Agent;
use kapsel_protocol::{VERSION, limits};
use tokio::sync::Notify;
use ttrpc::Result;
use ttrpc::r#async::TtrpcContext;

use crate::container::lifecycle::{Container, Surroundings};
use crate::error::Error;
use crate::files;
use crate::phases::Phases;
use crate::read_ahead;
use crate::reaper::Exit;
use crate::sandbox::Sandbox;
use crate::stdio::Streams;

/// A session's view of the guest.
///
/// Requests that change something take `order` first. It is fair and held only as long as it takes to find or reserve what the
/// request is about, so requests begin in the order of their arrival and none waits for another one's container.
#[derive(Debug)]
pub struct Service {
    /// The guest.
    pub sandbox: Arc<Sandbox>,
    /// This session's streams.
    pub streams: Arc<Streams>,
    /// Told when the guest shall end.
    pub shutdown: Arc<Notify>,
    order: tokio::sync::Mutex<()>,
}

impl Service {
    /// For a new session.
    pub fn new(sandbox: Arc<Sandbox>, streams: Arc<Streams>, shutdown: Arc<Notify>) -> Self {
        Self { sandbox, streams, shutdown, order: tokio::sync::Mutex::default() }
    }

    fn around(&self) -> Surroundings<'_> {
        Surroundings { reaper: &self.sandbox.reaper, streams: &self.streams }
    }

    /// A container, in order.
    async fn ordered(&self, id: &str) -> std::result::Result<Arc<Container>, Error> {
        let order = self.order.lock().await;
        // Its slot's lock is fair too, so the order goes on there.
        let container = self.sandbox.container(id);
        drop(order);
        container.await
    }
}

fn cells(n: u32) -> u16 {
    u16::try_from(n).unwrap_or(u16::MAX)
}

#[async_trait::async_trait]
impl Agent for Service {
    async fn hello(&self, _: &TtrpcContext, request: HelloRequest) -> Result<HelloResponse> {
        self.sandbox.hello(request.unix_time_ns)?;
        Ok(HelloResponse {
            version: VERSION.to_owned(),
            kernel_release: rustix::system::uname().release().to_string_lossy().into_owned(),
            configured: self.sandbox.is_configured(),
            phases: self.sandbox.boot.clone(),
            ..Default::default()
        })
    }

    async fn configure(&self, _: &TtrpcContext, request: ConfigureRequest) -> Result<ConfigureResponse> {
        let _order = self.order.lock().await;
        let mut phases = Phases::start();
        self.sandbox.configure(&request, &mut phases).await?;
        Ok(ConfigureResponse { phases: phases.into_vec(), ..Default::default() })
    }

    async fn quiesce(&self, _: &TtrpcContext, request: QuiesceRequest) -> Result<QuiesceResponse> {
        if self.sandbox.is_configured() {
            return Err(Error::State("the guest is in use: it is not to be saved any more".into()).into());
        }
        let container = match request.id.is_empty() {
            true => None,
            false => Some(self.sandbox.prepared(&request.id).await?),
        };
        let keep = || {
            container.iter().for_each(|container| read_ahead::start(container.rootfs(), &request.programs))
        };
        crate::quiesce::quiesce(keep).map_err(|e| Error::Internal(format!("making the guest small: {e}")))?;
        Ok(QuiesceResponse::default())
    }

    async fn connect(&self, _: &TtrpcContext, request: ConnectRequest) -> Result<ConnectResponse> {
        self.sandbox.must_be_configured()?;
        crate::net::configure(&request.interfaces).await?;
        Ok(ConnectResponse::default())
    }

    async fn disconnect(&self, _: &TtrpcContext, request: DisconnectRequest) -> Result<DisconnectResponse> {
        crate::net::remove(&request.mac)?;
        Ok(DisconnectResponse::default())
    }

    async fn create(&self, _: &TtrpcContext, request: CreateRequest) -> Result<CreateResponse> {
        let order = self.order.lock().await;
        let mut phases = Phases::start();
        let slot = self.sandbox.reserve(&request.id)?;
        drop(order);
        let pid = self.sandbox.create(slot, &request, self.around(), &mut phases).await?;
        Ok(CreateResponse { pid, phases: phases.into_vec(), ..Default::default() })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecRequest) -> Result<ExecResponse> {
        let _order = self.order.lock().await;
        self.sandbox.exec(&request).await?;
        Ok(ExecResponse::default())
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> Result<StartResponse> {
        let container = self.ordered(&request.id).await?;
        let mut phases = Phases::start();
        let pid = if request.exec_id.is_empty() {
            container.start(self.around(), &mut phases).await?;
            container.pid()
        } else {
            container.start_added(&request.exec_id, self.around(), &mut phases).await?
        };
        Ok(StartResponse { pid, phases: phases.into_vec(), ..Default::default() })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> Result<KillResponse> {
        let container = self.ordered(&request.id).await?;
        if !(1..=64).contains(&request.signal) {
            return Err(Error::Invalid(format!("signal {} is not in 1 to 64", request.signal)).into());
        }
        container.kill(&request.exec_id, request.signal as i32, request.all)?;
        Ok(KillResponse::default())
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> Result<WaitResponse> {
        let container = self.ordered(&request.id).await?;
        let (Exit { code, at_ns }, oom) = container.wait(&request.exec_id).await?;
        Ok(WaitResponse { exit_code: code, exited_at_ns: at_ns, oom, ..Default::default() })
    }

    async fn oom_kills(&self, _: &TtrpcContext, request: OomKillsRequest) -> Result<OomKillsResponse> {
        let container = self.sandbox.container(&request.id).await?;
        let kills = container.oom_kills_beyond(request.seen).await?;
        Ok(OomKillsResponse { kills, ..Default::default() })
    }

    async fn resize(&self, _: &TtrpcContext, request: ResizeRequest) -> Result<ResizeResponse> {
        let container = self.ordered(&request.id).await?;
        container.started(&request.exec_id)?.resize(cells(request.width), cells(request.height))?;
        Ok(ResizeResponse::default())
    }

    async fn delete(&self, _: &TtrpcContext, request: DeleteRequest) -> Result<DeleteResponse> {
        let container = self.ordered(&request.id).await?;
        let end = if request.exec_id.is_empty() {
            let end = container.delete(request.force).await?;
            self.sandbox.forget(&request.id);
            crate::storage::forget_unused();
            end
        } else {
            container.delete_added(&request.exec_id, request.force).await?
        };
        let (Exit { code, at_ns }, oom) = end.unwrap_or((Exit { code: 0, at_ns: 0 }, false));
        Ok(DeleteResponse { exit_code: code, exited_at_ns: at_ns, oom, ..Default::default() })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> Result<PauseResponse> {
        self.ordered(&request.id).await?.freeze(true).await?;
        Ok(PauseResponse::default())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> Result<ResumeResponse> {
        self.ordered(&request.id).await?.freeze(false).await?;
        Ok(ResumeResponse::default())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateRequest) -> Result<UpdateResponse> {
        self.ordered(&request.id).await?.update(&request.resources)?;
        Ok(UpdateResponse::default())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> Result<StatsResponse> {
        Ok(crate::stats::read(self.sandbox.container(&request.id).await?.cgroup()))
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> Result<PidsResponse> {
        let container = self.sandbox.container(&request.id).await?;
        let info = |(pid, exec_id)| ProcessInfo { pid: pid as u32, exec_id, ..Default::default() };
        let processes = container.processes().into_iter().take(limits::PIDS_MAX).map(info).collect();
        Ok(PidsResponse { processes, ..Default::default() })
    }

    async fn stat(&self, _: &TtrpcContext, request: StatRequest) -> Result<StatResponse> {
        let container = self.sandbox.container(&request.id).await?;
        Ok(files::stat(&container, &request, self.around()).await?)
    }

    async fn copy(&self, _: &TtrpcContext, request: CopyRequest) -> Result<CopyResponse> {
        let container = self.sandbox.container(&request.id).await?;
        Ok(files::copy(&container, &request, self.around()).await?)
    }

    async fn names(&self, _: &TtrpcContext, request: NamesRequest) -> Result<NamesResponse> {
        let container = self.ordered(&request.id).await?;
        crate::names::write(container.rootfs(), &request.files)?;
        Ok(NamesResponse::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Result<ShutdownResponse> {
        let _order = self.order.lock().await;
        self.sandbox.clear().await;
        self.shutdown.notify_one();
        Ok(ShutdownResponse::default())
    }
}
