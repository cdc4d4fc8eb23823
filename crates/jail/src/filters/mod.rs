//! The seccomp allow-lists. What is not on a list kills the process ([`Exit::Signal`](crate::Exit::Signal) with SIGSYS), in
//! debug builds too; [`denied_call`] tells which call it was.
//!
//! They were found by running the real programs through all that kapsel does with them, and only x86-64 calls are on them: a 32-bit
//! call is killed by its architecture, an x32 one by its number.

mod forward;
mod fsd;
mod qemu;

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::error::{Error, Result};
use crate::seccomp;

pub use forward::forward;
pub use fsd::{fsd, lock_down_fsd};
pub use qemu::qemu;

/// A list in the making. Compiles to: an error for calls that are politely refused, then the list, then death.
struct AllowList {
    name: &'static str,
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    refused: Vec<(c_long, i32)>,
    broken: Option<seccompiler::BackendError>,
}

/// A condition on one argument of a call. Only the low 32 bits are compared: the kernel takes them as an int.
#[derive(Clone, Copy)]
struct Arg(u8);

impl Arg {
    /// Equal to a value.
    fn is(self, value: u64) -> (u8, SeccompCmpOp, u64) {
        (self.0, SeccompCmpOp::Eq, value)
    }

    /// All of these bits set.
    fn with(self, bits: u64) -> (u8, SeccompCmpOp, u64) {
        (self.0, SeccompCmpOp::MaskedEq(bits), bits)
    }
}

impl AllowList {
    fn new(name: &'static str) -> AllowList {
        AllowList { name, rules: BTreeMap::new(), refused: Vec::new(), broken: None }
    }

    /// Allows calls with any arguments.
    fn allow(mut self, calls: &[c_long]) -> AllowList {
        for call in calls {
            self.rules.insert(*call, Vec::new());
        }
        self
    }

    /// Allows a call when all conditions hold; several rules for one call are alternatives.
    fn allow_if(mut self, call: c_long, conditions: &[(u8, SeccompCmpOp, u64)]) -> AllowList {
        let rule = conditions
            .iter()
            .map(|(arg, op, value)| SeccompCondition::new(*arg, SeccompCmpArgLen::Dword, op.clone(), *value))
            .collect::<Result<Vec<_>, _>>()
            .and_then(SeccompRule::new);
        match rule {
            Ok(rule) => self.rules.entry(call).or_default().push(rule),
            Err(error) => self.broken = Some(error),
        }
        self
    }

    /// Allows a call when an argument has one of these values.
    fn allow_values(self, call: c_long, arg: u8, values: &[u64]) -> AllowList {
        values.iter().fold(self, |list, value| list.allow_if(call, &[Arg(arg).is(*value)]))
    }

    /// Answers calls with an error, as a kernel that does not have them would: libraries try them, and do without.
    fn refuse(mut self, errno: i32, calls: &[c_long]) -> AllowList {
        self.refused.extend(calls.iter().map(|call| (*call, errno)));
        self
    }

    fn compile(self) -> Result<BpfProgram> {
        let failed = |source| Error::Filter { name: self.name, source };
        if let Some(error) = self.broken {
            return Err(failed(error));
        }
        let (otherwise, listed) = (SeccompAction::KillProcess, SeccompAction::Allow);
        let filter = SeccompFilter::new(self.rules, otherwise, listed, TargetArch::x86_64).map_err(failed)?;
        let program = BpfProgram::try_from(filter).map_err(failed)?;
        Ok(seccomp::with_errors(&program, &self.refused))
    }
}

/// A thread, and not a process: what glibc's `pthread_create` asks of clone(2). clone3(2) cannot be filtered, as its flags are in memory; it
/// is refused with ENOSYS, upon which glibc uses clone.
const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

/// The system call that the kernel killed the process `pid` for, from the kernel's log. `None` if the log cannot be read, no longer has it, or
/// has not got it (the kernel logs a few of these in a second, and those of processes that are audited by a daemon elsewhere).
#[must_use]
pub fn denied_call(pid: u32) -> Option<u32> {
    use std::io::Read;
    use std::os::unix::fs::OpenOptionsExt;
    let mut log =
        std::fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg").ok()?;
    let mut found = None;
    let mut record = [0; 8192];
    // Each read returns one record; EPIPE means that older ones were overwritten while we read.
    loop {
        match log.read(&mut record) {
            Ok(0) => return found,
            Ok(len) => {
                let text = String::from_utf8_lossy(record.get(..len).unwrap_or_default());
                found = denied_in(&text, pid).or(found);
            }
            Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {}
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(_) => return found,
        }
    }
}

/// The call number in an audit record of type 1326 (`AUDIT_SECCOMP`) about `pid`.
fn denied_in(record: &str, pid: u32) -> Option<u32> {
    let fields = record.split_once("type=1326 ")?.1;
    let field =
        |key: &str| fields.split_whitespace().find_map(|word| word.strip_prefix(key)?.parse::<u32>().ok());
    (field("pid=")? == pid).then(|| field("syscall="))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn audit_records_are_understood() {
        let record = "5,912,1234,-;audit: type=1326 audit(1700000000.1:2): auid=0 uid=9 gid=9 ses=1 pid=77 \
                      comm=\"qemu\" exe=\"/usr/bin/qemu\" sig=31 arch=c000003e syscall=101 compat=0 ip=0x7f code=0x80000000";
        assert_eq!(denied_in(record, 77), Some(101));
        assert_eq!(denied_in(record, 7), None);
        assert_eq!(denied_in("6,1,1,-;usb 1-1: new device", 77), None);
    }

    #[test]
    fn the_filters_compile_and_fit() {
        for program in [qemu().unwrap(), fsd().unwrap(), forward().unwrap()] {
            assert!((50..2000).contains(&program.len()), "{} instructions", program.len());
        }
    }
}
