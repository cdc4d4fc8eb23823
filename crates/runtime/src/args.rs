//! The command line: runc's verbs and flags, since it is engines that write it.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// OCI containers, each in a virtual machine of its own.
#[derive(Debug, Parser)]
#[command(name = "kapsel-runtime", disable_version_flag = true, max_term_width = 100)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub verb: Option<Verb>,
}

/// What engines put before the verb.
#[derive(Debug, Args)]
pub struct Global {
    /// Directory of the containers' state; each has its own set of names
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// File that errors are appended to
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// Form of the log
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// linux.cgroupsPath is SLICE:PREFIX:NAME, a scope that systemd makes
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Log what is done, too
    #[arg(long)]
    pub debug: bool,
    /// Print the version
    #[arg(short, long)]
    pub version: bool,
}

/// How lines of the log look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// As logrus writes it.
    Text,
    /// One object a line.
    Json,
}

/// What is to be done.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Make a container; its program waits for `start`
    Create(Create),
    /// Start the program of a created container
    Start(Named),
    /// Create and start a container
    Run(Run),
    /// Run another process in a container
    Exec(Exec),
    /// Print a container's state
    State(Named),
    /// Send a signal to a container
    Kill(Kill),
    /// Remove a container
    Delete(Delete),
    /// Freeze a container
    Pause(Named),
    /// Thaw a container
    Resume(Named),
    /// List the processes of a container, as its guest numbers them; as JSON, the one that stands for it on the host
    Ps(Ps),
    /// List containers
    List(List),
    /// Print what a container uses
    Events(Events),
    /// Change a container's limits
    Update(Update),
    /// Write a specification to begin with
    Spec(Spec),
    /// Print what this runtime can do
    Features,
    /// Not possible: a machine's processes cannot be taken out of it
    Checkpoint(Rest),
    /// Not possible: see checkpoint
    Restore(Rest),
    /// The process that stands for one in a guest
    #[command(hide = true)]
    StandIn {
        /// Talks to the command that started it
        #[arg(long)]
        control_fd: i32,
    },
}

/// One container.
#[derive(Debug, Args)]
pub struct Named {
    /// The container's id
    pub id: String,
}

/// Whatever follows.
#[derive(Debug, Args)]
pub struct Rest {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    pub words: Vec<String>,
}

/// `create`.
#[derive(Clone, Debug, Args)]
pub struct Create {
    /// Directory with config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
    /// Socket that gets the master of the container's terminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// File for the id of the process that stands for the container
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Accepted: the guest's root is not the host's, there is nothing to pivot from
    #[arg(long)]
    pub no_pivot: bool,
    /// Accepted: the guest's kernel has keyrings of its own
    #[arg(long)]
    pub no_new_keyring: bool,
    /// Descriptors to pass on; none can be passed into a guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// The container's id
    pub id: String,
}

/// `run`.
#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub create: Create,
    /// Do not stay until the container ends
    #[arg(short, long)]
    pub detach: bool,
    /// Keep the container's state when it ends
    #[arg(long)]
    pub keep: bool,
    /// Accepted: whoever started this command inherits the stand-in with --detach
    #[arg(long)]
    pub no_subreaper: bool,
}

/// `exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// File with an OCI process; `-` is standard input
    #[arg(short, long, value_name = "FILE")]
    pub process: Option<PathBuf>,
    /// Socket that gets the master of the process's terminal
    #[arg(long, value_name = "SOCKET")]
    pub console_socket: Option<PathBuf>,
    /// File for the id of the process that stands for it
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Do not stay until the process ends
    #[arg(short, long)]
    pub detach: bool,
    /// Give it a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Its working directory
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<String>,
    /// Added to its environment, NAME=value
    #[arg(short, long, value_name = "NAME=VALUE")]
    pub env: Vec<String>,
    /// UID[:GID]
    #[arg(short, long)]
    pub user: Option<String>,
    /// More groups
    #[arg(short = 'g', long, value_name = "GID")]
    pub additional_gids: Vec<u32>,
    /// A capability to add
    #[arg(short, long, value_name = "CAP")]
    pub cap: Vec<String>,
    /// Let it gain no privileges
    #[arg(long)]
    pub no_new_privs: bool,
    /// Descriptors to pass on; none can be passed into a guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub preserve_fds: u32,
    /// The container's id
    pub id: String,
    /// Program and arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<String>,
}

