//! One module per command, or per few that share their code.

mod attach;
mod config;
mod cp;
mod doctor;
mod exec;
mod generate;
mod host;
mod image;
mod inspect;
mod install;
mod life;
mod logs;
mod many;
mod prune;
mod ps;
mod rm;
mod run;
mod stats;
mod template;
mod version;

use host::Host;

use crate::failure::Outcome;
use crate::flags::{Cli, Command};
use crate::trace::Trace;

/// Does what the command line asks for.
pub fn run(cli: Cli, mut trace: Trace) -> Outcome {
    let host = match &cli.command {
        // These must work on a machine on which nothing else does.
        Command::Version(flags) => return version::run(flags),
        Command::Install(flags) => return install::run(flags),
        Command::Man(flags) => return generate::man(flags),
        Command::Completions(flags) => return generate::completions(flags),
        _ => Host::new(cli.root, cli.config)?,
    };
    trace.phase("command line and configuration");
    match cli.command {
        Command::Run(flags) => run::run(&host, *flags, trace),
        Command::Do(flags) => run::run_on_host_root(&host, *flags, trace),
        Command::Exec(flags) => exec::run(&host, &flags),
        Command::Cp(flags) => cp::run(&host, &flags),
        Command::Ps(flags) => ps::run(&host, &flags),
        Command::Logs(flags) => logs::run(&host, &flags),
        Command::Inspect(flags) => inspect::run(&host, &flags),
        Command::Stats(flags) => stats::run(&host, &flags),
        Command::Attach(flags) => attach::run(&host, &flags),
        Command::Wait(flags) => life::wait(&host, &flags),
        Command::Stop(flags) => life::stop(&host, &flags),
        Command::Kill(flags) => life::kill(&host, &flags),
        Command::Pause(flags) => life::pause(&host, &flags),
        Command::Resume(flags) => life::resume(&host, &flags),
        Command::Rm(flags) => rm::run(&host, &flags),
        Command::Pull(flags) => image::pull(&host, &flags),
        Command::Images(flags) => image::list(&host, &flags),
        Command::Import(flags) => image::import(&host, &flags),
        Command::Rmi(flags) => image::remove(&host, &flags),
        Command::Template(flags) => template::run(&host, &flags),
        Command::Prune(flags) => prune::run(&host, &flags),
        Command::Doctor(flags) => doctor::run(&host, &flags),
        Command::Config(flags) => config::run(&host, &flags),
        Command::Version(_) | Command::Install(_) | Command::Man(_) | Command::Completions(_) => Ok(0),
    }
}
