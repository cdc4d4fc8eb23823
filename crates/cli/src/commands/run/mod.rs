//! `kapsel run` and `kapsel do`: a new sandbox with one container, in the foreground or not.
//!
//! The order is for speed: nothing that can wait comes before the shim is started, and the streams are connected while
//! the machine starts.

mod host_root;
mod image;
mod notice;

use std::time::Duration;

use kapsel_sandbox::client::{Client, Io, RootfsMount};
use kapsel_sandbox::config::Isolation;
use kapsel_sandbox::launch::{self, Sandbox};
use kapsel_sandbox::paths::Id;
use kapsel_sandbox::record::Record;
use kapsel_sandbox::spec::{self, ImageDefaults, Limits, RunOptions};
use kapsel_sandbox::timings::Timings;

use oci_spec::runtime::Spec;

use super::host::{self, Host};
use crate::failure::{Failure, Outcome};
use crate::flags::run::{MachineFlags, Run, TimingsForm};
use crate::foreground::{Foreground, Left};
use crate::streams::{self, Wanted};
use crate::terminal::{self, Raw};
use crate::trace::Trace;
use crate::{env, output};
use kapsel_sandbox::signals::{Event, Signals};
use kapsel_sandbox::streams::Streams;

pub use host_root::run as run_on_host_root;

/// Less memory than this no program of an image starts in.
const LEAST_MEMORY: u64 = 6 << 20;

/// How long a shim may take to clear up and tell that a start has failed.
const SHIM_TELLS: Duration = Duration::from_secs(10);

/// Everything about a container that is to be.
struct Plan {
    /// What its image says.
    defaults: ImageDefaults,
    /// What the person says.
    options: RunOptions,
    /// What is noted about it.
    record: Record,
    /// What its root file system is.
    rootfs: RootfsMount,
    /// How kapsel stands to it.
    manner: Manner,
}

/// How kapsel stands to the container.
struct Manner {
    detach: bool,
    wanted: Wanted,
    detach_keys: Vec<u8>,
    timings: Option<TimingsForm>,
}

/// `kapsel run`.
pub fn run(host: &Host, flags: Run, mut trace: Trace) -> Outcome {
    check(&flags)?;
    let (name, command) = flags.target.split_first().ok_or_else(|| Failure::new("no image given"))?;
    let found = image::find(host, name, flags.pull)?;
    trace.phase("image");

    let mut record = Record::new(Id::random(), flags.name.clone().unwrap_or_default(), Vec::new());
    record.image = Some(found.name);
    record.image_digest = Some(found.digest);
    record.rootfs = Some(found.rootfs.clone());
    record.labels = flags.labels.iter().map(|label| (label.key.clone(), label.value.clone())).collect();
    record.remove = flags.remove;

    let options = RunOptions {
        args: command.to_vec(),
        init: flags.init,
        entrypoint: flags.entrypoint.clone().map(|program| match program.is_empty() {
            true => Vec::new(),
            false => vec![program],
        }),
        env: env::collect(&flags.process)?,
        user: flags.process.user.clone(),
        workdir: flags.process.workdir.clone(),
        // Without one it is the sandbox's short id.
        hostname: flags.hostname.clone(),
        terminal: flags.terminal,
        read_only: flags.files.read_only,
        tmpfs: flags.files.tmpfs.clone(),
        volumes: flags.files.volumes.clone(),
        network: flags.network.network.clone(),
        dns: flags.network.dns.clone(),
        add_hosts: flags.network.add_host.clone(),
        publish: flags.network.publish.iter().flat_map(|ports| ports.0.iter().copied()).collect(),
        stop_signal: flags.stop_signal.map(|signal| signal.to_string()),
        ..machine_options(host, &flags.machine)?
    };
    let manner = Manner {
        detach: flags.detach,
        wanted: Wanted { stdin: flags.interactive, terminal: flags.terminal },
        detach_keys: flags.detach_keys.0,
        timings: flags.machine.timings,
    };
    let rootfs = RootfsMount::erofs(found.rootfs);
    Plan { defaults: found.defaults, options, record, rootfs, manner }.carry_out(host, trace)
}

fn check(flags: &Run) -> Result<(), Failure> {
    flags.network.network.check()?;
    if !flags.network.publish.is_empty() {
        flags.network.network.check_publish().map_err(Failure::new)?;
    }
    if flags.terminal && flags.interactive && !flags.detach && !terminal::stdin_is_terminal() {
        return Err(
            Failure::new("-t needs a terminal, and standard input is none").hint("leave -t out, and keep -i")
        );
    }
    if let Some(name) = &flags.hostname
        && (name.is_empty()
            || name.len() > 64
            || name.contains(|c: char| !c.is_ascii_alphanumeric() && !"-.".contains(c)))
    {
        return Err(Failure::new(format!("'{name}' is no host name"))
            .hint("use at most 64 letters, digits, '-' and '.'"));
    }
    Ok(())
}

/// What `run` and `do` share.
fn machine_options(host: &Host, flags: &MachineFlags) -> Result<RunOptions, Failure> {
    if let Some(memory) = flags.memory.filter(|memory| *memory < LEAST_MEMORY) {
        return Err(Failure::new(format!(
            "{} of memory is too little for a container",
            output::size::bytes(memory)
        ))
        .hint(format!("give at least --memory {}", output::size::bytes(LEAST_MEMORY))));
    }
    let pids = flags.pids_limit.map_or(host.config.pids_limit(), i64::from);
    let seccomp = match host.config.seccomp().parse() {
        Ok(seccomp) => seccomp,
        Err(never) => match never {},
    };
    Ok(RunOptions {
        limits: Limits { memory: flags.memory, cpus: flags.cpus, pids: Some(pids) },
        ulimits: flags.ulimits.clone(),
        seccomp,
        isolation: flags.isolation.map(Isolation::from),
        cold: flags.cold,
        storage: flags.storage,
        terminal_size: terminal::size().map(|size| (size.width, size.height)),
        ..RunOptions::default()
    })
}

