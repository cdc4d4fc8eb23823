//! The OCI runtime specification, as far as a Linux guest acts on it.
//!
//! Types of our own rather than a crate's: the agent needs to read, never to build or write them, and unknown properties must
//! be ignored ("Extensibility"). Properties that are known and cannot be honoured are here so that the plan can refuse them.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer};

/// Go writes `null` for an empty list or map.
fn nullable<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(d: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(d)?.unwrap_or_default())
}

/// Declares structures whose every field may be absent or null.
macro_rules! properties {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, Default, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name {
            $($(#[$field_doc])* #[serde(deserialize_with = "nullable")] pub $field: $type,)*
        }
    )*};
}

properties! {
    /// `config.json`.
    Spec {
        /// `ociVersion`.
        oci_version: String,
        /// The program; a container without one cannot be started.
        process: Option<Process>,
        /// Where the root file system is.
        root: Option<Root>,
        /// Needs a UTS namespace.
        hostname: String,
        /// Needs a UTS namespace.
        domainname: String,
        /// In this order.
        mounts: Vec<Mount>,
        /// Of these only `startContainer` runs in the guest.
        hooks: Hooks,
        /// All that is Linux's.
        linux: Linux,
    }
    /// `root`.
    Root {
        /// Absolute, in the guest.
        path: String,
        /// Mount it read-only.
        readonly: bool,
    }
    /// One of `mounts`.
    Mount {
        /// In the container.
        destination: String,
        /// File system type, or "bind".
        #[serde(rename = "type")]
        kind: String,
        /// Path in the guest for a bind mount.
        source: String,
        /// As in mount(8).
        options: Vec<String>,
        /// Id-mapped mounts.
        uid_mappings: Vec<IdMapping>,
        /// Id-mapped mounts.
        gid_mappings: Vec<IdMapping>,
    }
    /// `hooks`.
    Hooks {
        /// Host side.
        prestart: Vec<Hook>,
        /// Host side.
        create_runtime: Vec<Hook>,
        /// Host side.
        create_container: Vec<Hook>,
        /// In the container, before its program.
        start_container: Vec<Hook>,
        /// Host side.
        poststart: Vec<Hook>,
        /// Host side.
        poststop: Vec<Hook>,
    }
    /// One hook.
    Hook {
        /// Absolute path.
        path: String,
        /// With the program's own name as the first.
        args: Vec<String>,
        /// Its whole environment.
        env: Vec<String>,
        /// Seconds.
        timeout: Option<u32>,
    }
    /// `process`, which Exec gives by itself.
    Process {
        /// Run on a pseudo-terminal.
        terminal: bool,
        /// The terminal's size.
        console_size: Option<ConsoleSize>,
        /// Who runs it.
        user: User,
        /// The program and its arguments.
        args: Vec<String>,
        /// `NAME=value`.
        env: Vec<String>,
        /// Absolute.
        cwd: String,
        /// Absent: none at all.
        capabilities: Option<Capabilities>,
        /// Resource limits.
        rlimits: Vec<Rlimit>,
        /// PR_SET_NO_NEW_PRIVS.
        no_new_privileges: bool,
        /// Refused when set.
        apparmor_profile: String,
        /// Refused when set.
        selinux_label: String,
        /// -1000 to 1000.
        oom_score_adj: Option<i32>,
        /// Refused when set.
        scheduler: Option<serde::de::IgnoredAny>,
        /// Refused when set.
        io_priority: Option<serde::de::IgnoredAny>,
        /// Refused when set.
        #[serde(rename = "execCPUAffinity")]
        exec_cpu_affinity: Option<serde::de::IgnoredAny>,
    }
    /// `consoleSize`.
    ConsoleSize {
        /// Rows.
        height: u32,
        /// Columns.
        width: u32,
    }
    /// `user`.
    User {
        /// In the container.
        uid: u32,
        /// In the container.
        gid: u32,
        /// Mask of file modes.
        umask: Option<u32>,
        /// Supplementary groups.
        additional_gids: Vec<u32>,
        /// Resolved with the image's own files, see `container::user`.
        username: String,
    }
    /// `capabilities`, names as `CAP_CHOWN`.
    Capabilities {
        /// Upper bound of what can ever be gained.
        bounding: Vec<String>,
        /// In force.
        effective: Vec<String>,
        /// Kept over execve by files that inherit.
        inheritable: Vec<String>,
        /// May be made effective.
        permitted: Vec<String>,
        /// Kept over execve.
        ambient: Vec<String>,
    }
    /// One of `rlimits`.
    Rlimit {
        /// `RLIMIT_NOFILE`, …
        #[serde(rename = "type")]
        kind: String,
        /// In force.
        soft: u64,
        /// Upper bound.
        hard: u64,
    }
    /// `linux`.
    Linux {
        /// New ones, or others' by path.
        namespaces: Vec<Namespace>,
        /// Of a new user namespace.
        uid_mappings: Vec<IdMapping>,
        /// Of a new user namespace.
        gid_mappings: Vec<IdMapping>,
        /// Refused when set.
        time_offsets: BTreeMap<String, serde::de::IgnoredAny>,
        /// Nodes to make.
        devices: Vec<Device>,
        /// Limits.
        resources: Option<Resources>,
        /// `shared`, `slave`, `private` or `unbindable`.
        rootfs_propagation: String,
        /// The host compiles it.
        seccomp: Option<serde::de::IgnoredAny>,
        /// Hidden from the container.
        masked_paths: Vec<String>,
        /// Read-only in the container.
        readonly_paths: Vec<String>,
        /// `net.ipv4.ip_forward`, … of the container's own namespaces.
        sysctl: BTreeMap<String, String>,
        /// Refused when set.
        mount_label: String,
        /// Refused when set.
        intel_rdt: Option<serde::de::IgnoredAny>,
        /// Refused when set.
        personality: Option<serde::de::IgnoredAny>,
    }
    /// One of `namespaces`.
    Namespace {
        /// `pid`, `network`, `mount`, `ipc`, `uts`, `user`, `cgroup` or `time`.
        #[serde(rename = "type")]
        kind: String,
        /// An existing one; empty: a new one.
        path: String,
    }
    /// A range of ids.
    IdMapping {
        /// First id inside.
        #[serde(rename = "containerID")]
        container_id: u32,
        /// First id outside.
        #[serde(rename = "hostID")]
        host_id: u32,
        /// How many.
        size: u32,
    }
    /// One of `devices`.
    Device {
        /// `c`, `b`, `u` or `p`.
        #[serde(rename = "type")]
        kind: String,
        /// In the container.
        path: String,
        /// Number.
        major: i64,
        /// Number.
        minor: i64,
        /// Default 0666.
        file_mode: Option<u32>,
        /// Owner.
        uid: Option<u32>,
        /// Group.
        gid: Option<u32>,
    }
    /// `resources`, which Update gives by itself.
    Resources {
        /// Which devices may be opened and made.
        devices: Vec<DeviceRule>,
        /// Memory.
        memory: MemoryResources,
        /// Processor time.
        cpu: CpuResources,
        /// Number of processes.
        pids: PidsResources,
        /// Disk traffic.
        #[serde(rename = "blockIO")]
        block_io: BlockIo,
        /// Huge pages.
        hugepage_limits: Vec<HugepageLimit>,
        /// cgroup v1 only: refused when set.
        network: Option<NetworkResources>,
        /// By device name.
        rdma: BTreeMap<String, Rdma>,
        /// cgroup v2 files and what to write.
        unified: BTreeMap<String, String>,
    }
    /// One of `resources.devices`; later rules win.
    DeviceRule {
        /// Allow or deny.
        allow: bool,
        /// `a`, `c` or `b`; empty is `a`.
        #[serde(rename = "type")]
        kind: String,
        /// Absent or negative: any.
        major: Option<i64>,
        /// Absent or negative: any.
        minor: Option<i64>,
        /// Of `r`, `w`, `m`.
        access: String,
    }
    /// `memory`, in bytes; -1 is unlimited.
    MemoryResources {
        /// Hard limit.
        limit: Option<i64>,
        /// Soft limit.
        reservation: Option<i64>,
        /// Of memory and swap together.
        swap: Option<i64>,
        /// cgroup v1 only: refused when set.
        swappiness: Option<u64>,
        /// cgroup v1 only: refused when set.
        #[serde(rename = "disableOOMKiller")]
        disable_oom_killer: bool,
        /// Refuse an update below what is in use.
        check_before_update: bool,
    }
    /// `cpu`.
    CpuResources {
        /// 2 to 262144.
        shares: Option<u64>,
        /// Microseconds per period; negative is unlimited.
        quota: Option<i64>,
        /// Microseconds.
        burst: Option<u64>,
        /// Microseconds.
        period: Option<u64>,
        /// cgroup v1 only: refused when set.
        realtime_runtime: Option<i64>,
        /// cgroup v1 only: refused when set.
        realtime_period: Option<u64>,
        /// A list, `0-2,4`.
        cpus: String,
        /// A list.
        mems: String,
        /// SCHED_IDLE.
        idle: Option<i64>,
    }
    /// `pids`.
    PidsResources {
        /// 0 and less is unlimited.
        limit: Option<i64>,
    }
    /// `blockIO`.
    BlockIo {
        /// 10 to 1000.
        weight: Option<u16>,
        /// cgroup v1 only: refused when set.
        leaf_weight: Option<u16>,
        /// Per device.
        weight_device: Vec<WeightDevice>,
        /// Bytes per second.
        throttle_read_bps_device: Vec<ThrottleDevice>,
        /// Bytes per second.
        throttle_write_bps_device: Vec<ThrottleDevice>,
        /// Operations per second.
        #[serde(rename = "throttleReadIOPSDevice")]
        throttle_read_iops_device: Vec<ThrottleDevice>,
        /// Operations per second.
        #[serde(rename = "throttleWriteIOPSDevice")]
        throttle_write_iops_device: Vec<ThrottleDevice>,
    }
    /// One of `weightDevice`.
    WeightDevice {
        /// Number.
        major: i64,
        /// Number.
        minor: i64,
        /// 10 to 1000.
        weight: Option<u16>,
    }
    /// One of the throttle lists.
    ThrottleDevice {
        /// Number.
        major: i64,
        /// Number.
        minor: i64,
        /// Per second.
        rate: u64,
    }
    /// One of `hugepageLimits`.
    HugepageLimit {
        /// `2MB`, `1GB`.
        page_size: String,
        /// Bytes.
        limit: u64,
    }
    /// `network`.
    NetworkResources {
        /// net_cls.
        #[serde(rename = "classID")]
        class_id: Option<u32>,
        /// net_prio.
        priorities: Vec<serde::de::IgnoredAny>,
    }
    /// One of `rdma`.
    Rdma {
        /// Number.
        hca_handles: Option<u32>,
        /// Number.
        hca_objects: Option<u32>,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nulls_and_unknown_properties_are_taken() {
        let spec: Spec = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","mounts":null,"process":{"args":["a"],"cwd":"/","novel":[1,{}],
                "user":{"uid":1,"additionalGids":null},"scheduler":{"policy":"SCHED_FIFO"}},
                "linux":{"resources":{"blockIO":{"throttleReadIOPSDevice":[{"major":1,"minor":2,"rate":3}]},
                "memory":{"disableOOMKiller":true}},"uidMappings":[{"containerID":0,"hostID":5,"size":1}]}}"#,
        )
        .expect("valid");
        assert!(spec.mounts.is_empty());
        let process = spec.process.expect("process");
        assert!(process.scheduler.is_some() && process.io_priority.is_none());
        let resources = spec.linux.resources.expect("resources");
        assert_eq!(resources.block_io.throttle_read_iops_device[0].rate, 3);
        assert!(resources.memory.disable_oom_killer);
        assert_eq!(spec.linux.uid_mappings[0].host_id, 5);
    }
}
