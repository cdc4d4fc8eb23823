//! Templates that hold a container: everything of it is made but its process.
//!
//! The first sandbox of an image makes its container from the beginning; those after it find it made, when they ask for the
//! same. What differs from one to the next (program, environment, user, streams) comes with the start.

use std::io::{self, Read};
use std::path::PathBuf;

use kapsel_protocol::{api, limits};
use oci_spec::runtime::{Process, Spec};
use protobuf::Message;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::KEY_LENGTH;
use crate::life::guest_spec::GuestSpec;
use crate::seccomp::Filter;

/// The name of a sandbox's container in its guest.
pub const CONTAINER: &str = "main";

/// A container that a template can hold.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// The disk with its root file system, whose name says what is in it.
    pub rootfs: PathBuf,
    /// Where the program of the first sandbox may be: clones find it in memory. Not a part of the key.
    pub programs: Vec<String>,
    request: api::CreateRequest,
}

/// What a template says of the container in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The name of the root file system's disk.
    pub rootfs: String,
    /// SHA-256 of the request that made it, hexadecimal.
    pub request: String,
    /// The first process's id in the guest.
    pub pid: u32,
}

impl Prepared {
    /// What of a container a template can hold; `None` when there is something in it that is one sandbox's own.
    pub fn of(
        guest: &GuestSpec,
        rootfs: Option<&PathBuf>,
        scratch_disk: bool,
        filter: Option<&Filter>,
    ) -> Option<Self> {
        let spec = &guest.spec;
        let writable = spec.root().as_ref().is_some_and(|root| !root.readonly().unwrap_or(false));
        // A read-only root cannot be given its working directory later.
        if scratch_disk || !guest.shares.is_empty() || spec.hostname().is_some() || !writable {
            return None;
        }
        let process = spec.process().as_ref()?;
        let programs = programs(process);
        // Opening a terminal is more than the filter allows; a filter of somebody's own may allow less than a start needs.
        let early = !process.terminal().unwrap_or(false)
            && guest.seccomp.as_ref().is_some_and(crate::spec::is_default_profile)
            && no_hooks(spec);
        let filter = filter.filter(|_| early).cloned().unwrap_or_default();
        let mut spec = spec.clone();
        spec.set_process(None);
        let request = api::CreateRequest {
            id: CONTAINER.into(),
            spec: serde_json::to_vec(&spec).ok()?,
            storages: guest.storages.clone(),
            seccomp: filter.program,
            seccomp_flags: filter.flags,
            ..Default::default()
        };
        Some(Self { rootfs: rootfs?.clone(), programs, request })
    }

    /// Whether the container has its seccomp filter before its process comes.
    pub fn has_filter(&self) -> bool {
        !self.request.seccomp.is_empty()
    }

    /// From the program that wants it built.
    ///
    /// # Errors
    /// When `request` is none.
    pub fn read(rootfs: PathBuf, programs: Vec<String>, request: impl Read) -> io::Result<Self> {
        let mut bytes = Vec::new();
        request.take(limits::MESSAGE_MAX as u64).read_to_end(&mut bytes)?;
        let request = api::CreateRequest::parse_from_bytes(&bytes).map_err(io::Error::other)?;
        Ok(Self { rootfs, programs, request })
    }

    /// For the program that builds it.
    ///
    /// # Errors
    /// When it is too large.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        let bytes = self.request.write_to_bytes().map_err(io::Error::other)?;
        match bytes.len() < limits::MESSAGE_MAX {
            true => Ok(bytes),
            false => Err(io::Error::other("the specification is too large")),
        }
    }

    /// The request that makes the container.
    pub fn request(&self) -> &api::CreateRequest {
        &self.request
    }

    /// What the template says of it.
    pub fn held(&self, pid: u32) -> Held {
        let bytes = self.request.write_to_bytes().unwrap_or_default();
        let rootfs = self.rootfs.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Held { rootfs, request: hex::encode(Sha256::digest(bytes)), pid }
    }

    /// The key of the template that holds it, from that of the empty one.
    pub fn key(&self, empty: &str) -> String {
        let Held { rootfs, request, .. } = self.held(0);
        let mut hash = Sha256::new();
        for part in [empty, &rootfs, &request] {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hex::encode(hash.finalize())[..KEY_LENGTH].to_owned()
    }
}

/// Where a process's program may be, as execvp(3) looks for it.
fn programs(process: &Process) -> Vec<String> {
    let Some(name) = process.args().iter().flatten().next() else { return Vec::new() };
    if name.contains('/') {
        return vec![name.clone()];
    }
    let path = process.env().iter().flatten().rev().find_map(|entry| entry.strip_prefix("PATH="));
    path.into_iter()
        .flat_map(|path| path.split(':'))
        .take(limits::PROGRAMS_MAX)
        .map(|dir| format!("{dir}/{name}"))
        .collect()
}

fn no_hooks(spec: &Spec) -> bool {
    spec.hooks().as_ref().is_none_or(|hooks| hooks.start_container().iter().flatten().next().is_none())
}

impl Held {
    /// Whether both are of the same container.
    pub fn same(&self, other: &Self) -> bool {
        (&self.rootfs, &self.request) == (&other.rootfs, &other.request)
    }
}
