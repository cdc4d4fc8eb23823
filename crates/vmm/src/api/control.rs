//! What can be asked of a machine: before its start it is put together, afterwards it is paused, resumed and its disks
//! are changed.

use std::fs::File;
use std::time::Duration;

use kapsel_devices::{block, net};
use serde_json::{Value, json};

use super::fault::Fault;
use super::request::{DriveUpdate, InterfaceUpdate, Request};
use crate::backends::Backends;
use crate::bus::lock;
use crate::config::{Backing, BootSource, Config, Drive, NetworkInterface, RateLimiter};
use crate::machine::Machine;
use crate::metrics::Metrics;
use crate::x86::template::Source;
use crate::{builder, confine, log, mmds, serial, snapshot};

/// The API of which version of Firecracker this is, as far as it goes.
pub const API_VERSION: &str = "1.14.0";

/// What a request that could be done gives.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It is done.
    Done,
    /// This was asked for.
    Value(Value),
}

/// Makes machines.
pub trait Builder {
    /// A machine that boots, with the sessions that were begun for its disks.
    ///
    /// # Errors
    /// [`builder::Error`].
    fn build(&self, config: &Config, backends: &mut Backends) -> Result<Machine, builder::Error>;

    /// A machine that goes on, with such a serial console, and what it is made of.
    ///
    /// # Errors
    /// [`snapshot::Error`].
    fn restore(
        &self,
        load: &snapshot::Load,
        serial: &serial::Settings,
    ) -> Result<(Config, Machine), snapshot::Error>;
}

/// A machine that is put together.
#[derive(Debug)]
pub struct PreBoot {
    id: String,
    config: Config,
    backends: Backends,
    metrics: Metrics,
    mmds: mmds::Shared,
}

/// A machine that was started.
pub struct Running {
    id: String,
    config: Config,
    paused: bool,
    mmds: mmds::Shared,
}

/// What a request before the start makes of the machine.
pub enum Next {
    /// It is still put together.
    Wait(PreBoot, Result<Answer, Fault>),
    /// It is to run now.
    Run(Running, Box<Machine>),
}

impl PreBoot {
    /// An instance of that name, with a configuration to begin with. Its machine's guest reads `mmds`.
    ///
    /// # Errors
    /// When the log or the metrics that it asks for cannot be written.
    pub fn new(id: String, config: Config, metrics: Metrics, mmds: mmds::Shared) -> Result<Self, Fault> {
        let (initial, backends) = (Config::default(), Backends::default());
        let mut pre_boot = PreBoot { id, config: initial, backends, metrics, mmds };
        if let Some(settings) = &config.logger {
            configure_log(settings)?;
        }
        if let Some(settings) = &config.metrics {
            pre_boot.metrics.configure(settings)?;
        }
        pre_boot.config = config;
        // The template is part of the machine, whatever becomes of its file.
        if let Some(source) = &mut pre_boot.config.cpu_config {
            *source = Source::Inline(source.template()?.into_owned());
        }
        Ok(pre_boot)
    }

    /// Does one request. `builder` makes the machine when the request is to start or to continue one.
    pub fn handle(mut self, request: Request, builder: &impl Builder) -> Next {
        let counters = request.counters();
        let started = match request {
            Request::Start => self.start(builder),
            Request::LoadSnapshot(load) => self.load(&load, builder),
            other => {
                let answer = self.configure(other);
                self.metrics.count_request(counters, answer.is_err());
                return Next::Wait(self, answer);
            }
        };
        match started {
            Ok((running, machine)) => Next::Run(running, Box::new(machine)),
            Err(fault) => Next::Wait(self, Err(fault)),
        }
    }

    /// Builds the machine and has it run.
    ///
    /// # Errors
    /// [`Fault`]; it can be put together in another way then.
    pub fn start(&mut self, builder: &impl Builder) -> Result<(Running, Machine), Fault> {
        if self.config.boot_source.is_none() {
            return Err(Fault::NoKernel);
        }
        let mut machine = builder.build(&self.config, &mut self.backends)?;
        machine.resume();
        Ok((self.running(self.config.clone(), false, &mut machine), machine))
    }

