//! `create`, `start` and `run`.

use std::{collections::BTreeMap, time::Duration};

use anyhow::bail;
use kapsel_sandbox::{
    engine::{Bundle, Named, Role},
    paths::Id,
    removal,
};

use super::{Call, wait, write_pid};
use crate::{
    args, console, hooks,
    stand_in::{NewContainer, Order, StandIn, explain},
    state::{Container, Status},
};

/// How long the processes of what did not come to be may take to leave its cgroup.
const LEFT: Duration = Duration::from_secs(5);

/// Whose terminal a process gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Foreground {
    /// This command stays: its own.
    Stays,
    /// This command ends: the engine's.
    Ends,
}

impl Call<'_> {
    /// `create`.
    pub fn create(&self, flags: &args::Create) -> anyhow::Result<()> {
        // Not waited for: it outlives this command, and whoever called this inherits it.
        self.make(flags, Foreground::Ends).map(drop)
    }

    /// Makes a container whose program waits for `start`.
    fn make(&self, flags: &args::Create, foreground: Foreground) -> anyhow::Result<(StandIn, Bundle)> {
        no_descriptors(flags.preserve_fds)?;
        let claim = self.containers.claim(&flags.id)?;
        let bundle = Bundle::read(&flags.bundle, Role::Alone, &self.host.config)?;
        bundle.warnings.iter().for_each(|warning| self.report.warn(warning));
        self.check_cgroup(&bundle)?;
        check_terminal(bundle.terminal, flags.console_socket.is_some(), foreground)?;
        // Of its own: another engine, or a person, may have one that is called as this engine calls its container.
        let sandbox = Id::random();
        let order = order(&bundle, &flags.id, sandbox.clone());
        let process = bundle.spec.process().as_ref();
        let size = process.and_then(oci_spec::runtime::Process::console_size).map(|size| {
            let clamp = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
            (clamp(size.width()), clamp(size.height()))
        });
        let console = flags.console_socket.as_ref().map(|socket| console::make(socket, size)).transpose()?;
        let mut stand_in = StandIn::start(&Order::Container(Box::new(order)), console)?;
        let made = self.bring_up(&mut stand_in, &bundle, flags, sandbox.clone()).and_then(|container| {
            if let Some(path) = &flags.pid_file {
                write_pid(path, container.pid)?;
            }
            claim.fill(&container)
        });
        match made {
            Ok(()) => Ok((stand_in, bundle)),
            Err(error) => {
                stand_in.kill();
                self.discard(&sandbox, bundle.cgroup.as_ref());
                Err(error)
            }
        }
    }

    /// Leaves nothing of a sandbox whose container did not come to be.
    fn discard(&self, sandbox: &Id, cgroup: Option<&Named>) {
        let bundle = self.host.paths.bundle(sandbox);
        let remove = || -> anyhow::Result<()> {
            if bundle.dir().exists() {
                let registry = self.host.registry()?;
                wait(async { Ok(removal::remove(&registry, &bundle, Some(sandbox)).await?) })?;
            }
            // Others may be in it: that is one of the reasons why nothing came of the container.
            if let Some(cgroup) = cgroup.and_then(Named::open)
                && !cgroup.remove_empty(LEFT)
            {
                bail!("there are processes in its cgroup");
            }
            Ok(())
        };
        if let Err(error) = remove() {
            self.report.warn(&format!("something of the sandbox is left: {error:#}"));
        }
    }

    /// Whether engine and bundle mean the same kind of cgroup.
    fn check_cgroup(&self, bundle: &Bundle) -> anyhow::Result<()> {
        match &bundle.cgroup {
            Some(Named::Path(path)) if self.systemd_cgroup => bail!(
                "--systemd-cgroup wants linux.cgroupsPath as SLICE:PREFIX:NAME, and it is {:?}; leave out one of them",
                path.display()
            ),
            _ => Ok(()),
        }
    }

    /// Hooks see the stand-in and its namespaces before the sandbox starts: what they make of the network is there for it.
    #[allow(deprecated, reason = "Docker still uses prestart")]
    fn bring_up(
        &self,
        stand_in: &mut StandIn,
        bundle: &Bundle,
        flags: &args::Create,
        sandbox: Id,
    ) -> anyhow::Result<Container> {
        stand_in.ready()?;
        let mut container = Container::new(&flags.id, sandbox, stand_in.pid())?;
        container.bundle = bundle.dir.clone();
        container.rootfs = bundle.rootfs.source.clone();
        container.oci_version = bundle.oci_version.clone();
        container.annotations = bundle.annotations.clone();
        container.hooks = Some(bundle.hooks.clone());
        container.cgroup = cgroup_of(bundle);
        let creating = container.shown("creating");
        hooks::run("prestart", bundle.hooks.prestart().as_ref(), &creating)?;
        hooks::run("createRuntime", bundle.hooks.create_runtime().as_ref(), &creating)?;
        stand_in.go()?;
        stand_in.done()?;
        Ok(container)
    }

    /// `start`.
    pub fn start(&self, id: &str) -> anyhow::Result<()> {
        let container = self.container_in(id, &[Status::Created], "start")?;
        wait(async { self.connect(&container).await?.start("").await.map_err(explain) })?;
        let poststart = container.hooks.as_ref().and_then(|hooks| hooks.poststart().as_ref());
        if let Err(error) = hooks::run("poststart", poststart, &container.shown(Status::Running)) {
            // As the specification says: the container is not wanted then.
            self.end(&container)?;
            return Err(error);
        }
        Ok(())
    }

    /// `run`.
    pub fn run(&self, flags: &args::Run) -> anyhow::Result<u8> {
        let foreground = if flags.detach { Foreground::Ends } else { Foreground::Stays };
        let (stand_in, bundle) = self.make(&flags.create, foreground)?;
        let id = &flags.create.id;
        if let Err(error) = self.start(id) {
            let container = self.containers.get(id)?;
            self.end(&container)?;
            stand_in.kill();
            self.remove(&container)?;
            return Err(error);
        }
        if flags.detach {
            return Ok(0);
        }
        let code = stand_in.stay(bundle.terminal && flags.create.console_socket.is_none())?;
        if !flags.keep {
            self.remove(&self.containers.get(id)?)?;
        }
        Ok(code)
    }
}

