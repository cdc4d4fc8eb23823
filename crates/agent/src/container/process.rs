//! One process of a container: what it runs and with which rights.

use std::ffi::CString;

use kapsel_protocol::limits;
use rustix::process::{Resource, Rlimit};

use crate::oci;

use super::capabilities::Capabilities;
use super::plan::{PlanError, c_string, capabilities, invalid, unsupported};

type Result<T> = std::result::Result<T, PlanError>;

/// A compiled seccomp filter.
#[derive(Clone, Debug, Default)]
pub struct Seccomp {
    /// An array of `struct sock_filter`; empty: none.
    pub program: Vec<u8>,
    /// SECCOMP_FILTER_FLAG_*.
    pub flags: u32,
}

impl Seccomp {
    /// Checks a filter's size and flags.
    ///
    /// # Errors
    /// When it is no whole number of instructions, too long, or asks for a notification descriptor.
    pub fn new(program: Vec<u8>, flags: u32) -> Result<Self> {
        const INSTRUCTION: usize = size_of::<libc::sock_filter>();
        let allowed = libc::SECCOMP_FILTER_FLAG_TSYNC
            | libc::SECCOMP_FILTER_FLAG_LOG
            | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        if !program.len().is_multiple_of(INSTRUCTION) {
            return invalid(format!(
                "the seccomp filter has {} bytes, not whole instructions",
                program.len()
            ));
        }
        if program.len() / INSTRUCTION > limits::SECCOMP_INSTRUCTIONS_MAX {
            return invalid(format!(
                "the seccomp filter has more than {} instructions",
                limits::SECCOMP_INSTRUCTIONS_MAX
            ));
        }
        if libc::c_ulong::from(flags) & !allowed != 0 {
            return unsupported(format!("seccomp flags {flags:#x} (a notification listener, perhaps)"));
        }
        Ok(Self { program, flags })
    }
}

/// A process, ready to be executed.
#[derive(Clone, Debug)]
pub struct ProcessPlan {
    /// Never empty.
    pub args: Vec<CString>,
    /// `NAME=value`; HOME is added when absent.
    pub env: Vec<CString>,
    /// Made when missing.
    pub cwd: CString,
    /// Resolved with the container's files; wins over the numbers.
    pub username: String,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Supplementary groups.
    pub additional_gids: Vec<u32>,
    /// Mask of file modes.
    pub umask: u32,
    /// Absent: none at all (for Exec: the container's).
    pub capabilities: Option<Capabilities>,
    /// Resource limits.
    pub rlimits: Vec<(Resource, Rlimit)>,
    /// PR_SET_NO_NEW_PRIVS.
    pub no_new_privileges: bool,
    /// Installed last.
    pub seccomp: Seccomp,
    /// -1000 to 1000.
    pub oom_score_adj: Option<i32>,
    /// Runs on a pseudo-terminal of this size (columns, rows; 0: unknown).
    pub terminal: Option<(u16, u16)>,
}

impl ProcessPlan {
    /// Checks a process.
    ///
    /// # Errors
    /// For everything that cannot or will not be done.
    pub fn new(spec: &oci::Process, seccomp: Seccomp, terminal: bool) -> Result<Self> {
        refuse_unsupported(spec)?;
        if spec.args.first().is_none_or(String::is_empty) {
            return invalid("process.args is empty: there is nothing to run");
        }
        if !spec.cwd.starts_with('/') || spec.cwd.len() >= limits::PATH_MAX {
            return invalid(format!("process.cwd {:?} is not an absolute path", spec.cwd));
        }
        if let Some(value) = spec.oom_score_adj.filter(|value| !(-1000..=1000).contains(value)) {
            return invalid(format!("process.oomScoreAdj {value} is not in -1000 to 1000"));
        }
        let strings = |what, list: &[String]| {
            list.iter().map(|s| c_string(what, s.as_str())).collect::<Result<Vec<_>>>()
        };
        let size = spec.console_size.as_ref();
        let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        Ok(Self {
            args: strings("process.args", &spec.args)?,
            env: strings("process.env", &spec.env)?,
            cwd: c_string("process.cwd", spec.cwd.as_str())?,
            username: spec.user.username.clone(),
            uid: spec.user.uid,
            gid: spec.user.gid,
            additional_gids: spec.user.additional_gids.clone(),
            umask: spec.user.umask.unwrap_or(0o022) & 0o777,
            capabilities: match &spec.capabilities {
                Some(sets) => Some(capabilities(Some(sets))?),
                None => None,
            },
            rlimits: spec.rlimits.iter().map(rlimit).collect::<Result<_>>()?,
            no_new_privileges: spec.no_new_privileges,
            seccomp,
            oom_score_adj: spec.oom_score_adj,
            terminal: terminal.then(|| size.map_or((0, 0), |s| (cells(s.width), cells(s.height)))),
        })
    }

