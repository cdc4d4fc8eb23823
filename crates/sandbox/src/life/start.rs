//! The start of a sandbox, in order.

use std::{os::fd::OwnedFd, path::PathBuf, sync::Arc, time::Duration};

use kapsel_jail::{Cgroup, cgroup::Named};
use kapsel_machine::{Attachment, Machine, Snapshot};
use kapsel_protocol::api;

use super::{
    Cause, Error, Guest, Later, Sandbox, State, Wanted,
    agent::Agent,
    blueprint::{self, Blueprint, Occupant, Scratch},
    forward::Ports,
    guest_spec::{self, GuestSpec, Rootfs, Sharing},
    lock,
    names::{Names, Watch},
    network::{self, Connection, Plugs},
    shares::{self, Servers},
    size,
    spare::Spare,
    tree::Tree,
};
use crate::{
    annotations::Wishes,
    cgroup,
    client::RootfsMount,
    host,
    logs::Writer,
    network::Network,
    record::MachineInfo,
    seccomp::{self, Filter},
    stdio::{Log, Owner, Plan, Streams, announce, token},
    template::{self, Held, Prepared, Template},
};

/// Where a process's streams go, as the Task API says it.
#[derive(Clone, Debug, Default)]
pub struct IoRequest {
    /// One stream for both directions.
    pub terminal: bool,
    /// URI.
    pub stdin: String,
    /// URI.
    pub stdout: String,
    /// URI.
    pub stderr: String,
    /// Whose they are.
    pub owner: Owner,
}

impl IoRequest {
    pub(super) fn plan(&self) -> Result<Plan, Error> {
        let plan = Plan::parse(self.terminal, &self.stdin, &self.stdout, &self.stderr)?;
        Ok(Plan { owner: self.owner.clone(), ..plan })
    }

    pub(super) fn uris(&self) -> [String; 3] {
        [self.stdin.clone(), self.stdout.clone(), self.stderr.clone()]
    }
}

/// What Create says beyond the bundle.
#[derive(Clone, Debug)]
pub struct CreateRequest {
    /// The root file system; exactly one is understood.
    pub rootfs: Vec<RootfsMount>,
    /// The first process's streams.
    pub io: IoRequest,
}

/// How a sandbox's machine came to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Origin {
    /// It booted.
    Boot,
    /// A clone of an empty template.
    Template,
    /// A clone of a template with the container in it, whose first process waits.
    Prepared {
        /// In the guest.
        pid: u32,
    },
}

impl Sandbox {
    /// Starts the machine and sets the container up in it. On an error nothing is left running.
    ///
    /// # Errors
    /// What is missing, not possible, or did not come up in time.
    pub async fn create(self: &Arc<Self>, request: CreateRequest) -> Result<u32, Error> {
        if std::mem::replace(&mut *lock(&self.begun), true) {
            return Err(Error::AlreadyExists("the container was created already".into()));
        }
        let deadline = self.config.start_timeout();
        let created = tokio::time::timeout(deadline, self.bring_up(&request)).await;
        let error = match created {
            Ok(Ok(pid)) => return Ok(pid),
            Ok(Err(error)) => error,
            Err(_) => self.late(deadline),
        };
        self.end(Cause::NotStarted(error.to_string())).await;
        Err(error)
    }

