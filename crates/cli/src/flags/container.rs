//! Commands about containers that exist.

use clap::Args;

use super::run::ProcessFlags;
use super::value::{CopyPath, DetachKeys, signal};

/// Containers, by name or the beginning of an id.
#[derive(Args, Debug)]
pub struct Names {
    /// Name of a container, or the beginning of its id
    #[arg(required = true, value_name = "CONTAINER")]
    pub names: Vec<String>,
}

/// Run a command in a running container
///
/// The exit code is the command's own; 125 when kapsel itself failed, 126 when COMMAND cannot be executed, 127 when
/// it is not found, 128+N when signal N ended it.
#[derive(Args, Debug)]
#[command(override_usage = "kapsel exec [OPTIONS] CONTAINER COMMAND [ARG]...")]
pub struct Exec {
    /// Start the command and leave it running
    #[arg(short, long, conflicts_with_all = ["interactive", "terminal"])]
    pub detach: bool,
    /// Pass standard input on to the command
    #[arg(short, long)]
    pub interactive: bool,
    /// Give the command a terminal
    #[arg(short = 't', long = "tty")]
    pub terminal: bool,
    /// Keys that let go of the terminal and leave the command running; empty for none
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: DetachKeys,
    /// What the process gets.
    #[command(flatten)]
    pub process: ProcessFlags,
    /// The container, then the command and its arguments.
    #[arg(required = true, num_args = 2.., trailing_var_arg = true, hide = true, value_name = "CONTAINER")]
    pub target: Vec<String>,
}

/// Copy files into or out of a container
///
/// One of SRC and DST is CONTAINER:PATH, the other a path here, or '-' for a tar archive on standard input or output.
/// As with 'cp -a': a directory is copied whole; into DST when that is a directory, as DST when it does not exist.
/// 'SRC/.' copies what is in SRC. Links are copied as links; files belong to the container's root, or to you.
#[derive(Args, Debug)]
pub struct Cp {
    /// Keep the owners of files
    #[arg(short, long)]
    pub archive: bool,
    /// Follow a link that SRC itself is
    #[arg(short = 'L', long)]
    pub follow_link: bool,
    /// From where: CONTAINER:PATH, a path here, or '-'
    #[arg(value_name = "SRC")]
    pub source: CopyPath,
    /// To where: CONTAINER:PATH, a path here, or '-'
    #[arg(value_name = "DST")]
    pub destination: CopyPath,
}

/// List containers
#[derive(Args, Debug)]
pub struct Ps {
    /// Also those that have ended
    #[arg(short, long)]
    pub all: bool,
    /// Only their ids
    #[arg(short, long, conflicts_with = "json")]
    pub quiet: bool,
    /// Print JSON, one array
    #[arg(long)]
    pub json: bool,
}

/// Show what a container wrote
///
/// What it wrote to standard output comes out on standard output, and what it wrote to standard error on standard
/// error. Only the newest output is kept (see 'kapsel config').
#[derive(Args, Debug)]
pub struct Logs {
    /// Go on showing what it writes, until it ends
    #[arg(short, long)]
    pub follow: bool,
    /// Only the last LINES lines
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<usize>,
    /// Name of the container, or the beginning of its id
    #[arg(value_name = "CONTAINER")]
    pub name: String,
}

/// Show all that is known about containers or images, as JSON
#[derive(Args, Debug)]
pub struct Inspect {
    /// Containers or images
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
    /// Accepted for likeness with the other commands: the output is JSON anyway
    #[arg(long, hide = true)]
    pub json: bool,
}

/// Show the resources that containers use
#[derive(Args, Debug)]
pub struct Stats {
    /// Print the numbers once, instead of again and again
    #[arg(long)]
    pub no_stream: bool,
    /// Print JSON: one array each time
    #[arg(long)]
    pub json: bool,
    /// Containers; all that run when none is named
    #[arg(value_name = "CONTAINER")]
    pub names: Vec<String>,
}

/// Connect to the main process of a container
///
/// Standard input is passed on when the container was started with -i.
#[derive(Args, Debug)]
pub struct Attach {
    /// Do not pass standard input on
    #[arg(long)]
    pub no_stdin: bool,
    /// Keys that let go of the terminal and leave the container running; empty for none
    #[arg(long, value_name = "KEYS", default_value = "ctrl-p,ctrl-q")]
    pub detach_keys: DetachKeys,
    /// Name of the container, or the beginning of its id
    #[arg(value_name = "CONTAINER")]
    pub name: String,
}

/// End containers: their stop signal first, SIGKILL after a grace period
#[derive(Args, Debug)]
pub struct Stop {
    /// Seconds to wait before SIGKILL [default: 10]
    #[arg(short, long = "timeout", visible_alias = "time", value_name = "SECONDS")]
    pub timeout: Option<u64>,
    /// Signal to send first, instead of the container's own
    #[arg(short, long, value_name = "SIGNAL", value_parser = signal)]
    pub signal: Option<i32>,
    /// Containers.
    #[command(flatten)]
    pub containers: Names,
}

/// Send a signal to containers
#[derive(Args, Debug)]
pub struct Kill {
    /// Which, by name or number
    #[arg(short, long, value_name = "SIGNAL", value_parser = signal, default_value = "KILL")]
    pub signal: i32,
    /// Containers.
    #[command(flatten)]
    pub containers: Names,
}

/// Remove containers
#[derive(Args, Debug)]
pub struct Rm {
    /// Also those that run: they are killed; and do not mind names that are unknown
    #[arg(short, long)]
    pub force: bool,
    /// Containers.
    #[command(flatten)]
    pub containers: Names,
}
