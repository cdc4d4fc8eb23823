//! Limits, in the words of both versions.

use super::hierarchy::{Controller, Version};

/// Upper bounds for all processes of a sandbox together. `None` leaves what is in force.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Limits {
    /// Bytes of memory, page cache included.
    pub memory: Option<u64>,
    /// Processor time, in processors: 1.5 is one and a half; infinite is no limit.
    pub cpu: Option<f64>,
    /// Weight among others when processors are short, from 2 to 262144 as version 1 counts; 1024 is everybody's.
    pub shares: Option<u64>,
    /// The processors that may be used, as `0-2,5`.
    pub cpus: Option<String>,
    /// The memory nodes that may be used, in the same form.
    pub mems: Option<String>,
    /// Processes and threads.
    pub pids: Option<u64>,
}

impl Limits {
    /// The controllers that it takes to keep them.
    pub(super) fn controllers(&self) -> Vec<Controller> {
        let wanted = [
            (Controller::Memory, self.memory.is_some()),
            (Controller::Cpu, self.cpu.is_some() || self.shares.is_some()),
            (Controller::Pids, self.pids.is_some()),
            (Controller::Cpuset, self.cpus.is_some() || self.mems.is_some()),
        ];
        wanted.into_iter().filter_map(|(controller, wanted)| wanted.then_some(controller)).collect()
    }

    /// The weight on version 2's scale, from 1 to 10000, as runc converts it.
    pub(super) fn weight(&self) -> Option<u64> {
        self.shares.map(|shares| 1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142)
    }
}

/// Microseconds. The kernel's default.
const PERIOD: u64 = 100_000;
/// The kernel accepts no less.
const MIN_QUOTA: u64 = 1_000;

/// The files to write, with their values.
pub(super) fn settings(version: Version, limits: &Limits) -> Vec<(&'static str, String)> {
    let mut settings = Vec::new();
    let v2 = version == Version::V2;
    if let Some(bytes) = limits.memory {
        settings.push((if v2 { "memory.max" } else { "memory.limit_in_bytes" }, bytes.to_string()));
    }
    if let Some(cpus) = limits.cpu {
        let quota = cpus.is_finite().then(|| ((cpus * PERIOD as f64) as u64).max(MIN_QUOTA).to_string());
        if v2 {
            settings.push(("cpu.max", format!("{} {PERIOD}", quota.as_deref().unwrap_or("max"))));
        } else {
            settings.push(("cpu.cfs_period_us", PERIOD.to_string()));
            settings.push(("cpu.cfs_quota_us", quota.unwrap_or_else(|| "-1".to_owned())));
        }
    }
    if let (Some(shares), Some(weight)) = (limits.shares, limits.weight()) {
        settings.push(if v2 {
            ("cpu.weight", weight.to_string())
        } else {
            ("cpu.shares", shares.to_string())
        });
    }
    for (file, list) in [("cpuset.cpus", &limits.cpus), ("cpuset.mems", &limits.mems)] {
        if let Some(list) = list {
            settings.push((file, list.clone()));
        }
    }
    if let Some(pids) = limits.pids {
        settings.push(("pids.max", pids.to_string()));
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_written_in_each_versions_terms() {
        let limits = Limits {
            memory: Some(1 << 20),
            cpu: Some(1.5),
            shares: Some(512),
            cpus: Some("0-1".into()),
            mems: None,
            pids: Some(7),
        };
        let text = |version, limits| {
            settings(version, limits).iter().map(|(f, v)| format!("{f}={v}")).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(
            text(Version::V2, &limits),
            "memory.max=1048576 cpu.max=150000 100000 cpu.weight=20 cpuset.cpus=0-1 pids.max=7"
        );
        assert_eq!(
            text(Version::V1, &limits),
            "memory.limit_in_bytes=1048576 cpu.cfs_period_us=100000 cpu.cfs_quota_us=150000 cpu.shares=512 \
             cpuset.cpus=0-1 pids.max=7"
        );
        let free = Limits { cpu: Some(f64::INFINITY), ..Limits::default() };
        assert_eq!(text(Version::V2, &free), "cpu.max=max 100000");
        assert_eq!(text(Version::V1, &free), "cpu.cfs_period_us=100000 cpu.cfs_quota_us=-1");
        assert!(settings(Version::V2, &Limits::default()).is_empty());
    }
}
