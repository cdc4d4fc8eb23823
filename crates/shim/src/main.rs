//! The process that owns one sandbox and answers containerd's Task API for it: started by kapsel's own commands, or by containerd.
//!
//! | file | idea |
//! | --- | --- |
//! | `args` | the command line |
//! | `serve` | the life of this process around that of its sandbox |
//! | `standby` | its machine is there before the sandbox is known |
//! | `task` | the Task API, over [`kapsel_sandbox::life`] |
//! | `convert` | between that API's messages and ours |
//! | `attach` | streams and copies, on `attach.sock` |
//! | `engine` | what containerd calls, and the process that answers for its containers |
//! | `clients` | who is connected, so that nobody's answer is cut off |

mod args;
mod attach;
mod clients;
mod convert;
mod engine;
mod serve;
mod standby;
mod task;

use std::{process::ExitCode, time::Duration};

use anyhow::Context;
use args::Command;
use engine::{Host, flags::Call};
use kapsel_sandbox::{
    annotations::Wishes,
    config::Config,
    paths::Paths,
    template::{self, Prepared},
    timings::Stopwatch,
};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let watch = Stopwatch::default();
    match run(watch) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Goes to shim.log, whose last lines whoever waits for this shim tells.
            eprintln!("containerd-shim-kapsel-v2: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(watch: Stopwatch) -> anyhow::Result<()> {
    let command = args::parse(std::env::args_os().skip(1))?;
    if let Command::Engine(Call::Version) = command {
        println!("containerd-shim-kapsel-v2 {}", env!("CARGO_PKG_VERSION"));
        return Ok(());
    }
    let config = Config::load(None)?;
    log(&command, &config)?;
    let root = std::env::var_os("KAPSEL_ROOT").filter(|root| !root.is_empty());
    let paths = Paths::discover(root.as_ref().map(std::path::Path::new))?;
    if let Command::Engine(Call::Once(flags, action)) = &command {
        return engine::call(&Host { paths, config }, flags, *action);
    }
    let runtime = runtime()?;
    match command {
        Command::Engine(Call::Daemon(daemon)) => {
            runtime.block_on(engine::serve(Host { paths, config }, daemon))
        }
        Command::Serve(serve) => runtime.block_on(serve::serve(paths, config, serve, watch)),
        Command::BuildTemplate { annotations, rootfs, programs } => {
            let wishes = Wishes::parse(&annotations)?;
            let template = match rootfs {
                Some(rootfs) => {
                    let prepared = Prepared::read(rootfs, programs, std::io::stdin())
                        .context("cannot read the request for the container from standard input")?;
                    runtime.block_on(template::build_prepared(&paths, &config, &wishes, &prepared))?
                }
                None => runtime.block_on(template::build(&paths, &config, &wishes))?,
            };
            tracing::info!(key = template.meta.key, "the template is there");
            Ok(())
        }
        Command::Engine(Call::Once(..) | Call::Version) => Ok(()),
    }
}

/// One thread: a sandbox's host side waits most of the time, and there may be hundreds of them.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(4)
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .context("cannot start the runtime")
}

/// On standard error: shim.log, or what containerd reads. Of the calls of containerd that end at once it takes that for a part of the
/// answer, so they log nothing.
fn log(command: &Command, config: &Config) -> anyhow::Result<()> {
    let level = match command {
        Command::Engine(Call::Once(..)) => "off",
        Command::Engine(Call::Daemon(daemon)) if daemon.flags.debug => "debug",
        _ => config.log_level(),
    };
    let filter =
        EnvFilter::try_new(level).with_context(|| format!("log_level = {level:?} is no tracing filter"))?;
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // A line that does not fit into a log that nobody reads is lost, and no reason to complain there.
    log.with_ansi(false).log_internal_errors(false).init();
    Ok(())
}
