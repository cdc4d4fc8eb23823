//! What to do for a container, worked out and checked before anything is done.
//!
//! Everything that can be refused is refused here, in the agent, so that the child that builds the container only carries
//! out system calls with arguments that are ready.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::oci::{self, Spec};
use kapsel_protocol::limits;

use super::capabilities::Capabilities;
use super::device_rules::Rules;
use super::limits::{Setting, settings};
use super::options::{self, Options};
use super::process::{ProcessPlan, Seccomp};

/// Why a specification is refused.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// It can never work.
    #[error("{0}")]
    Invalid(String),
    /// This guest cannot do it.
    #[error("{0} is not supported in the guest; remove it from the specification")]
    Unsupported(String),
    /// A part of it is wrong.
    #[error(transparent)]
    Capability(#[from] super::capabilities::Unknown),
    /// A part of it is wrong.
    #[error(transparent)]
    Limit(#[from] super::limits::LimitError),
    /// A part of it is wrong.
    #[error(transparent)]
    Device(#[from] super::device_rules::RuleError),
    /// A part of it cannot be done.
    #[error(transparent)]
    Option(#[from] options::Unsupported),
    /// Not JSON, or not the specification's.
    #[error("the specification cannot be read: {0}")]
    Json(#[from] serde_json::Error),
}

type Result<T> = std::result::Result<T, PlanError>;

/// Shorthand for what can never work.
pub(super) fn invalid<T>(message: impl Into<String>) -> Result<T> {
    Err(PlanError::Invalid(message.into()))
}

/// Shorthand for what this guest cannot do.
pub(super) fn unsupported<T>(what: impl Into<String>) -> Result<T> {
    Err(PlanError::Unsupported(what.into()))
}

/// A string for the kernel.
pub(super) fn c_string(what: &str, text: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(text).or_else(|_| invalid(format!("{what} contains a NUL byte")))
}

/// A container, ready to be built.
#[derive(Clone, Debug)]
pub struct Plan {
    /// CLONE_NEW* of the new ones, without the cgroup namespace.
    pub new_namespaces: u64,
    /// A new cgroup namespace.
    pub new_cgroup_namespace: bool,
    /// Existing ones to join: CLONE_NEW* and path; the user namespace first.
    pub joined: Vec<(u64, CString)>,
    /// `uid_map` and `gid_map` of a new user namespace.
    pub id_maps: Option<(String, String)>,
    /// The root file system.
    pub rootfs: CString,
    /// Mount it read-only.
    pub readonly: bool,
    /// Propagation of the root mount, MS_*, and whether recursive.
    pub propagation: Option<(u64, bool)>,
    /// In this order.
    pub mounts: Vec<MountPlan>,
    /// Nodes to make besides the default ones.
    pub devices: Vec<DevicePlan>,
    /// Whether /dev is the container's own, to be filled with the default nodes and links.
    pub fill_dev: bool,
    /// Hidden.
    pub masked_paths: Vec<CString>,
    /// Read-only.
    pub readonly_paths: Vec<CString>,
    /// Path below /proc/sys and value.
    pub sysctls: Vec<(CString, String)>,
    /// Empty: unchanged.
    pub hostname: String,
    /// Empty: unchanged.
    pub domainname: String,
    /// What to write in the cgroup.
    pub cgroup: Vec<Setting>,
    /// Which devices may be used.
    pub device_rules: Rules,
    /// Run in the container before its program.
    pub start_hooks: Vec<HookPlan>,
    /// The first process; `None`: it comes later.
    pub process: Option<ProcessPlan>,
    /// Of a process that comes later: in force before it does. Empty: the filter comes with it, if there is one.
    pub early_seccomp: Seccomp,
}

/// One mount.
#[derive(Clone, Debug)]
pub struct MountPlan {
    /// In the container.
    pub destination: CString,
    /// What.
    pub source: MountSource,
    /// How.
    pub options: Options,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountSource {
    /// A path in the guest.
    Bind(CString),
    /// A new instance of a file system: type and source.
    New(CString, CString),
    /// The container's own view of the cgroup tree.
    Cgroup,
}

/// One device node.
#[derive(Clone, Debug)]
pub struct DevicePlan {
    /// In the container.
    pub path: CString,
    /// S_IFCHR, S_IFBLK or S_IFIFO and permissions.
    pub mode: u32,
    /// Number.
    pub device: u64,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One hook.
#[derive(Clone, Debug)]
pub struct HookPlan {
    /// In the container.
    pub path: CString,
    /// Never empty.
    pub args: Vec<CString>,
    /// Its whole environment.
    pub env: Vec<CString>,
    /// Seconds, if any.
    pub timeout: Option<u32>,
}

impl Plan {
    /// Reads and checks a specification.
    ///
    /// `seccomp` is the compiled filter (see CreateRequest.seccomp), `terminal` says whether the first process has one.
    ///
    /// # Errors
    /// For everything that cannot or will not be done.
    pub fn new(json: &[u8], seccomp: Seccomp, terminal: bool) -> Result<Self> {
        if json.len() > limits::SPEC_MAX {
            return invalid(format!(
                "the specification has {} bytes, more than {}",
                json.len(),
                limits::SPEC_MAX
            ));
        }
        let spec: Spec = serde_json::from_slice(json)?;
        if !spec.oci_version.starts_with("1.") {
            return invalid(format!("ociVersion {:?} is not 1.x", spec.oci_version));
        }
        refuse_unsupported(&spec)?;
        if spec.linux.seccomp.is_some() && seccomp.program.is_empty() {
            return invalid("linux.seccomp is set but no compiled filter came with it");
        }
        let Some(root) = spec.root.as_ref().filter(|root| root.path.starts_with('/')) else {
            return invalid("root.path is missing or not absolute");
        };
        let spaces = Namespaces::parse(&spec)?;
        let resources = spec.linux.resources.clone().unwrap_or_default();
        let device = |d: &oci::Device| device(d);
        let propagation = match spec.linux.rootfs_propagation.as_str() {
            "" => None,
            other => match options::propagation(other) {
                Some(flag) => Some(flag),
                None => return invalid(format!("linux.rootfsPropagation {other:?} is unknown")),
            },
        };
        let binds_dev = |m: &MountPlan| is_dev(&m.destination) && matches!(m.source, MountSource::Bind(_));
        let mounts: Vec<MountPlan> = spec.mounts.iter().map(mount).collect::<Result<_>>()?;
        let (process, early_seccomp) = match &spec.process {
            Some(process) => (Some(ProcessPlan::new(process, seccomp, terminal)?), Seccomp::default()),
            None => (None, seccomp),
        };
        Ok(Self {
            new_namespaces: spaces.new,
            new_cgroup_namespace: spaces.new_cgroup,
            joined: spaces.joined,
            id_maps: spaces.id_maps,
            rootfs: c_string("root.path", root.path.as_str())?,
            readonly: root.readonly,
            propagation,
            fill_dev: !mounts.iter().any(binds_dev),
            mounts,
            devices: spec.linux.devices.iter().map(device).collect::<Result<_>>()?,
            masked_paths: paths("linux.maskedPaths", &spec.linux.masked_paths)?,
            readonly_paths: paths("linux.readonlyPaths", &spec.linux.readonly_paths)?,
            sysctls: sysctls(&spec)?,
            hostname: spec.hostname.clone(),
            domainname: spec.domainname.clone(),
            cgroup: settings(&resources)?,
            device_rules: Rules::parse(&resources.devices)?,
            start_hooks: spec.hooks.start_container.iter().map(hook).collect::<Result<_>>()?,
            process,
            early_seccomp,
        })
    }
}

fn refuse_unsupported(spec: &Spec) -> Result<()> {
    let host_hooks = [
        ("prestart", &spec.hooks.prestart),
        ("createRuntime", &spec.hooks.create_runtime),
        ("createContainer", &spec.hooks.create_container),
        ("poststart", &spec.hooks.poststart),
        ("poststop", &spec.hooks.poststop),
    ];
    for (name, hooks) in host_hooks {
        if !hooks.is_empty() {
            return unsupported(format!("hooks.{name} (hooks other than startContainer are the host's)"));
        }
    }
    let linux = &spec.linux;
    let refused = [
        ("linux.timeOffsets", !linux.time_offsets.is_empty()),
        ("linux.mountLabel (SELinux)", !linux.mount_label.is_empty()),
        ("linux.intelRdt", linux.intel_rdt.is_some()),
        ("linux.personality", linux.personality.is_some()),
    ];
    match refused.iter().find(|(_, set)| *set) {
        Some((what, _)) => unsupported(*what),
        None => Ok(()),
    }
}

struct Namespaces {
    new: u64,
    new_cgroup: bool,
    joined: Vec<(u64, CString)>,
    id_maps: Option<(String, String)>,
}

impl Namespaces {
    fn parse(spec: &Spec) -> Result<Self> {
        let mut spaces = Self { new: 0, new_cgroup: false, joined: vec![], id_maps: None };
        let mut seen = 0;
        for namespace in &spec.linux.namespaces {
            let flag = match namespace.kind.as_str() {
                "pid" => libc::CLONE_NEWPID,
                "network" => libc::CLONE_NEWNET,
                "mount" => libc::CLONE_NEWNS,
                "ipc" => libc::CLONE_NEWIPC,
                "uts" => libc::CLONE_NEWUTS,
                "user" => libc::CLONE_NEWUSER,
                "cgroup" => libc::CLONE_NEWCGROUP,
                "time" => return unsupported("a time namespace"),
                other => return invalid(format!("linux.namespaces: unknown type {other:?}")),
            } as u64;
            if seen & flag != 0 {
                return invalid(format!("linux.namespaces: {} is there twice", namespace.kind));
            }
            seen |= flag;
            if !namespace.path.is_empty() {
                if !namespace.path.starts_with('/') {
                    return invalid(format!("linux.namespaces: path {:?} is not absolute", namespace.path));
                }
                spaces.joined.push((flag, c_string("linux.namespaces", namespace.path.as_str())?));
            } else if flag == libc::CLONE_NEWCGROUP as u64 {
                spaces.new_cgroup = true;
            } else {
                spaces.new |= flag;
            }
        }
        // A user namespace gives the rights to join the others.
        spaces.joined.sort_by_key(|(flag, _)| *flag != libc::CLONE_NEWUSER as u64);
        if spaces.new & libc::CLONE_NEWNS as u64 == 0 {
            return unsupported("a container without a new mount namespace");
        }
        let own_uts = spaces.new & libc::CLONE_NEWUTS as u64 != 0;
        if !(own_uts || spec.hostname.is_empty() && spec.domainname.is_empty()) {
            return invalid("hostname and domainname need a new uts namespace");
        }
        for (what, name) in [("hostname", &spec.hostname), ("domainname", &spec.domainname)] {
            if name.len() > limits::HOSTNAME_MAX {
                return invalid(format!("{what} is longer than {} bytes", limits::HOSTNAME_MAX));
            }
        }
        spaces.id_maps = id_maps(spec, spaces.new & libc::CLONE_NEWUSER as u64 != 0)?;
        Ok(spaces)
    }
}

fn id_maps(spec: &Spec, new_user: bool) -> Result<Option<(String, String)>> {
    let (uids, gids) = (&spec.linux.uid_mappings, &spec.linux.gid_mappings);
    if !new_user {
        return match uids.is_empty() && gids.is_empty() {
            true => Ok(None),
            false => invalid("linux.uidMappings and gidMappings need a new user namespace"),
        };
    }
    // The kernel takes 340 lines.
    if uids.is_empty() || gids.is_empty() || uids.len() > 340 || gids.len() > 340 {
        return invalid("a new user namespace needs 1 to 340 linux.uidMappings and gidMappings");
    }
    let lines = |maps: &[oci::IdMapping]| -> String {
        maps.iter().map(|m| format!("{} {} {}\n", m.container_id, m.host_id, m.size)).collect()
    };
    Ok(Some((lines(uids), lines(gids))))
}

fn is_dev(destination: &CString) -> bool {
    matches!(destination.to_bytes(), b"/dev" | b"/dev/")
}

/// An absolute path in the container, for the kernel.
fn path(what: &str, path: &str) -> Result<CString> {
    if !path.starts_with('/') || path.len() >= limits::PATH_MAX {
        return invalid(format!("{what}: {path:?} is not an absolute path"));
    }
    c_string(what, path)
}

fn paths(what: &str, list: &[String]) -> Result<Vec<CString>> {
    list.iter().map(|p| path(what, p)).collect()
}

fn mount(mount: &oci::Mount) -> Result<MountPlan> {
    let destination = &mount.destination;
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return unsupported(format!("an id-mapped mount (on {destination})"));
    }
    // The specification once allowed relative destinations; they are below the root.
    let absolute = Path::new("/").join(destination);
    if destination.is_empty() || absolute == Path::new("/") {
        return invalid("a mount has no destination below the root");
    }
    let options = Options::parse(&mount.options)?;
    if options.copy_up && mount.kind != "tmpfs" {
        return invalid(format!(
            "mount on {destination}: tmpcopyup is for a tmpfs, and it is {:?}",
            mount.kind
        ));
    }
    let source = match mount.kind.as_str() {
        "cgroup" | "cgroup2" => MountSource::Cgroup,
        kind if kind == "bind" || options.bind.is_some() => {
            if !options.data.is_empty() {
                return invalid(format!("bind mount on {destination}: unknown option {:?}", options.data[0]));
            }
            MountSource::Bind(path(&format!("source of the bind mount on {destination}"), &mount.source)?)
        }
        "" => return invalid(format!("the mount on {destination} has no type")),
        kind => MountSource::New(
            c_string("mount type", kind)?,
            c_string("mount source", if mount.source.is_empty() { kind } else { &mount.source })?,
        ),
    };
    Ok(MountPlan {
        destination: c_string("mount destination", absolute.as_os_str().as_bytes())?,
        source,
        options,
    })
}

fn device(device: &oci::Device) -> Result<DevicePlan> {
    let kind = match device.kind.as_str() {
        "c" | "u" => libc::S_IFCHR,
        "b" => libc::S_IFBLK,
        "p" => libc::S_IFIFO,
        other => return invalid(format!("device {}: type {other:?} is none of c, u, b, p", device.path)),
    };
    let number =
        |n: i64| u32::try_from(n).or_else(|_| invalid(format!("device {}: number {n}", device.path)));
    Ok(DevicePlan {
        path: path("linux.devices", &device.path)?,
        mode: kind | device.file_mode.unwrap_or(0o666) & 0o7777,
        device: match kind {
            libc::S_IFIFO => 0,
            _ => rustix::fs::makedev(number(device.major)?, number(device.minor)?),
        },
        uid: device.uid.unwrap_or(0),
        gid: device.gid.unwrap_or(0),
    })
}

fn hook(hook: &oci::Hook) -> Result<HookPlan> {
    let path = path("hooks.startContainer", &hook.path)?;
    let strings =
        |what, list: &[String]| list.iter().map(|s| c_string(what, s.as_str())).collect::<Result<Vec<_>>>();
    let mut args = strings("hook argument", &hook.args)?;
    if args.is_empty() {
        args.push(path.clone());
    }
    Ok(HookPlan { path, args, env: strings("hook environment", &hook.env)?, timeout: hook.timeout })
}

/// Only what belongs to a namespace of the container's own may be set: everything else is the whole guest's.
fn sysctls(spec: &Spec) -> Result<Vec<(CString, String)>> {
    const IPC: [&str; 8] = [
        "kernel.msgmax",
        "kernel.msgmnb",
        "kernel.msgmni",
        "kernel.sem",
        "kernel.shmall",
        "kernel.shmmax",
        "kernel.shmmni",
        "kernel.shm_rmid_forced",
    ];
    let own = |kind: &str| spec.linux.namespaces.iter().any(|n| n.kind == kind);
    let one = |(name, value): (&String, &String)| {
        // Both `.` and `/` separate; a `/` in a dotted name stands for a dot (an interface's name).
        let name = if name.split_once('/').is_some_and(|(head, _)| !head.contains('.')) {
            name.replace('.', "\0").replace('/', ".").replace('\0', "/")
        } else {
            name.clone()
        };
        // The guest's network and IPC are there for its containers, whether or not they share them.
        let allowed = name.starts_with("net.")
            || IPC.contains(&name.as_str())
            || name.starts_with("fs.mqueue.")
            || (own("uts") && name == "kernel.domainname");
        let parts: Vec<String> = name.split('.').map(|part| part.replace('/', ".")).collect();
        if parts.iter().any(|part| part.is_empty() || part == "." || part == "..") {
            return invalid(format!("linux.sysctl: {name:?} is no name"));
        }
        if !allowed {
            return invalid(format!(
                "linux.sysctl: {name} does not belong to a namespace of the container's own"
            ));
        }
        Ok((c_string("linux.sysctl", parts.join("/"))?, value.clone()))
    };
    spec.linux.sysctl.iter().map(one).collect()
}

/// The limits that Update gives by themselves.
///
/// # Errors
/// As for a whole specification.
pub fn update(json: &[u8]) -> Result<(Vec<Setting>, Option<Rules>)> {
    let resources: oci::Resources = serde_json::from_slice(json)?;
    let rules = match resources.devices.is_empty() {
        true => None,
        false => Some(Rules::parse(&resources.devices)?),
    };
    Ok((settings(&resources)?, rules))
}

/// The capabilities of a process, absent ones meaning none.
pub(super) fn capabilities(spec: Option<&oci::Capabilities>) -> Result<Capabilities> {
    Ok(spec.map(Capabilities::parse).transpose()?.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::process::Seccomp;

    fn plan(patch: &str) -> Result<Plan> {
        let mut spec: serde_json::Value = serde_json::from_str(
            r#"{"ociVersion":"1.0.2","root":{"path":"/r"},"process":{"args":["true"],"cwd":"/","user":{"uid":0}},
            "linux":{"namespaces":[{"type":"mount"},{"type":"pid"},{"type":"ipc"},{"type":"uts"},{"type":"cgroup"}]}}"#,
        )
        .expect("valid");
        merge(&mut spec, serde_json::from_str(patch).expect("valid patch"));
        Plan::new(spec.to_string().as_bytes(), Seccomp::default(), false)
    }

    fn merge(into: &mut serde_json::Value, from: serde_json::Value) {
        match (into, from) {
            (serde_json::Value::Object(into), serde_json::Value::Object(from)) => {
                for (key, value) in from {
                    merge(into.entry(key).or_insert(serde_json::Value::Null), value);
                }
            }
            (into, from) => *into = from,
        }
    }

    #[test]
    fn an_ordinary_container() {
        let plan = plan(
            r#"{"hostname":"h","mounts":[{"destination":"/proc","type":"proc","source":"proc"},
            {"destination":"data","type":"none","source":"/d","options":["rbind","ro"]}]}"#,
        )
        .expect("valid");
        let flags = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
        assert_eq!(plan.new_namespaces, flags as u64);
        assert!(plan.new_cgroup_namespace && plan.fill_dev);
        assert_eq!(plan.mounts[1].destination.as_c_str(), c"/data");
        assert_eq!(plan.mounts[1].source, MountSource::Bind(c"/d".into()));
    }

    #[test]
    fn everything_that_will_not_work_is_refused() {
        let cases = [
            (r#"{"ociVersion":"2.0"}"#, "ociVersion"),
            (r#"{"root":{"path":"relative"}}"#, "root.path"),
            (r#"{"process":{"args":[]}}"#, "process.args"),
            (r#"{"process":{"args":["a\u0000b"]}}"#, "NUL"),
            (r#"{"process":{"cwd":"x"}}"#, "process.cwd"),
            (r#"{"process":{"apparmorProfile":"docker"}}"#, "apparmor"),
            (r#"{"process":{"selinuxLabel":"x"}}"#, "selinux"),
            (r#"{"process":{"rlimits":[{"type":"RLIMIT_X","soft":1,"hard":1}]}}"#, "RLIMIT_X"),
            (r#"{"process":{"oomScoreAdj":1001}}"#, "oomScoreAdj"),
            (r#"{"process":{"capabilities":{"bounding":["CAP_X"]}}}"#, "CAP_X"),
            (r#"{"linux":{"namespaces":[{"type":"pid"}]}}"#, "mount namespace"),
            (r#"{"linux":{"namespaces":[{"type":"mount"},{"type":"mount"}]}}"#, "twice"),
            (r#"{"linux":{"namespaces":[{"type":"mount"},{"type":"time"}]}}"#, "time namespace"),
            (r#"{"linux":{"namespaces":[{"type":"mount"}]},"hostname":"h"}"#, "uts"),
            (r#"{"linux":{"namespaces":[{"type":"mount"},{"type":"user"}]}}"#, "uidMappings"),
            (r#"{"linux":{"uidMappings":[{"containerID":0,"hostID":1,"size":1}]}}"#, "uidMappings"),
            (r#"{"linux":{"sysctl":{"kernel.panic":"1"}}}"#, "kernel.panic"),
            (
                r#"{"linux":{"namespaces":[{"type":"mount"}],"sysctl":{"kernel.domainname":"x"}}}"#,
                "kernel.domainname",
            ),
            (r#"{"linux":{"sysctl":{"fs.mqueue.../../../x":"1"}}}"#, "sysctl"),
            (r#"{"linux":{"seccomp":{"defaultAction":"SCMP_ACT_ERRNO"}}}"#, "seccomp"),
            (r#"{"linux":{"personality":{"domain":"LINUX32"}}}"#, "personality"),
            (r#"{"linux":{"rootfsPropagation":"x"}}"#, "rootfsPropagation"),
            (r#"{"linux":{"maskedPaths":["relative"]}}"#, "maskedPaths"),
            (r#"{"linux":{"devices":[{"type":"x","path":"/dev/x"}]}}"#, "/dev/x"),
            (r#"{"hooks":{"prestart":[{"path":"/x"}]}}"#, "hooks.prestart"),
            (r#"{"mounts":[{"destination":"/","type":"tmpfs"}]}"#, "destination"),
            (r#"{"mounts":[{"destination":"/x","type":"bind","source":"rel"}]}"#, "source"),
            (
                r#"{"mounts":[{"destination":"/x","type":"bind","source":"/y","options":["rw","foo"]}]}"#,
                "foo",
            ),
            (r#"{"mounts":[{"destination":"/x","type":"tmpfs","uidMappings":[{"size":1}]}]}"#, "id-mapped"),
            (r#"{"mounts":[{"destination":"/x","type":"proc","options":["tmpcopyup"]}]}"#, "tmpcopyup"),
        ];
        for (patch, what) in cases {
            let error = plan(patch).expect_err(patch).to_string();
            assert!(error.contains(what), "{patch}: {error}");
        }
    }

    #[test]
    fn sysctls_become_paths() {
        let plan = plan(r#"{"linux":{"namespaces":[{"type":"mount"},{"type":"network"},{"type":"ipc"}],
            "sysctl":{"net.ipv4.conf.eth0/1.forwarding":"1","net/ipv4/conf/eth0.2/forwarding":"1","kernel.shmmax":"9"}}}"#)
        .expect("valid");
        let names: Vec<_> = plan.sysctls.iter().map(|(name, _)| name.to_str().expect("text")).collect();
        assert_eq!(
            names,
            ["kernel/shmmax", "net/ipv4/conf/eth0.1/forwarding", "net/ipv4/conf/eth0.2/forwarding"]
        );
    }
}
