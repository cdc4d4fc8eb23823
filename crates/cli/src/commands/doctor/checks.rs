//! The checks of `kapsel doctor`.

use std::path::Path;

use kapsel_guest::{Kernel, KernelSource};
use kapsel_machine::{Accel, Monitor, probe};
use kapsel_sandbox::host::{Needs, choose};
use kapsel_sandbox::programs;

use super::Check;
use crate::commands::host::Host;
use crate::output::size;

/// Less free space than this will not hold an image and a template.
const LITTLE_SPACE: u64 = 1 << 30;

/// What to do where KVM does not help.
const NO_KVM: &str =
    "use a machine whose processor virtualises for it: bare metal, or a virtual machine with nested KVM";

/// The guest's kernel in the cache; nothing is fetched here.
pub fn kernel(host: &Host) -> (Check, Option<String>) {
    let source = host.config.kernel().map_or(KernelSource::Debian, KernelSource::Path);
    if source == KernelSource::Debian && !has_kernel(&host.paths.data().join("kernels")) {
        let hint = "the first 'kapsel run' or 'kapsel template build' fetches it";
        return (Check::warn("guest kernel", "not fetched yet", hint), None);
    }
    match Kernel::ensure(host.paths.data(), &source, &mut |_| {}) {
        Ok(kernel) => {
            let path = kernel.vmlinux.display().to_string();
            (Check::ok("guest kernel", format!("{} ({path})", kernel.release)), Some(path))
        }
        Err(error) => {
            let hint = "set 'kernel' in the configuration to a vmlinux, or leave it empty for Debian's";
            (Check::fail("guest kernel", error.to_string(), hint), None)
        }
    }
}

fn has_kernel(cache: &Path) -> bool {
    let entries = std::fs::read_dir(cache).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).any(|entry| entry.join("meta.json").exists())
}

/// Which isolation can be had.
pub struct Choice {
    /// `kapsel-vmm`, `qemu-kvm` or `tcg`; `None` when there is no monitor.
    pub isolation: Option<String>,
    /// Why.
    pub reason: String,
    /// What it was made of.
    pub checks: Vec<Check>,
}

/// Measures KVM, looks at the monitors, and lets the library choose, as it does for each sandbox.
pub fn choice(host: &Host) -> Choice {
    let chosen = match choose(&host.paths, &host.config, host.config.isolation(), &Needs::default()) {
        Ok(chosen) => chosen,
        Err(error) => {
            let text = error.to_string();
            let (reason, hint) = text.split_once("; ").unwrap_or((&text, "apt-get install qemu-system-x86"));
            let verdict = probe::kvm(host.paths.state());
            let kvm = match verdict.usable() {
                true => Check::ok("kvm", verdict.reason()),
                false => Check::warn("kvm", verdict.reason(), NO_KVM),
            };
            let checks = vec![kvm, Check::fail("monitor", reason, hint)];
            return Choice { isolation: None, reason: reason.to_owned(), checks };
        }
    };
    let monitor = monitor(&*chosen.monitor);
    let isolation = Some(chosen.isolation.to_string());
    let accel = chosen.accel();
    let reason = chosen.reason;
    match accel {
        Accel::Kvm => Choice { isolation, checks: vec![Check::ok("kvm", reason.clone()), monitor], reason },
        Accel::Tcg => Choice {
            isolation,
            checks: vec![Check::warn("kvm", reason.clone(), NO_KVM), monitor],
            reason: format!(
                "{reason}. QEMU emulates (TCG); QEMU does not call that a security boundary: what holds is the jail \
                 around it."
            ),
        },
    }
}

fn monitor(monitor: &dyn Monitor) -> Check {
    let (name, probe) = (monitor.name(), monitor.probe());
    let path = probe.path.as_ref().map(|path| path.display().to_string()).unwrap_or_default();
    match probe.problems.first() {
        None => Check::ok("monitor", format!("{name} {} ({path})", probe.version.as_deref().unwrap_or("?"))),
        Some(problem) => {
            let (detail, hint) =
                problem.split_once("; ").unwrap_or((problem, "install another version of the monitor"));
            Check::fail("monitor", detail, hint)
        }
    }
}

