//! Published ports: a jailed process that carries what comes to them into the sandbox.

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use kapsel_jail::{Cgroup, profiles};

use super::Error;
use crate::{
    config::Config,
    paths::{Bundle, Id},
    programs,
    publish::{self, Publish},
};

/// Ports of the host that are this sandbox's: nobody else gets them while this is there.
#[derive(Debug, Default)]
pub struct Ports {
    bound: Vec<(Publish, OwnedFd)>,
}

/// What carries. Dropping it ends it.
#[derive(Debug)]
pub struct Forwarder {
    child: kapsel_jail::Child,
}

impl Ports {
    /// Takes ports of the host.
    ///
    /// # Errors
    /// When one cannot be had; then none is taken.
    pub fn take(wanted: &[Publish]) -> Result<Self, Error> {
        if wanted.len() > publish::MAX {
            return Err(Error::Invalid(format!("at most {} ports can be published", publish::MAX)));
        }
        let bound = wanted.iter().map(Publish::bind).collect::<Result<_, _>>()?;
        Ok(Self { bound })
    }

    /// Which ones, with their numbers.
    pub fn list(&self) -> Vec<Publish> {
        self.bound.iter().map(|(port, _)| *port).collect()
    }

    /// Has a process carry what comes to them to `address`; none where there are none.
    ///
    /// # Errors
    /// When the process is not installed, or cannot be confined or started.
    pub fn forward(
        self,
        address: Ipv4Addr,
        bundle: &Bundle,
        id: &Id,
        config: &Config,
        cgroup: Option<&Cgroup>,
    ) -> Result<Option<Forwarder>, Error> {
        if self.bound.is_empty() {
            return Ok(None);
        }
        let failed =
            |reason: String| Error::Helper { what: "the process that carries its ports".into(), reason };
        let program = programs::find(programs::FORWARD, config).map_err(|e| Error::Missing(e.to_string()))?;
        let mut jail = profiles::forward(&program, id.as_str()).map_err(|e| failed(e.to_string()))?;
        for (n, (port, socket)) in self.bound.into_iter().enumerate() {
            let at = FIRST_SOCKET + n as i32;
            jail = jail.arg(format!("{}:{at}={address}:{}", port.protocol, port.port)).fd(socket, at);
        }
        if let Some(cgroup) = cgroup {
            jail = jail.cgroup(cgroup);
        }
        let log = File::options().append(true).open(bundle.shim_log()).map_err(|e| failed(e.to_string()))?;
        let child = jail.stderr(log.into()).spawn().map_err(|e| failed(e.to_string()))?;
        Ok(Some(Forwarder { child }))
    }
}

/// The number of the first socket in the process.
const FIRST_SOCKET: i32 = 3;

impl Forwarder {
    /// Its process on the host.
    pub fn pid(&self) -> u32 {
        self.child.pid()
    }

    /// What becomes readable when it ends.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn watch(&self) -> std::io::Result<OwnedFd> {
        self.child.pidfd().try_clone_to_owned()
    }
}
