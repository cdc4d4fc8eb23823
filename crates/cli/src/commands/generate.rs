//! `kapsel man` and `kapsel completions`: made from the definition, for packagers and the Makefile.

use crate::failure::{Failure, Outcome};
use crate::flags::Cli;
use crate::flags::system;
use crate::output;

/// Writes `kapsel.1` and one page for each command.
pub fn man(flags: &system::Man) -> Outcome {
    let directory = &flags.directory;
    std::fs::create_dir_all(directory)
        .and_then(|()| clap_mangen::generate_to(Cli::definition(), directory))
        .map_err(|error| {
            Failure::new(format!("cannot write man pages to {}: {error}", directory.display()))
        })?;
    Ok(0)
}

/// Prints the completion script for a shell.
pub fn completions(flags: &system::Completions) -> Outcome {
    let mut script = Vec::new();
    clap_complete::generate(flags.shell, &mut Cli::definition(), "kapsel", &mut script);
    output::print(&script);
    Ok(0)
}