    /// The first process of a container that was made without one.
    ///
    /// # Errors
    /// As [`Self::new`], and when `json` is not OCI's.
    pub fn for_start(json: &[u8], seccomp: Seccomp, terminal: bool) -> Result<Self> {
        Self::new(&parse(json)?, seccomp, terminal)
    }

    /// A process that joins a running container: what it leaves open is as for the container's first.
    ///
    /// # Errors
    /// As [`Self::new`], and when `json` is not OCI's.
    pub fn for_exec(json: &[u8], init: &Self, terminal: bool) -> Result<Self> {
        let spec = parse(json)?;
        let mut process = Self::new(&spec, init.seccomp.clone(), terminal)?;
        process.capabilities = process.capabilities.or(init.capabilities);
        process.no_new_privileges |= init.no_new_privileges;
        process.oom_score_adj = process.oom_score_adj.or(init.oom_score_adj);
        if spec.user.umask.is_none() {
            process.umask = init.umask;
        }
        Ok(process)
    }

    /// Sets the terminal's size, when it has one and the size is known.
    pub fn set_size(&mut self, width: u32, height: u32) {
        let cells = |n: u32| u16::try_from(n).unwrap_or(u16::MAX);
        if let Some(size) = &mut self.terminal
            && (width, height) != (0, 0)
        {
            *size = (cells(width), cells(height));
        }
    }

    /// The value of a variable of the environment; the last one wins.
    pub fn variable<'a>(env: &'a [CString], name: &str) -> Option<&'a [u8]> {
        env.iter().rev().find_map(|entry| entry.to_bytes().strip_prefix(name.as_bytes())?.strip_prefix(b"="))
    }
}

fn parse(json: &[u8]) -> Result<oci::Process> {
    if json.len() > limits::SPEC_MAX {
        return invalid(format!("the process has {} bytes, more than {}", json.len(), limits::SPEC_MAX));
    }
    Ok(serde_json::from_slice(json)?)
}

fn refuse_unsupported(spec: &oci::Process) -> Result<()> {
    let refused = [
        ("process.apparmorProfile", !spec.apparmor_profile.is_empty()),
        ("process.selinuxLabel", !spec.selinux_label.is_empty()),
        ("process.scheduler", spec.scheduler.is_some()),
        ("process.ioPriority", spec.io_priority.is_some()),
        ("process.execCPUAffinity", spec.exec_cpu_affinity.is_some()),
    ];
    match refused.iter().find(|(_, set)| *set) {
        Some((what, _)) => unsupported(*what),
        None => Ok(()),
    }
}

fn rlimit(limit: &oci::Rlimit) -> Result<(Resource, Rlimit)> {
    let resource = match limit.kind.as_str() {
        "RLIMIT_AS" => Resource::As,
        "RLIMIT_CORE" => Resource::Core,
        "RLIMIT_CPU" => Resource::Cpu,
        "RLIMIT_DATA" => Resource::Data,
        "RLIMIT_FSIZE" => Resource::Fsize,
        "RLIMIT_LOCKS" => Resource::Locks,
        "RLIMIT_MEMLOCK" => Resource::Memlock,
        "RLIMIT_MSGQUEUE" => Resource::Msgqueue,
        "RLIMIT_NICE" => Resource::Nice,
        "RLIMIT_NOFILE" => Resource::Nofile,
        "RLIMIT_NPROC" => Resource::Nproc,
        "RLIMIT_RSS" => Resource::Rss,
        "RLIMIT_RTPRIO" => Resource::Rtprio,
        "RLIMIT_RTTIME" => Resource::Rttime,
        "RLIMIT_SIGPENDING" => Resource::Sigpending,
        "RLIMIT_STACK" => Resource::Stack,
        other => return invalid(format!("process.rlimits: unknown type {other:?}")),
    };
    if limit.soft > limit.hard {
        return invalid(format!("process.rlimits: {} has a soft limit above the hard one", limit.kind));
    }
    let value = |n: u64| (n != u64::MAX).then_some(n);
    Ok((resource, Rlimit { current: value(limit.soft), maximum: value(limit.hard) }))
}
