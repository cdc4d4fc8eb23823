//! Changing limits while a machine runs: the container's in the guest, and those of what surrounds it on the host.
//!
//! The machine is as large as it was made. QEMU's `microvm` has no controller that could give a running one memory or processors;
//! kapsel-vmm can plug memory, but no sandbox's machine is started with a region for it. So what would need a larger machine is refused,
//! where a limit that the machine cannot reach would be a promise that nobody keeps.

use oci_spec::runtime::{LinuxResources, Spec};

use super::{Container, Error, Sandbox, lock};
use crate::{cgroup, config::format_size, spec::GUEST_RESERVE};

/// How many microseconds a period of processor time has that is not named (the kernel's default).
const PERIOD: u64 = 100_000;

/// What a container may have at most, as far as a machine's size has to do with it. `None`: all of the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Share {
    /// Bytes.
    memory: Option<u64>,
    /// Processors' worth of time.
    cpus: Option<f64>,
}

impl Share {
    /// What a specification gives to its container.
    pub(super) fn of(spec: &Spec) -> Self {
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        resources.map_or_else(Self::default, |resources| Self::default().changed(resources))
    }

    /// What it is once `resources` are in force; what these do not name stays.
    fn changed(self, resources: &LinuxResources) -> Self {
        let positive = |n: i64| u64::try_from(n).ok().filter(|n| *n > 0);
        let limit = resources.memory().as_ref().and_then(|memory| memory.limit()).filter(|limit| *limit != 0);
        let cpu = resources.cpu().as_ref();
        let quota = cpu.and_then(|cpu| cpu.quota()).filter(|quota| *quota != 0);
        let period = cpu.and_then(|cpu| cpu.period()).filter(|period| *period != 0).unwrap_or(PERIOD);
        Self {
            memory: limit.map_or(self.memory, positive),
            cpus: quota.map_or(self.cpus, |quota| Some(positive(quota)? as f64 / period as f64)),
        }
    }

    /// Whether a machine has room for what this is more than `before`.
    ///
    /// # Errors
    /// What it has not, and what to do.
    fn grows_within(self, before: Self, machine: Size) -> Result<(), Error> {
        let more = |new: Option<f64>, old: Option<f64>| match (new, old) {
            (Some(new), Some(old)) => new > old,
            (new, _) => new.is_some(),
        };
        const ANEW: &str = "a machine that runs does not grow; make the container anew with the larger limit";
        let room = machine.memory.saturating_sub(GUEST_RESERVE);
        let bytes = |memory: Option<u64>| memory.map(|bytes| bytes as f64);
        if let Some(memory) = self.memory.filter(|memory| *memory > room)
            && more(bytes(self.memory), bytes(before.memory))
        {
            return Err(Error::State(format!(
                "the container cannot have {} of memory: its machine has {}, of which {} are for the guest's kernel; {ANEW}",
                format_size(memory),
                format_size(machine.memory),
                format_size(GUEST_RESERVE)
            )));
        }
        if let Some(cpus) = self.cpus.filter(|cpus| *cpus > f64::from(machine.cpus))
            && more(self.cpus, before.cpus)
        {
            return Err(Error::State(format!(
                "the container cannot have {cpus:.2} processors: its machine has {}; {ANEW}",
                machine.cpus
            )));
        }
        Ok(())
    }
}

/// How large a machine is.
#[derive(Clone, Copy, Debug)]
struct Size {
    /// Bytes.
    memory: u64,
    /// Virtual CPUs.
    cpus: u32,
}

impl Container {
    /// Changes limits, in the guest and then around it; `resources` is OCI JSON. What it does not name stays as it is.
    ///
    /// # Errors
    /// When the machine is too small for it, or guest or host cannot follow.
    pub async fn update(&self, resources: &[u8]) -> Result<(), Error> {
        let invalid =
            |error: serde_json::Error| Error::Invalid(format!("these are no OCI resources: {error}"));
        let mut resources: LinuxResources = serde_json::from_slice(resources).map_err(invalid)?;
        let sandbox = self.sandbox()?;
        let before = *lock(&self.share);
        let share = before.changed(&resources);
        share.grows_within(before, sandbox.size())?;
        let limits = cgroup::engine_limits(&resources, None);
        let hosts = cgroup::take_hosts(&mut resources);
        let named = match self.main && !sandbox.wishes.pod {
            true => cgroup::named(&sandbox.spec).map_err(|error| Error::Invalid(error.to_string()))?,
            // A pod's cgroup is all of its containers'.
            false => None,
        };
        match named {
            None if hosts && !sandbox.wishes.pod => {
                return Err(Error::State(
                    "processors of the host cannot be chosen: the container has no linux.cgroupsPath".into(),
                ));
            }
            None if hosts => {
                tracing::info!(container = self.name, "a pod's containers run on all of the pod's processors")
            }
            _ => {}
        }
        if resources != LinuxResources::default() {
            let json = serde_json::to_vec(&resources).map_err(invalid)?;
            sandbox.guest()?.agent.update(&self.name, json).await?;
            *lock(&self.share) = share;
        }
        if let Some(named) = named {
            named.limited(&limits).map_err(|error| Error::Resources(error.to_string()))?;
        }
        Ok(())
    }
}

impl Sandbox {
    fn size(&self) -> Size {
        Size {
            memory: self.wishes.memory.unwrap_or_else(|| self.config.memory()),
            cpus: self.wishes.cpus.unwrap_or_else(|| self.config.cpus()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn share(resources: serde_json::Value) -> Share {
        Share::default().changed(&serde_json::from_value(resources).unwrap())
    }

    #[test]
    fn what_is_not_named_stays_and_less_than_nothing_is_all() {
        let begun =
            share(json!({ "memory": { "limit": 100 }, "cpu": { "quota": 150_000, "period": 100_000 } }));
        assert_eq!(begun, Share { memory: Some(100), cpus: Some(1.5) });
        let resources = |json| serde_json::from_value::<LinuxResources>(json).unwrap();
        assert_eq!(begun.changed(&resources(json!({ "pids": { "limit": 5 } }))), begun);
        let free = begun.changed(&resources(json!({ "memory": { "limit": -1 }, "cpu": { "quota": -1 } })));
        assert_eq!(free, Share::default());
    }

    #[test]
    fn growth_ends_at_the_machine() {
        let machine = Size { memory: 512 << 20, cpus: 2 };
        let memory = |mib: u64| share(json!({ "memory": { "limit": mib << 20 } }));
        let cpus = |quota: u64| share(json!({ "cpu": { "quota": quota } }));
        for (new, before, words) in [
            (memory(416), memory(64), None),
            (memory(417), memory(64), Some("417M")),
            (memory(417), Share::default(), Some("512M")),
            // Too much from the beginning, and no more now.
            (memory(1000), memory(1000), None),
            (memory(999), memory(1000), None),
            (Share::default(), memory(64), None),
            (cpus(200_000), cpus(50_000), None),
            (cpus(250_000), cpus(50_000), Some("2.50 processors")),
            (cpus(250_000), cpus(300_000), None),
            (cpus(250_000), Share::default(), Some("make the container anew")),
        ] {
            let told = new.grows_within(before, machine).map_err(|error| error.to_string());
            match words {
                None => assert_eq!(told, Ok(()), "{new:?} after {before:?}"),
                Some(words) => assert!(told.as_ref().is_err_and(|told| told.contains(words)), "{told:?}"),
            }
        }
    }
}
