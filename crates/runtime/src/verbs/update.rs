//! `update`.

use anyhow::bail;
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxPids, LinuxResources};

use super::{Call, read_json, wait};
use crate::{args, state::Status};

impl Call<'_> {
    /// `update`: the limits of the guest's cgroup, and of the host's around it.
    pub fn update(&self, flags: &args::Update) -> anyhow::Result<()> {
        let container =
            self.container_in(&flags.id, &[Status::Created, Status::Running, Status::Paused], "update")?;
        let mut resources: LinuxResources = match &flags.resources {
            Some(path) => read_json(path)?,
            None => LinuxResources::default(),
        };
        change(&mut resources, flags);
        // What may be opened is not changed by this verb; engines send the rules along.
        resources.set_devices(None);
        if resources == LinuxResources::default() {
            bail!("nothing to change; give --resources FILE or a limit");
        }
        wait(async { Ok(self.connect(&container).await?.update(&resources).await?) })
    }
}

/// Flags win over the file.
fn change(resources: &mut LinuxResources, flags: &args::Update) {
    let mut memory: LinuxMemory = resources.memory().unwrap_or_default();
    if flags.memory.is_some() {
        memory.set_limit(flags.memory);
    }
    if flags.memory_reservation.is_some() {
        memory.set_reservation(flags.memory_reservation);
    }
    if flags.memory_swap.is_some() {
        memory.set_swap(flags.memory_swap);
    }
    if memory != LinuxMemory::default() {
        resources.set_memory(Some(memory));
    }
    let mut cpu: LinuxCpu = resources.cpu().clone().unwrap_or_default();
    if flags.cpu_quota.is_some() {
        cpu.set_quota(flags.cpu_quota);
    }
    if flags.cpu_period.is_some() {
        cpu.set_period(flags.cpu_period);
    }
    if flags.cpu_share.is_some() {
        cpu.set_shares(flags.cpu_share);
    }
    if flags.cpuset_cpus.is_some() {
        cpu.set_cpus(flags.cpuset_cpus.clone());
    }
    if flags.cpuset_mems.is_some() {
        cpu.set_mems(flags.cpuset_mems.clone());
    }
    if cpu != LinuxCpu::default() {
        resources.set_cpu(Some(cpu));
    }
    if let Some(limit) = flags.pids_limit {
        let mut pids = LinuxPids::default();
        pids.set_limit(limit);
        resources.set_pids(Some(pids));
    }
}