    /// The sequence. What needs no answer of the step before runs beside it.
    async fn bring_up(self: &Arc<Self>, request: &CreateRequest) -> Result<u32, Error> {
        // 1. Decide: everything that can be refused is refused before anything starts.
        let phase = self.watch.phase("prepare");
        let plan = request.io.plan()?;
        self.main.init.want(Wanted { plan: plan.clone(), uris: request.io.uris(), process: None });
        let (rootfs, disk) = root(&request.rootfs)?;
        let ports = self.take_ports()?;
        let published = ports.list();
        let storage = self.wishes.storage;
        let guest_spec = self.furnish_main(&rootfs, storage.is_some())?;
        let profile = guest_spec.seccomp.as_ref();
        let filter =
            profile.map(|profile| seccomp::compile(profile, &self.paths.seccomp_cache())).transpose()?;
        let name = self.id.short();
        let scratch = storage.map(|size| Scratch::make(&self.paths, name, size)).transpose()?;
        let log = self.output_log(&plan)?;
        let prepared = Prepared::of(&guest_spec, disk.as_ref(), scratch.is_some(), filter.as_ref());
        let mut blueprint = self.draw(disk, &scratch, guest_spec.shares.len())?;
        drop(phase);

        // 2. File servers, so that the machine finds them.
        let spare = self.spare(&blueprint, prepared.as_ref()).await;
        let phase = self.watch.phase("shares");
        match &spare {
            Some(spare) => self.take_cgroup(&mut blueprint, spare.cgroup.clone()),
            None => self.make_cgroup(&mut blueprint)?,
        }
        let cgroup = blueprint.spec.jail.cgroup.clone();
        let (servers, connected) =
            Servers::start(&guest_spec.shares, &self.bundle, &self.id, &self.config, cgroup.as_ref())?;
        blueprint.spec.shares = connected;
        let fsd = servers.pids();
        self.watch_servers(&servers)?;
        lock(&self.host).servers = servers;
        drop(phase);

        // 3. The network.
        let places = blueprint.monitor.capabilities().places.saturating_sub(guest_spec.shares.len());
        let Plugs { nics, interfaces } = self.connect(places).await?;
        blueprint.spec.nics = nics;
        let forward = self.forward(ports, cgroup.as_ref())?;

        // 4. The machine: one that stood by, a clone of a template, or a cold boot.
        let (machine, origin, channel) = match spare {
            Some(Spare { machine, channel, pid, .. }) => {
                for nic in blueprint.spec.nics.drain(..) {
                    machine.attach(Attachment::Nic(nic)).await?;
                }
                (machine, Origin::Prepared { pid }, Some(channel))
            }
            None => {
                let (machine, origin) = self.machine(&blueprint, prepared.as_ref()).await?;
                let phases = machine.phases();
                phases.iter().for_each(|p| {
                    self.watch.add(format!("machine: {}", p.name), p.took.as_secs_f64() * 1e3);
                });
                (machine, origin, None)
            }
        };
        drop(scratch);
        // The monitor has taps and connections now: they shall go with it.
        blueprint.spec.nics.clear();
        blueprint.spec.shares.clear();
        lock(&self.host).machine = Some(machine.clone());
        self.watch_machine(&machine);

        // 5. The agent. Its requests follow each other without waiting for answers: it carries them out in order.
        let phase = self.watch.phase("agent");
        let channel = match channel {
            Some(channel) => channel,
            None => machine.connect(self.config.start_timeout()).await?,
        };
        let agent = Agent::open(&channel, self.watch.clone()).await?;
        let hostname = self.spec.hostname().clone().unwrap_or_else(|| name.into());
        let (names, watch) = self.names(&hostname)?;
        let others = match &watch {
            Some(watch) => watch.list().await,
            None => Vec::new(),
        };
        let files = names.files(&others);
        let naming = agent.names(&self.main.name, files.clone());
        let (release, pid) = if let Origin::Prepared { pid } = origin {
            let process =
                guest_spec.spec.process().clone().ok_or_else(|| Error::Invalid("no process".into()))?;
            let held = prepared.as_ref().is_some_and(Prepared::has_filter);
            let seccomp = filter.filter(|_| !held).unwrap_or_default();
            *lock(&self.main.first) = Some(Later { process, seccomp, plan: plan.clone(), log });
            let (release, configured, named) =
                tokio::join!(agent.hello(false), agent.configure(&hostname, interfaces), naming);
            configured?;
            named?;
            (release?, pid)
        } else {
            let token = token();
            let create = create_request(&self.main.name, &guest_spec, filter, &plan, announce(&plan, token))?;
            let streams = Streams::connect(&*channel, token, &plan, &self.main.init.hub, log);
            let (release, configured, created, named, streams) = tokio::join!(
                agent.hello(origin == Origin::Boot),
                agent.configure(&hostname, interfaces),
                agent.create(&create),
                naming,
                streams
            );
            let release = release?;
            configured?;
            let pid = created?;
            named?;
            self.main.init.connected(streams?).await;
            (release, pid)
        };
        drop(phase);

        // 6. Known from here on.
        let (address, address6) = {
            let host = lock(&self.host);
            (host.network.address(), host.network.address6())
        };
        self.note(|record| {
            record.address = address;
            record.address6 = address6;
            record.ports = published;
            record.machine = Some(MachineInfo {
                accelerator: blueprint.accelerator().into(),
                isolation: blueprint.isolation.to_string(),
                kernel: release,
                vcpus: blueprint.spec.vcpus,
                memory: u64::from(blueprint.spec.memory_mib) << 20,
                template: origin != Origin::Boot,
                reason: blueprint.reason.clone(),
                shim: std::process::id(),
                monitor: machine.pid(),
                fsd,
                forward,
            });
        });
        self.watch_channel(channel.clone());
        let writes_host = guest_spec.shares.iter().any(|share| !share.read_only);
        let _ = self.guest.set(Guest { machine, channel, agent, writes_host });
        let _ = self.main.pid.set(pid);
        self.main.init.set(State::Created);
        self.follow_names(watch, names, &files);
        self.follow_network();
        self.want_template(&blueprint, origin, prepared.as_ref());
        Ok(pid)
    }

