//! A microVM monitor on KVM: the machine, its devices' places, its processors, and the way from a configuration to a
//! running guest ([`builder::build`] is the sequence, top to bottom).

pub mod api;
pub mod backends;
pub mod boot_timer;
pub mod builder;
mod bus;
pub mod config;
pub mod confine;
mod console;
mod events;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod hotplug;
pub mod kernel;
mod keyboard;
pub mod log;
pub mod mac;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod mmds;
pub mod serial;
pub mod snapshot;
mod vcpu;
pub mod x86;
