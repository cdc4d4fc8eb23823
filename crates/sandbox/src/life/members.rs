//! Containers that are added to a pod's sandbox while its machine runs.

use std::sync::Arc;

use kapsel_protocol::limits;
use oci_spec::runtime::Spec;

use super::{
    Container, Error, Guest, IoRequest, Sandbox, State, Wanted,
    guest_spec::{self, GuestSpec, Rootfs, Sharing},
    lock,
    start::{create_request, root},
};
use crate::{
    client::RootfsMount,
    seccomp,
    stdio::{Streams, announce, token},
    template,
};

/// A container to be added.
#[derive(Clone, Debug)]
pub struct Member {
    /// Unique in the sandbox.
    pub name: String,
    /// As an engine's bundle has it, once it is [checked](crate::engine).
    pub spec: Spec,
    /// A directory.
    pub rootfs: RootfsMount,
    /// The first process's streams.
    pub io: IoRequest,
    /// It is in the main container's pid namespace instead of its own.
    pub shares_pids: bool,
}

impl Sandbox {
    /// Adds a container. On an error nothing of it is left.
    ///
    /// # Errors
    /// When the sandbox is no pod's, has ended, or cannot give what is asked for.
    pub async fn add(self: &Arc<Self>, member: Member) -> Result<Arc<Container>, Error> {
        self.guest()?;
        if !self.wishes.pod {
            return Err(Error::State("the sandbox is that of one container, and no pod's".into()));
        }
        let name = &member.name;
        if !limits::valid_id(name) || name == template::CONTAINER {
            return Err(Error::Invalid(format!("{name:?} is no name for a container")));
        }
        {
            let mut members = lock(&self.members);
            if members.contains_key(name) {
                return Err(Error::AlreadyExists(format!("there is a container {name} already")));
            }
            members.insert(name.clone(), None);
        }
        let container = Container::added(Arc::downgrade(self), name, &member.spec);
        let made = self.make(&container, &member).await;
        let mut members = lock(&self.members);
        match made {
            Ok(()) => {
                members.insert(name.clone(), Some(container.clone()));
                Ok(container)
            }
            Err(error) => {
                members.remove(name);
                drop(members);
                self.release(&container);
                Err(error)
            }
        }
    }

    async fn make(&self, container: &Arc<Container>, member: &Member) -> Result<(), Error> {
        let plan = member.io.plan()?;
        container.init.want(Wanted { plan: plan.clone(), uris: member.io.uris(), process: None });
        let (rootfs, disk) = root(std::slice::from_ref(&member.rootfs))?;
        if let Some(disk) = disk {
            return Err(Error::Invalid(format!(
                "the root file system {} is a disk, which a machine that runs cannot be given; a pod's containers have directories",
                disk.display()
            )));
        }
        let guest_spec = self.furnish(container, member, &rootfs)?;
        let profile = guest_spec.seccomp.as_ref();
        let filter =
            profile.map(|profile| seccomp::compile(profile, &self.paths.seccomp_cache())).transpose()?;
        let token = token();
        let create = create_request(&container.name, &guest_spec, filter, &plan, announce(&plan, token))?;
        let Guest { agent, channel, .. } = self.guest()?;
        let streams = Streams::connect(&**channel, token, &plan, &container.init.hub, None);
        let (created, streams) = tokio::join!(agent.create(&create), streams);
        let pid = created?;
        container.init.connected(streams?).await;
        let _ = container.pid.set(pid);
        container.init.set(State::Created);
        // The end may have come meanwhile, and has not seen it.
        self.guest().map(drop)
    }

    /// The specification for the guest, and what it names of the host where the guest finds it.
    fn furnish(&self, container: &Container, member: &Member, rootfs: &Rootfs) -> Result<GuestSpec, Error> {
        let mut host = lock(&self.host);
        let tree = host.tree.as_mut().ok_or_else(|| self.why_ended())?;
        let before = tree.places.clone();
        let sharing = Sharing::Pod(&mut tree.places);
        let is_file = |path: &std::path::Path| path.is_file();
        let guest = guest_spec::translate(&member.spec, &container.name, rootfs, false, sharing, is_file);
        let mut guest = guest.inspect_err(|_| tree.places = before)?;
        *lock(&container.places) = guest.places.clone();
        if member.shares_pids {
            let pid = self.main.pid.get().ok_or_else(|| self.why_ended())?;
            guest.join_pids(*pid);
        }
        tree.fill()?;
        Ok(guest)
    }

    /// Removes a container that does not run. A guest that does not follow keeps nothing of the host's.
    pub(super) async fn remove(&self, container: &Container) {
        if let Ok(guest) = self.guest() {
            match guest.agent.delete(&container.name, "").await {
                // What was never started, or was killed before, the agent may have forgotten.
                Ok(()) | Err(Error::Guest { code: ttrpc::Code::NOT_FOUND, .. } | Error::Ended(_)) => {}
                Err(error) => {
                    tracing::warn!(%error, container = container.name, "the guest does not forget a container");
                }
            }
        }
        self.release(container);
        lock(&self.members).remove(&container.name);
    }

    fn release(&self, container: &Container) {
        let places = std::mem::take(&mut *lock(&container.places));
        if let Some(tree) = &mut lock(&self.host).tree {
            tree.release(&places);
        }
    }
}
