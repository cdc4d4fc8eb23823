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
use crate::{Attachment, Error, ExitReason, Machine, MachineSpec, Phase, Result, Snapshot, Stats};

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
    /// How many shares it has.
    shares: tokio::sync::Mutex<usize>,
    /// How many it has room for.
    most_shares: usize,
    memory_file: Option<PathBuf>,
    session: Session,
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
        let shares = tokio::sync::Mutex::new(spec.shares.len());
        let most_shares = MAX_PLUGGED - spec.nics.len();
        let spec = MachineSpec { shares: Vec::new(), nics: Vec::new(), ..spec.clone() };
        QemuMachine {
            process,
            qmp: tokio::sync::Mutex::new(qmp),
            spec,
            fingerprint,
            memory,
            shares,
            most_shares,
            memory_file,
            session: Session::new(phases),
        }
    }

    /// Executes a control command. QEMU's end ends it at once.
    async fn command(&self, command: &str, arguments: Value) -> Result<Value> {
        let mut qmp = self.qmp.lock().await;
        tokio::select! {
            biased;
            answer = qmp.execute(command, arguments, COMMAND) => answer.map_err(|error| self.error(command, error)),
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
        let Attachment::Share(share) = attachment;
        args::check_tag(&self.spec.name, &share.tag)?;
        let unsupported = |what| Err(Error::Unsupported { monitor: NAME, what });
        if self.memory != Memory::Shared {
            return unsupported(format!(
                "share a directory with the machine {}, which was started without any: its memory is its own",
                self.spec.name
            ));
        }
        let mut shares = self.shares.lock().await;
        if *shares >= self.most_shares {
            let (name, most) = (&self.spec.name, self.most_shares);
            return unsupported(format!("give the machine {name} more than {most} shares"));
        }
        let n = *shares;
        // Not tried again after a failure: what QEMU has made of it is unknown.
        *shares += 1;
        let mut qmp = self.qmp.lock().await;
        let plugged = async {
            let chardev = args::share_chardev(n);
            qmp.send_fd(&chardev, share.socket.as_fd(), COMMAND).await?;
            let address = json!({ "type": "fd", "data": { "str": chardev } });
            let backend = json!({ "type": "socket", "data": { "addr": address, "server": false } });
            qmp.execute("chardev-add", json!({ "id": chardev, "backend": backend }), COMMAND).await?;
            let plugged =
                tokio::time::timeout(COMMAND, plug(&mut qmp, args::share_device(n, &share.tag))).await;
            plugged.unwrap_or(Err(QmpError::Deadline(COMMAND)))
        };
        tokio::select! {
            biased;
            plugged = plugged => plugged.map_err(|error| self.error("device_add", error)),
            exit = self.process.exit() => Err(self.process.ended(exit)),
        }
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
