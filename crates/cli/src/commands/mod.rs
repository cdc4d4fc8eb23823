//! One module per command, or per few that share their code.

mod generate;
mod version;

use crate::failure::{Failure, Outcome};
use crate::flags::{Cli, Command};

/// Does what the command line asks for.
pub fn run(cli: Cli) -> Outcome {
    match cli.command {
        Command::Version(flags) => version::run(&flags),
        Command::Man(flags) => generate::man(&flags),
        Command::Completions(flags) => generate::completions(&flags),
        _ => Err(Failure::new("this command needs libraries that are not there yet")),
    }
}
