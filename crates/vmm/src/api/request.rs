//! What a request asks for.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use crate::config::{
    Balloon, BalloonStatisticsUpdate, BalloonUpdate, BootSource, Drive, Entropy, MachineConfig,
    MachineConfigUpdate, NetworkInterface, RateLimiter, Vsock,
};
use crate::x86::template::Template;
use crate::{hotplug, log, metrics, mmds, serial, snapshot};

/// Something that the API can be asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// What the instance is and whether it runs.
    GetInstance,
    /// Processors and memory.
    GetMachineConfig,
    /// The whole configuration.
    GetConfig,
    /// Sets kernel, initrd and command line.
    PutBootSource(BootSource),
    /// Sets processors and memory.
    PutMachineConfig(MachineConfig),
    /// Changes some of them.
    PatchMachineConfig(MachineConfigUpdate),
    /// Adds a disk, or replaces the one of that name.
    PutDrive(Drive),
    /// Continues a disk with another file.
    PatchDrive(DriveUpdate),
    /// Adds a network card, or replaces the one of that name.
    PutInterface(NetworkInterface),
    /// Changes a network card's limits.
    PatchInterface(InterfaceUpdate),
    /// The balloon.
    GetBalloon,
    /// Adds a balloon.
    PutBalloon(Balloon),
    /// Gives it another size.
    PatchBalloon(BalloonUpdate),
    /// What the guest said about its memory.
    GetBalloonStatistics,
    /// Asks the guest at another interval.
    PatchBalloonStatistics(BalloonStatisticsUpdate),
    /// Adds sockets.
    PutVsock(Vsock),
    /// Have memory that can be plugged.
    PutMemoryHotplug(hotplug::Config),
    /// How much is plugged?
    GetMemoryHotplug,
    /// Plug another amount.
    PatchMemoryHotplug(hotplug::Update),
    /// Change the processors.
    PutCpuConfig(Template),
    /// Say where the serial console's output goes.
    PutSerial(serial::Settings),
    /// Adds the entropy device.
    PutEntropy(Entropy),
    /// Has the guest read metadata.
    PutMmdsConfig(mmds::Config),
    /// The metadata.
    GetMmds,
    /// Replaces them.
    PutMmds(Value),
    /// Changes them.
    PatchMmds(Value),
    /// Sets up the log.
    PutLogger(log::Settings),
    /// Says where counters are told.
    PutMetrics(metrics::Settings),
    /// Which API this is.
    GetVersion,
    /// Starts the machine.
    Start,
    /// Tells counters now.
    FlushMetrics,
    /// Presses keys by which Linux restarts.
    SendCtrlAltDel,
    /// Saves the machine.
    CreateSnapshot(snapshot::Create),
    /// Continues a machine that was saved.
    LoadSnapshot(snapshot::Load),
    /// Holds the machine.
    Pause,
    /// Lets it go on.
    Resume,
}

/// Another file or other limits for a disk; what is absent stays.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Which disk.
    pub drive_id: String,
    /// The file; the same one again when its size changed.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// The limits.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

/// Other limits for a network card; what is absent stays.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InterfaceUpdate {
    /// Which one.
    pub iface_id: String,
    /// How fast the guest may receive.
    #[serde(default)]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// How fast the guest may send.
    #[serde(default)]
    pub tx_rate_limiter: Option<RateLimiter>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Action {
    action_type: ActionType,
}

