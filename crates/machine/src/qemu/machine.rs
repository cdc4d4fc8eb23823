//! A running machine.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kapsel_channel::{Channel, connect};
use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::args::{self, MAX_PLUGGED, Memory};
use super::qmp::{Qmp, QmpError};
use super::{NAME, plug, snapshot};
use crate::error::Context;
use crate::process::Process;
use crate::session::Session;
use crate::snapshot::Meta;
use crate::{
    Attachment, Error, ExitReason, Machine, MachineSpec, Nic, Phase, Result, Share, Snapshot, Stats,
};

/// How long QEMU may take to obey.
const COMMAND: Duration = Duration::from_secs(5);
/// How long it may take to save a machine.
const SAVE: Duration = Duration::from_secs(60);

pub(super) struct QemuMachine {
    process: Process,
    qmp: tokio::sync::Mutex<Qmp>,
    spec: MachineSpec,
    fingerprint: String,
    memory: Memory,
    plugged: tokio::sync::Mutex<Plugged>,
    memory_file: Option<PathBuf>,
    session: Session,
}

/// What was plugged in, in the order of the places.
struct Plugged {
    shares: usize,
    /// By their addresses; `None` for one that was taken away.
    nics: Vec<Option<[u8; 6]>>,
}

impl Plugged {
    fn is_full(&self) -> bool {
        self.shares + self.nics.len() >= MAX_PLUGGED
    }
}

impl QemuMachine {
    pub(super) fn new(
        process: Process,
        qmp: Qmp,
        spec: &MachineSpec,
        fingerprint: String,
        memory: Memory,
        memory_file: Option<PathBuf>,
        phases: Vec<(&str, Duration)>,
    ) -> QemuMachine {
        // What was passed to QEMU is closed here: a back end sees its end when QEMU has ended, and taps go with it.
        let nics = spec.nics.iter().map(|nic| Some(nic.mac)).collect();
        let plugged = tokio::sync::Mutex::new(Plugged { shares: spec.shares.len(), nics });
        let spec = MachineSpec { shares: Vec::new(), nics: Vec::new(), ..spec.clone() };
        QemuMachine {
            process,
            qmp: tokio::sync::Mutex::new(qmp),
            spec,
            fingerprint,
            memory,
            plugged,
            memory_file,
            session: Session::new(phases),
        }
    }

    /// Executes a control command.
    async fn command(&self, command: &str, arguments: Value) -> Result<Value> {
        let mut qmp = self.qmp.lock().await;
        self.obeyed(command, qmp.execute(command, arguments, COMMAND)).await
    }

    /// Waits for what QEMU was told to do. Its end ends that at once.
    async fn obeyed<T>(&self, command: &str, doing: impl Future<Output = Result<T, QmpError>>) -> Result<T> {
        tokio::select! {
            biased;
            done = doing => done.map_err(|error| self.error(command, error)),
            exit = self.process.exit() => Err(self.process.ended(exit)),
        }
    }

    fn error(&self, command: &str, error: QmpError) -> Error {
        let name = self.spec.name.clone();
        match error {
            QmpError::Refused(message) => {
                Error::Refused { name, monitor: NAME, command: command.to_owned(), message }
            }
            QmpError::Deadline(after) => {
                self.process.late(&format!("the monitor's answer to {command}"), after)
            }
            QmpError::Broken(what) => Error::Control { name, what },
        }
    }
}

#[async_trait::async_trait]
impl Machine for QemuMachine {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn phases(&self) -> Vec<Phase> {
        self.session.phases()
    }

    async fn connect(&self, deadline: Duration) -> Result<Arc<dyn Channel>> {
        // QEMU takes one connection at a time, and closes one that comes while it still has another.
        let socket = self.process.socket.as_path();
        let knock = |left| async move { connect(UnixStream::connect(socket).await?, left).await };
        self.session.begin(&self.process, deadline, knock).await
    }

    async fn pause(&self) -> Result<()> {
        self.command("stop", json!({})).await.map(drop)
    }

    async fn resume(&self) -> Result<()> {
        self.command("cont", json!({})).await.map(drop)
    }

    async fn snapshot(&self, dir: &Path) -> Result<Snapshot> {
        let Some(memory) = &self.memory_file else {
            return Err(Error::Unsupported {
                monitor: NAME,
                what: format!("save the machine {}, which was not started as a template", self.spec.name),
            });
        };
        self.session.end();
        // Let the guest see that the host is gone, so that the clones begin in that state.
        tokio::time::sleep(Duration::from_millis(50)).await;
        // QEMU stops the machine itself when it saves it, and notes that it ran: the clones run at once, without a command from us.
        let path = dir.join("state");
        let state = std::fs::File::create(&path).context(|| format!("cannot create {}", path.display()))?;
        let mut qmp = self.qmp.lock().await;
        let save = async {
            let on = |name: &str| json!({ "capability": name, "state": true });
            let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
            qmp.execute("migrate-set-capabilities", capabilities, COMMAND).await?;
            qmp.send_fd("state", state.as_fd(), COMMAND).await?;
            qmp.execute("migrate", json!({ "uri": "fd:state" }), COMMAND).await?;
            let ended = qmp.event(|name, data| match (name, data.get("status")?.as_str()?) {
                ("MIGRATION", status @ ("completed" | "failed" | "cancelled")) => Some(status == "completed"),
                _ => None,
            });
            match tokio::time::timeout(SAVE, ended).await {
                Ok(Ok(true)) => Ok(()),
                Ok(Ok(false)) => Err(QmpError::Refused("saving the state failed".into())),
                Ok(Err(error)) => Err(error),
                Err(_) => Err(QmpError::Deadline(SAVE)),
            }
        };
        tokio::select! {
            biased;
            saved = save => saved.map_err(|error| self.error("migrate", error))?,
            exit = self.process.exit() => return Err(self.process.ended(exit)),
        }
        drop(qmp);
        self.finish_snapshot(memory, dir).await
    }