    /// The main container's specification for the guest, and what it names of the host where the guest finds it.
    pub(super) fn furnish_main(&self, rootfs: &Rootfs, scratch_disk: bool) -> Result<GuestSpec, Error> {
        let translate = |sharing| {
            let is_file = |path: &std::path::Path| path.is_file();
            guest_spec::translate(&self.spec, &self.main.name, rootfs, scratch_disk, sharing, is_file)
        };
        if !self.wishes.pod {
            return Ok(translate(Sharing::Each)?);
        }
        let mut tree = Tree::make(self.bundle.pod_dir())?;
        let translated = translate(Sharing::Pod(&mut tree.places));
        let filled = translated.map_err(Error::from).and_then(|guest| tree.fill().map(|()| guest));
        lock(&self.host).tree = Some(tree);
        filled
    }

    /// The network that the sandbox shall have.
    pub(super) fn network(&self) -> Network {
        self.wishes.network.clone().unwrap_or_else(|| Network::of(&self.spec))
    }

    /// Connects it, in so many of the machine's places.
    async fn connect(&self, places: usize) -> Result<Plugs, Error> {
        let network = self.network();
        if network == Network::None {
            return Ok(Plugs::default());
        }
        let _phase = self.watch.phase("network");
        let name = lock(&self.record).name.clone();
        let (connection, plugs) = Connection::make(network::Request {
            network,
            note: &self.bundle.network(),
            places,
            subnet: self.config.bridge_subnet(),
            id: self.id.short(),
            name: &name,
        })
        .await?;
        lock(&self.host).network = connection;
        Ok(plugs)
    }

    /// What the container is told of names, and what tells of changes where there are other sandboxes.
    fn names(&self, hostname: &str) -> Result<(Names, Option<Watch>), Error> {
        let (address, address6, neighbours) = {
            let host = lock(&self.host);
            (host.network.address(), host.network.address6(), host.network.neighbours())
        };
        let watch = neighbours.map(Watch::new).transpose();
        let watch = watch.map_err(|e| Error::Resources(format!("cannot watch the bridge: {e}")))?;
        Ok((Names::new(&self.wishes, &self.network(), hostname, address, address6), watch))
    }

    /// Takes the ports of the host that it publishes.
    fn take_ports(&self) -> Result<Ports, Error> {
        let wanted = &self.wishes.publish;
        if !wanted.is_empty() {
            self.network().check_publish().map_err(Error::Invalid)?;
        }
        Ports::take(wanted)
    }

