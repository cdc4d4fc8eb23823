//! A machine that is made before the sandbox is known that will have it: a clone of a template with the container in it, which has
//! rehearsed a start.
//!
//! It is used as what it is said to be only if that is exactly what the sandbox would have been cloned from. No program of the image
//! has run in it, and its randomness is its own from before the rehearsal on; the sandbox's Configure brings more.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use kapsel_channel::Channel;
use kapsel_jail::Cgroup;
use kapsel_machine::{ExitReason, Machine, Snapshot};
use kapsel_protocol::{api, limits, program, stdio::Kind as StreamKind};
use oci_spec::runtime::Process;
use tokio::io::AsyncReadExt;

use super::{Error, Sandbox, agent::Agent, blueprint::Blueprint, guest_spec::Rootfs, lock};
use crate::{
    cleanup,
    network::Network,
    seccomp,
    standby::{self, Kind},
    stdio,
    template::{self, Held, Prepared},
    timings::Stopwatch,
};

/// The name of the container that a rehearsal makes.
const REHEARSAL: &str = "rehearsal";

/// A machine that stands by.
pub struct Spare {
    /// Of the template that it is a clone of.
    pub key: String,
    /// The container's first process in the guest.
    pub(super) pid: u32,
    pub(super) machine: Arc<dyn Machine>,
    pub(super) channel: Arc<dyn Channel>,
    pub(super) cgroup: Option<Cgroup>,
}

impl std::fmt::Debug for Spare {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spare").field("key", &self.key).field("pid", &self.pid).finish_non_exhaustive()
    }
}

impl Spare {
    /// Waits until the machine ends.
    pub async fn ended(&self) -> ExitReason {
        self.machine.wait().await
    }

    /// Ends the machine.
    pub async fn end(self) {
        self.machine.kill().await;
    }
}

impl Sandbox {
    /// Makes a machine for a later sandbox that has this one's id and bundle, and a specification of its kind. This one has no other use.
    ///
    /// # Errors
    /// When there is no template of such a container, or it cannot be restored. Nothing runs then.
    pub async fn stand_by(self: &Arc<Self>, rootfs: PathBuf) -> Result<Spare, Error> {
        let guest_spec = self.furnish_main(&Rootfs::Disk, false)?;
        let profile = guest_spec.seccomp.as_ref();
        let filter =
            profile.map(|profile| seccomp::compile(profile, &self.paths.seccomp_cache())).transpose()?;
        let unfit = || Error::State("no template can hold such a container".into());
        let prepared = Prepared::of(&guest_spec, Some(&rootfs), false, filter.as_ref()).ok_or_else(unfit)?;
        let mut blueprint = self.draw(Some(rootfs), &None, 0)?;
        if !self.can_be_connected(&blueprint) {
            return Err(Error::State("such a machine cannot be given a network while it runs".into()));
        }
        let key = prepared.key(&template::key(&blueprint)?);
        let found = template::find(&self.paths, &key).map_err(|error| Error::State(error.to_string()))?;
        let found = found.ok_or_else(|| Error::State(format!("there is no template {key}")))?;
        let Some(Held { pid, .. }) = found.meta.shape.container else { return Err(unfit()) };
        self.make_cgroup(&mut blueprint)?;
        let cgroup = blueprint.spec.jail.cgroup.clone();
        let machine = blueprint.monitor.restore(&Snapshot { dir: found.dir }, &blueprint.spec).await?;
        let readied = async {
            let channel = machine.connect(self.config.start_timeout()).await?;
            let agent = Agent::open(&channel, Stopwatch::default()).await?;
            agent.hello(false).await?;
            agent.configure(self.id.short(), Vec::new()).await?;
            let process = guest_spec.spec.process().as_ref();
            rehearse(&*channel, &agent, &prepared, filter, process).await?;
            Ok(channel)
        };
        let deadline = self.config.start_timeout();
        let late = |_| Err(Error::Timeout { call: "the rehearsal", seconds: deadline.as_secs() });
        match tokio::time::timeout(deadline, readied).await.unwrap_or_else(late) {
            Ok(channel) => Ok(Spare { key, pid, machine, channel, cgroup }),
            Err(error) => {
                machine.kill().await;
                Err(error)
            }
        }
    }

