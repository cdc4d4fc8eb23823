//! A running machine.

use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kapsel_channel::{Channel, connect, dial};
use serde_json::{Value, json};
use tokio::time::{Instant, timeout};

use super::api::{Api, ApiError, Request, Socket};
use super::process::saved;
use super::{NAME, paths};
use crate::error::Context;
use crate::process::Process;
use crate::session::Session;
use crate::snapshot::Meta;
use crate::{Attachment, Error, ExitReason, Machine, MachineSpec, Phase, Result, Snapshot, Stats};

/// How long kapsel-vmm may take to obey: to build a machine, at most.
const COMMAND: Duration = Duration::from_secs(20);
/// How long it may take to save a machine.
const SAVE: Duration = Duration::from_secs(60);
/// How long the end of a process may take to be seen after a connection to it broke.
const ENDING: Duration = Duration::from_secs(1);
/// The guest's port on which its agent listens.
const AGENT_PORT: u32 = 1024;

pub(super) struct VmmMachine {
    process: Process,
    api: Api,
    spec: MachineSpec,
    fingerprint: String,
    session: Session,
}

impl VmmMachine {
    pub(super) fn new(
        process: Process,
        api: Api,
        spec: &MachineSpec,
        fingerprint: String,
        phases: Vec<(&str, Duration)>,
    ) -> VmmMachine {
        // What was passed to the monitor is closed here: a back end sees its end when the monitor has ended, and taps go with it.
        let spec = MachineSpec { shares: Vec::new(), nics: Vec::new(), ..spec.clone() };
        VmmMachine { process, api, spec, fingerprint, session: Session::new(phases) }
    }

    async fn set_state(&self, state: &'static str) -> Result<()> {
        let request = Request::patch("/vm", json!({ "state": state }));
        ask(&self.process, &self.api, "hold or go on", request).await.map(drop)
    }
}

/// Has the monitor do `what`. Its end ends the wait at once.
pub(super) async fn ask(process: &Process, api: &Api, what: &str, request: Request) -> Result<Value> {
    ask_within(process, api, what, request, COMMAND).await
}

async fn ask_within(
    process: &Process,
    api: &Api,
    what: &str,
    request: Request,
    deadline: Duration,
) -> Result<Value> {
    let answer = tokio::select! {
        biased;
        answer = timeout(deadline, api.ask(&request)) => answer,
        exit = process.exit() => return Err(process.ended(exit)),
    };
    let name = process.name().to_owned();
    match answer {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(ApiError::Refused(message))) => {
            Err(Error::Refused { name, monitor: NAME, command: what.to_owned(), message })
        }
        // A broken connection mostly means that it is about to end, and then it says why on stderr.
        Ok(Err(ApiError::Broken(error))) => match timeout(ENDING, process.exit()).await {
            Ok(exit) => Err(process.ended(exit)),
            Err(_) => Err(Error::Control { name, what: format!("{what}: {error}") }),
        },
        Err(_) => Err(process.late(&format!("kapsel-vmm to {what}"), deadline)),
    }
}

#[async_trait::async_trait]
impl Machine for VmmMachine {
    fn pid(&self) -> u32 {
        self.process.pid()
    }

    fn phases(&self) -> Vec<Phase> {
        self.session.phases()
    }

    async fn connect(&self, deadline: Duration) -> Result<Arc<dyn Channel>> {
        let socket = &Socket(self.process.socket.clone());
        // The guest resets a connection while its agent does not listen yet.
        let knock = |left: Duration| async move {
            let until = Instant::now() + left;
            let mut stream = socket.connect().await?;
            dial(&mut stream, AGENT_PORT, left).await?;
            connect(stream, until.saturating_duration_since(Instant::now())).await
        };
        self.session.begin(&self.process, deadline, knock).await
    }

    async fn pause(&self) -> Result<()> {
        self.set_state("Paused").await
    }

    async fn resume(&self) -> Result<()> {
        self.set_state("Resumed").await
    }

    async fn snapshot(&self, dir: &Path) -> Result<Snapshot> {
        if !self.spec.template {
            return Err(Error::Unsupported {
                monitor: NAME,
                what: format!("save the machine {}, which was not started as a template", self.spec.name),
            });
        }
        self.session.end();
        // Let the guest see that the host is gone, so that the clones begin in that state.
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.pause().await?;
        let to = json!({ "snapshot_path": paths::STATE, "mem_file_path": paths::MEMORY });
        let request = Request::put("/snapshot/create", to);
        ask_within(&self.process, &self.api, "save the machine", request, SAVE).await?;
        self.kill().await;
        for name in ["state", "memory"] {
            let (path, target) = (saved(&self.spec, name), dir.join(name));
            if path != target {
                fs::rename(&path, &target)
                    .context(|| format!("cannot move {} to {}", path.display(), target.display()))?;
            }
            // It was the monitor's to write. From now on it is ours, and every clone's monitor reads it, each as another user; the
            // directory keeps everybody else away.
            let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            chown(&target, Some(uid), Some(gid))
                .and_then(|()| fs::set_permissions(&target, Permissions::from_mode(0o644)))
                .context(|| format!("cannot take {} over", target.display()))?;
        }
        Meta::of(&self.spec, self.fingerprint.clone(), &dir.join("memory"))?.write(dir)?;
        Ok(Snapshot { dir: dir.to_owned() })
    }

    async fn attach(&self, attachment: Attachment) -> Result<()> {
        let what = match attachment {
            Attachment::Share(_) => "share a directory with a machine that runs",
            Attachment::Nic(_) => "give a running machine another network interface",
        };
        Err(Error::Unsupported { monitor: NAME, what: what.into() })
    }

    async fn detach(&self, _: [u8; 6]) -> Result<()> {
        // What it has, it has from the beginning: the tap is the machine's until its end, and without a link.
        Ok(())
    }

    fn console(&self) -> Vec<u8> {
        self.process.console.bytes()
    }

    async fn stats(&self) -> Result<Stats> {
        // Nobody inflates its balloon.
        let memory = u64::from(self.spec.memory_mib) << 20;
        self.process.stats(memory, memory)
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