#[derive(Deserialize)]
enum ActionType {
    InstanceStart,
    FlushMetrics,
    SendCtrlAltDel,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Vm {
    state: VmState,
}

#[derive(Deserialize)]
enum VmState {
    Paused,
    Resumed,
}

impl Request {
    /// The counters of such requests and of their failures: group and names. Some are not counted.
    pub fn counters(&self) -> Option<(&'static str, &'static str, Option<&'static str>)> {
        let (get, put, patch) = ("get_api_requests", "put_api_requests", "patch_api_requests");
        Some(match self {
            Request::GetInstance => (get, "instance_info_count", None),
            Request::GetMachineConfig => (get, "machine_cfg_count", None),
            Request::GetVersion => (get, "vmm_version_count", None),
            Request::PutBootSource(_) => (put, "boot_source_count", Some("boot_source_fails")),
            Request::PutMachineConfig(_) => (put, "machine_cfg_count", Some("machine_cfg_fails")),
            Request::PatchMachineConfig(_) => (patch, "machine_cfg_count", Some("machine_cfg_fails")),
            Request::PutDrive(_) => (put, "drive_count", Some("drive_fails")),
            Request::PatchDrive(_) => (patch, "drive_count", Some("drive_fails")),
            Request::PutInterface(_) => (put, "network_count", Some("network_fails")),
            Request::PatchInterface(_) => (patch, "network_count", Some("network_fails")),
            Request::PutVsock(_) => (put, "vsock_count", Some("vsock_fails")),
            Request::PutCpuConfig(_) => (put, "cpu_cfg_count", Some("cpu_cfg_fails")),
            Request::PutMemoryHotplug(_) => (put, "hotplug_memory_count", Some("hotplug_memory_fails")),
            Request::PatchMemoryHotplug(_) => (patch, "hotplug_memory_count", Some("hotplug_memory_fails")),
            Request::GetMemoryHotplug => (get, "hotplug_memory_count", None),
            Request::PutSerial(_) => (put, "serial_count", Some("serial_fails")),
            Request::GetMmds => (get, "mmds_count", None),
            Request::PutMmds(_) => (put, "mmds_count", Some("mmds_fails")),
            Request::PatchMmds(_) => (patch, "mmds_count", Some("mmds_fails")),
            Request::PutLogger(_) => (put, "logger_count", Some("logger_fails")),
            Request::PutMetrics(_) => (put, "metrics_count", Some("metrics_fails")),
            Request::Start | Request::FlushMetrics | Request::SendCtrlAltDel => {
                (put, "actions_count", Some("actions_fails"))
            }
            _ => return None,
        })
    }
}

/// Why a request is not one; the texts are Firecracker's, because clients look at them.
#[derive(Debug, thiserror::Error)]
pub enum Invalid {
    /// No such thing.
    #[error("Invalid request method and/or path: {0} {1}.")]
    Path(String, String),
    /// No such part of a thing.
    #[error("Unrecognized PUT request path `{0}`.")]
    PutPath(String),
    /// A body where none may be.
    #[error("GET request cannot have a body.")]
    GetBody,
    /// No body where one must be.
    #[error("Empty {0} request.")]
    Empty(String),
    /// No name.
    #[error("The ID cannot be empty.")]
    EmptyId,
    /// A name with other characters.
    #[error("API Resource IDs can only contain alphanumeric characters and underscores.")]
    Id,
    /// One name in the path and another in the body.
    #[error("The id from the path does not match the id from the body!")]
    IdMismatch,
    /// The body is not what it should be.
    #[error("An error occurred when deserializing the json body of a request: {0}.")]
    Json(#[from] serde_json::Error),
}

/// Finds out what a request asks for.
///
/// # Errors
/// [`Invalid`].
pub fn parse(method: &str, path: &str, body: &[u8]) -> Result<Request, Invalid> {
    let mut tokens = path.trim_start_matches('/').split_terminator('/');
    let (resource, name) = (tokens.next().unwrap_or_default(), tokens.next());
    let unknown = || Invalid::Path(method.to_owned(), path.to_owned());
    if tokens.next().is_some() {
        return Err(unknown());
    }
    match method {
        "GET" if !body.is_empty() => Err(Invalid::GetBody),
        "PUT" | "PATCH" if body.is_empty() => Err(Invalid::Empty(method.to_owned())),
        _ => Ok(()),
    }?;
    match (method, resource, name) {
        ("GET", "", None) => Ok(Request::GetInstance),
        ("GET", "machine-config", None) => Ok(Request::GetMachineConfig),
        ("GET", "vm", Some("config")) => Ok(Request::GetConfig),
        ("PUT", "boot-source", None) => Ok(Request::PutBootSource(serde_json::from_slice(body)?)),
        ("PUT", "machine-config", None) => Ok(Request::PutMachineConfig(serde_json::from_slice(body)?)),
        ("PATCH", "machine-config", None) => Ok(Request::PatchMachineConfig(serde_json::from_slice(body)?)),
        ("GET", "balloon", None) => Ok(Request::GetBalloon),
        ("PUT", "balloon", None) => Ok(Request::PutBalloon(serde_json::from_slice(body)?)),
        ("PATCH", "balloon", None) => Ok(Request::PatchBalloon(serde_json::from_slice(body)?)),
        ("GET", "balloon", Some("statistics")) => Ok(Request::GetBalloonStatistics),
        ("PATCH", "balloon", Some("statistics")) => {
            Ok(Request::PatchBalloonStatistics(serde_json::from_slice(body)?))
        }
        ("PUT", "logger", None) => Ok(Request::PutLogger(serde_json::from_slice(body)?)),
        ("PUT", "metrics", None) => Ok(Request::PutMetrics(serde_json::from_slice(body)?)),
        ("GET", "version", None) => Ok(Request::GetVersion),
        ("PUT", "vsock", None) => Ok(Request::PutVsock(serde_json::from_slice(body)?)),
        ("PUT", "cpu-config", None) => Ok(Request::PutCpuConfig(serde_json::from_slice(body)?)),
        ("PUT", "hotplug", Some("memory")) => Ok(Request::PutMemoryHotplug(serde_json::from_slice(body)?)),
        ("PATCH", "hotplug", Some("memory")) => {
            Ok(Request::PatchMemoryHotplug(serde_json::from_slice(body)?))
        }
        ("GET", "hotplug", Some("memory")) => Ok(Request::GetMemoryHotplug),
        ("PUT", "serial", None) => Ok(Request::PutSerial(serde_json::from_slice(body)?)),
        ("PUT", "entropy", None) => Ok(Request::PutEntropy(serde_json::from_slice(body)?)),
        ("GET", "mmds", None) => Ok(Request::GetMmds),
        ("PUT", "mmds", None) => Ok(Request::PutMmds(serde_json::from_slice(body)?)),
        ("PATCH", "mmds", None) => Ok(Request::PatchMmds(serde_json::from_slice(body)?)),
        ("PUT", "mmds", Some("config")) => Ok(Request::PutMmdsConfig(serde_json::from_slice(body)?)),
        ("PUT", "mmds", Some(other)) => Err(Invalid::PutPath(other.to_owned())),
        ("PUT", "drives", name) => {
            let name = check_name(name)?;
            let drive: Drive = serde_json::from_slice(body)?;
            if drive.drive_id == name { Ok(Request::PutDrive(drive)) } else { Err(Invalid::IdMismatch) }
        }
        ("PATCH", "drives", name) => {
            let name = check_name(name)?;
            let update: DriveUpdate = serde_json::from_slice(body)?;
            if update.drive_id == name { Ok(Request::PatchDrive(update)) } else { Err(Invalid::IdMismatch) }
        }
        ("PUT", "network-interfaces", name) => {
            let name = check_name(name)?;
            let interface: NetworkInterface = serde_json::from_slice(body)?;
            let matches = interface.iface_id == name;
            if matches { Ok(Request::PutInterface(interface)) } else { Err(Invalid::IdMismatch) }
        }
        ("PATCH", "network-interfaces", name) => {
            let name = check_name(name)?;
            let update: InterfaceUpdate = serde_json::from_slice(body)?;
            let matches = update.iface_id == name;
            if matches { Ok(Request::PatchInterface(update)) } else { Err(Invalid::IdMismatch) }
        }
        ("PUT", "actions", None) => match serde_json::from_slice(body)? {
            Action { action_type: ActionType::InstanceStart } => Ok(Request::Start),
            Action { action_type: ActionType::FlushMetrics } => Ok(Request::FlushMetrics),
            Action { action_type: ActionType::SendCtrlAltDel } => Ok(Request::SendCtrlAltDel),
        },
        ("PUT", "snapshot", Some("create")) => Ok(Request::CreateSnapshot(serde_json::from_slice(body)?)),
        ("PUT", "snapshot", Some("load")) => Ok(Request::LoadSnapshot(serde_json::from_slice(body)?)),
        ("PATCH", "vm", None) => match serde_json::from_slice(body)? {
            Vm { state: VmState::Paused } => Ok(Request::Pause),
            Vm { state: VmState::Resumed } => Ok(Request::Resume),
        },
        _ => Err(unknown()),
    }
}

fn check_name(name: Option<&str>) -> Result<&str, Invalid> {
    let name = name.ok_or(Invalid::EmptyId)?;
    if name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_') { Ok(name) } else { Err(Invalid::Id) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(method: &str, path: &str, body: &str) -> String {
        parse(method, path, body.as_bytes()).map(|request| format!("{request:?}")).unwrap_err().to_string()
    }

