//! The command line: Firecracker's, with its messages.
//!
//! One table says what there is, and help is printed from it. The monitor starts once a machine, so what reads a dozen flags
//! has to be small: a parser that also knows colours, suggestions and subcommands took a third of the time until the API was there.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::PathBuf;
use std::str::FromStr;

use kapsel_vmm::api::BODY_MAX;
use kapsel_vmm::log;
use lexopt::{Arg, Parser};

/// Every flag: its name, what its value is, if it takes one, and what it is for.
const FLAGS: &[(&str, Option<&str>, &str)] = &[
    ("api-sock", Some("SOCKET"), "The API's Unix socket, which is made [default: /run/firecracker.socket]"),
    ("no-api", None, "Have no API; the machine is then in --config-file"),
    ("config-file", Some("FILE"), "Start the machine that is described in this JSON file"),
    ("id", Some("ID"), "The instance's name [default: anonymous-instance]"),
    ("log-path", Some("FILE"), "Where messages go instead of the standard error output"),
    (
        "level",
        Some("LEVEL"),
        "The least important messages: Off, Error, Warning, Info, Debug or Trace [default: Info]",
    ),
    ("show-level", None, "Write messages with their levels"),
    ("show-log-origin", None, "Write messages with their places in the source"),
    ("module", Some("PATH"), "Write only messages of modules whose path begins so"),
    ("metrics-path", Some("FILE"), "Where counters are told"),
    ("boot-timer", None, "Log how long the guest took to boot, when it writes 123 to the byte at 0xc0000000"),
    ("mmds-size-limit", Some("BYTES"), "The longest metadata, as JSON [default: 51200]"),
    ("http-api-max-payload-size", Some("BYTES"), "The longest body of a request to the API [default: 51200]"),
    ("metadata", Some("FILE"), "A JSON file with the metadata to begin with"),
    ("start-time-us", Some("TIME"), "When the process was started, by the monotonic clock; a jailer says so"),
    (
        "start-time-cpu-us",
        Some("TIME"),
        "What the process had used of the processor by then; a jailer says so",
    ),
    ("parent-cpu-time-us", Some("TIME"), "What its parent had used of the processor; a jailer says so"),
    ("snapshot-version", None, "Print the version of snapshots that this program writes and reads, and end"),
    ("describe-snapshot", Some("FILE"), "Print the version of this snapshot's state file, and end"),
    ("no-seccomp", None, "Let the monitor's threads make any system call"),
    (
        "seccomp-filter",
        Some("FILE"),
        "Confine the monitor's threads by the filters in this JSON file, not by its own",
    ),
    ("help", None, "Print this, and end"),
    ("version", None, "Print the program's version, and end"),
];

/// What the command line asks for.
#[derive(Debug)]
pub enum Command {
    /// A machine.
    Run(Box<Options>),
    /// A text on the standard output.
    Print(String),
    /// The version of a snapshot's state file.
    DescribeSnapshot(PathBuf),
    /// The version of the snapshots of this program.
    SnapshotVersion,
}

/// How a machine is to be run.
#[derive(Debug)]
pub struct Options {
    /// The API's Unix socket.
    pub api_sock: PathBuf,
    /// There is no API.
    pub no_api: bool,
    /// The machine's description.
    pub config_file: Option<PathBuf>,
    /// The instance's name.
    pub id: String,
    /// The log.
    pub log: log::Settings,
    /// Where counters are told.
    pub metrics_path: Option<PathBuf>,
    /// Whether the time until the guest has booted is told.
    pub boot_timer: bool,
    /// The longest body of a request, in bytes.
    pub payload_max: usize,
    /// The longest metadata, in bytes: as long as a body, unless it is set.
    pub mmds_size_limit: usize,
    /// The metadata to begin with.
    pub metadata: Option<PathBuf>,
    /// When the process was started, in microseconds of the monotonic clock.
    pub start_time_us: Option<u64>,
    /// What the process had used of the processor by then, in microseconds.
    pub start_time_cpu_us: Option<u64>,
    /// What its parent had used of the processor, in microseconds.
    pub parent_cpu_time_us: Option<u64>,
    /// Threads may make any system call.
    pub no_seccomp: bool,
    /// Filters of the user's own.
    pub seccomp_filter: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            api_sock: "/run/firecracker.socket".into(),
            no_api: false,
            config_file: None,
            id: "anonymous-instance".into(),
            log: log::Settings { level: Some(log::Level::Info), ..log::Settings::default() },
            metrics_path: None,
            boot_timer: false,
            payload_max: BODY_MAX,
            mmds_size_limit: BODY_MAX,
            metadata: None,
            start_time_us: None,
            start_time_cpu_us: None,
            parent_cpu_time_us: None,
            no_seccomp: false,
            seccomp_filter: None,
        }
    }
}

