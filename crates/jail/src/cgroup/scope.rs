//! Scopes: cgroups that systemd makes for processes which it has not started, `org.freedesktop.systemd1(5)`. It is asked by its own
//! `busctl`, which is wherever it is.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::{Limits, failed, retried};
use crate::error::Result;

/// Exists where systemd is process 1 (sd_booted(3)).
const BOOTED: &str = "/run/systemd/system";
/// The longest name of a unit.
const UNIT_MAX: usize = 255;
/// How long systemd may take to answer.
const ANSWER: &str = "--timeout=25";
/// How long it may take to move a process once it has answered.
const MOVE: Duration = Duration::from_secs(25);

/// A scope in a slice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    slice: String,
    unit: String,
}

impl Scope {
    /// Whether systemd runs.
    pub(super) fn possible() -> bool {
        Path::new(BOOTED).is_dir()
    }

    /// From the parts of `SLICE:PREFIX:NAME`; an empty slice is `system.slice`, as runc has it.
    pub(super) fn new(slice: &str, prefix: &str, name: &str) -> Result<Self, &'static str> {
        let plain = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b":-_.\\@".contains(&b));
        let slice = if slice.is_empty() { "system.slice" } else { slice };
        let Some(stem) = slice.strip_suffix(".slice") else { return Err("its slice does not end in .slice") };
        if !plain(slice) || slice.len() > UNIT_MAX || (stem != "-" && stem.split('-').any(str::is_empty)) {
            return Err("its slice is none that systemd could have");
        }
        if name.is_empty() {
            return Err("the scope has no name");
        }
        if name.ends_with(".slice") {
            return Err("it names a slice, and a container has a scope");
        }
        let unit = match prefix {
            "" => format!("{name}.scope"),
            prefix => format!("{prefix}-{name}.scope"),
        };
        if !plain(&unit) || unit.starts_with('.') || unit.len() > UNIT_MAX {
            return Err("its scope is no unit that systemd could have");
        }
        Ok(Self { slice: slice.to_owned(), unit })
    }

    pub(super) fn unit(&self) -> &str {
        &self.unit
    }

    /// Where it is: a slice `a-b.slice` is in `a.slice` (systemd.slice(5)).
    pub(super) fn path(&self) -> PathBuf {
        let stem = self.slice.trim_end_matches(".slice");
        let mut path = PathBuf::new();
        if stem != "-" {
            let dashes = stem.match_indices('-').map(|(at, _)| at);
            path.extend(dashes.map(|at| format!("{}.slice", &stem[..at])));
            path.push(&self.slice);
        }
        path.join(&self.unit)
    }

    /// Makes it around this process. Another of the name that has failed makes room.
    pub(super) fn start(&self) -> Result<()> {
        // One that is not there, or is well, is not reset, and the start says what is wrong.
        let _ = self.call("ResetFailedUnit", &["s", &self.unit]);
        let pid = std::process::id().to_string();
        let args = [
            &["ssa(sv)a(sa(sv))", &self.unit, "fail", "6"][..],
            &["Description", "s", "a container in a virtual machine, by kapsel"],
            &["Slice", "s", &self.slice],
            &["PIDs", "au", "1", &pid],
            // The controllers are at our disposal, and what is below is ours.
            &["Delegate", "b", "true"],
            &["DefaultDependencies", "b", "false"],
            &["CollectMode", "s", "inactive-or-failed"],
            &["0"],
        ];
        self.call("StartTransientUnit", &args.concat())?;
        // The answer is that of a job.
        retried(MOVE, || match std::fs::read_to_string("/proc/self/cgroup") {
            Ok(text) if text.lines().any(|line| line.ends_with(&format!("/{}", self.unit))) => Ok(()),
            Ok(_) => Err(self.failed(io::Error::other("systemd has not moved this process into it"))),
            Err(error) => Err(self.failed(error)),
        })
    }

    /// Tells systemd of limits.
    pub(super) fn limit(&self, limits: &Limits) -> Result<()> {
        let properties = properties(limits);
        if properties.is_empty() {
            return Ok(());
        }
        let count = properties.len().to_string();
        let mut args = vec!["sba(sv)", self.unit.as_str(), "true", &count];
        for (name, signature, value) in &properties {
            args.extend([*name, *signature]);
            args.extend(value.split(' '));
        }
        self.call("SetUnitProperties", &args)
    }

    /// Ends it. It goes by itself with its last process; one that has gone is no error.
    pub(super) fn stop(&self) -> Result<()> {
        if !Self::possible() {
            return Ok(());
        }
        match self.call("StopUnit", &["ss", &self.unit, "replace"]) {
            Err(error) if error.to_string().contains("not loaded") => Ok(()),
            other => other,
        }
    }

    fn call(&self, method: &str, args: &[&str]) -> Result<()> {
        let output = Command::new("busctl")
            .env("PATH", "/usr/bin:/bin")
            .args(["--system", "--quiet", ANSWER, "call", "org.freedesktop.systemd1"])
            .args(["/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager", method])
            .args(args)
            .output()
            .map_err(|error| self.failed(error))?;
        match output.status.success() {
            true => Ok(()),
            false => {
                let told = String::from_utf8_lossy(&output.stderr).trim().to_owned();
                Err(self.failed(io::Error::other(format!("systemd refused {method}: {told}"))))
            }
        }
    }

    fn failed(&self, source: io::Error) -> crate::Error {
        failed(Path::new(&self.unit), "set up", source)
    }
}

