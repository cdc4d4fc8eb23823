//! `kapsel`: what a person types.
//!
//! Thin over the libraries: [`flags`] is the command line, each module of [`commands`] one command. What goes wrong
//! becomes a [`failure::Failure`], and exit code 125.

mod archive;
mod commands;
mod detach;
mod env;
mod failure;
mod flags;
mod foreground;
mod output;
mod progress;
mod streams;
mod terminal;
mod trace;

use std::process::ExitCode;

use clap::FromArgMatches as _;

fn main() -> ExitCode {
    let trace = trace::Trace::start();
    let parsed = flags::Cli::definition().try_get_matches().and_then(|m| flags::Cli::from_arg_matches(&m));
    let code = match parsed {
        Ok(cli) => commands::run(cli, trace).unwrap_or_else(|failure| failure.report()),
        Err(usage) => failure::report_usage(&usage),
    };
    ExitCode::from(code)
}
