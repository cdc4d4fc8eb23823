//! Resource limits of the OCI specification as files of cgroup v2.

use crate::oci::{BlockIo, CpuResources, MemoryResources, Resources, ThrottleDevice};

/// One file to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// Name in the cgroup's directory.
    pub file: String,
    /// What to write.
    pub value: String,
    /// Another file that serves when the kernel lacks `file`, as for the weights of different I/O schedulers.
    pub fallback: Option<(&'static str, String)>,
    /// The kernel may lack the file when what it limits does not exist (swap).
    pub optional: bool,
}

/// A limit that cannot be honoured.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LimitError {
    /// cgroup v1 only, or real time.
    #[error("linux.resources.{0} is not supported: the guest has cgroup v2 only")]
    Unsupported(&'static str),
    /// Out of range.
    #[error("linux.resources.{0} is not valid: {1}")]
    Invalid(&'static str, String),
}

type Result<T> = std::result::Result<T, LimitError>;

fn set(file: impl Into<String>, value: impl ToString) -> Setting {
    Setting { file: file.into(), value: value.to_string(), fallback: None, optional: false }
}

fn invalid<T>(what: &'static str, value: impl ToString) -> Result<T> {
    Err(LimitError::Invalid(what, value.to_string()))
}

/// What to write, in this order, to put `resources` in force.
///
/// # Errors
/// For limits that cgroup v2 does not have, and for values that are out of range.
pub fn settings(resources: &Resources) -> Result<Vec<Setting>> {
    let mut out = Vec::new();
    if let Some(network) = &resources.network
        && (network.class_id.unwrap_or(0) != 0 || !network.priorities.is_empty())
    {
        return Err(LimitError::Unsupported("network"));
    }
    memory(&resources.memory, &mut out)?;
    cpu(&resources.cpu, &mut out)?;
    if let Some(limit) = resources.pids.limit {
        out.push(set("pids.max", max_or(limit, limit <= 0)));
    }
    io(&resources.block_io, &mut out)?;
    for huge in &resources.hugepage_limits {
        let size = &huge.page_size;
        if size.is_empty() || !size.bytes().all(|b| b.is_ascii_alphanumeric()) {
            return invalid("hugepageLimits.pageSize", size);
        }
        out.push(set(format!("hugetlb.{size}.max"), huge.limit));
    }
    for (device, rdma) in &resources.rdma {
        if device.is_empty() || device.contains(char::is_whitespace) {
            return invalid("rdma", device);
        }
        let part = |name, n: Option<u32>| n.map(|n| format!(" {name}={n}")).unwrap_or_default();
        let value = format!(
            "{device}{}{}",
            part("hca_handle", rdma.hca_handles),
            part("hca_object", rdma.hca_objects)
        );
        out.push(set("rdma.max", value));
    }
    for (file, value) in &resources.unified {
        let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_');
        if !file.contains('.')
            || file.starts_with('.')
            || !file.bytes().all(valid)
            || file.starts_with("cgroup.")
        {
            return invalid("unified", file);
        }
        // Several devices stand on several lines; the kernel takes one a write.
        out.extend(value.lines().map(|line| set(file, line)));
    }
    Ok(out)
}

fn max_or(value: i64, max: bool) -> String {
    if max { "max".to_owned() } else { value.to_string() }
}

fn memory(memory: &MemoryResources, out: &mut Vec<Setting>) -> Result<()> {
    if memory.disable_oom_killer {
        return Err(LimitError::Unsupported("memory.disableOOMKiller"));
    }
    if memory.swappiness.is_some() {
        return Err(LimitError::Unsupported("memory.swappiness"));
    }
    let limit = memory.limit.filter(|&limit| limit != 0);
    // Swap before memory, so that lowering both never lets memory move to swap in between.
    if let Some(both) = memory.swap.filter(|&both| both != 0) {
        // The specification counts memory and swap together, cgroup v2 swap by itself.
        let swap = match limit {
            _ if both < 0 => -1,
            Some(limit) if limit > 0 && both >= limit => both - limit,
            Some(limit) if limit > 0 => {
                return invalid("memory.swap", format!("{both} is below the limit {limit}"));
            }
            _ => return invalid("memory.swap", "it needs memory.limit, which it includes"),
        };
        out.push(Setting { optional: swap <= 0, ..set("memory.swap.max", max_or(swap, swap < 0)) });
    }
    if let Some(limit) = limit {
        out.push(set("memory.max", max_or(limit, limit < 0)));
    }
    if let Some(low) = memory.reservation.filter(|&low| low != 0) {
        out.push(set("memory.low", max_or(low, low < 0)));
    }
    Ok(())
}

fn cpu(cpu: &CpuResources, out: &mut Vec<Setting>) -> Result<()> {
    if cpu.realtime_runtime.unwrap_or(0) != 0 || cpu.realtime_period.unwrap_or(0) != 0 {
        return Err(LimitError::Unsupported("cpu.realtimeRuntime"));
    }
    if let Some(idle) = cpu.idle {
        out.push(set("cpu.idle", idle));
    }
    if let Some(shares) = cpu.shares.filter(|&shares| shares != 0) {
        out.push(set("cpu.weight", weight(shares)));
    }
    match (cpu.quota.filter(|&quota| quota != 0), cpu.period.filter(|&period| period != 0)) {
        (None, None) => {}
        (quota, period) => {
            let quota = quota.unwrap_or(-1);
            out.push(set("cpu.max", format!("{} {}", max_or(quota, quota < 0), period.unwrap_or(100_000))));
        }
    }
    if let Some(burst) = cpu.burst {
        out.push(set("cpu.max.burst", burst));
    }
    for (file, what, list) in [("cpuset.cpus", "cpu.cpus", &cpu.cpus), ("cpuset.mems", "cpu.mems", &cpu.mems)]
    {
        if !list.bytes().all(|b| b.is_ascii_digit() || matches!(b, b',' | b'-')) {
            return invalid(what, list);
        }
        if !list.is_empty() {
            out.push(set(file, list));
        }
    }
    Ok(())
}

/// cgroup v1's shares (2 to 262144) on cgroup v2's scale (1 to 10000).
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9_999 / 262_142
}

