//! The verbs: each is found here, and none does more than its name says.

mod create;
mod delete;
mod exec;
mod life;
mod look;
mod print;
mod update;

use std::{
    fs,
    io::{Read, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, bail};
use kapsel_sandbox::{client::Client, config::Config, paths::Paths, registry::Registry};
use serde::de::DeserializeOwned;

use crate::{
    args::{Cli, Verb},
    report::Report,
    state::{Container, Containers, Status},
};

/// What an engine gives as JSON (a process, resources) is not larger.
const INPUT_MAX: u64 = 8 << 20;

/// This machine as kapsel sees it.
pub struct Host {
    /// Where kapsel keeps things.
    pub paths: Paths,
    /// The configuration in force.
    pub config: Config,
    /// kapsel's own root, which is not the engine's.
    pub root: Option<PathBuf>,
}

impl Host {
    /// As the environment and the configuration describe it.
    pub fn of_environment() -> anyhow::Result<Self> {
        let root = std::env::var_os("KAPSEL_ROOT").filter(|root| !root.is_empty()).map(PathBuf::from);
        Ok(Self { paths: Paths::discover(root.as_deref())?, config: Config::load(None)?, root })
    }

    /// All sandboxes.
    pub fn registry(&self) -> anyhow::Result<Registry> {
        Ok(Registry::open(&self.paths)?)
    }
}

/// One call of this program.
pub struct Call<'a> {
    host: Host,
    containers: Containers,
    report: &'a Report,
    /// `--systemd-cgroup`.
    systemd_cgroup: bool,
}

/// Does what the command line says; the exit code.
pub fn carry_out(cli: &Cli, report: &Report) -> anyhow::Result<u8> {
    if cli.global.version {
        print::version();
        return Ok(0);
    }
    let Some(verb) = &cli.verb else { bail!("no command given; `kapsel-runtime --help` lists them") };
    report.debug(&format!("{verb:?}"));
    // What needs no containers works for everybody.
    match verb {
        Verb::Features => return print::features().map(|()| 0),
        Verb::Spec(spec) => return print::spec(spec).map(|()| 0),
        _ => {}
    }
    if !rustix::process::geteuid().is_root() {
        bail!(
            "kapsel-runtime must run as root: it makes network namespaces and jails; call the engine with sudo"
        );
    }
    let host = Host::of_environment()?;
    let containers = Containers::below(cli.global.root.as_deref(), &host.paths)?;
    let call = Call { host, containers, report, systemd_cgroup: cli.global.systemd_cgroup };
    let done = match verb {
        Verb::Create(flags) => call.create(flags),
        Verb::Run(flags) => return call.run(flags),
        Verb::Exec(flags) => return call.exec(flags),
        Verb::Start(named) => call.start(&named.id),
        Verb::State(named) => call.state(&named.id),
        Verb::Kill(flags) => call.kill(flags),
        Verb::Delete(flags) => call.delete(flags),
        Verb::Pause(named) => call.pause(&named.id),
        Verb::Resume(named) => call.resume(&named.id),
        Verb::Ps(flags) => call.ps(flags),
        Verb::List(flags) => call.list(flags),
        Verb::Events(flags) => call.events(flags),
        Verb::Update(flags) => call.update(flags),
        Verb::Checkpoint(_) | Verb::Restore(_) => bail!(
            "a container with a kernel of its own cannot be checkpointed or restored: its processes are in a machine"
        ),
        Verb::Features | Verb::Spec(_) | Verb::StandIn { .. } => bail!("this verb was dealt with before"),
    };
    done.map(|()| 0)
}

impl Call<'_> {
    /// A container that is in one of these states.
    fn container_in(&self, id: &str, states: &[Status], what: &str) -> anyhow::Result<Container> {
        let container = self.containers.get(id)?;
        let status = container.status(&self.host.paths);
        if !states.contains(&status) {
            bail!("cannot {what} container {id:?}: it is {status}");
        }
        Ok(container)
    }

    /// Speaks to a container's shim.
    async fn connect(&self, container: &Container) -> anyhow::Result<Client> {
        Ok(Client::connect(&container.sandbox_bundle(&self.host.paths), &container.sandbox).await?)
    }
}

/// Waits for the shim's answers.
fn wait<T>(answer: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    crate::stand_in::runtime()?.block_on(answer)
}

/// Reads JSON from a file, or from standard input for `-`.
fn read_json<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let failed = || format!("cannot read {}", path.display());
    let mut json = Vec::new();
    let source: Box<dyn Read> = match path == Path::new("-") {
        true => Box::new(std::io::stdin()),
        false => Box::new(fs::File::open(path).with_context(failed)?),
    };
    source.take(INPUT_MAX + 1).read_to_end(&mut json).with_context(failed)?;
    if json.len() as u64 > INPUT_MAX {
        bail!("{} has more than {} MiB", path.display(), INPUT_MAX >> 20);
    }
    serde_json::from_slice(&json)
        .with_context(|| format!("{} is not what the specification says", path.display()))
}

/// Writes a pid file in one step: the engine may look at any time.
fn write_pid(path: &Path, pid: u32) -> anyhow::Result<()> {
    let name = path.file_name().with_context(|| format!("--pid-file {} is no file", path.display()))?;
    let mut hidden = std::ffi::OsString::from(".");
    hidden.push(name);
    let new = path.with_file_name(hidden);
    let write = || -> std::io::Result<()> {
        let mut file =
            fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&new)?;
        write!(file, "{pid}")?;
        fs::rename(&new, path)
    };
    write().with_context(|| format!("cannot write --pid-file {}", path.display()))
}