    fn load(&mut self, load: &snapshot::Load, builder: &impl Builder) -> Result<(Running, Machine), Fault> {
        // The one thing that a snapshot leaves open.
        let serial = self.config.serial.clone();
        if self.config != (Config { serial: serial.clone(), ..Config::default() }) {
            return Err(Fault::LoadNotAllowed);
        }
        let (config, mut machine) = builder.restore(load, &serial).map_err(Fault::LoadSnapshot)?;
        if load.resume_vm {
            machine.resume();
        }
        Ok((self.running(config, !load.resume_vm, &mut machine), machine))
    }

    /// The machine counts on from what was counted before.
    fn running(&mut self, config: Config, paused: bool, machine: &mut Machine) -> Running {
        machine.count_in(std::mem::take(&mut self.metrics));
        Running { id: self.id.clone(), config, paused, mmds: self.mmds.clone() }
    }

    fn configure(&mut self, request: Request) -> Result<Answer, Fault> {
        let mut config = self.config.clone();
        match request {
            Request::GetInstance => return Ok(instance(&self.id, "Not started")),
            Request::GetMachineConfig => return Ok(value(&config.machine_config)),
            Request::GetConfig => return Ok(value(&config)),
            Request::PutBootSource(source) => {
                check_boot_source(&source)?;
                config.boot_source = Some(source);
            }
            Request::PutMachineConfig(machine) => config.machine_config = machine,
            Request::PatchMachineConfig(update) => update.apply(&mut config.machine_config),
            Request::PutDrive(drive) => {
                if let Backing::File(path) = drive.backing()? {
                    block::check(path, drive.read_only()).map_err(Fault::Drive)?;
                }
                put_drive(&mut config.drives, drive.clone());
                config.check()?;
                self.backends.put(&drive).map_err(Fault::Backend)?;
            }
            Request::PutInterface(interface) => {
                net::check(&interface.host_dev_name)?;
                put_interface(&mut config.network_interfaces, interface);
            }
            Request::GetBalloon => return config.balloon.as_ref().map(value).ok_or(Fault::NoBalloon),
            Request::PutBalloon(balloon) => config.balloon = Some(balloon),
            Request::PutCpuConfig(template) => config.cpu_config = Some(Source::Inline(template)),
            Request::PutMemoryHotplug(hotplug) => config.memory_hotplug = Some(hotplug),
            Request::PutSerial(settings) => config.serial = settings,
            Request::PutVsock(vsock) => config.vsock = Some(vsock),
            Request::PutEntropy(entropy) => config.entropy = Some(entropy),
            Request::PutLogger(settings) => configure_log(&settings)?,
            Request::PutMetrics(settings) => self.metrics.configure(&settings)?,
            Request::PutMmdsConfig(mmds) => config.mmds_config = Some(mmds),
            Request::GetMmds => return Ok(Answer::Value(lock(&self.mmds).get().clone())),
            Request::PutMmds(document) => lock(&self.mmds).put(document)?,
            Request::PatchMmds(patch) => lock(&self.mmds).patch(&patch)?,
            Request::GetVersion => return Ok(version()),
            Request::PatchDrive(_)
            | Request::PatchInterface(_)
            | Request::GetMemoryHotplug
            | Request::PatchMemoryHotplug(_)
            | Request::PatchBalloon(_)
            | Request::GetBalloonStatistics
            | Request::PatchBalloonStatistics(_)
            | Request::FlushMetrics
            | Request::SendCtrlAltDel
            | Request::CreateSnapshot(_)
            | Request::LoadSnapshot(_)
            | Request::Pause
            | Request::Resume
            | Request::Start => {
                return Err(Fault::BeforeStart);
            }
        }
        config.check()?;
        self.config = config;
        Ok(Answer::Done)
    }
}

