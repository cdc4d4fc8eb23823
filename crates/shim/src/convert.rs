//! Between the Task API's messages and ours.

use containerd_shim_protos::{
    api,
    cgroups_v2::metrics::{CPUStat, MemoryEvents, MemoryStat, Metrics, PidsStat},
    protobuf::{Message, MessageField, well_known_types::any::Any, well_known_types::timestamp::Timestamp},
    types::task::Status,
};
use kapsel_sandbox::{
    client::RootfsMount,
    life::{CreateRequest, Error, IoRequest, State},
    record::Exit,
    stdio::Owner,
};

/// How the Task API names cgroup v2 metrics.
const METRICS_TYPE: &str = "io.containerd.cgroups.v2.Metrics";

/// An error as a status.
pub fn status(error: &Error) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
}

/// Nanoseconds since 1970.
pub fn timestamp(at: u64) -> MessageField<Timestamp> {
    MessageField::some(Timestamp {
        seconds: i64::try_from(at / 1_000_000_000).unwrap_or(i64::MAX),
        nanos: i32::try_from(at % 1_000_000_000).unwrap_or(0),
        ..Default::default()
    })
}

/// What Create asks for a container whose id is unique in `namespace`.
pub fn create(request: &api::CreateTaskRequest, namespace: &str) -> CreateRequest {
    let mount = |mount: &api::Mount| RootfsMount {
        kind: mount.type_.clone(),
        source: mount.source.clone().into(),
        options: mount.options.clone(),
    };
    CreateRequest {
        rootfs: request.rootfs.iter().map(mount).collect(),
        io: IoRequest {
            terminal: request.terminal,
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            owner: Owner { id: request.id.clone(), namespace: namespace.into() },
        },
    }
}

/// Status, pid and exit for State.
pub fn state(state: &State, paused: bool) -> (Status, u32, Option<Exit>) {
    match state {
        State::New | State::Created => (Status::CREATED, 0, None),
        State::Running { pid } if paused => (Status::PAUSED, *pid, None),
        State::Running { pid } => (Status::RUNNING, *pid, None),
        State::Exited(exit) => (Status::STOPPED, 0, Some(exit.clone())),
    }
}

/// The guest's counters as cgroup v2 metrics.
pub fn metrics(stats: &kapsel_sandbox::life::Stats) -> ttrpc::Result<Any> {
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids_current,
            // As the kernel's "max".
            limit: if stats.pids_limit == u64::MAX { 0 } else { stats.pids_limit },
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: stats.cpu_usage_us,
            user_usec: stats.cpu_user_us,
            system_usec: stats.cpu_system_us,
            throttled_usec: stats.cpu_throttled_us,
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            usage: stats.memory_current,
            usage_limit: stats.memory_limit,
            max_usage: stats.memory_peak,
            swap_usage: stats.swap_current,
            inactive_file: stats.memory_inactive_file,
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents { oom_kill: stats.oom_kills, ..Default::default() }),
        io: MessageField::some(io(stats)),
        ..Default::default()
    };
    let value = metrics.write_to_bytes().map_err(|e| ttrpc::Error::Others(e.to_string()))?;
    Ok(Any { type_url: METRICS_TYPE.into(), value, ..Default::default() })
}

fn io(stats: &kapsel_sandbox::life::Stats) -> containerd_shim_protos::cgroups_v2::metrics::IOStat {
    use containerd_shim_protos::cgroups_v2::metrics::{IOEntry, IOStat};
    let entry = IOEntry { rbytes: stats.io_read_bytes, wbytes: stats.io_write_bytes, ..Default::default() };
    IOStat { usage: vec![entry], ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive() {
        let stamp = timestamp(1_700_000_000_123_456_789);
        assert_eq!((stamp.seconds, stamp.nanos), (1_700_000_000, 123_456_789));
    }

    #[test]
    fn a_programs_error_keeps_the_words_that_clients_look_for() {
        let error = Error::Guest { code: ttrpc::Code::NOT_FOUND, message: "not found: /bin/x".into() };
        let ttrpc::Error::RpcStatus(status) = status(&error) else { panic!("no status") };
        assert_eq!((status.code(), status.message()), (ttrpc::Code::NOT_FOUND, "not found: /bin/x"));
    }

    #[test]
    fn counters_travel() {
        let stats =
            kapsel_sandbox::life::Stats { memory_current: 7, pids_limit: u64::MAX, ..Default::default() };
        let any = metrics(&stats).unwrap();
        let read = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!((any.type_url.as_str(), read.memory.usage, read.pids.limit), (METRICS_TYPE, 7, 0));
    }
}