fn io(io: &BlockIo, out: &mut Vec<Setting>) -> Result<()> {
    if io.leaf_weight.unwrap_or(0) != 0 {
        return Err(LimitError::Unsupported("blockIO.leafWeight"));
    }
    if let Some(weight) = io.weight.filter(|&weight| weight != 0) {
        out.push(io_weight("default", weight)?);
    }
    for device in &io.weight_device {
        if let Some(weight) = device.weight.filter(|&weight| weight != 0) {
            out.push(io_weight(&format!("{}:{}", device.major, device.minor), weight)?);
        }
    }
    let throttles: [(&str, &[ThrottleDevice]); 4] = [
        ("rbps", &io.throttle_read_bps_device),
        ("wbps", &io.throttle_write_bps_device),
        ("riops", &io.throttle_read_iops_device),
        ("wiops", &io.throttle_write_iops_device),
    ];
    for (key, devices) in throttles {
        let line = |d: &ThrottleDevice| {
            set("io.max", format!("{}:{} {key}={}", d.major, d.minor, max_or(d.rate as i64, d.rate == 0)))
        };
        out.extend(devices.iter().map(line));
    }
    Ok(())
}

/// BFQ has the old scale (10 to 1000); the cost model, which serves when there is no BFQ, has 1 to 10000.
fn io_weight(device: &str, weight: u16) -> Result<Setting> {
    if !(10..=1000).contains(&weight) {
        return invalid("blockIO.weight", format!("{weight} is not in 10 to 1000"));
    }
    let converted = 1 + (u32::from(weight) - 10) * 9_999 / 990;
    Ok(Setting {
        fallback: Some(("io.weight", format!("{device} {converted}"))),
        ..set("io.bfq.weight", format!("{device} {weight}"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<(String, String)>> {
        let resources: Resources = serde_json::from_str(json).expect("valid JSON");
        Ok(settings(&resources)?.into_iter().map(|s| (s.file, s.value)).collect())
    }

    fn pairs(list: &[(&str, &str)]) -> Vec<(String, String)> {
        list.iter().map(|(f, v)| (f.to_string(), v.to_string())).collect()
    }

    #[test]
    fn converts_to_version_two() {
        let got = of(
            r#"{"memory":{"limit":1000,"swap":1500,"reservation":500},"cpu":{"shares":1024,"quota":50000,"cpus":"0-1"},
            "pids":{"limit":10},"unified":{"memory.high":"900","io.max":"8:0 rbps=1\n8:16 rbps=2"}}"#,
        );
        let expected = pairs(&[
            ("memory.swap.max", "500"),
            ("memory.max", "1000"),
            ("memory.low", "500"),
            ("cpu.weight", "39"),
            ("cpu.max", "50000 100000"),
            ("cpuset.cpus", "0-1"),
            ("pids.max", "10"),
            ("io.max", "8:0 rbps=1"),
            ("io.max", "8:16 rbps=2"),
            ("memory.high", "900"),
        ]);
        assert_eq!(got, Ok(expected));
    }

    #[test]
    fn unlimited_is_max_and_zero_is_unset() {
        let got = of(r#"{"memory":{"limit":-1,"swap":-1},"cpu":{"quota":-1,"shares":0},"pids":{"limit":0}}"#);
        let expected = pairs(&[
            ("memory.swap.max", "max"),
            ("memory.max", "max"),
            ("cpu.max", "max 100000"),
            ("pids.max", "max"),
        ]);
        assert_eq!(got, Ok(expected));
        assert_eq!(of("{}"), Ok(vec![]));
    }

    #[test]
    fn weights_keep_their_ends() {
        assert_eq!((weight(2), weight(262_144), weight(0), weight(u64::MAX)), (1, 10_000, 1, 10_000));
        let s = io_weight("default", 1000).expect("in range");
        assert_eq!(s.fallback, Some(("io.weight", "default 10000".into())));
    }

    #[test]
    fn refuses_what_it_cannot_do() {
        for (json, what) in [
            (r#"{"memory":{"swappiness":60}}"#, "memory.swappiness"),
            (r#"{"memory":{"disableOOMKiller":true}}"#, "memory.disableOOMKiller"),
            (r#"{"network":{"classID":1}}"#, "network"),
            (r#"{"cpu":{"realtimeRuntime":1}}"#, "cpu.realtimeRuntime"),
        ] {
            assert_eq!(of(json), Err(LimitError::Unsupported(what)), "{json}");
        }
        for json in [
            r#"{"memory":{"limit":10,"swap":5}}"#,
            r#"{"memory":{"swap":5}}"#,
            r#"{"cpu":{"cpus":"0\n"}}"#,
            r#"{"unified":{"../memory.max":"1"}}"#,
            r#"{"unified":{"cgroup.procs":"1"}}"#,
            r#"{"blockIO":{"weight":5}}"#,
            r#"{"hugepageLimits":[{"pageSize":"2/MB"}]}"#,
        ] {
            assert!(matches!(of(json), Err(LimitError::Invalid(..))), "{json}");
        }
    }
}
