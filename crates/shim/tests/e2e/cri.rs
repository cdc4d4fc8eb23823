//! What the kubelet says to containerd, as far as the tests say it: the Container Runtime Interface, version 1, over gRPC.
//!
//! Names and numbers of the messages are those of Kubernetes' `cri-api` (`pkg/apis/runtime/v1/api.proto`, Apache-2.0); fields that the tests
//! neither set nor look at are left out, and so is the code that a generator would make of all of it.

use std::{collections::HashMap, path::Path};

use prost::Message;
use tonic::{
    Code, Request,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

/// RunPodSandboxRequest.
#[derive(Clone, PartialEq, Message)]
pub struct RunPod {
    #[prost(message, optional, tag = "1")]
    pub config: Option<PodConfig>,
    #[prost(string, tag = "2")]
    pub runtime_handler: String,
}

/// PodSandboxConfig.
#[derive(Clone, PartialEq, Message)]
pub struct PodConfig {
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<PodMetadata>,
    #[prost(string, tag = "2")]
    pub hostname: String,
    #[prost(string, tag = "3")]
    pub log_directory: String,
    #[prost(message, optional, tag = "4")]
    pub dns: Option<Dns>,
    #[prost(map = "string, string", tag = "7")]
    pub annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxPod>,
}

/// PodSandboxMetadata.
#[derive(Clone, PartialEq, Message)]
pub struct PodMetadata {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub uid: String,
    #[prost(string, tag = "3")]
    pub namespace: String,
}

/// DNSConfig.
#[derive(Clone, PartialEq, Message)]
pub struct Dns {
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
}

/// LinuxPodSandboxConfig.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxPod {
    #[prost(message, optional, tag = "2")]
    pub security: Option<PodSecurity>,
    #[prost(map = "string, string", tag = "3")]
    pub sysctls: HashMap<String, String>,
}

/// LinuxSandboxSecurityContext.
#[derive(Clone, PartialEq, Message)]
pub struct PodSecurity {
    #[prost(message, optional, tag = "1")]
    pub namespaces: Option<Namespaces>,
}

/// NamespaceOption.
#[derive(Clone, PartialEq, Message)]
pub struct Namespaces {
    #[prost(int32, tag = "1")]
    pub network: i32,
    #[prost(int32, tag = "2")]
    pub pid: i32,
    #[prost(int32, tag = "3")]
    pub ipc: i32,
}

/// NamespaceMode.
pub const POD: i32 = 0;
/// NamespaceMode.
pub const CONTAINER: i32 = 1;
/// NamespaceMode.
pub const NODE: i32 = 2;

/// CreateContainerRequest.
#[derive(Clone, PartialEq, Message)]
pub struct CreateContainer {
    #[prost(string, tag = "1")]
    pub pod: String,
    #[prost(message, optional, tag = "2")]
    pub config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pub pod_config: Option<PodConfig>,
}

/// ContainerConfig.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    pub image: Option<Image>,
    #[prost(string, repeated, tag = "3")]
    pub command: Vec<String>,
    #[prost(message, repeated, tag = "7")]
    pub mounts: Vec<Mount>,
    #[prost(string, tag = "11")]
    pub log_path: String,
    #[prost(message, optional, tag = "15")]
    pub linux: Option<LinuxContainer>,
}

/// ContainerMetadata.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerMetadata {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(uint32, tag = "2")]
    pub attempt: u32,
}

/// ImageSpec.
#[derive(Clone, PartialEq, Message)]
pub struct Image {
    #[prost(string, tag = "1")]
    pub image: String,
}

/// Mount.
#[derive(Clone, PartialEq, Message)]
pub struct Mount {
    #[prost(string, tag = "1")]
    pub container_path: String,
    #[prost(string, tag = "2")]
    pub host_path: String,
    #[prost(bool, tag = "3")]
    pub readonly: bool,
}

/// LinuxContainerConfig.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxContainer {
    #[prost(message, optional, tag = "1")]
    pub resources: Option<Resources>,
    #[prost(message, optional, tag = "2")]
    pub security: Option<ContainerSecurity>,
}

/// LinuxContainerResources.
#[derive(Clone, PartialEq, Message)]
pub struct Resources {
    #[prost(int64, tag = "4")]
    pub memory: i64,
    #[prost(string, tag = "6")]
    pub cpus: String,
}

/// UpdateContainerResourcesRequest.
#[derive(Clone, PartialEq, Message)]
pub struct UpdateContainer {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(message, optional, tag = "2")]
    pub linux: Option<Resources>,
}

/// LinuxContainerSecurityContext.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerSecurity {
    #[prost(message, optional, tag = "3")]
    pub namespaces: Option<Namespaces>,
    #[prost(bool, tag = "7")]
    pub readonly_rootfs: bool,
}

/// Every message that only names something, and the answers that do.
#[derive(Clone, PartialEq, Message)]
pub struct Named {
    #[prost(string, tag = "1")]
    pub id: String,
}