    #[test]
    fn requests_are_understood() {
        for (method, path, body, expected) in [
            ("GET", "/", "", Request::GetInstance),
            ("GET", "/vm/config", "", Request::GetConfig),
            ("PUT", "/actions", r#"{"action_type":"InstanceStart"}"#, Request::Start),
            ("PATCH", "/vm", r#"{"state":"Paused"}"#, Request::Pause),
            ("PATCH", "/vm", r#"{"state":"Resumed"}"#, Request::Resume),
            ("PUT", "/entropy", "{}", Request::PutEntropy(Entropy::default())),
        ] {
            assert_eq!(parse(method, path, body.as_bytes()).unwrap(), expected);
        }
    }

    #[test]
    fn faults_have_firecrackers_words() {
        assert_eq!(fault("GET", "/nothing", ""), "Invalid request method and/or path: GET /nothing.");
        assert_eq!(fault("DELETE", "/vm", ""), "Invalid request method and/or path: DELETE /vm.");
        assert_eq!(fault("GET", "/vm/config/x", ""), "Invalid request method and/or path: GET /vm/config/x.");
        assert_eq!(fault("PUT", "/mmds/x", "{}"), "Unrecognized PUT request path `x`.");
        assert_eq!(fault("GET", "/", "{}"), "GET request cannot have a body.");
        assert_eq!(fault("PUT", "/vsock", ""), "Empty PUT request.");
        assert_eq!(fault("PUT", "/drives", "{}"), "The ID cannot be empty.");
        assert_eq!(
            fault("PUT", "/drives/a-b", "{}"),
            "API Resource IDs can only contain alphanumeric characters and underscores."
        );
        let drive = r#"{"drive_id":"a","path_on_host":"/x","is_root_device":false}"#;
        assert_eq!(
            fault("PUT", "/drives/b", drive),
            "The id from the path does not match the id from the body!"
        );
        assert!(fault("PUT", "/actions", r#"{"action_type":"Halt"}"#).starts_with(
            "An error occurred when deserializing the json body of a request: unknown variant `Halt`"
        ));
        assert!(fault("PUT", "/entropy", r#"{"rate":{}}"#).contains("unknown field `rate`"));
    }
}
