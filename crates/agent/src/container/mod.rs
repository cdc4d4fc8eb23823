//! Containers: from an OCI specification to processes in namespaces.
//!
//! # Why not libcontainer
//! A sandbox restored from a template under emulation has 50 ms for all of create, start and exit, and nothing in its translation
//! cache, so what counts is how little *different* code runs. youki's libcontainer forks three times (main, intermediate, init),
//! passes JSON between the stages, and brings libseccomp, chrono, regex and procfs along. Here the plan is worked out and checked
//! before anything is done ([`plan`]), one clone3(2) makes all the namespaces at once, in the right cgroup and with a pidfd, and
//! the child ([`child`]) inherits the plan by being a fork: nothing is serialised. The exception is
//! a first process that comes after its container ([`order`]). Device rules and cgroup controllers are
//! put in force when the guest boots, before it becomes a template ([`cgroup`]).
//!
//! # Order of trust
//! [`child`] is the one file to read for what happens when. Paths in a root file system go through [`root`].

pub mod capabilities;
pub mod cgroup;
pub mod child;
pub mod copy_up;
pub mod device_rules;
pub mod devices;
pub mod finish;
pub mod hooks;
pub mod lifecycle;
pub mod limits;
pub mod mounts;
pub mod options;
pub mod order;
pub mod plan;
pub mod process;
pub mod report;
pub mod root;
pub mod running;
pub mod terminal;
pub mod user;