/// StopContainerRequest.
#[derive(Clone, PartialEq, Message)]
pub struct StopContainer {
    #[prost(string, tag = "1")]
    pub id: String,
    /// Seconds.
    #[prost(int64, tag = "2")]
    pub timeout: i64,
}

/// ExecSyncRequest.
#[derive(Clone, PartialEq, Message)]
pub struct ExecSync {
    #[prost(string, tag = "1")]
    pub id: String,
    #[prost(string, repeated, tag = "2")]
    pub cmd: Vec<String>,
    /// Seconds.
    #[prost(int64, tag = "3")]
    pub timeout: i64,
}

/// ExecSyncResponse.
#[derive(Clone, PartialEq, Message)]
pub struct Executed {
    #[prost(bytes = "vec", tag = "1")]
    pub stdout: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    pub stderr: Vec<u8>,
    #[prost(int32, tag = "3")]
    pub code: i32,
}

/// PodSandboxStatusResponse.
#[derive(Clone, PartialEq, Message)]
pub struct PodStatusResponse {
    #[prost(message, optional, tag = "1")]
    pub status: Option<PodStatus>,
}

/// PodSandboxStatus.
#[derive(Clone, PartialEq, Message)]
pub struct PodStatus {
    /// 0 is ready.
    #[prost(int32, tag = "3")]
    pub state: i32,
    #[prost(message, optional, tag = "5")]
    pub network: Option<Network>,
}

/// PodSandboxNetworkStatus.
#[derive(Clone, PartialEq, Message)]
pub struct Network {
    #[prost(string, tag = "1")]
    pub ip: String,
}

/// ContainerStatusResponse.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerStatusResponse {
    #[prost(message, optional, tag = "1")]
    pub status: Option<ContainerStatus>,
}

/// ContainerStatus.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerStatus {
    #[prost(int32, tag = "3")]
    pub state: i32,
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
    #[prost(string, tag = "10")]
    pub reason: String,
}

/// ContainerState.
pub const RUNNING: i32 = 1;
/// ContainerState.
pub const EXITED: i32 = 2;

/// ContainerStatsResponse.
#[derive(Clone, PartialEq, Message)]
pub struct StatsResponse {
    #[prost(message, optional, tag = "1")]
    pub stats: Option<Stats>,
}

/// ContainerStats.
#[derive(Clone, PartialEq, Message)]
pub struct Stats {
    #[prost(message, optional, tag = "2")]
    pub cpu: Option<Cpu>,
    #[prost(message, optional, tag = "3")]
    pub memory: Option<Memory>,
}

/// CpuUsage.
#[derive(Clone, PartialEq, Message)]
pub struct Cpu {
    #[prost(message, optional, tag = "2")]
    pub nanoseconds: Option<Number>,
}

/// MemoryUsage.
#[derive(Clone, PartialEq, Message)]
pub struct Memory {
    #[prost(message, optional, tag = "2")]
    pub working_set: Option<Number>,
}

/// UInt64Value.
#[derive(Clone, PartialEq, Message)]
pub struct Number {
    #[prost(uint64, tag = "1")]
    pub value: u64,
}

/// StatusResponse.
#[derive(Clone, PartialEq, Message)]
pub struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    pub status: Option<RuntimeStatus>,
}

/// RuntimeStatus.
#[derive(Clone, PartialEq, Message)]
pub struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    pub conditions: Vec<Condition>,
}

/// RuntimeCondition.
#[derive(Clone, PartialEq, Message)]
pub struct Condition {
    #[prost(string, tag = "1")]
    pub kind: String,
    #[prost(bool, tag = "2")]
    pub met: bool,
    #[prost(string, tag = "4")]
    pub message: String,
}

/// An answer without anything in it, or with nothing that is looked at.
#[derive(Clone, PartialEq, Message)]
pub struct Nothing {}

/// A connection to containerd, which is made anew for each call: containerd may have been restarted.
#[derive(Clone, Debug)]
pub struct Client {
    socket: String,
}

impl Client {
    pub fn new(socket: &Path) -> Self {
        Self { socket: format!("unix://{}", socket.display()) }
    }

    /// A call, which may take as long as a test waits for anything.
    pub fn call<R: Message + Default + 'static>(
        &self,
        method: &str,
        request: impl Message + 'static,
    ) -> Result<R, tonic::Status> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let gone =
                |error: tonic::transport::Error| tonic::Status::new(Code::Unavailable, error.to_string());
            let endpoint = Endpoint::from_shared(self.socket.clone()).expect("a socket");
            let channel: Channel = endpoint.timeout(crate::world::PATIENCE).connect().await.map_err(gone)?;
            let mut grpc = Grpc::new(channel);
            grpc.ready().await.map_err(gone)?;
            let path =
                PathAndQuery::try_from(format!("/runtime.v1.RuntimeService/{method}")).expect("a path");
            let response = grpc.unary(Request::new(request), path, ProstCodec::default()).await?;
            Ok(response.into_inner())
        })
    }
}
