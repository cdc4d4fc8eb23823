//! `kapsel-vmm`: runs one microVM.

mod options;

use std::io;
use std::os::fd::RawFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kapsel_vmm::api::Server;
use kapsel_vmm::api::control::{Answer, Builder, Next, PreBoot};
use kapsel_vmm::backends::Backends;
use kapsel_vmm::boot_timer::{BootTimer, processor_time};
use kapsel_vmm::builder::{self, Surroundings};
use kapsel_vmm::config::Config;
use kapsel_vmm::confine::{self, Policy, Thread};
use kapsel_vmm::machine::{End, Machine};
use kapsel_vmm::metrics::{Metrics, Startup};
use kapsel_vmm::{log, metrics, mmds, serial, snapshot};
use options::{Command, Options};
use rustix::time::{ClockId, clock_gettime};

impl Options {
    fn start_log(&self) -> Result<RawFd> {
        log::start(&self.id);
        log::configure(&self.log).with_context(|| format!("cannot open the log {:?}", self.log.log_path))
    }

    fn metrics(&self) -> Result<Metrics, metrics::Error> {
        let monotonic = || clock_gettime(ClockId::Monotonic).try_into().unwrap_or_default();
        let since = |now: Duration, then: u64| (now.as_micros() as u64).saturating_sub(then);
        let processor = self.start_time_cpu_us.map_or(0, |then| since(processor_time(), then));
        let mut metrics = Metrics::new(Startup {
            wall: self.start_time_us.map_or(0, |then| since(monotonic(), then)),
            processor: processor.saturating_add(self.parent_cpu_time_us.unwrap_or(0)),
        });
        if let Some(path) = &self.metrics_path {
            metrics.configure(&metrics::Settings { metrics_path: path.clone() })?;
        }
        Ok(metrics)
    }

    /// What the guest can read.
    fn mmds(&self) -> Result<mmds::Shared> {
        let mut store = mmds::Store::new(self.mmds_size_limit).context("the host gives no random numbers")?;
        if let Some(path) = &self.metadata {
            let failed = || format!("cannot take the metadata from {}", path.display());
            let document = serde_json::from_slice(&read(path).with_context(failed)?).with_context(failed)?;
            store.put(document).with_context(failed)?;
        }
        Ok(Arc::new(Mutex::new(store)))
    }

    fn policy(&self) -> Result<Policy, confine::Error> {
        match &self.seccomp_filter {
            _ if self.no_seccomp => Ok(Policy::Off),
            None => Ok(Policy::Declared),
            Some(path) => Policy::read(path),
        }
    }
}

/// Configurations and metadata are small; what is larger is some other file, in bytes.
const FILE_MAX: u64 = 1 << 20;

/// Has all threads allocate from one heap. They rarely do, and a heap for each would cost memory; and glibc opens a file of
/// /proc before it makes such a heap smaller, which no confined thread may.
fn share_heap() {
    // SAFETY: the call sets a number of glibc's, and no other thread is there yet.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } == 0 {
        tracing::debug!("threads have heaps of their own");
    }
}

/// The exit code after a wrong command line; the same as Firecracker's.
const WRONG_ARGUMENTS: u8 = 153;

fn main() -> Result<ExitCode> {
    share_heap();
    match options::parse(std::env::args_os().skip(1)) {
        Ok(Command::Run(options)) => return run(&options),
        Ok(Command::Print(text)) => println!("{text}"),
        Ok(Command::SnapshotVersion) => println!("v{}", snapshot::format::VERSION),
        Ok(Command::DescribeSnapshot(path)) => {
            let version = snapshot::format::version(&path);
            println!("v{}", version.with_context(|| format!("cannot describe {}", path.display()))?);
        }
        Err(error) => {
            eprintln!("Arguments parsing error: {error}\n\nFor more information try --help.");
            return Ok(ExitCode::from(WRONG_ARGUMENTS));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run(options: &Options) -> Result<ExitCode> {
    let boot_timer = options.boot_timer.then(BootTimer::start);
    confine::install_trap(options.start_log()?)?;
    let mmds = options.mmds()?;
    let surroundings = Surroundings { policy: options.policy()?, mmds: mmds.clone(), boot_timer };
    let filter = surroundings.policy.filter(Thread::Api, &confine::api())?;
    let server =
        (!options.no_api).then(|| Server::start(&options.api_sock, options.payload_max, filter)).transpose();
    let server = server.with_context(|| format!("cannot listen at {}", options.api_sock.display()))?;
    let builder = ConsoleBuilder(surroundings);
    let metrics = options.metrics()?;
    let pre_boot = |config| PreBoot::new(options.id.clone(), config, metrics, mmds);
    let mut machine = match (&options.config_file, server) {
        (Some(path), server) => {
            let (running, mut machine) = pre_boot(read_config(path)?)?.start(&builder)?;
            if let Some(server) = server {
                machine.answer(server, running)?;
            }
            machine
        }
        (None, Some(server)) => wait_for_start(pre_boot(Config::default())?, server, &builder)?,
        (None, None) => bail!("--no-api needs --config-file"),
    };
    let end = machine.run().context("the machine's event loop failed")?;
    if let Err(error) = machine.flush_metrics() {
        tracing::warn!(%error);
    }
    tracing::info!(?end, exits = machine.exits().total(), counted = ?machine.exits(), "the machine ended");
    match end {
        End::PowerOff | End::Reset => Ok(ExitCode::SUCCESS),
        End::Failure(reason) => bail!("the machine failed: {reason}"),
    }
}

/// Makes machines whose console is the monitor's own, or goes where the API says.
struct ConsoleBuilder(Surroundings);

impl Builder for ConsoleBuilder {
    fn build(&self, config: &Config, backends: &mut Backends) -> Result<Machine, builder::Error> {
        builder::build(config, output(&config.serial)?, &self.0, backends)
    }

    fn restore(
        &self,
        load: &snapshot::Load,
        serial: &serial::Settings,
    ) -> Result<(Config, Machine), snapshot::Error> {
        builder::restore(load, output(serial).map_err(Box::new)?, &self.0)
    }
}

/// Opens what the guest's console is written to.
fn output(settings: &serial::Settings) -> Result<serial::Output, builder::Error> {
    serial::Output::open(settings).map_err(|source| {
        let path = settings.serial_out_path.clone().unwrap_or_default();
        builder::Error::Serial { path, source }
    })
}

/// Has the API put a machine together until it is to start.
fn wait_for_start(mut pre_boot: PreBoot, server: Server, builder: &ConsoleBuilder) -> Result<Machine> {
    while let Some(call) = server.wait() {
        pre_boot = match pre_boot.handle(call.request, builder) {
            Next::Wait(pre_boot, answer) => {
                // A client that has gone does not want the answer.
                let _ = call.reply.send(answer);
                pre_boot
            }
            Next::Run(running, mut machine) => {
                machine.answer(server, running)?;
                let _ = call.reply.send(Ok(Answer::Done));
                return Ok(*machine);
            }
        };
    }
    bail!("the API has ended")
}

fn read_config(path: &Path) -> Result<Config> {
    let json = read(path).with_context(|| format!("cannot read the configuration {}", path.display()))?;
    Config::parse(&json).with_context(|| format!("in {}", path.display()))
}

/// All of a file, which is small.
fn read(path: &Path) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path)?;
    let read = io::Read::read_to_end(&mut io::Read::take(file, FILE_MAX + 1), &mut bytes)?;
    if read as u64 > FILE_MAX {
        bail!("it is larger than {FILE_MAX} bytes");
    }
    Ok(bytes)
}
