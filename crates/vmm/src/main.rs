//! `kapsel-vmm`: runs one microVM.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use clap::Parser;
use kapsel_vmm::api::Server;
use kapsel_vmm::api::control::{Answer, Next, PreBoot};
use kapsel_vmm::builder;
use kapsel_vmm::config::Config;
use kapsel_vmm::confine::{self, Policy, Thread};
use kapsel_vmm::machine::{End, Machine};
use tracing_subscriber::filter::LevelFilter;

/// Run one microVM. Its serial console is the standard input and output; the exit status is 0 when the guest powers itself
/// off or resets.
#[derive(Parser)]
#[command(version, about)]
struct Options {
    /// The API's Unix socket, which is made
    #[arg(long, value_name = "SOCKET", default_value = "/run/firecracker.socket")]
    api_sock: PathBuf,
    /// Have no API; the machine is then in --config-file
    #[arg(long, requires = "config_file", conflicts_with = "api_sock")]
    no_api: bool,
    /// Start the machine that is described in this JSON file
    #[arg(long, value_name = "FILE")]
    config_file: Option<PathBuf>,
    /// The instance's name
    #[arg(long, default_value = "anonymous-instance", value_parser = instance_id)]
    id: String,
    /// Where messages go instead of the standard error output
    #[arg(long, value_name = "FILE")]
    log_path: Option<PathBuf>,
    /// The least important messages that are written: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warn", ignore_case = true)]
    level: LevelFilter,
    /// Let the monitor's threads make any system call
    #[arg(long, conflicts_with = "seccomp_filter")]
    no_seccomp: bool,
    /// Confine the monitor's threads by the filters in this JSON file, not by its own
    #[arg(long, value_name = "FILE")]
    seccomp_filter: Option<PathBuf>,
}

impl Options {
    fn policy(&self) -> Result<Policy, confine::Error> {
        match &self.seccomp_filter {
            _ if self.no_seccomp => Ok(Policy::Off),
            None => Ok(Policy::Declared),
            Some(path) => Policy::read(path),
        }
    }
}

fn instance_id(id: &str) -> Result<String, String> {
    if (1..=64).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        Ok(id.to_owned())
    } else {
        Err("an id is 1 to 64 letters, digits and hyphens".to_owned())
    }
}

/// A configuration is small; what is larger is some other file, in bytes.
const CONFIG_MAX: u64 = 1 << 20;

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    confine::install_trap(start_log(&options)?)?;
    let policy = options.policy()?;
    let filter = policy.filter(Thread::Api, &confine::api())?;
    let server = (!options.no_api).then(|| Server::start(&options.api_sock, filter)).transpose();
    let server = server.with_context(|| format!("cannot listen at {}", options.api_sock.display()))?;
    // The machine's console is the monitor's own.
    let build = |config: &Config| builder::build(config, Box::new(io::stdout()), &policy);
    let pre_boot = |config| PreBoot::new(options.id.clone(), config);
    let mut machine = match (&options.config_file, server) {
        (Some(path), server) => {
            let (running, mut machine) = pre_boot(read_config(path)?).start(build)?;
            if let Some(server) = server {
                machine.answer(server, running)?;
            }
            machine
        }
        (None, Some(server)) => wait_for_start(pre_boot(Config::default()), server, build)?,
        (None, None) => bail!("--no-api needs --config-file"),
    };
    let end = machine.run().context("the machine's event loop failed")?;
    tracing::info!(?end, exits = machine.exits().total(), counted = ?machine.exits(), "the machine ended");
    match end {
        End::PowerOff | End::Reset => Ok(ExitCode::SUCCESS),
        End::Failure(reason) => bail!("the machine failed: {reason}"),
    }
}

/// Has the API put a machine together until it is to start.
fn wait_for_start(
    mut pre_boot: PreBoot,
    server: Server,
    build: impl Fn(&Config) -> Result<Machine, builder::Error>,
) -> Result<Machine> {
    while let Some(call) = server.wait() {
        pre_boot = match pre_boot.handle(call.request, &build) {
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

/// Starts the log and gives its descriptor, which stays open.
fn start_log(options: &Options) -> Result<RawFd> {
    let subscriber = tracing_subscriber::fmt().with_max_level(options.level).with_ansi(false);
    match &options.log_path {
        None => {
            subscriber.with_writer(io::stderr).init();
            Ok(io::stderr().as_raw_fd())
        }
        Some(path) => {
            let file = std::fs::File::options().create(true).append(true).open(path);
            let file = file.with_context(|| format!("cannot open the log {}", path.display()))?;
            let descriptor = file.as_raw_fd();
            subscriber.with_writer(Mutex::new(file)).init();
            Ok(descriptor)
        }
    }
}

fn read_config(path: &std::path::Path) -> Result<Config> {
    let failed = || format!("cannot read the configuration {}", path.display());
    let mut json = Vec::new();
    let file = std::fs::File::open(path).with_context(failed)?;
    let read =
        io::Read::read_to_end(&mut io::Read::take(file, CONFIG_MAX + 1), &mut json).with_context(failed)?;
    if read as u64 > CONFIG_MAX {
        bail!("{}: it is larger than {CONFIG_MAX} bytes", failed());
    }
    Config::parse(&json).with_context(|| format!("in {}", path.display()))
}
