//! The cgroup of a sandbox's processes on the host: kapsel's own, or the one that an engine names.
//!
//! An engine's has everything of one container in it: the process that stands for it, shim, monitor and servers. Its limits are
//! the container's and an allowance on top, since inside the guest a cgroup keeps the container's to the byte, and what holds the
//! guest must not be killed for what the guest may rightly use.

use std::fs;

use kapsel_jail::{
    Cgroup,
    cgroup::{BadName, Limits, Named},
};
use kapsel_protocol::limits::PROCESSES_MAX;
use oci_spec::runtime::{LinuxCpu, LinuxResources, Spec};
use serde::Deserialize;

use crate::paths::Bundle;

/// Memory of the monitor beside its guest's: QEMU itself, and the code that TCG translates.
const MONITOR_MEMORY: u64 = 512 << 20;
/// Memory of an engine's processes of a sandbox: the shim, and what stands for processes.
const ENGINE_MEMORY: u64 = 128 << 20;
/// Processor time beside the guest's processors: devices, file servers, the shim.
const OVERHEAD_CPU: f64 = 0.25;
/// Processes and threads of monitor and file servers.
const HOST_PIDS: u64 = 512;
/// Threads of a process that stands for one in the guest.
const STAND_IN_PIDS: u64 = 8;

/// What a sandbox of kapsel's own may take of the host, its machine having so many bytes of memory.
#[must_use]
pub fn own_limits(machine: u64) -> Limits {
    Limits {
        memory: Some(machine.saturating_add(MONITOR_MEMORY)),
        pids: Some(HOST_PIDS),
        ..Limits::default()
    }
}

/// What a sandbox may take of the host in its engine's cgroup, so that a container has what `resources` give it. `machine` is its
/// machine's memory in bytes; without, the limit of memory stays as it is.
#[must_use]
pub fn engine_limits(resources: &LinuxResources, machine: Option<u64>) -> Limits {
    let cpu = resources.cpu().as_ref();
    let some = |list: &Option<String>| list.clone().filter(|list| !list.is_empty());
    let quota = cpu.and_then(|cpu| cpu.quota()).filter(|quota| *quota != 0);
    let period = cpu.and_then(|cpu| cpu.period()).filter(|period| *period != 0).unwrap_or(100_000);
    let pids = resources.pids().map(|pids| u64::try_from(pids.limit()).unwrap_or(0));
    let processes = pids.filter(|limit| *limit > 0).unwrap_or(PROCESSES_MAX as u64);
    Limits {
        memory: machine.map(|machine| machine.saturating_add(MONITOR_MEMORY + ENGINE_MEMORY)),
        cpu: quota.map(|quota| match quota > 0 {
            true => quota as f64 / period as f64 + OVERHEAD_CPU,
            false => f64::INFINITY,
        }),
        shares: cpu.and_then(|cpu| cpu.shares()).filter(|shares| *shares != 0),
        cpus: cpu.and_then(|cpu| some(cpu.cpus())),
        mems: cpu.and_then(|cpu| some(cpu.mems())),
        // As many processes as the guest may have can be added from outside.
        pids: (machine.is_some() || pids.is_some())
            .then(|| HOST_PIDS + STAND_IN_PIDS * processes.min(PROCESSES_MAX as u64)),
    }
}

/// Takes out what names processors and memory nodes of the host: their numbers are others in the guest. True when there was some.
pub fn take_hosts(resources: &mut LinuxResources) -> bool {
    let Some(mut cpu) = resources.cpu().clone() else { return false };
    let named = [cpu.cpus(), cpu.mems()].into_iter().flatten().any(|list| !list.is_empty());
    cpu.set_cpus(None).set_mems(None);
    resources.set_cpu((cpu != LinuxCpu::default()).then_some(cpu));
    named
}

/// The cgroup that a specification names.
///
/// # Errors
/// When none can be called so.
pub fn named(spec: &Spec) -> Result<Option<Named>, BadName> {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    let text = path.map(|path| path.to_string_lossy().into_owned());
    text.filter(|text| !text.is_empty()).map(|text| text.parse()).transpose()
}

/// A sandbox's cgroup, if it is an engine's.
pub(crate) fn of_engine(bundle: &Bundle) -> Option<Cgroup> {
    #[derive(Deserialize)]
    struct Part {
        linux: Option<Linux>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Linux {
        cgroups_path: Option<String>,
    }
    let json = fs::read(bundle.spec()).ok()?;
    let part: Part = serde_json::from_slice(&json).ok()?;
    part.linux?.cgroups_path?.parse::<Named>().ok()?.open()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn limits(resources: serde_json::Value, machine: Option<u64>) -> Limits {
        engine_limits(&serde_json::from_value(resources).unwrap(), machine)
    }

    #[test]
    fn a_container_has_an_allowance_on_top() {
        let asked = json!({
            "memory": { "limit": 64 << 20 },
            "cpu": { "quota": 150_000, "period": 100_000, "shares": 512, "cpus": "0", "mems": "" },
            "pids": { "limit": 10 },
        });
        let given = limits(asked, Some(256 << 20));
        assert_eq!(
            given,
            Limits {
                memory: Some((256 + 512 + 128) << 20),
                cpu: Some(1.75),
                shares: Some(512),
                cpus: Some("0".into()),
                mems: None,
                pids: Some(512 + 80),
            }
        );
    }

    #[test]
    fn processors_of_the_host_are_not_the_guests() {
        let mut resources: LinuxResources =
            serde_json::from_value(json!({ "cpu": { "cpus": "3", "mems": "0" } })).unwrap();
        assert!(take_hosts(&mut resources));
        assert_eq!(resources, LinuxResources::default());
        assert!(!take_hosts(&mut resources));
    }

    #[test]
    fn what_is_not_asked_for_is_bounded_all_the_same() {
        let given = limits(json!({}), Some(1 << 30));
        assert_eq!((given.cpu, given.shares), (None, None));
        assert_eq!(given.pids, Some(512 + 8 * 1024));
        assert!(given.memory.is_some());
    }

    #[test]
    fn an_update_changes_what_it_names_and_nothing_else() {
        let given = limits(json!({ "cpu": { "quota": -1, "period": 100_000 } }), None);
        assert_eq!(given, Limits { cpu: Some(f64::INFINITY), ..Limits::default() });
    }
}
