//! How a container is made from containerd's bundle: by itself, as a pod, or in one.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex},
};

use anyhow::Context;
use containerd_shim_protos::api;
use kapsel_sandbox::{
    client::RootfsMount,
    engine::{Bundle, Network, Role},
    launch,
    life::{CreateRequest, Error, Member},
    paths::Id,
    record::{Record, now},
    registry::Registry,
    timings::Stopwatch,
};

use super::{Task, Tasks};
use crate::{
    convert,
    engine::{pod::Place, pod_bundle, rootfs, sandbox_file},
    serve::{Owned, Sockets, own},
    task::TaskService,
};

impl Tasks {
    /// What an error leaves is the caller's to remove.
    pub(super) async fn make(
        &self,
        request: &api::CreateTaskRequest,
        dir: &Path,
        is_pod: bool,
    ) -> Result<Arc<Task>, Error> {
        let watch = Stopwatch::default();
        let resources = |error: anyhow::Error| Error::Resources(format!("{error:#}"));
        let (at, mounts) = (dir.to_owned(), request.rootfs.clone());
        let mounting = tokio::task::spawn_blocking(move || rootfs::mount(&at, &mounts)).await;
        mounting.map_err(|e| Error::Resources(e.to_string()))?.map_err(resources)?;
        let place = Place::read(dir).map_err(|error| Error::Invalid(format!("{error:#}")))?;
        let pod = match &place {
            Place::Member(pod) => Some(self.get(pod)?),
            Place::Alone => self.pod(),
            Place::Sandbox => None,
        };
        let role = match (&place, &pod) {
            (_, Some(pod)) => Role::PodMember { monitor: pod.pid },
            (Place::Sandbox, None) if is_pod => Role::Pod,
            (Place::Sandbox, None) => Role::PodSandbox,
            (_, None) => Role::Alone,
        };
        let mut bundle =
            Bundle::read(dir, role, &self.host.config).map_err(|error| Error::Invalid(error.to_string()))?;
        bundle.warnings.iter().for_each(|warning| tracing::info!(id = request.id, warning));
        refuse_hooks(&bundle)?;
        let io = convert::create(request, &self.flags.namespace).io;
        let (sandbox, container) = match pod {
            Some(pod) => {
                if pod.is_pod {
                    pod_bundle::lend(&pod.bundle, &mut bundle.spec).map_err(|error| {
                        Error::Resources(format!("cannot use {}: {error}", pod.bundle.display()))
                    })?;
                }
                let (name, rootfs) = (request.id.clone(), bundle.rootfs.clone());
                let member = Member { name, spec: bundle.spec, rootfs, io, shares_pids: bundle.shares_pids };
                let container = pod.sandbox.add(member).await?;
                (pod.sandbox.clone(), container)
            }
            None => {
                if let Network::At(path) = &bundle.network {
                    Bundle::connect(&mut bundle.spec, path)
                        .map_err(|error| Error::Invalid(error.to_string()))?;
                }
                let owned = self.own(request, &bundle, watch).await.map_err(resources)?;
                let sandbox = owned.sandbox.clone();
                // Until the sandbox is gone: kapsel's commands see it as they see any other.
                tokio::spawn(owned.gone());
                let create = CreateRequest { rootfs: vec![bundle.rootfs.clone()], io };
                sandbox.create(create).await?;
                let container = sandbox.main.clone();
                (sandbox, container)
            }
        };
        let pid = sandbox.monitor();
        Ok(Arc::new(Task {
            id: request.id.clone(),
            bundle: dir.to_owned(),
            service: TaskService::new(container.clone(), request.id.clone(), self.flags.namespace.clone()),
            sandbox,
            container,
            pid,
            is_pod,
            created_at: now(),
            added: Mutex::default(),
        }))
    }

    /// Makes the sandbox's own bundle, and takes it. Where it is noted first: a killed shim leaves no secrets.
    async fn own(
        &self,
        request: &api::CreateTaskRequest,
        bundle: &Bundle,
        watch: Stopwatch,
    ) -> anyhow::Result<Owned> {
        let registry = Registry::open(&self.host.paths)?;
        let mut record = self.record(request, bundle);
        let note = sandbox_file(&bundle.dir);
        std::fs::write(&note, record.id.as_str())
            .with_context(|| format!("cannot write {}", note.display()))?;
        let furnished = launch::furnish(&registry, &mut record, &bundle.spec)?;
        let listener = |listener: std::os::unix::net::UnixListener| {
            listener.set_nonblocking(true)?;
            tokio::net::UnixListener::from_std(listener)
        };
        let sockets = Sockets { task: listener(furnished.task)?, attach: listener(furnished.attach)? };
        let (paths, config) = (self.host.paths.clone(), self.host.config.clone());
        let taken = async {
            let bundle = (furnished.bundle.clone(), own(&furnished.bundle)?);
            Owned::take(paths, config, bundle, record.id, sockets, watch, None).await
        };
        let taken = taken.await;
        if taken.is_err() {
            registry.remove(&furnished.bundle)?;
        }
        taken
    }

    fn record(&self, request: &api::CreateTaskRequest, bundle: &Bundle) -> Record {
        let args =
            bundle.spec.process().as_ref().and_then(|process| process.args().clone()).unwrap_or_default();
        let mut record = Record::new(Id::random(), String::new(), args);
        record.labels = BTreeMap::from([
            ("engine.id".to_owned(), request.id.clone()),
            ("engine.namespace".to_owned(), self.flags.namespace.clone()),
            ("engine.bundle".to_owned(), bundle.dir.display().to_string()),
        ]);
        record.terminal = request.terminal;
        record.stdin = !request.stdin.is_empty();
        // What remains to be known of it containerd knows.
        record.remove = true;
        let RootfsMount { source, .. } = &bundle.rootfs;
        record.rootfs = Some(source.clone());
        record
    }
}

/// Hooks of the host look for a process of the container's on the host, and there is none.
#[allow(deprecated, reason = "Docker still uses prestart")]
fn refuse_hooks(bundle: &Bundle) -> Result<(), Error> {
    let hooks = &bundle.hooks;
    let host = [hooks.prestart(), hooks.create_runtime(), hooks.poststart(), hooks.poststop()];
    match host.into_iter().flatten().flatten().next() {
        None => Ok(()),
        Some(hook) => Err(Error::Invalid(format!(
            "the container has the hook {}, which looks for a process of the container's on the host, and there is \
             none; leave it out (nerdctl: --net none)",
            hook.path().display()
        ))),
    }
}
