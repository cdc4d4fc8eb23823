//! The life of a sandbox: the one place where image, machine and agent meet.
//!
//! Two sides. A person's command makes a [bundle](paths::Bundle) from a [specification](spec), [launches](launch) a shim
//! for it and speaks to that by its [client]; names and lists are in the [registry] and the [listing], and what a killed
//! shim left is [cleaned up](cleanup) by whoever comes next.

pub mod annotations;
pub mod attach;
pub mod cgroup;
pub mod cleanup;
pub mod client;
pub mod config;
pub mod engine;
pub mod host;
pub mod launch;
pub mod life;
pub mod listing;
pub mod logs;
mod names;
pub mod network;
pub mod owner;
pub mod paths;
pub mod programs;
pub mod publish;
pub mod pump;
pub mod record;
pub mod registry;
pub mod removal;
pub mod seccomp;
pub mod signals;
pub mod spec;
pub mod standby;
pub mod stdio;
pub mod streams;
pub mod template;
pub mod timings;
