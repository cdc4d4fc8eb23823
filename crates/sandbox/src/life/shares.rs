//! Directories and files of the host in the guest: one jailed `kapsel-fsd` for each directory, and one for files of each kind.

use std::{
    fs::File,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    sync::Arc,
};

use kapsel_jail::{Cgroup, profiles};
use kapsel_machine::Share;
use tokio::io::{Interest, unix::AsyncFd};

use super::{Error, guest_spec::SharedPath};
use crate::{
    config::Config,
    paths::{Bundle, Id},
    programs,
};

/// The running servers of one sandbox. Dropping them kills them.
#[derive(Debug, Default)]
pub struct Servers {
    servers: Vec<Server>,
}

#[derive(Debug)]
struct Server {
    source: String,
    child: kapsel_jail::Child,
}

impl Servers {
    /// Starts a server for each of `wanted` and connects to it.
    ///
    /// # Errors
    /// When a source is missing, or a server cannot be confined or started.
    pub fn start(
        wanted: &[SharedPath],
        bundle: &Bundle,
        id: &Id,
        config: &Config,
        cgroup: Option<&Cgroup>,
    ) -> Result<(Self, Vec<Share>), Error> {
        let mut servers = Self::default();
        let mut shares = Vec::new();
        if wanted.is_empty() {
            return Ok((servers, shares));
        }
        let program = programs::find(programs::FSD, config).map_err(|e| Error::Missing(e.to_string()))?;
        for path in wanted {
            let (child, connection) = serve(&program, path, bundle, id, cgroup)?;
            servers.servers.push(Server { source: path.shown(), child });
            shares.push(Share { tag: path.tag.clone(), socket: Arc::new(connection) });
        }
        Ok((servers, shares))
    }

    /// Process ids on the host.
    pub fn pids(&self) -> Vec<u32> {
        self.servers.iter().map(|server| server.child.pid()).collect()
    }

    /// What tells that a server died, for each: the shared source and a descriptor that becomes readable.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn watches(&self) -> std::io::Result<Vec<(String, OwnedFd)>> {
        self.servers
            .iter()
            .map(|server| Ok((server.source.clone(), server.child.pidfd().try_clone_to_owned()?)))
            .collect()
    }
}

/// Waits until the process of a pidfd has ended.
pub async fn ended(pidfd: OwnedFd) {
    // SAFETY: an `OwnedFd` is the same open descriptor for all of its life, and the `AsyncFd` owns it.
    match unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) } {
        Ok(pidfd) => drop(pidfd.readable().await),
        // Without the reactor nothing works any more; better no watch than a false alarm.
        Err(error) => {
            tracing::error!(%error, "cannot watch a process");
            std::future::pending::<()>().await;
        }
    }
}

fn serve(
    program: &Path,
    path: &SharedPath,
    bundle: &Bundle,
    id: &Id,
    cgroup: Option<&Cgroup>,
) -> Result<(kapsel_jail::Child, OwnedFd), Error> {
    let failed =
        |reason: String| Error::Helper { what: format!("the file server of {}", path.shown()), reason };
    // A name is needed for a moment only: to be connected to.
    let socket = bundle.machine_dir().join(format!("{}.sock", path.tag));
    let listener = UnixListener::bind(&socket).map_err(|e| failed(e.to_string()))?;
    let connection = UnixStream::connect(&socket).map_err(|e| failed(e.to_string()));
    let _ = std::fs::remove_file(&socket);
    let connection = connection?;
    let share = profiles::Share {
        sources: &path.sources,
        read_only: path.read_only,
        follow: path.follow,
        tag: Some(&path.tag),
    };
    let jail =
        profiles::fsd(program, share, listener.into(), id.as_str()).map_err(|e| failed(e.to_string()))?;
    let jail = match cgroup {
        Some(cgroup) => jail.cgroup(cgroup),
        None => jail,
    };
    let log = File::options().append(true).open(bundle.shim_log()).map_err(|e| failed(e.to_string()))?;
    let child = jail.stderr(log.into()).spawn().map_err(|e| failed(e.to_string()))?;
    Ok((child, connection.into()))
}