    /// Has what comes to published ports carried into the sandbox, by a process whose end ends the sandbox: nobody would reach it.
    fn forward(self: &Arc<Self>, ports: Ports, cgroup: Option<&Cgroup>) -> Result<Option<u32>, Error> {
        let Some(address) = lock(&self.host).network.address() else { return Ok(None) };
        let forwarder = ports.forward(address, &self.bundle, &self.id, &self.config, cgroup)?;
        let Some(forwarder) = forwarder else { return Ok(None) };
        let pid = forwarder.pid();
        let watch =
            forwarder.watch().map_err(|e| Error::Resources(format!("cannot watch a process: {e}")))?;
        lock(&self.host).forwarder = Some(forwarder);
        self.end_with(watch, "the process that carries its ports died".into());
        Ok(Some(pid))
    }

    pub(super) fn draw(
        &self,
        rootfs: Option<PathBuf>,
        scratch: &Option<Scratch>,
        shares: usize,
    ) -> Result<Blueprint, Error> {
        let dir = self.bundle.machine_dir();
        crate::paths::private_dir(&dir).map_err(|e| Error::Resources(e.to_string()))?;
        let occupant = Occupant {
            name: self.id.short(),
            dir,
            console: Some(self.bundle.console_log()),
            rootfs,
            scratch: scratch.as_ref().map(|scratch| scratch.path.clone()),
            shares,
            network: self.network() != Network::None,
            cgroup: None,
        };
        blueprint::draw(&self.paths, &self.config, &self.wishes, occupant)
    }

    /// Bounds what the sandbox's processes take of the host. Where no cgroup of its own can be had the log says so; one that an
    /// engine names must be.
    pub(super) fn make_cgroup(&self, blueprint: &mut Blueprint) -> Result<(), Error> {
        let memory = u64::from(blueprint.spec.memory_mib) << 20;
        let cgroup = match cgroup::named(&self.spec).map_err(|error| Error::Invalid(error.to_string()))? {
            Some(named) => self.engines_cgroup(&named, memory)?,
            None => None,
        };
        self.take_cgroup(blueprint, cgroup.or_else(|| self.own_cgroup(memory)));
        Ok(())
    }

    fn take_cgroup(&self, blueprint: &mut Blueprint, cgroup: Option<Cgroup>) {
        lock(&self.host).cgroup = cgroup.clone();
        blueprint.spec.jail.cgroup = cgroup;
    }

    fn engines_cgroup(&self, named: &Named, memory: u64) -> Result<Option<Cgroup>, Error> {
        let resources = self.spec.linux().as_ref().and_then(|linux| linux.resources().clone());
        let limits = cgroup::engine_limits(&resources.unwrap_or_default(), Some(memory));
        let cgroup = named.limited(&limits).map_err(|error| Error::Resources(error.to_string()))?;
        match &cgroup {
            Some(cgroup) if cgroup.unenforced().is_empty() => {}
            Some(cgroup) => {
                let missing = cgroup.unenforced().join(", ");
                tracing::warn!(missing, "limits are kept in the guest only: the host lacks controllers");
            }
            None => tracing::warn!(
                "nobody has made the scope that is named: the sandbox has a cgroup of kapsel's"
            ),
        }
        Ok(cgroup)
    }

    fn own_cgroup(&self, memory: u64) -> Option<Cgroup> {
        match Cgroup::create(self.id.short(), &cgroup::own_limits(memory)) {
            Ok(Some(cgroup)) => return Some(cgroup),
            Ok(None) => {
                let why = kapsel_jail::cgroup::obstacles().join("; ");
                tracing::info!(why, "the sandbox's processes run without a cgroup");
            }
            Err(error) => tracing::warn!(%error, "the sandbox's processes run without a cgroup"),
        }
        None
    }