/// Limits as properties of a unit (systemd.resource-control(5)): name, signature, value as `busctl` takes it.
fn properties(limits: &Limits) -> Vec<(&'static str, &'static str, String)> {
    let mut properties = Vec::new();
    if let Some(bytes) = limits.memory {
        properties.push(("MemoryMax", "t", bytes.to_string()));
    }
    if let Some(cpus) = limits.cpu {
        // Microseconds in a second; all ones are no limit.
        let quota = if cpus.is_finite() { (cpus * 1e6) as u64 } else { u64::MAX };
        properties.push(("CPUQuotaPerSecUSec", "t", quota.to_string()));
    }
    if let Some(weight) = limits.weight() {
        properties.push(("CPUWeight", "t", weight.to_string()));
    }
    for (name, list) in [("AllowedCPUs", &limits.cpus), ("AllowedMemoryNodes", &limits.mems)] {
        if let Some(bits) = list.as_deref().and_then(bit_mask) {
            let bytes: String = bits.iter().map(|byte| format!(" {byte}")).collect();
            properties.push((name, "ay", format!("{}{bytes}", bits.len())));
        }
    }
    if let Some(pids) = limits.pids {
        properties.push(("TasksMax", "t", pids.to_string()));
    }
    properties
}

/// A list such as `0-2,5` as bits, the lowest first. `None` when it is none; the kernel says so.
fn bit_mask(list: &str) -> Option<Vec<u8>> {
    /// More processors than Linux knows.
    const MOST: usize = 8192;
    let mut bits = Vec::new();
    for range in list.split(',') {
        let (from, to) = range.split_once('-').unwrap_or((range, range));
        let (from, to): (usize, usize) = (from.trim().parse().ok()?, to.trim().parse().ok()?);
        if to >= MOST {
            return None;
        }
        for bit in from..=to {
            if bits.len() <= bit / 8 {
                bits.resize(bit / 8 + 1, 0);
            }
            bits[bit / 8] |= 1 << (bit % 8);
        }
    }
    Some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_properties() {
        let limits = Limits {
            memory: Some(1 << 20),
            cpu: Some(1.5),
            shares: Some(2),
            cpus: Some("0-1,9".into()),
            mems: None,
            pids: Some(7),
        };
        let shown: Vec<String> = properties(&limits).iter().map(|(n, s, v)| format!("{n} {s} {v}")).collect();
        assert_eq!(
            shown,
            [
                "MemoryMax t 1048576",
                "CPUQuotaPerSecUSec t 1500000",
                "CPUWeight t 1",
                "AllowedCPUs ay 2 3 2",
                "TasksMax t 7"
            ]
        );
        assert_eq!(bit_mask("0-99999999999"), None);
        assert_eq!(bit_mask("x"), None);
    }

    #[test]
    fn the_root_slice_is_the_root() {
        assert_eq!(Scope::new("-.slice", "", "c").unwrap().path(), Path::new("c.scope"));
    }
}
