//! The agent: process 1 of the guest.
//!
//! From the outside in:
//! - [`init`] makes the guest ready; [`session`] serves one session with the host after the other; [`rpc`] is the API.
//! - [`sandbox`] is the guest as a whole; [`container`] makes and watches containers; [`storage`] mounts their file systems.
//! - [`stdio`] moves the bytes of processes; [`files`] those of copies, packed by [`archive`].
//! - [`reaper`] waits for every child; [`quiesce`] makes the guest small before it is saved.
//! - [`program`] is what a container's process finds when it executes the agent.
//!
//! One thread, one event loop: a fork of a single-threaded process may do anything, which is what lets a container's first
//! process inherit its plan. Only one that a template holds, born before it was known what to run, is told.

pub mod archive;
pub mod container;
pub mod error;
pub mod files;
pub mod init;
pub mod names;
pub mod net;
pub mod oci;
pub mod phases;
pub mod program;
pub mod quiesce;
pub mod read_ahead;
pub mod reaper;
pub mod rpc;
pub mod sandbox;
pub mod session;
pub mod stats;
pub mod stdio;
pub mod storage;
pub mod sys;