impl Plan {
    /// Launches the sandbox and stays with it, or not.
    fn carry_out(mut self, host: &Host, mut trace: Trace) -> Outcome {
        let spec = spec::build(&self.defaults, &self.options)?;
        self.record.terminal = self.manner.wanted.terminal;
        self.record.stdin = self.manner.wanted.stdin;
        let args = spec.process().as_ref().and_then(|process| process.args().clone());
        let before = if self.options.init { spec::INIT.len() } else { 0 };
        self.record.command = args.unwrap_or_default().split_off(before);
        host::ensure_kernel(host)?;
        // What killed sandboxes left may hold the name.
        host.sandboxes()?;
        trace.phase("specification");
        host::runtime()?.block_on(self.start(host, &spec, &mut trace))
    }

    async fn start(mut self, host: &Host, spec: &Spec, trace: &mut Trace) -> Outcome {
        let disk = self.record.rootfs.clone();
        let options = launch::Options { leash: true, rootfs: disk.as_deref(), ..host.launch_options() };
        let launched = launch::launch(&host.paths, &host.config, &mut self.record, spec, options).await?;
        trace.phase("launch the shim");
        let mut signals = Signals::take_over()?;
        let begun = tokio::select! {
            begun = self.begin(host, &launched, trace) => begun,
            signal = ending(&mut signals) => {
                // The leash goes with this process, and the sandbox with it.
                return Ok(128 + u8::try_from(signal).unwrap_or(0));
            }
        };
        let streams = match begun {
            Ok(streams) => streams,
            Err(failure) => {
                discard(host, launched).await;
                return Err(failure);
            }
        };
        if let Some(form) = self.manner.timings {
            if let Ok(timings) = Timings::read(&launched.bundle) {
                trace.add(&timings);
            }
            if self.manner.detach {
                trace.print(form);
            }
        }
        let Some(streams) = streams else {
            release(launched)?;
            output::print(format!("{}\n", self.record.id).as_bytes());
            return Ok(0);
        };
        self.stay(launched, streams, &mut signals, trace).await
    }

    /// From a shim that listens to a process that runs.
    async fn begin(
        &self,
        host: &Host,
        launched: &Sandbox,
        trace: &mut Trace,
    ) -> Result<Option<Streams>, Failure> {
        let wanted = self.manner.wanted;
        let io = Io::attached(wanted.stdin, wanted.terminal, true);
        let client = &launched.client;
        // The shim gives up first: it can say why.
        let deadline = host.config.start_timeout() + SHIM_TELLS;
        let creating = client.create(&self.rootfs, &io, deadline);
        // The streams are connected while the machine starts; by threads, since connecting blocks.
        let bundle = launched.bundle.clone();
        let detach = self.manner.detach;
        let connecting = tokio::task::spawn_blocking(move || match detach {
            true => Ok(None),
            false => {
                Streams::open(&bundle, "", wanted.stdin, wanted.terminal).map(Some).map_err(Failure::from)
            }
        });
        creating.await?;
        trace.phase("create");
        let streams = connecting.await.map_err(|_| Failure::new("connecting the streams failed"))??;
        trace.phase("connect the streams");
        started(client, "").await?;
        trace.phase("start");
        notice::emulation(host, &launched.bundle);
        Ok(streams)
    }

    async fn stay(
        self,
        launched: Sandbox,
        streams: Streams,
        signals: &mut Signals,
        trace: &mut Trace,
    ) -> Outcome {
        let Manner { wanted, detach_keys, timings, .. } = self.manner;
        let raw = (wanted.terminal && wanted.stdin).then(Raw::enter).transpose()?;
        let running = streams::run(streams, wanted.terminal.then_some(detach_keys))?;
        let foreground = Foreground { client: &launched.client, exec_id: "", terminal: wanted.terminal };
        let left = foreground.stay(running, signals).await;
        drop(raw);
        if let Some(form) = timings {
            trace.phase("run");
            trace.print(form);
        }
        match left? {
            Left::Exited(code) => foreground.verdict(code).await,
            Left::Detached => {
                release(launched)?;
                Ok(0)
            }
            Left::GivenUp(code) => Ok(code),
            Left::ReaderGone => output::die_of_broken_pipe(),
        }
    }
}

/// Starts a process; a program that is not there has Docker's exit code.
pub async fn started(client: &Client, exec_id: &str) -> Result<(), Failure> {
    client.start(exec_id).await.map(drop).map_err(|error| {
        let code = error.exit_code();
        Failure::from(error).code(code)
    })
}

/// The next signal that asks to end.
async fn ending(signals: &mut Signals) -> i32 {
    loop {
        if let Event::Forward(signal @ (1 | 2 | 3 | 15)) = signals.next().await {
            return signal;
        }
    }
}

/// Lets the sandbox live on without this process.
fn release(launched: Sandbox) -> Result<(), Failure> {
    match launched.leash.map(launch::Leash::release) {
        Some(Err(error)) => Err(Failure::new(format!("cannot let go of the sandbox: {error}"))),
        _ => Ok(()),
    }
}

/// Ends a sandbox that could not be started, and leaves nothing of it.
async fn discard(host: &Host, launched: Sandbox) {
    if let Err(failure) = super::rm::end(host, &launched.bundle, &launched.id).await {
        failure.warn();
    }
}
