//! What a container uses, from the files of its cgroup.

use kapsel_protocol::api::StatsResponse;

use crate::container::cgroup::Cgroup;

/// Reads everything; what the kernel does not count is 0, and a missing limit `u64::MAX`.
pub fn read(cgroup: &Cgroup) -> StatsResponse {
    let whole = |file: &str| cgroup.read(file).ok().and_then(|text| number(&text));
    let io = cgroup.read("io.stat").unwrap_or_default();
    StatsResponse {
        memory_current: whole("memory.current").unwrap_or(0),
        memory_peak: whole("memory.peak").unwrap_or(0),
        memory_limit: whole("memory.max").unwrap_or(u64::MAX),
        swap_current: whole("memory.swap.current").unwrap_or(0),
        memory_inactive_file: cgroup.number("memory.stat", "inactive_file"),
        cpu_usage_us: cgroup.number("cpu.stat", "usage_usec"),
        cpu_user_us: cgroup.number("cpu.stat", "user_usec"),
        cpu_system_us: cgroup.number("cpu.stat", "system_usec"),
        cpu_throttled_us: cgroup.number("cpu.stat", "throttled_usec"),
        pids_current: whole("pids.current").unwrap_or(0),
        pids_limit: whole("pids.max").unwrap_or(u64::MAX),
        io_read_bytes: sum(&io, "rbytes="),
        io_write_bytes: sum(&io, "wbytes="),
        oom_kills: cgroup.oom_kills(),
        ..Default::default()
    }
}

/// The content of a file with one number or "max".
fn number(text: &str) -> Option<u64> {
    match text.trim() {
        "max" => Some(u64::MAX),
        other => other.parse().ok(),
    }
}

/// The sum over all devices of one key of `io.stat`.
fn sum(io: &str, key: &str) -> u64 {
    let values = io.split_whitespace().filter_map(|word| word.strip_prefix(key)?.parse::<u64>().ok());
    values.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_formats_are_read() {
        assert_eq!((number("max\n"), number("12\n"), number("")), (Some(u64::MAX), Some(12), None));
        let io = "254:0 rbytes=10 wbytes=1 rios=1\n254:16 rbytes=5 wbytes=2\n";
        assert_eq!((sum(io, "rbytes="), sum(io, "wbytes=")), (15, 3));
    }
}