    /// The machine that stood by, if it is what this sandbox would be cloned from. Another is ended.
    pub(super) async fn spare(&self, blueprint: &Blueprint, prepared: Option<&Prepared>) -> Option<Spare> {
        let spare = lock(&self.spare).take()?;
        let _phase = self.watch.phase("standby");
        let key = prepared.and_then(|prepared| Some(prepared.key(&template::key(blueprint).ok()?)));
        if key.as_deref() == Some(&spare.key) && self.can_be_connected(blueprint) {
            return Some(spare);
        }
        tracing::info!("the machine that stood by is not what is wanted now");
        spare.end().await;
        if let Err(error) = cleanup::machine(&self.bundle) {
            tracing::warn!(%error, "something of the machine that stood by is left");
        }
        None
    }

    /// Whether a machine that runs can be given the sandbox's network.
    fn can_be_connected(&self, blueprint: &Blueprint) -> bool {
        blueprint.monitor.capabilities().attach || self.network() == Network::None
    }

    /// What machine could stand by for it.
    pub fn kind(&self, rootfs: &Path) -> Option<Kind> {
        Kind::of(&self.spec, rootfs, &self.config)
    }

    /// Has a machine stand by for the next sandbox like this one.
    pub(super) fn want_standby(&self) {
        let rootfs = lock(&self.record).rootfs.clone();
        if let Some(rootfs) = rootfs {
            standby::want(&self.paths, &self.config, &self.spec, &rootfs);
        }
    }
}

/// Makes a container like the one that waits, runs a program in it and removes it: what that runs in kernel and agent the start will
/// run again.
async fn rehearse(
    channel: &dyn Channel,
    agent: &Agent,
    prepared: &Prepared,
    filter: Option<seccomp::Filter>,
    process: Option<&Process>,
) -> Result<(), Error> {
    let bad = |error: serde_json::Error| Error::Invalid(error.to_string());
    let mut process = process.cloned().ok_or_else(|| Error::Invalid("no process".into()))?;
    process.set_args(Some([program::PATH, program::REHEARSE].map(str::to_owned).to_vec()));
    let token = stdio::token();
    let stdio = api::Stdio { token: token.to_string(), stdout: true, stderr: true, ..Default::default() };
    let held = prepared.has_filter();
    let filter = filter.filter(|_| !held).unwrap_or_default();
    // It is where the other one is, whose storages are mounted.
    let create =
        api::CreateRequest { id: REHEARSAL.into(), storages: Vec::new(), ..prepared.request().clone() };
    let exec = api::ExecRequest {
        id: REHEARSAL.into(),
        process: serde_json::to_vec(&process).map_err(bad)?,
        stdio: Some(stdio).into(),
        seccomp: filter.program,
        seccomp_flags: filter.flags,
        ..Default::default()
    };
    agent.create(&create).await?;
    let read = async {
        let mut stdout = stdio::open(channel, token, StreamKind::Stdout).await?;
        let mut stderr = stdio::open(channel, token, StreamKind::Stderr).await?;
        let mut text = Vec::new();
        (&mut stdout).take(limits::ERROR_MESSAGE_MAX as u64).read_to_end(&mut text).await?;
        (&mut stderr).take(limits::ERROR_MESSAGE_MAX as u64).read_to_end(&mut text).await?;
        Ok::<_, stdio::Error>(text)
    };
    let read = async { Ok(read.await?) };
    tokio::try_join!(agent.exec(&exec), agent.start(REHEARSAL, ""), read)?;
    let exit = agent.wait(REHEARSAL, "").await?;
    if exit.code != 0 {
        return Err(Error::State(format!("the rehearsal ended with code {}", exit.code)));
    }
    agent.delete(REHEARSAL, "").await
}
