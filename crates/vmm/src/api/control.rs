//! What can be asked of a machine: before its start it is put together, afterwards it is paused, resumed and its disks
//! are changed.

use serde_json::{Value, json};

use super::request::Request;
use crate::builder;
use crate::config::{self, Config, Drive};
use crate::machine::Machine;

/// What a request that could be done gives.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// It is done.
    Done,
    /// This was asked for.
    Value(Value),
}

/// Why a request cannot be done. The first texts are Firecracker's, because clients look at them.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    /// Only possible before the start.
    #[error("The requested operation is not supported after starting the microVM.")]
    AfterStart,
    /// Only possible after the start.
    #[error("The requested operation is not supported before starting the microVM.")]
    BeforeStart,
    /// Nothing to boot.
    #[error("Cannot start microvm without kernel configuration.")]
    NoKernel,
    /// The machine is not made as it was asked for.
    #[error("Start microvm error: {0}")]
    Build(#[from] builder::Error),
    /// The configuration is impossible.
    #[error("{0}")]
    Config(#[from] config::Error),
    /// No disk of that name.
    #[error("Unable to patch the block device: there is no drive {0}")]
    NoDrive(String),
    /// The disk's new file cannot be used.
    #[error("Unable to patch the block device: {0}")]
    Drive(#[from] kapsel_devices::block::Error),
    /// There is no balloon.
    #[error("No balloon device found.")]
    NoBalloon,
    /// The machine has ended.
    #[error("the machine has ended")]
    Ended,
}

/// A machine that is put together.
#[derive(Debug)]
pub struct PreBoot {
    id: String,
    config: Config,
}

/// A machine that was started.
pub struct Running {
    id: String,
    config: Config,
    paused: bool,
}

/// What a request before the start makes of the machine.
pub enum Next {
    /// It is still put together.
    Wait(PreBoot, Result<Answer, Fault>),
    /// It is to run now.
    Run(Running, Box<Machine>),
}

impl PreBoot {
    /// An instance of that name, with a configuration to begin with.
    pub fn new(id: String, config: Config) -> Self {
        PreBoot { id, config }
    }

    /// Does one request. `build` makes the machine when the request is to start.
    pub fn handle(
        mut self,
        request: Request,
        build: impl FnOnce(&Config) -> Result<Machine, builder::Error>,
    ) -> Next {
        if request != Request::Start {
            let answer = self.configure(request);
            return Next::Wait(self, answer);
        }
        match self.start(build) {
            Ok((running, machine)) => Next::Run(running, Box::new(machine)),
            Err(fault) => Next::Wait(self, Err(fault)),
        }
    }

    /// Builds the machine.
    ///
    /// # Errors
    /// [`Fault`]; it can be put together in another way then.
    pub fn start(
        &self,
        build: impl FnOnce(&Config) -> Result<Machine, builder::Error>,
    ) -> Result<(Running, Machine), Fault> {
        if self.config.boot_source.is_none() {
            return Err(Fault::NoKernel);
        }
        let machine = build(&self.config)?;
        Ok((Running { id: self.id.clone(), config: self.config.clone(), paused: false }, machine))
    }

    fn configure(&mut self, request: Request) -> Result<Answer, Fault> {
        let mut config = self.config.clone();
        match request {
            Request::GetInstance => return Ok(instance(&self.id, "Not started")),
            Request::GetMachineConfig => return Ok(value(&config.machine_config)),
            Request::GetConfig => return Ok(value(&config)),
            Request::PutBootSource(source) => config.boot_source = Some(source),
            Request::PutMachineConfig(machine) => config.machine_config = machine,
            Request::PatchMachineConfig(update) => update.apply(&mut config.machine_config),
            Request::PutDrive(drive) => put_drive(&mut config.drives, drive),
            Request::GetBalloon => return config.balloon.as_ref().map(value).ok_or(Fault::NoBalloon),
            Request::PutBalloon(balloon) => config.balloon = Some(balloon),
            Request::PutVsock(vsock) => config.vsock = Some(vsock),
            Request::PutEntropy(entropy) => config.entropy = Some(entropy),
            Request::PatchDrive(_)
            | Request::PatchBalloon(_)
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

fn put_drive(drives: &mut Vec<Drive>, drive: Drive) {
    match drives.iter_mut().find(|other| other.drive_id == drive.drive_id) {
        Some(other) => *other = drive,
        None => drives.push(drive),
    }
}

impl Running {
    /// Does one request.
    ///
    /// # Errors
    /// [`Fault`]; the machine is as before.
    pub fn handle(&mut self, request: Request, machine: &Machine) -> Result<Answer, Fault> {
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
            Request::PatchDrive(update) => {
                let drive = self.config.drives.iter_mut().find(|drive| drive.drive_id == update.drive_id);
                let drive = drive.ok_or_else(|| Fault::NoDrive(update.drive_id.clone()))?;
                machine.replace_disk(&update.drive_id, &update.path_on_host)?;
                drive.path_on_host = update.path_on_host;
                Ok(Answer::Done)
            }
            Request::GetBalloon => self.config.balloon.as_ref().map(value).ok_or(Fault::NoBalloon),
            Request::PatchBalloon(update) => {
                let mut config = self.config.clone();
                config.balloon.as_mut().ok_or(Fault::NoBalloon)?.amount_mib = update.amount_mib;
                config.check()?;
                machine.resize_balloon(update.amount_mib);
                self.config = config;
                Ok(Answer::Done)
            }
            Request::PutBootSource(_)
            | Request::PutMachineConfig(_)
            | Request::PatchMachineConfig(_)
            | Request::PutDrive(_)
            | Request::PutBalloon(_)
            | Request::PutVsock(_)
            | Request::PutEntropy(_)
            | Request::Start => Err(Fault::AfterStart),
        }
    }
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
    use super::*;
    use crate::api::request;

    fn ask(pre_boot: PreBoot, method: &str, path: &str, body: &str) -> (PreBoot, Result<Answer, Fault>) {
        let request = request::parse(method, path, body.as_bytes()).unwrap();
        match pre_boot.handle(request, |_| Err(builder::Error::TooManyDevices)) {
            Next::Wait(pre_boot, answer) => (pre_boot, answer),
            Next::Run(..) => panic!("nothing can be built here"),
        }
    }

    #[test]
    fn a_machine_is_put_together_and_what_is_wrong_changes_nothing() {
        let new = PreBoot::new("one".into(), Config::default());
        let (vm, answer) = ask(new, "PUT", "/actions", r#"{"action_type":"InstanceStart"}"#);
        assert_eq!(answer.unwrap_err().to_string(), "Cannot start microvm without kernel configuration.");
        let (vm, answer) = ask(vm, "PUT", "/boot-source", r#"{"kernel_image_path":"/k"}"#);
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
    fn a_drive_of_the_same_name_is_replaced() {
        let vm = PreBoot::new("one".into(), Config::default());
        let drive =
            |path: &str| format!(r#"{{"drive_id":"a","path_on_host":"{path}","is_root_device":true}}"#);
        let (vm, _) = ask(vm, "PUT", "/drives/a", &drive("/x"));
        let (vm, _) = ask(vm, "PUT", "/drives/a", &drive("/y"));
        assert_eq!(
            vm.config.drives.iter().map(|d| d.path_on_host.to_str()).collect::<Vec<_>>(),
            [Some("/y")]
        );
        let (_, answer) = ask(vm, "PUT", "/drives/b", &drive("/z").replace("\"a\"", "\"b\""));
        assert!(matches!(answer, Err(Fault::Config(config::Error::TwoRoots(..)))));
    }
}
