//! Confines a child process: namespaces, `pivot_root`, capabilities, seccomp, Landlock, rlimits, cgroup.
//!
//! Used for the monitors and the file servers: programs that face a hostile guest. A [`Jail`] describes what such a process
//! has; all else it has not. [`Jail::spawn`] returns when the program runs, or with the step that failed.
//!
//! | file | idea |
//! | --- | --- |
//! | `jail` | the description |
//! | `plan` | the description turned into strings, numbers and descriptors, before the clone |
//! | `spawn` | clone, and hearing from the child |
//! | `child` | the confinement itself, in order: **the file to audit** |
//! | `cgroup` | cgroups of v1, v2 and both |
//! | `filters` | the seccomp allow-lists |
//! | `profiles` | the jails of the monitors and of kapsel-fsd |

mod caps;
pub mod cgroup;
mod child;
mod elf;
mod error;
pub mod filters;
mod identity;
mod jail;
mod plan;
mod process;
pub mod profiles;
mod ruleset;
mod seccomp;
mod spawn;
pub mod submounts;
mod sys;

pub use caps::{Cap, CapSet};
pub use cgroup::Cgroup;
pub use error::{Error, Result, Step};
pub use filters::denied_call;
pub use identity::{FIRST_UID, Identity, UID_COUNT};
pub use jail::{Jail, Namespaces, Resource};
pub use process::{Child, Exit};
pub use ruleset::landlock_version;
pub use seccompiler::BpfProgram;