/// What the machine shall start from has to be there when it is named.
fn check_boot_source(source: &BootSource) -> Result<(), Fault> {
    File::open(&source.kernel_image_path).map_err(Fault::Kernel)?;
    if let Some(path) = &source.initrd_path {
        File::open(path).map_err(Fault::Initrd)?;
    }
    Ok(())
}

fn configure_log(settings: &log::Settings) -> Result<(), Fault> {
    confine::set_log(log::configure(settings).map_err(Fault::Logger)?);
    Ok(())
}

fn put_drive(drives: &mut Vec<Drive>, drive: Drive) {
    match drives.iter_mut().find(|other| other.drive_id == drive.drive_id) {
        Some(other) => *other = drive,
        None => drives.push(drive),
    }
}

fn put_interface(interfaces: &mut Vec<NetworkInterface>, interface: NetworkInterface) {
    match interfaces.iter_mut().find(|other| other.iface_id == interface.iface_id) {
        Some(other) => *other = interface,
        None => interfaces.push(interface),
    }
}

impl Running {
    /// Does one request.
    ///
    /// # Errors
    /// [`Fault`]; the machine is as before.
    pub fn handle(&mut self, request: Request, machine: &mut Machine) -> Result<Answer, Fault> {
        match request {
            Request::GetInstance => Ok(instance(&self.id, if self.paused { "Paused" } else { "Running" })),
            Request::GetMachineConfig => Ok(value(&self.config.machine_config)),
            Request::GetConfig => Ok(value(&self.config)),
            Request::Pause => {
                machine.pause();
                self.paused = true;
                Ok(Answer::Done)
            }
            Request::Resume => {
                machine.resume();
                self.paused = false;
                Ok(Answer::Done)
            }
            Request::PatchDrive(update) => self.patch_drive(update, machine),
            Request::PatchInterface(update) => self.patch_interface(update, machine),
            Request::GetBalloon => self.config.balloon.as_ref().map(value).ok_or(Fault::NoBalloon),
            Request::PatchBalloon(update) => {
                let mut config = self.config.clone();
                config.balloon.as_mut().ok_or(Fault::NoBalloon)?.amount_mib = update.amount_mib;
                config.check()?;
                machine.resize_balloon(update.amount_mib);
                self.config = config;
                Ok(Answer::Done)
            }
            Request::GetBalloonStatistics => {
                let (pages, statistics) = machine.balloon_statistics().ok_or(Fault::NoBalloon)?;
                let target = self.config.balloon.map_or(0, |balloon| balloon.amount_mib);
                let mut answer = json!({
                    "target_pages": u64::from(target) * 256,
                    "target_mib": target,
                    "actual_pages": pages,
                    "actual_mib": pages / 256,
                });
                for (name, number) in statistics?.known() {
                    answer[name] = json!(number);
                }
                Ok(Answer::Value(answer))
            }
            Request::PatchBalloonStatistics(update) => {
                let balloon = self.config.balloon.as_mut().ok_or(Fault::NoBalloon)?;
                let seconds = update.stats_polling_interval_s;
                machine.poll_balloon_statistics(Duration::from_secs(seconds.into()))?;
                balloon.stats_polling_interval_s = seconds;
                Ok(Answer::Done)
            }
            Request::GetMemoryHotplug => {
                let hotplug = self.config.memory_hotplug.ok_or(Fault::NoHotplug)?;
                let (plugged, requested) = machine.plugged_memory().ok_or(Fault::NoHotplug)?;
                Ok(Answer::Value(json!({
                    "total_size_mib": hotplug.total_size_mib,
                    "block_size_mib": hotplug.block_size_mib,
                    "slot_size_mib": hotplug.slot_size_mib,
                    "plugged_size_mib": plugged,
                    "requested_size_mib": requested,
                })))
            }
            Request::PatchMemoryHotplug(update) => {
                self.config.memory_hotplug.ok_or(Fault::NoHotplug)?;
                machine.resize_memory(update.requested_size_mib)?;
                Ok(Answer::Done)
            }
            Request::GetMmds => Ok(Answer::Value(lock(self.metadata()?).get().clone())),
            Request::PutMmds(document) => {
                lock(self.metadata()?).put(document)?;
                Ok(Answer::Done)
            }
            Request::PatchMmds(patch) => {
                lock(self.metadata()?).patch(&patch)?;
                Ok(Answer::Done)
            }
            Request::GetVersion => Ok(version()),
            Request::FlushMetrics => {
                machine.flush_metrics()?;
                Ok(Answer::Done)
            }
            Request::SendCtrlAltDel => {
                if machine.press_ctrl_alt_del() {
                    Ok(Answer::Done)
                } else {
                    Err(Fault::Keyboard)
                }
            }
            Request::CreateSnapshot(to) => {
                if !self.paused {
                    return Err(Fault::CreateSnapshot(snapshot::Error::NotPaused));
                }
                machine.save(&self.config, &to).map_err(Fault::CreateSnapshot)?;
                Ok(Answer::Done)
            }
            Request::LoadSnapshot(_)
            | Request::PutLogger(_)
            | Request::PutMetrics(_)
            | Request::PutMmdsConfig(_)
            | Request::PutBootSource(_)
            | Request::PutMachineConfig(_)
            | Request::PatchMachineConfig(_)
            | Request::PutDrive(_)
            | Request::PutInterface(_)
            | Request::PutBalloon(_)
            | Request::PutVsock(_)
            | Request::PutCpuConfig(_)
            | Request::PutSerial(_)
            | Request::PutMemoryHotplug(_)
            | Request::PutEntropy(_)
            | Request::Start => Err(Fault::AfterStart),
        }
    }