    /// A clone of the fittest template that can be restored, else a cold boot.
    async fn machine(
        &self,
        blueprint: &Blueprint,
        prepared: Option<&Prepared>,
    ) -> Result<(Arc<dyn Machine>, Origin), Error> {
        for (key, found) in self.templates(blueprint, prepared) {
            let _phase = self.watch.phase("restore");
            let origin = match found.meta.shape.container {
                Some(Held { pid, .. }) => Origin::Prepared { pid },
                None => Origin::Template,
            };
            match blueprint.monitor.restore(&Snapshot { dir: found.dir }, &blueprint.spec).await {
                Ok(machine) => return Ok((machine, origin)),
                Err(error) => {
                    tracing::warn!(key, %error, "a template cannot be restored; it is put aside");
                    template::mark_bad(&self.paths, &key, &error.to_string());
                }
            }
        }
        let _phase = self.watch.phase("boot");
        Ok((blueprint.monitor.boot(&blueprint.spec).await?, Origin::Boot))
    }

    fn templates_wanted(&self, blueprint: &Blueprint) -> bool {
        self.config.templates()
            && !self.wishes.cold
            && blueprint.monitor.capabilities().snapshot
            && blueprint.is_common()
    }

    /// The templates that fit, the fittest first.
    fn templates(&self, blueprint: &Blueprint, prepared: Option<&Prepared>) -> Vec<(String, Template)> {
        if !self.templates_wanted(blueprint) {
            return Vec::new();
        }
        let _phase = self.watch.phase("template");
        let empty = match template::key(blueprint) {
            Ok(key) => key,
            Err(error) => {
                tracing::warn!(%error, "cannot tell which template would fit");
                return Vec::new();
            }
        };
        let keys = prepared.map(|prepared| prepared.key(&empty)).into_iter().chain([empty.clone()]);
        keys.filter_map(|key| match template::find(&self.paths, &key) {
            Ok(found) => found.map(|found| (key, found)),
            Err(error) => {
                tracing::warn!(%error, "a template is not used");
                if matches!(error, template::Error::Damaged { .. }) {
                    template::mark_bad(&self.paths, &key, &error.to_string());
                }
                None
            }
        })
        .collect()
    }

    /// Has the template built from which this sandbox would have started faster.
    fn want_template(&self, blueprint: &Blueprint, origin: Origin, prepared: Option<&Prepared>) {
        let wanted = match origin {
            Origin::Boot => true,
            Origin::Template => prepared.is_some(),
            Origin::Prepared { .. } => false,
        };
        if wanted
            && self.templates_wanted(blueprint)
            && let Ok(empty) = template::key(blueprint)
        {
            let key = prepared.map_or_else(|| empty.clone(), |prepared| prepared.key(&empty));
            // For machines of this kind, even where another would be chosen for an empty one.
            let wishes = Wishes { isolation: Some(blueprint.isolation), ..self.wishes.clone() };
            template::build_in_background(&self.paths, &self.config, &wishes, &key, prepared);
        }
    }

    fn output_log(&self, plan: &Plan) -> Result<Option<Log>, Error> {
        if !plan.logs() {
            return Ok(None);
        }
        let path = self.bundle.output_log();
        let writer = Writer::create(&path, self.config.log_size())
            .map_err(|source| crate::stdio::Error::Open { path, source })?;
        Ok(Some(Arc::new(std::sync::Mutex::new(writer))))
    }

    /// Ends the sandbox when a server of a share dies: the guest would hang at the next access.
    fn watch_servers(self: &Arc<Self>, servers: &Servers) -> Result<(), Error> {
        let watches =
            servers.watches().map_err(|e| Error::Resources(format!("cannot watch a file server: {e}")))?;
        for (source, pidfd) in watches {
            self.end_with(pidfd, format!("the file server of {source} died"));
        }
        Ok(())
    }

    /// Ends the sandbox when a process does.
    fn end_with(self: &Arc<Self>, pidfd: OwnedFd, reason: String) {
        let sandbox = Arc::downgrade(self);
        tokio::spawn(async move {
            shares::ended(pidfd).await;
            if let Some(sandbox) = sandbox.upgrade() {
                sandbox.end(Cause::Broken(reason)).await;
            }
        });
    }

