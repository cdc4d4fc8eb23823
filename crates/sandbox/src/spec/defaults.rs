//! What every container gets unless somebody says otherwise; as Docker's defaults where these make sense in a guest of
//! its own.

use std::{collections::HashSet, path::Path};

use oci_spec::runtime::{
    Capability, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxNamespace,
    LinuxNamespaceBuilder, LinuxNamespaceType, Mount,
};

use super::mount;

/// For images that do not set it.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Memory of a machine beyond its container's limit: the guest's kernel, its page structures and the agent.
pub const GUEST_RESERVE: u64 = 96 << 20;

const SHM_SIZE: u64 = 64 << 20;

/// The fourteen that Docker leaves to root in a container.
pub(super) fn capabilities() -> HashSet<Capability> {
    use Capability::{
        AuditWrite, Chown, DacOverride, Fowner, Fsetid, Kill, Mknod, NetBindService, NetRaw, Setfcap, Setgid,
        Setpcap, Setuid, SysChroot,
    };
    HashSet::from([
        AuditWrite,
        Chown,
        DacOverride,
        Fowner,
        Fsetid,
        Kill,
        Mknod,
        NetBindService,
        NetRaw,
        Setfcap,
        Setgid,
        Setpcap,
        Setuid,
        SysChroot,
    ])
}

/// Every capability that the specification names.
pub(super) fn all_capabilities() -> HashSet<Capability> {
    use Capability as C;
    let mut all = capabilities();
    all.extend([
        C::AuditControl,
        C::AuditRead,
        C::BlockSuspend,
        C::Bpf,
        C::CheckpointRestore,
        C::DacReadSearch,
        C::IpcLock,
        C::IpcOwner,
        C::Lease,
        C::LinuxImmutable,
        C::MacAdmin,
        C::MacOverride,
        C::NetAdmin,
        C::NetBroadcast,
        C::Perfmon,
        C::SysAdmin,
        C::SysBoot,
        C::SysModule,
        C::SysNice,
        C::SysPacct,
        C::SysPtrace,
        C::SysRawio,
        C::SysResource,
        C::SysTime,
        C::SysTtyConfig,
        C::Syslog,
        C::WakeAlarm,
    ]);
    all
}

pub(super) fn namespaces() -> Vec<LinuxNamespace> {
    use LinuxNamespaceType as T;
    // No user namespace: the guest's root is confined by the machine. The network namespace is the guest's own.
    [T::Pid, T::Mount, T::Ipc, T::Uts, T::Cgroup]
        .into_iter()
        .filter_map(|typ| LinuxNamespaceBuilder::default().typ(typ).build().ok())
        .collect()
}

pub(super) fn masked_paths() -> Vec<String> {
    [
        "/proc/acpi",
        "/proc/asound",
        "/proc/interrupts",
        "/proc/kcore",
        "/proc/keys",
        "/proc/latency_stats",
        "/proc/sched_debug",
        "/proc/scsi",
        "/proc/timer_list",
        "/proc/timer_stats",
        "/sys/devices/virtual/powercap",
        "/sys/firmware",
    ]
    .map(str::to_owned)
    .into()
}

pub(super) fn readonly_paths() -> Vec<String> {
    ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"].map(str::to_owned).into()
}

pub(super) fn mounts(shm_size: Option<u64>) -> Vec<Mount> {
    let shm = format!("size={}", shm_size.unwrap_or(SHM_SIZE));
    let table: [(&str, &str, &str, &[&str]); 7] = [
        ("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
        ("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        (
            "/dev/pts",
            "devpts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        ),
        ("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", &shm]),
        ("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        ("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
    ];
    table
        .into_iter()
        .map(|(at, kind, source, options)| {
            mount(kind, source.into(), Path::new(at), options.iter().map(|&o| o.to_owned()).collect())
        })
        .collect()
}

/// No device but the harmless ones; the guest's disks stay out of reach of mknod(2).
pub(super) fn device_rules() -> Vec<LinuxDeviceCgroup> {
    let rule = |allow: bool, typ: LinuxDeviceType, major: Option<i64>, minor: Option<i64>, access: &str| {
        let mut rule = LinuxDeviceCgroupBuilder::default().allow(allow).typ(typ).access(access);
        if let Some(major) = major {
            rule = rule.major(major);
        }
        if let Some(minor) = minor {
            rule = rule.minor(minor);
        }
        rule.build().ok()
    };
    use LinuxDeviceType::{A, B, C};
    [
        rule(false, A, None, None, "rwm"),
        rule(true, C, None, None, "m"),
        rule(true, B, None, None, "m"),
        rule(true, C, Some(1), Some(3), "rwm"), // null
        rule(true, C, Some(1), Some(5), "rwm"), // zero
        rule(true, C, Some(1), Some(7), "rwm"), // full
        rule(true, C, Some(1), Some(8), "rwm"), // random
        rule(true, C, Some(1), Some(9), "rwm"), // urandom
        rule(true, C, Some(5), Some(0), "rwm"), // tty
        rule(true, C, Some(5), Some(2), "rwm"), // ptmx
        rule(true, C, Some(136), None, "rwm"),  // pts
    ]
    .into_iter()
    .flatten()
    .collect()
}