/// What the stand-in is told.
fn order(bundle: &Bundle, id: &str, sandbox: Id) -> NewContainer {
    let labels = BTreeMap::from([
        ("engine.id".to_owned(), id.to_owned()),
        ("engine.bundle".to_owned(), bundle.dir.to_string_lossy().into_owned()),
    ]);
    NewContainer {
        sandbox,
        spec: bundle.spec.clone(),
        rootfs: bundle.rootfs.clone(),
        network: bundle.network.clone(),
        cgroup: cgroup_of(bundle),
        terminal: bundle.terminal,
        labels,
    }
}

/// As the specification has it.
fn cgroup_of(bundle: &Bundle) -> Option<String> {
    let path = bundle.spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    path.filter(|_| bundle.cgroup.is_some()).map(|path| path.to_string_lossy().into_owned())
}

/// Whether terminal, socket and manner of calling fit together.
pub fn check_terminal(terminal: bool, socket: bool, foreground: Foreground) -> anyhow::Result<()> {
    use std::io::IsTerminal;
    match (terminal, socket, foreground) {
        (false, true, _) => {
            bail!("--console-socket is for a process with a terminal, and process.terminal is false")
        }
        (true, false, Foreground::Ends) => {
            bail!("process.terminal is true: give --console-socket, where the terminal goes")
        }
        (true, false, Foreground::Stays) if !std::io::stdin().is_terminal() => {
            bail!("process.terminal is true, and standard input is no terminal")
        }
        _ => Ok(()),
    }
}

/// Refuses descriptors for the guest.
pub fn no_descriptors(count: u32) -> anyhow::Result<()> {
    match count {
        0 => Ok(()),
        count => bail!(
            "--preserve-fds {count}: open descriptors are the host's kernel's and cannot be passed into a guest; leave it out"
        ),
    }
}
