//! containerd's side: this program as it is called by containerd, and the process that answers for its containers.
//!
//! | file | idea |
//! | --- | --- |
//! | `flags` | the command line, which is Go's |
//! | `start`, `delete`, `info` | the calls that end at once |
//! | `daemon` | the life of the process that stays |
//! | `service` | the Task API for the containers of that process |
//! | `tasks` | the containers, from containerd's bundle to a sandbox and back |
//! | `pod` | which containers share one |
//! | `sandbox`, `cri`, `pod_bundle` | the Sandbox API for their pod, what is said of it, and what a pod of that is |
//! | `events` | what containerd is told, in order |
//! | `rootfs` | the mounts of a root file system |

mod cri;
mod daemon;
mod delete;
mod events;
pub mod flags;
mod info;
mod pod;
mod pod_bundle;
mod rootfs;
mod sandbox;
mod service;
mod start;
mod tasks;

use std::path::Path;

use kapsel_sandbox::{config::Config, paths::Paths};

use flags::{Action, Flags};

/// This machine as kapsel sees it.
pub struct Host {
    /// Where kapsel keeps things.
    pub paths: Paths,
    /// The configuration in force.
    pub config: Config,
}

/// Carries out a call that ends at once.
pub fn call(host: &Host, flags: &Flags, action: Action) -> anyhow::Result<()> {
    match action {
        Action::Start => start::start(host, flags),
        Action::Delete => delete::delete(host, flags),
        Action::Info => info::info(),
    }
}

pub use daemon::serve;

/// Where in containerd's bundle it is written which sandbox is the container's.
fn sandbox_file(bundle: &Path) -> std::path::PathBuf {
    bundle.join("kapsel-sandbox")
}
