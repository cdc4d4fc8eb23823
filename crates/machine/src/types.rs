//! What a monitor and a machine tell.

use std::path::PathBuf;
use std::time::Duration;

/// Whether a monitor can be used here.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Probe {
    /// The program, when found.
    pub path: Option<PathBuf>,
    /// Its version.
    pub version: Option<String>,
    /// Why it cannot be used, and what to do; empty when it can.
    pub problems: Vec<String>,
}

impl Probe {
    /// Whether machines can be started.
    pub fn usable(&self) -> bool {
        self.problems.is_empty()
    }
}

/// What machines of a monitor can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Capabilities {
    /// [`crate::Machine::snapshot`] and [`crate::Monitor::restore`].
    pub snapshot: bool,
    /// [`crate::Machine::attach`].
    pub attach: bool,
    /// The most shares and network interfaces together.
    pub places: usize,
    /// [`crate::Accel::Tcg`].
    pub tcg: bool,
    /// The most processors.
    pub vcpus: u32,
    /// The most memory, in MiB.
    pub memory_mib: u32,
}

/// A saved machine: `memory`, `state` and `meta.json` in a directory.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// The directory.
    pub dir: PathBuf,
}

/// One phase of a machine's start.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Phase {
    /// Its name, such as `monitor` (process up and its control connection answering), `restore`, `memory`, `resume`, `agent`.
    pub name: String,
    /// How long it took.
    pub took: Duration,
}

/// Memory of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct Stats {
    /// What the guest was given, in bytes.
    pub guest_memory: u64,
    /// What the guest has now, after the balloon, in bytes.
    pub guest_actual: u64,
    /// The monitor's resident set, in bytes, guest memory included.
    pub rss: u64,
    /// Its proportional share, in bytes: pages that clones share are divided among them.
    pub pss: u64,
}

/// How a machine ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered itself off or reset itself.
    Shutdown,
    /// The guest's kernel panicked: why, in its words.
    Panic(String),
    /// The monitor was killed by a signal.
    Killed(i32),
    /// The monitor failed: its exit code and last lines on stderr.
    Error {
        /// The exit code.
        code: i32,
        /// Its last lines on stderr.
        stderr: String,
    },
}

impl std::fmt::Display for ExitReason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ExitReason::Shutdown => write!(f, "shut down"),
            ExitReason::Panic(why) => write!(f, "the guest's kernel panicked: {why}"),
            ExitReason::Killed(signal) => write!(f, "killed by signal {signal}"),
            ExitReason::Error { code, .. } => write!(f, "exit code {code}"),
        }
    }
}