/// What is wrong with a command line, in Firecracker's words where it has some.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no such flag, or it is no flag.
    #[error("Found argument '{0}' which wasn't expected, or isn't valid in this context.")]
    Unexpected(String),
    /// It was there before.
    #[error("The argument '{0}' was provided more than once.")]
    Duplicate(&'static str),
    /// Nothing follows it.
    #[error("The argument '{0}' requires a value, but none was supplied.")]
    NoValue(&'static str),
    /// Flags that contradict each other.
    #[error("Argument '{0}' cannot be used together with argument '{1}'.")]
    Forbidden(&'static str, &'static str),
    /// One that another needs.
    #[error("Argument '{0}' required, but not found.")]
    Missing(&'static str),
    /// A value that cannot be.
    #[error("Invalid value for '{0}': {1}")]
    Value(&'static str, String),
}

/// Reads the arguments after the program's name.
///
/// # Errors
/// [`Error`].
pub fn parse(arguments: impl IntoIterator<Item = OsString, IntoIter: 'static>) -> Result<Command, Error> {
    let mut parser = Parser::from_args(arguments);
    let mut options = Options::default();
    let mut given = Vec::new();
    let mut instead = None;
    while let Some(argument) = parser.next().map_err(unexpected_value)? {
        let unexpected = |text: String| Err(Error::Unexpected(text));
        let name = match argument {
            Arg::Long(name) => match FLAGS.iter().find(|(known, ..)| *known == name) {
                Some((known, ..)) => *known,
                None => return unexpected(format!("--{name}")),
            },
            Arg::Short('h') => "help",
            Arg::Short('V') => "version",
            Arg::Short(letter) => return unexpected(format!("-{letter}")),
            Arg::Value(value) => return unexpected(value.to_string_lossy().into_owned()),
        };
        if given.contains(&name) {
            return Err(Error::Duplicate(name));
        }
        given.push(name);
        match name {
            "api-sock" => options.api_sock = path(name, &mut parser)?,
            "no-api" => options.no_api = true,
            "config-file" => options.config_file = Some(path(name, &mut parser)?),
            "id" => options.id = instance_id(text(name, &mut parser)?)?,
            "log-path" => options.log.log_path = Some(path(name, &mut parser)?),
            "level" => options.log.level = Some(value(name, &mut parser)?),
            "show-level" => options.log.show_level = Some(true),
            "show-log-origin" => options.log.show_log_origin = Some(true),
            "module" => options.log.module = Some(text(name, &mut parser)?),
            "metrics-path" => options.metrics_path = Some(path(name, &mut parser)?),
            "boot-timer" => options.boot_timer = true,
            "http-api-max-payload-size" => options.payload_max = value(name, &mut parser)?,
            "mmds-size-limit" => options.mmds_size_limit = value(name, &mut parser)?,
            "metadata" => options.metadata = Some(path(name, &mut parser)?),
            "start-time-us" => options.start_time_us = Some(value(name, &mut parser)?),
            "start-time-cpu-us" => options.start_time_cpu_us = Some(value(name, &mut parser)?),
            "parent-cpu-time-us" => options.parent_cpu_time_us = Some(value(name, &mut parser)?),
            "no-seccomp" => options.no_seccomp = true,
            "seccomp-filter" => options.seccomp_filter = Some(path(name, &mut parser)?),
            "snapshot-version" => instead = instead.or(Some(Command::SnapshotVersion)),
            "describe-snapshot" => {
                let file = path(name, &mut parser)?;
                instead = instead.or(Some(Command::DescribeSnapshot(file)));
            }
            "version" => instead = instead.or(Some(Command::Print(version()))),
            // Whatever else is wrong.
            _ => return Ok(Command::Print(help())),
        }
    }
    if !given.contains(&"mmds-size-limit") {
        options.mmds_size_limit = options.payload_max;
    }
    for (one, other) in [("no-seccomp", "seccomp-filter"), ("no-api", "api-sock")] {
        if given.contains(&one) && given.contains(&other) {
            return Err(Error::Forbidden(one, other));
        }
    }
    if options.no_api && options.config_file.is_none() {
        return Err(Error::Missing("config-file"));
    }
    Ok(instead.unwrap_or_else(|| Command::Run(Box::new(options))))
}

fn unexpected_value(error: lexopt::Error) -> Error {
    Error::Unexpected(match error {
        lexopt::Error::UnexpectedValue { option, value } => format!("{option}={}", value.to_string_lossy()),
        other => other.to_string(),
    })
}

/// The argument's value, which no flag is.
fn raw(name: &'static str, parser: &mut Parser) -> Result<OsString, Error> {
    let value = parser.value().ok().filter(|value| !value.as_encoded_bytes().starts_with(b"--"));
    value.ok_or(Error::NoValue(name))
}

fn path(name: &'static str, parser: &mut Parser) -> Result<PathBuf, Error> {
    raw(name, parser).map(PathBuf::from)
}

fn text(name: &'static str, parser: &mut Parser) -> Result<String, Error> {
    raw(name, parser)?.into_string().map_err(|raw| Error::Value(name, format!("{raw:?} is not UTF-8")))
}

fn value<T: FromStr<Err: ToString>>(name: &'static str, parser: &mut Parser) -> Result<T, Error> {
    text(name, parser)?.parse().map_err(|error: T::Err| Error::Value(name, error.to_string()))
}

fn instance_id(id: String) -> Result<String, Error> {
    if (1..=64).contains(&id.len()) && id.chars().all(|c| c.is_ascii_alphanumeric() || c == '-') {
        Ok(id)
    } else {
        Err(Error::Value("id", "an id is 1 to 64 letters, digits and hyphens".to_owned()))
    }
}

fn version() -> String {
    concat!("kapsel-vmm ", env!("CARGO_PKG_VERSION")).to_owned()
}

fn help() -> String {
    let mut help = "Run one microVM. Its serial console is the standard input and output; the exit status is 0 when the guest\n\
        powers itself off or resets.\n\nUsage: kapsel-vmm [OPTIONS]\n\nOptions:"
        .to_owned();
    for (name, value, purpose) in FLAGS {
        let flag = value.map_or_else(|| (*name).to_owned(), |value| format!("{name} <{value}>"));
        // Writing to a string does not fail.
        let _ = write!(help, "\n  --{flag:<28} {purpose}");
    }
    help
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(line: &str) -> Result<Options, String> {
        match parse(line.split_whitespace().map(OsString::from).collect::<Vec<_>>()) {
            Ok(Command::Run(options)) => Ok(*options),
            Ok(other) => Err(format!("{other:?}")),
            Err(error) => Err(error.to_string()),
        }
    }

    #[test]
    fn flags_are_firecrackers_and_so_are_its_defaults() {
        let options = run("").unwrap();
        assert_eq!(options.api_sock, PathBuf::from("/run/firecracker.socket"));
        assert_eq!((options.id.as_str(), options.mmds_size_limit), ("anonymous-instance", 51_200));
        let options =
            run("--id one-2 --api-sock /s --level=debug --show-level --start-time-us 7 --boot-timer")
                .unwrap();
        assert_eq!((options.id.as_str(), options.api_sock), ("one-2", PathBuf::from("/s")));
        assert_eq!((options.log.level, options.log.show_level), (Some(log::Level::Debug), Some(true)));
        assert_eq!((options.start_time_us, options.boot_timer), (Some(7), true));
        let options = run("--http-api-max-payload-size 1000").unwrap();
        assert_eq!((options.payload_max, options.mmds_size_limit), (1000, 1000));
        assert_eq!(run("--http-api-max-payload-size 9 --mmds-size-limit 5").unwrap().mmds_size_limit, 5);
        assert!(run("--no-api --config-file /c").unwrap().no_api);
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (line, message) in [
            ("--nonsense", "Found argument '--nonsense' which wasn't expected"),
            ("word", "Found argument 'word' which wasn't expected"),
            ("-x", "Found argument '-x' which wasn't expected"),
            ("--id a --id b", "The argument 'id' was provided more than once."),
            ("--api-sock", "The argument 'api-sock' requires a value, but none was supplied."),
            ("--no-api", "Argument 'config-file' required, but not found."),
            (
                "--no-api --config-file c --api-sock s",
                "Argument 'no-api' cannot be used together with argument 'api-sock'.",
            ),
            ("--no-seccomp --seccomp-filter f", "Argument 'no-seccomp' cannot be used together"),
            ("--id a_b", "Invalid value for 'id': an id is"),
            ("--level loud", "Invalid value for 'level': \"loud\" is not a level"),
            ("--mmds-size-limit x", "Invalid value for 'mmds-size-limit': invalid digit"),
            ("--boot-timer=yes", "Found argument '--boot-timer=yes'"),
            ("--id --boot-timer", "The argument 'id' requires a value"),
        ] {
            let error = run(line).unwrap_err();
            assert!(error.contains(message), "{line}: {error}");
        }
    }

    #[test]
    fn every_flag_of_the_table_is_read_and_in_the_help() {
        for (name, value, _) in FLAGS {
            let number = value.map_or("", |value| if value == "LEVEL" { "Info" } else { "7" });
            let read = run(&format!("--{name} {number}"));
            let fine =
                |error: &String| !error.contains("wasn't expected") && !error.contains("requires a value");
            assert!(read.as_ref().err().is_none_or(fine), "{name}: {read:?}");
            assert!(help().contains(&format!("--{name} ")), "{name}");
            let printed = name.ends_with("version") || ["help", "describe-snapshot"].contains(name);
            assert!(read.is_ok() || printed || *name == "no-api", "{name}: {read:?}");
        }
        assert!(run("--version").unwrap_err().contains("kapsel-vmm "));
    }
}