    /// The metadata, where there is a service for them or somebody has put some.
    fn metadata(&self) -> Result<&mmds::Shared, Fault> {
        if self.config.mmds_config.is_some() || lock(&self.mmds).initialized() {
            Ok(&self.mmds)
        } else {
            Err(mmds::Error::NotInitialized.into())
        }
    }

    fn patch_drive(&mut self, update: DriveUpdate, machine: &Machine) -> Result<Answer, Fault> {
        let drive = self.config.drives.iter_mut().find(|drive| drive.drive_id == update.drive_id);
        let drive = drive.ok_or_else(|| Fault::NoDrive(update.drive_id.clone()))?;
        let changes = update.path_on_host.is_some() || update.rate_limiter.is_some();
        if drive.socket.is_some() == changes {
            return Err(Fault::OtherBackend);
        }
        if !changes {
            machine.refresh_disk(&update.drive_id).map_err(Fault::PatchBackend)?;
        }
        if let Some(path) = update.path_on_host {
            machine.replace_disk(&update.drive_id, &path)?;
            drive.path_on_host = Some(path);
        }
        if let Some(limiter) = update.rate_limiter {
            machine.limit_disk(&update.drive_id, limiter.into());
        }
        update_limiter(&mut drive.rate_limiter, update.rate_limiter);
        Ok(Answer::Done)
    }

    fn patch_interface(&mut self, update: InterfaceUpdate, machine: &Machine) -> Result<Answer, Fault> {
        let config = &mut self.config;
        let mut interfaces = config.network_interfaces.iter_mut().chain(&mut config.late_network_interfaces);
        let interface = interfaces.find(|interface| interface.iface_id == update.iface_id);
        let interface = interface.ok_or_else(|| Fault::NoInterface(update.iface_id.clone()))?;
        let limits = |limiter: Option<RateLimiter>| limiter.unwrap_or_default().into();
        let (receive, transmit) = (limits(update.rx_rate_limiter), limits(update.tx_rate_limiter));
        machine.limit_interface(&update.iface_id, receive, transmit);
        update_limiter(&mut interface.rx_rate_limiter, update.rx_rate_limiter);
        update_limiter(&mut interface.tx_rate_limiter, update.tx_rate_limiter);
        Ok(Answer::Done)
    }
}

