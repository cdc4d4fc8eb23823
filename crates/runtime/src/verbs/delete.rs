//! `delete`: nothing of a container stays.

use std::time::{Duration, Instant};

use anyhow::bail;
use kapsel_sandbox::removal;
use rustix::process::{Pid, Signal};

use super::{Call, wait};
use crate::{
    args, hooks,
    state::{Container, Status},
};

/// How long a stand-in may take to deliver the last output once its sandbox has ended, before it is killed.
const LAST_OUTPUT: Duration = Duration::from_secs(2);
/// How long the system may take to end a killed process.
const DEATH: Duration = Duration::from_secs(5);
/// How often to look whether it has.
const LOOK: Duration = Duration::from_millis(2);

impl Call<'_> {
    /// `delete`.
    pub fn delete(&self, flags: &args::Delete) -> anyhow::Result<()> {
        let container = match self.containers.find(&flags.id) {
            Ok(Some(container)) => container,
            // What cannot be read, or was cut short in its making, must not be immortal.
            Ok(None) | Err(_) if flags.force => return self.containers.forget(&flags.id),
            Ok(None) => return self.containers.get(&flags.id).map(drop),
            Err(error) => return Err(error),
        };
        let status = container.status(&self.host.paths);
        if !flags.force && matches!(status, Status::Running | Status::Paused) {
            bail!(
                "cannot delete container {:?} that is not stopped: {status}; kill it first, or use --force",
                flags.id
            );
        }
        self.end(&container)?;
        self.remove(&container)
    }

    /// Ends a container's sandbox, and the process that stands for it.
    pub fn end(&self, container: &Container) -> anyhow::Result<()> {
        let bundle = container.sandbox_bundle(&self.host.paths);
        let registry = self.host.registry()?;
        if bundle.dir().exists() {
            wait(async { Ok(removal::remove(&registry, &bundle, Some(&container.sandbox)).await?) })?;
        }
        if !ended(container, LAST_OUTPUT) {
            kill(container.pid);
            if !ended(container, DEATH) {
                bail!(
                    "process {} of container {:?} does not end, though it was killed",
                    container.pid,
                    container.id
                );
            }
        }
        Ok(())
    }

    /// Forgets a container that has ended.
    pub fn remove(&self, container: &Container) -> anyhow::Result<()> {
        self.end(container)?;
        if let Some(cgroup) = container.cgroup() {
            cgroup.remove(DEATH)?;
        }
        self.containers.forget(&container.id)?;
        let poststop = container.hooks.as_ref().and_then(|hooks| hooks.poststop().as_ref());
        if let Err(error) = hooks::run("poststop", poststop, &container.shown(Status::Stopped)) {
            // As the specification says: told, and no reason to stop.
            self.report.warn(&format!("{error:#}"));
        }
        Ok(())
    }
}

/// Waits for the end of a stand-in; false when it has not come.
fn ended(container: &Container, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    while container.stand_in_lives() {
        if Instant::now() > until {
            return false;
        }
        std::thread::sleep(LOOK);
    }
    true
}

fn kill(pid: u32) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}
