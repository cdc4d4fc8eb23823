//! The end of a sandbox. Whatever ends it, the same steps follow, once: waiters are answered, processes of the host die,
//! what the sandbox had on the host is freed.

use std::{sync::Arc, time::Duration};

use kapsel_machine::ExitReason;

use super::{Ended, Error, LOST, Sandbox, State, lock};
use crate::{
    cleanup,
    record::{Exit, Status, now},
    registry,
};

/// How long a broken channel waits for the machine's own end, which says more.
const MACHINE_TELLS: Duration = Duration::from_millis(500);

/// What ended a sandbox.
#[derive(Clone, Debug)]
pub enum Cause {
    /// The container's first process ended by itself, or by a signal.
    Exited(Exit),
    /// It did not come so far.
    NotStarted(String),
    /// A client wants no more of it.
    Deleted,
    /// Killed from outside the guest.
    Killed(String),
    /// The monitor's process ended.
    MachineDied(ExitReason),
    /// The guest or a process that serves it failed.
    Broken(String),
}

/// The exit of what could not be started.
pub(super) fn failed(reason: String) -> Exit {
    Exit { code: 125, at: now(), oom: false, reason: Some(reason) }
}

impl Cause {
    /// The exit of processes that had not ended by themselves.
    pub(super) fn exit(&self, host_oom: bool) -> Exit {
        const KILLED: u32 = 128 + libc::SIGKILL as u32;
        let ended = |code, reason: &str| Exit { code, at: now(), oom: false, reason: Some(reason.into()) };
        match self {
            Self::Exited(_) => ended(KILLED, "the container ended"),
            Self::NotStarted(reason) => failed(reason.clone()),
            Self::Deleted => ended(KILLED, "the sandbox was removed"),
            Self::Killed(reason) => ended(KILLED, reason),
            Self::MachineDied(_) if host_oom => Exit {
                oom: true,
                ..ended(KILLED, "the monitor reached the memory limit of its cgroup on the host")
            },
            Self::MachineDied(ExitReason::Killed(signal)) => {
                ended(LOST, &format!("the monitor was killed by signal {signal}"))
            }
            Self::MachineDied(ExitReason::Panic(why)) => {
                ended(LOST, &format!("the guest's kernel panicked: {why}"))
            }
            Self::MachineDied(ExitReason::Shutdown) => ended(LOST, "the guest powered itself off"),
            Self::MachineDied(ExitReason::Error { code, stderr }) => {
                ended(LOST, &format!("the monitor failed with exit code {code}: {}", stderr.trim()))
            }
            Self::Broken(reason) => ended(LOST, reason),
        }
    }

    /// Whether the guest can still be asked to write everything out.
    fn guest_is_well(&self) -> bool {
        matches!(self, Self::Exited(_) | Self::Deleted)
    }
}

impl Sandbox {
    /// Ends the sandbox; returns when nothing of it is left on the host. The first cause counts.
    pub async fn end(self: &Arc<Self>, cause: Cause) {
        let first = self.ended.send_if_modified(|ended| {
            let first = *ended == Ended::No;
            if first {
                *ended = Ended::Ending;
            }
            first
        });
        if !first && !cause.guest_is_well() {
            // Whoever insists does not wait for a client that reads slowly.
            self.insisted.notify_one();
        }
        if first {
            // On its own, so that a caller who gives up does not stop it halfway.
            let sandbox = self.clone();
            tokio::spawn(async move { sandbox.take_down(cause).await });
        }
        self.gone().await;
    }

    /// Waits until nothing of the sandbox is left on the host.
    pub async fn gone(&self) {
        // The sender lives as long as `self`.
        let _ = self.ended.subscribe().wait_for(|ended| *ended == Ended::Done).await;
    }

    /// A channel that breaks is mostly the first sign of a machine that ends; its reason is then told instead.
    pub(super) async fn end_unless_machine_tells(self: &Arc<Self>, reason: String) {
        tokio::select! {
            () = self.gone() => {}
            () = tokio::time::sleep(MACHINE_TELLS) => {
                self.end(Cause::Broken(format!("the guest's agent is gone: {reason}"))).await;
            }
        }
    }

