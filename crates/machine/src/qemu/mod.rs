//! QEMU as a monitor.

mod args;
mod machine;
mod process;
mod qmp;
mod snapshot;
mod tsc;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::error::Context;
use crate::fingerprint;
use crate::process::{Process, give};
use crate::snapshot::Meta;
use crate::{Capabilities, Error, Machine, MachineSpec, Monitor, Probe, Result, Snapshot};
use args::{Memory, fds};
use machine::QemuMachine;
use process::Start;
use qmp::Qmp;

/// The monitor's name in messages.
const NAME: &str = "QEMU";
const PROGRAM: &str = "qemu-system-x86_64";
const PACKAGE: &str = "qemu-system-x86";
/// The oldest version with all that is used here.
const OLDEST: (u32, u32) = (7, 2);

/// How long QEMU may take to be up and answer.
const START_DEADLINE: Duration = Duration::from_secs(20);

/// QEMU, found on this host.
#[derive(Debug, Clone)]
pub struct Qemu {
    program: PathBuf,
}

impl Qemu {
    /// QEMU at `program`, or the first one in `PATH`.
    ///
    /// # Errors
    /// [`Error::Missing`] when there is none.
    pub fn find(program: Option<&Path>) -> Result<Qemu> {
        let found = match program {
            Some(program) => program.is_file().then(|| program.to_owned()),
            None => std::env::var_os("PATH")
                .iter()
                .flat_map(std::env::split_paths)
                .chain(["/usr/bin".into()])
                .map(|dir| dir.join(PROGRAM))
                .find(|path| path.is_file()),
        };
        let name = program.unwrap_or(Path::new(PROGRAM)).display().to_string();
        Ok(Qemu { program: found.ok_or(Error::Missing { program: name, package: PACKAGE })? })
    }

    /// The program.
    pub fn program(&self) -> &Path {
        &self.program
    }
}

#[async_trait::async_trait]
impl Monitor for Qemu {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self) -> Probe {
        let mut probe = Probe { path: Some(self.program.clone()), version: None, problems: Vec::new() };
        let output = std::process::Command::new(&self.program).arg("--version").output();
        let text = match output {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => {
                probe.problems.push(format!("{} cannot be run: {error}", self.program.display()));
                return probe;
            }
        };
        probe.version =
            text.split_whitespace().skip_while(|word| *word != "version").nth(1).map(str::to_owned);
        if probe.version.as_deref().and_then(numbers).is_none_or(|found| found < OLDEST) {
            let found = probe.version.as_deref().unwrap_or("of unknown version");
            probe
                .problems
                .push(format!("QEMU {found} is too old: {}.{} or later is needed", OLDEST.0, OLDEST.1));
        }
        let machines = std::process::Command::new(&self.program).args(["-machine", "help"]).output();
        if !machines
            .is_ok_and(|out| String::from_utf8_lossy(&out.stdout).lines().any(|l| l.starts_with("microvm ")))
        {
            probe
                .problems
                .push(format!("{} has no microvm machine: install {PACKAGE}", self.program.display()));
        }
        probe
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities {
            snapshot: true,
            attach: true,
            places: args::MAX_PLUGGED,
            tcg: true,
            vcpus: args::MAX_CPUS,
            memory_mib: u32::MAX,
        }
    }

    fn fingerprint(&self, spec: &MachineSpec) -> Result<String> {
        // The command line of a machine without what may differ between a saved machine and one made from it.
        let shape = MachineSpec {
            name: "x".into(),
            shares: Vec::new(),
            nics: Vec::new(),
            template: false,
            ..spec.clone()
        };
        let args = args::build(&shape, Memory::Anonymous, args::From::Snapshot)?;
        fingerprint::of(&self.program, spec, args.iter().map(|arg| arg.as_encoded_bytes()))
    }

    async fn boot(&self, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        let begun = Instant::now();
        let mut start = Start::default();
        let memory = if spec.template {
            start.memory_file = Some(memory_file(spec)?);
            Memory::File
        } else if !spec.shares.is_empty() {
            start.memory_fd = Some(snapshot::empty_memory(spec)?);
            Memory::Shared
        } else {
            Memory::Anonymous
        };
        let fingerprint = self.fingerprint(spec)?;
        let memory_file = start.memory_file.clone();
        let (process, mut qmp) = process::start(&self.program, spec, memory, start).await?;
        let spawned = begun.elapsed();
        let id = qmp.send(&[("query-status", json!({}))]).await;
        let up = answered(&process, &mut qmp, id, spec).await?;
        let phases = vec![("spawn", spawned), ("monitor", up - begun - spawned)];
        Ok(Arc::new(QemuMachine::new(process, qmp, spec, fingerprint, memory, memory_file, phases)))
    }

    async fn restore(&self, snapshot: &Snapshot, spec: &MachineSpec) -> Result<Arc<dyn Machine>> {
        let begun = Instant::now();
        let fingerprint = self.fingerprint(spec)?;
        Meta::read(&snapshot.dir, spec, &fingerprint)?;
        let path = snapshot.dir.join("state");
        let state = File::open(&path).context(|| format!("cannot open {}", path.display()))?;
        // Not mapped privately: QEMU before 8.1 punches what the guest reports as free out of the file behind such a mapping, which
        // would eat the template; and a taken-over monitor could write to a file that it has open.
        let mut start = Start { state: Some(state), ..Start::default() };
        let from = snapshot.dir.join("memory");
        let (memory, copy) = if spec.template {
            let path = memory_file(spec)?;
            let copy = snapshot::copy_memory(&from, &snapshot::open_memory(&path)?)?;
            start.memory_file = Some(path);
            (Memory::File, copy)
        } else {
            let memory = snapshot::empty_memory(spec)?;
            let copy = snapshot::copy_memory(&from, &memory)?;
            start.memory_fd = Some(memory);
            (Memory::Shared, copy)
        };
        let memory_file = start.memory_file.clone();
        // QEMU starts meanwhile; it looks at the memory no sooner than it is told to load the state.
        let copy = tokio::task::spawn_blocking(move || copy.run().map(|()| begun.elapsed()));
        let prepared = begun.elapsed();
        let (process, mut qmp) = process::start(&self.program, spec, memory, start).await?;
        let spawned = begun.elapsed() - prepared;
        let copied = copy.await.map_err(std::io::Error::other).context(|| "cannot copy memory".into())??;
        // Sent before QEMU is up, so that it need not wait for us. It lets the guest run when it has loaded the state.
        let ignore_shared = json!({ "capabilities": [{ "capability": "x-ignore-shared", "state": true }] });
        let id = qmp
            .send(&[
                ("migrate-set-capabilities", ignore_shared),
                ("migrate-incoming", json!({ "uri": format!("fd:{}", fds::STATE) })),
            ])
            .await;
        let up = answered(&process, &mut qmp, id, spec).await?;
        let resumed = async { qmp.event(|name, _| (name == "RESUME").then_some(())).await };
        guarded(&process, spec, "loading the saved state", resumed).await?;
        let restored = up.elapsed();
        for (n, share) in spec.shares.iter().enumerate() {
            let share = args::share_device(n, &share.tag);
            guarded(&process, spec, "plugging in a share", plug(&mut qmp, share)).await?;
        }
        for (n, nic) in spec.nics.iter().enumerate() {
            let nic = args::nic_device(n, nic);
            guarded(&process, spec, "plugging in a network interface", plug(&mut qmp, nic)).await?;
        }
        let phases = vec![
            ("memory", copied),
            ("spawn", spawned),
            ("monitor", up - begun - prepared - spawned),
            ("restore", restored),
            ("plug", up.elapsed() - restored),
        ];
        Ok(Arc::new(QemuMachine::new(process, qmp, spec, fingerprint, memory, memory_file, phases)))
    }
}

