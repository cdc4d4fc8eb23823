//! `kapsel-vmm`: runs one microVM.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use clap::Parser;
use kapsel_vmm::builder;
use kapsel_vmm::config::Config;
use kapsel_vmm::machine::End;
use tracing_subscriber::filter::LevelFilter;

/// Run one microVM. Its serial console is the standard input and output; the exit status is 0 when the guest powers itself
/// off or resets.
#[derive(Parser)]
#[command(version, about)]
struct Options {
    /// The machine, in JSON
    #[arg(long, value_name = "FILE")]
    config_file: PathBuf,
    /// Where messages go instead of the standard error output
    #[arg(long, value_name = "FILE")]
    log_path: Option<PathBuf>,
    /// The least important messages that are written: off, error, warn, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warn", ignore_case = true)]
    level: LevelFilter,
}

/// A configuration is small; what is larger is some other file, in bytes.
const CONFIG_MAX: u64 = 1 << 20;

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    start_log(&options)?;
    let config = read_config(&options.config_file)?;
    let mut machine = builder::build(&config, Box::new(io::stdout())).context("cannot build the machine")?;
    let end = machine.run().context("the machine's event loop failed")?;
    tracing::info!(?end, exits = machine.exits().total(), counted = ?machine.exits(), "the machine ended");
    match end {
        End::PowerOff | End::Reset => Ok(ExitCode::SUCCESS),
        End::Failure(reason) => bail!("the machine failed: {reason}"),
    }
}

fn start_log(options: &Options) -> Result<()> {
    let subscriber = tracing_subscriber::fmt().with_max_level(options.level).with_ansi(false);
    match &options.log_path {
        None => subscriber.with_writer(io::stderr).init(),
        Some(path) => {
            let file = std::fs::File::options().create(true).append(true).open(path);
            let file = file.with_context(|| format!("cannot open the log {}", path.display()))?;
            subscriber.with_writer(Mutex::new(file)).init();
        }
    }
    Ok(())
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