/// `kill`.
#[derive(Debug, Args)]
pub struct Kill {
    /// To all processes of the container
    #[arg(short, long)]
    pub all: bool,
    /// The container's id
    pub id: String,
    /// Name or number
    #[arg(default_value = "SIGTERM")]
    pub signal: String,
}

/// `delete`.
#[derive(Debug, Args)]
pub struct Delete {
    /// Kill it first; one that is not there is no error
    #[arg(short, long)]
    pub force: bool,
    /// The container's id
    pub id: String,
}

/// `ps`.
#[derive(Debug, Args)]
pub struct Ps {
    /// Form of the list
    #[arg(short, long, value_enum, default_value = "table")]
    pub format: TableFormat,
    /// The container's id
    pub id: String,
}

/// How lists are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TableFormat {
    /// For people.
    Table,
    /// For programs.
    Json,
}

/// `list`.
#[derive(Debug, Args)]
pub struct List {
    /// Form of the list
    #[arg(short, long, value_enum, default_value = "table")]
    pub format: TableFormat,
    /// Ids only
    #[arg(short, long)]
    pub quiet: bool,
}

/// `events`.
#[derive(Debug, Args)]
pub struct Events {
    /// Time between two lines
    #[arg(long, value_name = "TIME", default_value = "5s")]
    pub interval: String,
    /// One line, and the end
    #[arg(long)]
    pub stats: bool,
    /// The container's id
    pub id: String,
}

/// `update`.
#[derive(Debug, Args)]
pub struct Update {
    /// File with OCI resources; `-` is standard input
    #[arg(short, long, value_name = "FILE")]
    pub resources: Option<PathBuf>,
    /// Bytes of memory
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub memory: Option<i64>,
    /// Bytes of memory that it should not exceed for long
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub memory_reservation: Option<i64>,
    /// Bytes of memory and swap together
    #[arg(long, value_name = "BYTES", allow_hyphen_values = true)]
    pub memory_swap: Option<i64>,
    /// Microseconds of processor time in a period
    #[arg(long, value_name = "USECS", allow_hyphen_values = true)]
    pub cpu_quota: Option<i64>,
    /// Microseconds of a period
    #[arg(long, value_name = "USECS")]
    pub cpu_period: Option<u64>,
    /// Weight among others
    #[arg(long, value_name = "N")]
    pub cpu_share: Option<u64>,
    /// Processors of the host that it may use
    #[arg(long, value_name = "LIST")]
    pub cpuset_cpus: Option<String>,
    /// Memory nodes of the host that it may use
    #[arg(long, value_name = "LIST")]
    pub cpuset_mems: Option<String>,
    /// Most processes
    #[arg(long, value_name = "N", allow_hyphen_values = true)]
    pub pids_limit: Option<i64>,
    /// The container's id
    pub id: String,
}

/// `spec`.
#[derive(Debug, Args)]
pub struct Spec {
    /// Where to write config.json
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    pub bundle: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As podman's conmon, containerd's runc shim and Docker's daemon write them.
    #[test]
    fn what_engines_write_is_understood() {
        for line in [
            "--log-format=json --log /run/x/oci-log create --bundle /b --pid-file /b/pidfile --no-pivot c1",
            "--systemd-cgroup create --bundle /b --pid-file /p --console-socket /c.sock c1",
            "--root /run/docker/runtime-runc/moby --log /l --log-format json create --bundle /b --pid-file /p c1",
            "--root /r exec --process /p.json --console-socket /c --detach --pid-file /p c1",
            "exec --pid-file /p --process /spec --detach --tty c1",
            "kill --all c1 9",
            "kill c1",
            "delete --force c1",
            "events --stats c1",
            "ps --format json c1",
            "update --resources - c1",
            "exec -e A=b -u 1:2 c1 sh -c true",
            "--version",
        ] {
            let words = ["kapsel-runtime"].into_iter().chain(line.split(' '));
            Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }
}
