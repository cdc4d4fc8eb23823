//! A running machine.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kapsel_channel::mux::Mux;
use kapsel_channel::{Channel, connect};
use kapsel_jail::Exit;
use serde_json::{Value, json};
use tokio::net::UnixStream;

use super::args::{self, MAX_PLUGGED, Memory};
use super::process::{Process, smaps_rollup};
use super::qmp::{Qmp, QmpError};
use super::{NAME, plug, snapshot};
use crate::error::Context;
use crate::{Attachment, Error, ExitReason, Machine, MachineSpec, Phase, Result, Snapshot, Stats};

/// How long QEMU may take to obey.
const COMMAND: Duration = Duration::from_secs(5);
/// How long it may take to save a machine.
const SAVE: Duration = Duration::from_secs(60);
/// How long the end of a process may take to be seen after the channel broke.
const ENDING: Duration = Duration::from_secs(1);

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
    phases: Mutex<Vec<Phase>>,
    session: Mutex<Option<Mux>>,
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
        let phases = phases.into_iter().map(|(name, took)| Phase { name: name.to_owned(), took }).collect();
        QemuMachine {
            process,
            qmp: tokio::sync::Mutex::new(qmp),
            spec,
            fingerprint,
            memory,
            shares,
            most_shares,
            memory_file,
            phases: Mutex::new(phases),
            session: Mutex::new(None),
        }
    }

    /// Executes a control command. QEMU's end ends it at once.
    async fn command(&self, command: &str, arguments: Value) -> Result<Value> {
        let mut qmp = self.qmp.lock().await;
        tokio::select! {
            biased;
            answer = qmp.execute(command, arguments, COMMAND) => answer.map_err(|error| self.error(command, error)),
            exit = self.process.exit() => Err(self.ended(exit)),
        }
    }

    fn error(&self, command: &str, error: QmpError) -> Error {
        let name = self.spec.name.clone();
        match error {
            QmpError::Refused(message) => Error::Refused { name, command: command.to_owned(), message },
            QmpError::Deadline(after) => Error::Deadline {
                name,
                what: format!("the monitor's answer to {command}"),
                after,
                console: self.process.console.lines(10),
            },
            QmpError::Broken(what) => Error::Control { name, what },
        }
    }

    fn ended(&self, exit: Exit) -> Error {
        let reason = self.reason(exit);
        let said = self.process.stderr.lines(10);
        let stderr = match reason {
            // Says it already; the last lines are registers.
            ExitReason::Panic(_) => String::new(),
            _ if said.is_empty() => self.process.console.lines(10),
            _ => said,
        };
        Error::Ended { name: self.spec.name.clone(), monitor: NAME, reason: reason.to_string(), stderr }
    }

    fn reason(&self, exit: Exit) -> ExitReason {
        match exit {
            Exit::Code(0) => self.process.console.panic().map_or(ExitReason::Shutdown, ExitReason::Panic),
            Exit::Signal(signal) => ExitReason::Killed(signal),
            Exit::Code(code) => ExitReason::Error { code, stderr: self.process.stderr.lines(10) },
        }
    }

    fn end_session(&self) {
        if let Some(session) = self.session.lock().unwrap_or_else(PoisonError::into_inner).take() {
            session.close();
        }
    }

    /// Tries to begin a session until the guest answers.
    async fn begin_session(&self, deadline: Instant) -> Result<Mux, kapsel_channel::Error> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let socket = UnixStream::connect(&self.process.socket).await?;
            match connect(socket, left).await {
                // QEMU takes one connection at a time, and closes one that comes while it still has another.
                Err(kapsel_channel::Error::Closed) if !left.is_zero() => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                result => return result,
            }
        }
    }
}

#[async_trait::async_trait]
impl Machine for QemuMachine {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn phases(&self) -> Vec<Phase> {
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn connect(&self, deadline: Duration) -> Result<Arc<dyn Channel>> {
        let begun = Instant::now();
        self.end_session();
        let session = tokio::select! {
            biased;
            session = self.begin_session(begun + deadline) => session,
            exit = self.process.exit() => return Err(self.ended(exit)),
        };
        let session = match session {
            Ok(session) => session,
            Err(kapsel_channel::Error::Deadline(_)) => {
                return Err(Error::Deadline {
                    name: self.spec.name.clone(),
                    what: "the guest's agent to answer".into(),
                    after: deadline,
                    console: self.process.console.lines(20),
                });
            }
            // The channel goes with QEMU, a moment before its end is seen: why it ended says more.
            Err(source) => match tokio::time::timeout(ENDING, self.process.exit()).await {
                Ok(exit) => return Err(self.ended(exit)),
                Err(_) => return Err(Error::Channel { name: self.spec.name.clone(), source }),
            },
        };
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(session.clone());
        let mut phases = self.phases.lock().unwrap_or_else(PoisonError::into_inner);
        if !phases.iter().any(|phase| phase.name == "agent") {
            phases.push(Phase { name: "agent".into(), took: begun.elapsed() });
        }
        Ok(Arc::new(session))
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
        self.end_session();
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
            exit = self.process.exit() => return Err(self.ended(exit)),
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
            exit = self.process.exit() => Err(self.ended(exit)),
        }
    }

    fn console(&self) -> Vec<u8> {
        self.process.console.bytes()
    }

    async fn stats(&self) -> Result<Stats> {
        let balloon = self.command("query-balloon", json!({})).await?;
        let guest_memory = u64::from(self.spec.memory_mib) << 20;
        let rollup = smaps_rollup(self.pid())?;
        let kib = |key: &str| {
            let line = rollup.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            line.and_then(|value| value.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) << 10
        };
        Ok(Stats {
            guest_memory,
            guest_actual: balloon.get("actual").and_then(Value::as_u64).unwrap_or(guest_memory),
            rss: kib("Rss"),
            pss: kib("Pss"),
        })
    }

    async fn kill(&self) -> ExitReason {
        self.process.kill();
        self.wait().await
    }

    async fn wait(&self) -> ExitReason {
        let exit = self.process.exit().await;
        self.reason(exit)
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
        snapshot::Meta::of(&self.spec, self.fingerprint.clone(), &target)?.write(dir)?;
        Ok(Snapshot { dir: dir.to_owned() })
    }
}