    async fn attach(&self, attachment: Attachment) -> Result<()> {
        let unsupported = |what| Err(Error::Unsupported { monitor: NAME, what });
        let name = &self.spec.name;
        if self.memory != Memory::Shared {
            return unsupported(format!(
                "plug a device into the machine {name}, which was started with memory of its own alone"
            ));
        }
        let mut plugged = self.plugged.lock().await;
        if plugged.is_full() {
            return unsupported(format!("give the machine {name} more than {MAX_PLUGGED} devices"));
        }
        // The place is not used again after a failure: what QEMU has made of it is unknown.
        match attachment {
            Attachment::Share(share) => {
                args::check_tag(name, &share.tag)?;
                plugged.shares += 1;
                self.obeyed("device_add", self.plug_share(plugged.shares - 1, share)).await
            }
            Attachment::Nic(nic) => {
                plugged.nics.push(Some(nic.mac));
                self.obeyed("device_add", self.plug_nic(plugged.nics.len() - 1, nic)).await
            }
        }
    }

    async fn detach(&self, mac: [u8; 6]) -> Result<()> {
        let mut plugged = self.plugged.lock().await;
        let Some(n) = plugged.nics.iter().position(|nic| *nic == Some(mac)) else { return Ok(()) };
        self.command("netdev_del", json!({ "id": args::nic_backend(n) })).await?;
        plugged.nics[n] = None;
        Ok(())
    }

    fn console(&self) -> Vec<u8> {
        self.process.console.bytes()
    }

    async fn stats(&self) -> Result<Stats> {
        let balloon = self.command("query-balloon", json!({})).await?;
        let guest_memory = u64::from(self.spec.memory_mib) << 20;
        let actual = balloon.get("actual").and_then(Value::as_u64).unwrap_or(guest_memory);
        self.process.stats(guest_memory, actual)
    }

    async fn kill(&self) -> ExitReason {
        self.process.kill();
        self.wait().await
    }

    async fn wait(&self) -> ExitReason {
        let exit = self.process.exit().await;
        self.process.reason(exit)
    }
}

impl QemuMachine {
    async fn plug_share(&self, n: usize, share: Share) -> Result<(), QmpError> {
        let mut qmp = self.qmp.lock().await;
        let chardev = args::share_chardev(n);
        qmp.send_fd(&chardev, share.socket.as_fd(), COMMAND).await?;
        let address = json!({ "type": "fd", "data": { "str": chardev } });
        let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
        qmp.execute("chardev-add", json!({ "id": chardev, "backend": backend }), COMMAND).await?;
        in_time(plug(&mut qmp, args::share_device(n, &share.tag))).await
    }

    async fn plug_nic(&self, n: usize, nic: Nic) -> Result<(), QmpError> {
        let mut qmp = self.qmp.lock().await;
        let backend = args::nic_backend(n);
        qmp.send_fd(&backend, nic.tap.as_fd(), COMMAND).await?;
        let netdev = json!({ "type": "tap", "id": backend, "fd": backend });
        qmp.execute("netdev_add", netdev, COMMAND).await?;
        let plugged = in_time(plug(&mut qmp, args::nic_device(n, &nic))).await;
        if plugged.is_err() {
            // The tap shall not stay; the first error is the one to tell.
            let _ = qmp.execute("netdev_del", json!({ "id": backend }), COMMAND).await;
        }
        plugged
    }

    /// Ends QEMU (the memory must not change any more), and makes the files complete.
    async fn finish_snapshot(&self, memory: &Path, dir: &Path) -> Result<Snapshot> {
        self.kill().await;
        let target = dir.join("memory");
        if target != *memory {
            std::fs::rename(memory, &target)
                .context(|| format!("cannot move the memory to {}", target.display()))?;
        }
        snapshot::dig_holes(&target)?;
        // It was the monitor's to write; from now on it is only copied, by us.
        std::fs::set_permissions(&target, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            .context(|| format!("cannot set the mode of {}", target.display()))?;
        Meta::of(&self.spec, self.fingerprint.clone(), &target)?.write(dir)?;
        Ok(Snapshot { dir: dir.to_owned() })
    }
}

async fn in_time(plugged: impl Future<Output = Result<(), QmpError>>) -> Result<(), QmpError> {
    tokio::time::timeout(COMMAND, plugged).await.unwrap_or(Err(QmpError::Deadline(COMMAND)))
}