/// The memory of a machine that is to be saved: a file, which the monitor's user may write.
fn memory_file(spec: &MachineSpec) -> Result<PathBuf> {
    let path = spec.memory_dir.as_ref().unwrap_or(&spec.dir).join("memory");
    snapshot::create_memory(&path, spec)?;
    give(&path, spec)?;
    Ok(path)
}

/// Plugs in a device, whose back end QEMU has.
///
/// The guest is not told: its agent makes the driver look at the slot again.
async fn plug(qmp: &mut Qmp, device: Value) -> Result<(), qmp::QmpError> {
    let handler = json!({ "path": device["bus"], "property": "hotplug-handler", "value": args::PLUGGER });
    let id = qmp.send(&[("qom-set", handler), ("device_add", device)]).await?;
    qmp.answer(id).await.map(drop)
}

/// Waits for the answer to a command that was sent at the start; gives the time at which it came.
async fn answered(
    process: &Process,
    qmp: &mut Qmp,
    id: Result<u64, qmp::QmpError>,
    spec: &MachineSpec,
) -> Result<Instant> {
    guarded(process, spec, "starting QEMU", async { qmp.answer(id?).await }).await?;
    Ok(Instant::now())
}

/// Runs a control operation of the start: QEMU's end and a deadline end it too, and the error tells which.
async fn guarded<T>(
    process: &Process,
    spec: &MachineSpec,
    what: &str,
    operation: impl Future<Output = Result<T, qmp::QmpError>>,
) -> Result<T> {
    let refused = match tokio::time::timeout(START_DEADLINE, operation).await {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(qmp::QmpError::Refused(words))) => Some(words),
        Ok(Err(_)) => None,
        Err(_) => {
            let console = process.console.lines(10);
            return Err(Error::Deadline {
                name: spec.name.clone(),
                what: what.to_owned(),
                after: START_DEADLINE,
                console,
            });
        }
    };
    // A broken connection or a failed load mostly means that QEMU is about to end, and then it says why on stderr.
    match tokio::time::timeout(Duration::from_secs(1), process.exit()).await {
        Ok(exit) => Err(Error::Ended {
            name: spec.name.clone(),
            monitor: NAME,
            reason: exit.to_string(),
            stderr: process.stderr.lines(10),
        }),
        Err(_) => match refused {
            Some(message) => Err(Error::Refused {
                name: spec.name.clone(),
                monitor: NAME,
                command: what.to_owned(),
                message,
            }),
            None => Err(Error::Control { name: spec.name.clone(), what: format!("{what} failed") }),
        },
    }
}

fn numbers(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_compare_as_numbers() {
        assert!(numbers("7.2.22").unwrap() >= OLDEST);
        assert!(numbers("10.0.2").unwrap() > OLDEST);
        assert!(numbers("6.9").unwrap() < OLDEST);
        assert_eq!(numbers("x"), None);
    }

    #[test]
    fn a_missing_qemu_names_the_package() {
        let error = Qemu::find(Some(Path::new("/nowhere/qemu"))).unwrap_err();
        assert_eq!(error.to_string(), "cannot find /nowhere/qemu; install the package qemu-system-x86");
    }
}