/// kapsel's own programs.
pub fn programs(host: &Host) -> Check {
    let mut found = Vec::new();
    for name in [programs::SHIM, programs::FSD, programs::AGENT] {
        match programs::find(name, &host.config) {
            Ok(path) => found.push(path),
            Err(error) => {
                let text = error.to_string();
                let (detail, hint) = text.split_once("; ").unwrap_or((&text, "install kapsel again"));
                return Check::fail("programs", detail, hint);
            }
        }
    }
    let places: Vec<String> = found.iter().map(|path| path.display().to_string()).collect();
    Check::ok("programs", places.join(", "))
}

/// Whether sandboxes' processes get a cgroup of their own.
pub fn cgroup() -> Check {
    let obstacles = kapsel_jail::cgroup::obstacles();
    if obstacles.is_empty() {
        return Check::ok("cgroup", "each sandbox gets its own, with limits");
    }
    Check::warn(
        "cgroup",
        format!("not all limits hold on this side: {}", obstacles.join(", ")),
        "run as root, or have systemd delegate a cgroup to you (Delegate=yes)",
    )
}

/// Whether the jail can be built without root.
pub fn user_namespaces() -> Check {
    if rustix::process::geteuid().is_root() {
        return Check::ok("user namespaces", "not needed: root gives each sandbox a user of its own");
    }
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let most = number("/proc/sys/user/max_user_namespaces").unwrap_or(0);
    let unprivileged = number("/proc/sys/kernel/unprivileged_userns_clone").unwrap_or(1);
    if most == 0 || unprivileged == 0 {
        return Check::fail(
            "user namespaces",
            "users other than root cannot make any",
            "sysctl user.max_user_namespaces=10000 kernel.unprivileged_userns_clone=1, or run as root",
        );
    }
    Check::ok("user namespaces", format!("at most {most}"))
}

/// Whether the jail has its second wall.
pub fn landlock() -> Check {
    match kapsel_jail::landlock_version() {
        0 => Check::warn(
            "landlock",
            "not in this kernel",
            "the jail does without; a kernel with CONFIG_SECURITY_LANDLOCK and lsm=landlock has it",
        ),
        version => Check::ok("landlock", format!("version {version}")),
    }
}

/// Whether system calls can be filtered.
pub fn seccomp() -> Check {
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail").unwrap_or_default();
    if actions.split_whitespace().any(|action| action == "kill_process") {
        return Check::ok("seccomp", "filters for the monitor and for shared directories");
    }
    Check::fail(
        "seccomp",
        "this kernel cannot filter system calls",
        "use a kernel with CONFIG_SECCOMP_FILTER",
    )
}

/// Free space where things are kept.
pub fn space(host: &Host) -> Vec<Check> {
    let dirs = [("space for images", host.paths.data()), ("space for state", host.paths.state())];
    dirs.into_iter().map(|(name, dir)| space_in(name, dir)).collect()
}

fn space_in(name: &'static str, dir: &Path) -> Check {
    // Before the first run the directory is not there: the one above it is on the same file system.
    let there = dir.ancestors().find(|dir| dir.exists()).unwrap_or(Path::new("/"));
    let free = match rustix::fs::statvfs(there) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(error) => {
            return Check::fail(name, format!("{}: {error}", dir.display()), "choose another with --root");
        }
    };
    let detail = format!("{} free in {}", size::bytes(free), dir.display());
    // State is small: sockets, records and bounded logs.
    let little = if name == "space for images" { LITTLE_SPACE } else { LITTLE_SPACE / 16 };
    match free < little {
        true => Check::warn(name, detail, "make room, or choose another place with --root"),
        false => Check::ok(name, detail),
    }
}