    async fn take_down(self: &Arc<Self>, cause: Cause) {
        match &cause {
            Cause::Exited(exit) => tracing::info!(code = exit.code, oom = exit.oom, "the container ended"),
            Cause::Deleted => tracing::info!("the sandbox is removed"),
            other => tracing::warn!(cause = ?other, "the sandbox ends"),
        }
        // 1. The end is known: those who wait are answered at once.
        let oom = lock(&self.host).cgroup.as_ref().is_some_and(|cgroup| cgroup.oom_kills() > 0);
        let exit = match &cause {
            Cause::Exited(exit) => exit.clone(),
            other => other.exit(oom),
        };
        let removed = lock(&self.record).remove;
        if !removed {
            self.note(|record| {
                record.status = Status::Exited;
                record.exit = Some(exit.clone());
                record.address = None;
                record.address6 = None;
                record.ports.clear();
            });
        }
        if removed {
            // Before anybody is answered: for them it is gone.
            self.release_name();
        }
        self.main.end_added(&cause.exit(oom));
        self.main.init.set(State::Exited(exit));
        let members: Vec<_> = lock(&self.members).values().flatten().cloned().collect();
        for member in &members {
            member.end_added(&cause.exit(oom));
            member.init.set(State::Exited(cause.exit(oom)));
        }
        // 2. What was printed is delivered, as long as there is somebody who prints.
        if cause.guest_is_well() {
            tokio::select! {
                () = self.main.init.drain() => {}
                () = self.insisted.notified() => tracing::warn!("output was not delivered to its end"),
            }
            self.write_out().await;
        }
        // 3. The machine, then what served it.
        let (machine, servers, network, cgroup) = {
            let mut host = lock(&self.host);
            let network = (host.forwarder.take(), std::mem::take(&mut host.network));
            // Its mounts go with all that is below the bundle.
            host.tree = None;
            (host.machine.take(), std::mem::take(&mut host.servers), network, host.cgroup.take())
        };
        if let Some(machine) = machine {
            machine.kill().await;
        }
        drop(servers);
        drop(network);
        drop(cgroup);
        for container in members.iter().chain([&self.main]) {
            container.cut().await;
        }
        // 4. The rest of it on the host.
        if let Err(error) = cleanup::resources(&self.paths, &self.bundle) {
            tracing::error!(%error, "something of the sandbox is left; the next command tries again");
        } else if removed && let Err(error) = std::fs::remove_dir_all(self.bundle.dir()) {
            tracing::error!(%error, "cannot remove the bundle");
        }
        self.ended.send_replace(Ended::Done);
    }

    /// Makes the name free for a successor before the machine is gone, and hides the sandbox from lists.
    fn release_name(&self) {
        let name = lock(&self.record).name.clone();
        registry::release_name(&self.paths.names(), &self.bundle, &name);
    }

    /// Lets the guest write what it holds for the host's directories. A guest that takes long loses it.
    async fn write_out(&self) {
        let Some(guest) = self.guest.get().filter(|guest| guest.writes_host) else { return };
        if let Err(error @ (Error::Timeout { .. } | Error::Guest { .. })) = guest.agent.shutdown().await {
            tracing::warn!(%error, "the guest did not write everything to the shared directories");
        }
        // The reply came once all was written; what is left is the machine's.
        tracing::debug!(monitor = guest.machine.pid(), "written out");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_has_an_exit_that_tells_it() {
        let died = |reason| Cause::MachineDied(reason);
        for (cause, oom, code, words) in [
            (Cause::NotStarted("no kernel".into()), false, 125, "no kernel"),
            (Cause::Deleted, false, 137, "removed"),
            (Cause::Killed("leash".into()), false, 137, "leash"),
            (died(ExitReason::Killed(9)), false, 255, "signal 9"),
            (died(ExitReason::Killed(9)), true, 137, "memory limit"),
            (died(ExitReason::Panic("Oops".into())), false, 255, "panicked: Oops"),
            (died(ExitReason::Shutdown), false, 255, "powered"),
            (died(ExitReason::Error { code: 1, stderr: "bad disk".into() }), false, 255, "bad disk"),
            (Cause::Broken("fsd died".into()), false, 255, "fsd died"),
        ] {
            let exit = cause.exit(oom);
            assert_eq!((exit.code, exit.oom), (code, oom && code == 137), "{cause:?}");
            assert!(exit.reason.as_deref().unwrap_or_default().contains(words), "{exit:?}");
        }
    }
}
