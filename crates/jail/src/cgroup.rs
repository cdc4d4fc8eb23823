//! Cgroups.

use std::os::fd::OwnedFd;

use crate::error::Result;

/// A cgroup.
#[derive(Debug, Clone)]
pub struct Cgroup {}

/// Open descriptors through which a child enters a cgroup.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    /// The v2 directory, for `CLONE_INTO_CGROUP`.
    pub v2: Option<OwnedFd>,
    /// The `tasks` files of the v1 hierarchies.
    pub v1: Vec<OwnedFd>,
}

impl Cgroup {
    pub(crate) fn entry(&self) -> Result<Entry> {
        Ok(Entry::default())
    }
}