    fn watch_machine(self: &Arc<Self>, machine: &Arc<dyn Machine>) {
        let sandbox = Arc::downgrade(self);
        let machine = machine.clone();
        tokio::spawn(async move {
            let reason = machine.wait().await;
            if let Some(sandbox) = sandbox.upgrade() {
                sandbox.end(Cause::MachineDied(reason)).await;
            }
        });
    }

    /// The guest opens no streams to the host: the only thing to wait for is the end of the session.
    fn watch_channel(self: &Arc<Self>, channel: Arc<dyn kapsel_channel::Channel>) {
        let sandbox = Arc::downgrade(self);
        tokio::spawn(async move {
            let error = loop {
                match channel.accept().await {
                    Ok((port, _stream)) => {
                        tracing::warn!(port, "the guest opened a stream that nobody asked for")
                    }
                    Err(error) => break error,
                }
            };
            if let Some(sandbox) = sandbox.upgrade() {
                sandbox.end_unless_machine_tells(error.to_string()).await;
            }
        });
    }

    fn late(&self, deadline: Duration) -> Error {
        let machine = lock(&self.host).machine.clone();
        let console = machine.map(|machine| machine.console()).unwrap_or_default();
        let text = String::from_utf8_lossy(&console);
        let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
        // Guest's text: it must neither be long nor look like advice.
        let last: String = lines[lines.len().saturating_sub(5)..].join(" | ").replace("; ", ", ");
        let last: String = last.chars().take(1000).collect();
        let last = if last.is_empty() { "none".into() } else { last };
        let wanted = self.wishes.isolation.unwrap_or_else(|| self.config.isolation());
        let advice = match host::slow_kvm(&self.paths, wanted) {
            Some(reason) => format!("{reason}; --isolation tcg is for such hosts"),
            None => "if this host is slow, raise start_timeout in the configuration".into(),
        };
        Error::State(format!(
            "the sandbox did not start within {} s, the console's last lines: {last}; {advice}",
            deadline.as_secs(),
        ))
    }
}

/// What makes container `name` in the guest.
///
/// # Errors
/// When its specification cannot be written.
pub(super) fn create_request(
    name: &str,
    guest_spec: &GuestSpec,
    filter: Option<Filter>,
    plan: &Plan,
    stdio: api::Stdio,
) -> Result<api::CreateRequest, Error> {
    let spec = serde_json::to_vec(&guest_spec.spec).map_err(|e| Error::Invalid(e.to_string()))?;
    let filter = filter.unwrap_or_default();
    let (width, height) = guest_spec.spec.process().as_ref().map_or((0, 0), size);
    Ok(api::CreateRequest {
        id: name.into(),
        spec,
        storages: guest_spec.storages.clone(),
        seccomp: filter.program,
        seccomp_flags: filter.flags,
        terminal: plan.terminal,
        width,
        height,
        stdio: Some(stdio).into(),
        ..Default::default()
    })
}

/// The root file system of a Create request: what it is for the guest, and its disk when it is one.
pub(super) fn root(mounts: &[RootfsMount]) -> Result<(Rootfs, Option<PathBuf>), Error> {
    let [mount] = mounts else {
        return Err(Error::Invalid(format!("a root file system is one mount, not {}", mounts.len())));
    };
    let there = std::fs::metadata(&mount.source).map_err(|e| {
        Error::Invalid(format!("cannot use root file system {}: {e}", mount.source.display()))
    })?;
    let writable = mount.options.iter().any(|option| option == "rw");
    match (mount.kind.as_str(), there.is_dir()) {
        ("erofs", false) => Ok((Rootfs::Disk, Some(mount.source.clone()))),
        ("bind", true) if writable => Ok((Rootfs::Directory(mount.source.clone()), None)),
        ("bind", true) => Ok((Rootfs::Below(mount.source.clone()), None)),
        (kind, _) => Err(Error::Invalid(format!(
            "a root file system is an erofs file or a directory to bind, not {kind:?} of {}",
            mount.source.display()
        ))),
    }
}