fn update_limiter(limiter: &mut Option<RateLimiter>, change: Option<RateLimiter>) {
    if let Some(change) = change {
        limiter.get_or_insert_default().update(change);
    }
}

fn version() -> Answer {
    Answer::Value(json!({"firecracker_version": API_VERSION}))
}

fn instance(id: &str, state: &str) -> Answer {
    let version = env!("CARGO_PKG_VERSION");
    Answer::Value(json!({"id": id, "state": state, "vmm_version": version, "app_name": "kapsel-vmm"}))
}

fn value(of: &impl serde::Serialize) -> Answer {
    // Configurations are strings and numbers, which JSON always has.
    Answer::Value(serde_json::to_value(of).unwrap_or(Value::Null))
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::api::request;

    /// Cannot make anything.
    struct Nothing;

    impl Builder for Nothing {
        fn build(&self, _: &Config, _: &mut Backends) -> Result<Machine, builder::Error> {
            Err(builder::Error::TooManyDevices)
        }
        fn restore(
            &self,
            _: &snapshot::Load,
            _: &serial::Settings,
        ) -> Result<(Config, Machine), snapshot::Error> {
            Err(snapshot::Error::Checksum)
        }
    }

    fn ask(pre_boot: PreBoot, method: &str, path: &str, body: &str) -> (PreBoot, Result<Answer, Fault>) {
        let request = request::parse(method, path, body.as_bytes()).unwrap();
        match pre_boot.handle(request, &Nothing) {
            Next::Wait(pre_boot, answer) => (pre_boot, answer),
            Next::Run(..) => panic!("nothing can be built here"),
        }
    }

    fn pre_boot() -> PreBoot {
        let mmds = Arc::new(Mutex::new(mmds::Store::new(100).unwrap()));
        PreBoot::new("one".into(), Config::default(), Metrics::default(), mmds).unwrap()
    }

    #[test]
    fn a_machine_is_put_together_and_what_is_wrong_changes_nothing() {
        let new = pre_boot();
        let (vm, answer) = ask(new, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
        assert_eq!(
            answer.unwrap_err().to_string(),
            "Start microvm error: Cannot start microvm without kernel configuration."
        );
        let (vm, answer) = ask(vm, "PUT", "/boot-source", r#"{"kernel_image_path":"/proc/self/exe"}"#);
        assert_eq!(answer.unwrap(), Answer::Done);
        let (vm, answer) = ask(vm, "PUT", "/machine-config", r#"{"vcpu_count":99,"mem_size_mib":1}"#);
        assert!(answer.is_err());
        let (vm, answer) = ask(vm, "PATCH", "/machine-config", r#"{"mem_size_mib":512}"#);
        assert_eq!(answer.unwrap(), Answer::Done);
        let (vm, answer) = ask(vm, "GET", "/machine-config", "");
        let Ok(Answer::Value(machine)) = answer else { panic!("a machine has a configuration") };
        assert_eq!((&machine["vcpu_count"], &machine["mem_size_mib"]), (&json!(1), &json!(512)));
        let (vm, answer) = ask(vm, "PATCH", "/vm", r#"{"state":"Paused"}"#);
        assert!(matches!(answer, Err(Fault::BeforeStart)));
        let (_, answer) = ask(vm, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
        assert!(matches!(answer, Err(Fault::Build(_))));
    }

    #[test]
    fn only_a_machine_of_which_nothing_was_said_can_be_one_that_was_saved() {
        let load = r#"{"snapshot_path":"/s","mem_file_path":"/m"}"#;
        let (vm, answer) = ask(pre_boot(), "PUT", "/snapshot/load", load);
        assert!(matches!(answer, Err(Fault::LoadSnapshot(_))));
        let (vm, _) = ask(vm, "PUT", "/entropy", "{}");
        let (vm, answer) = ask(vm, "PUT", "/snapshot/load", load);
        assert!(matches!(answer, Err(Fault::LoadNotAllowed)));
        let (_, answer) = ask(vm, "PUT", "/snapshot/create", load);
        assert!(matches!(answer, Err(Fault::BeforeStart)));
    }

    #[test]
    fn metadata_are_put_merged_and_bounded_before_the_start() {
        let (vm, answer) = ask(pre_boot(), "PATCH", "/mmds", r#"{"a":1}"#);
        assert_eq!(answer.unwrap_err().to_string(), "MMDS error: The MMDS data store is not initialized.");
        let (vm, answer) = ask(vm, "GET", "/mmds", "");
        assert_eq!(answer.unwrap(), Answer::Value(Value::Null));
        let (vm, _) = ask(vm, "PUT", "/mmds", r#"{"a":{"b":1}}"#);
        let (vm, answer) = ask(vm, "PATCH", "/mmds", r#"{"a":{"b":null,"c":2}}"#);
        assert_eq!(answer.unwrap(), Answer::Done);
        let (vm, answer) = ask(vm, "PUT", "/mmds", &json!("x".repeat(99)).to_string());
        let fault = answer.unwrap_err();
        assert_eq!(fault.status(), 413);
        assert_eq!(fault.to_string(), "MMDS limit exceeded error: The MMDS patch request doesn't fit.");
        let (vm, answer) = ask(vm, "GET", "/mmds", "");
        assert_eq!(answer.unwrap(), Answer::Value(json!({"a": {"c": 2}})));
        let (_, answer) = ask(vm, "PUT", "/mmds/config", r#"{"network_interfaces":["eth0"]}"#);
        let fault = answer.unwrap_err();
        assert!(
            fault.to_string().starts_with("MMMDS config error: The list of network interface IDs provided")
        );
    }

    #[test]
    fn a_drive_of_the_same_name_is_replaced() {
        let vm = pre_boot();
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| {
            let path = directory.path().join(name);
            std::fs::write(&path, [0; 512]).unwrap();
            path
        };
        let drive =
            |path: &Path| json!({"drive_id": "a", "path_on_host": path, "is_root_device": true}).to_string();
        let (x, y) = (file("x"), file("y"));
        let (vm, _) = ask(vm, "PUT", "/drives/a", &drive(&x));
        let (vm, _) = ask(vm, "PUT", "/drives/a", &drive(&y));
        assert_eq!(vm.config.drives.iter().map(|d| &d.path_on_host).collect::<Vec<_>>(), [&Some(y)]);
        let (vm, answer) = ask(vm, "PUT", "/drives/b", &drive(&x).replace("\"a\"", "\"b\""));
        assert_eq!(
            answer.unwrap_err().to_string(),
            "Drive config error: A root block device already exists!"
        );
        let (vm, answer) = ask(vm, "PUT", "/drives/a", &drive(Path::new("/nonexistent")));
        assert!(matches!(answer, Err(Fault::Drive(_))));
        let served = json!({"drive_id": "a", "is_root_device": false, "socket": "/nonexistent"});
        let (vm, answer) = ask(vm, "PUT", "/drives/a", &served.to_string());
        assert_eq!(
            answer.unwrap_err().to_string(),
            "Drive config error: Unable to create the virtio block device: Vhost user backend error: Vhost-user error: \
             Failed to connect to UDS Unix stream: No such file or directory (os error 2)"
        );
        let both = json!({"drive_id": "a", "is_root_device": false, "socket": "/s", "path_on_host": x});
        let (vm, answer) = ask(vm, "PUT", "/drives/a", &both.to_string());
        assert_eq!(
            answer.unwrap_err().to_string(),
            "Drive config error: Unable to create the virtio block device: Invalid block config."
        );
        assert_eq!(vm.config.drives.len(), 1);
    }
}
