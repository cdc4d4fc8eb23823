//! What can go wrong with a machine.

use std::path::PathBuf;
use std::time::Duration;

/// Why a machine could not be started, or did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The monitor is not installed.
    #[error("cannot find {program}; install the package {package}")]
    Missing {
        /// What was looked for.
        program: String,
        /// Debian's package that has it.
        package: &'static str,
    },
    /// The monitor cannot do that.
    #[error("{monitor} cannot {what}")]
    Unsupported {
        /// The monitor.
        monitor: &'static str,
        /// What was asked.
        what: String,
    },
    /// The request makes no sense.
    #[error("machine {name}: {what}")]
    Invalid {
        /// The machine.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// The snapshot does not fit the request.
    #[error("the snapshot in {} does not fit this machine: {what}", dir.display())]
    Mismatch {
        /// The snapshot.
        dir: PathBuf,
        /// What differs.
        what: String,
    },
    /// The monitor ended.
    #[error("machine {name}: {monitor} ended ({reason}){}", last_lines(stderr))]
    Ended {
        /// The machine.
        name: String,
        /// The monitor.
        monitor: &'static str,
        /// How it ended.
        reason: String,
        /// Its last lines on stderr.
        stderr: String,
    },
    /// The monitor refused a command.
    #[error("machine {name}: {monitor} refused {command}: {message}")]
    Refused {
        /// The machine.
        name: String,
        /// The monitor.
        monitor: &'static str,
        /// The command of its control protocol.
        command: String,
        /// The monitor's words.
        message: String,
    },
    /// Something took too long.
    #[error("machine {name}: {what} took longer than {after:?}{}", last_lines(console))]
    Deadline {
        /// The machine.
        name: String,
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
        /// The guest's last lines.
        console: String,
    },
    /// The control connection to the monitor is broken.
    #[error("machine {name}: the monitor's control connection failed: {what}")]
    Control {
        /// The machine.
        name: String,
        /// What failed.
        what: String,
    },
    /// The monitor could not be confined, or not be started in its jail.
    #[error("machine {name}: {source}")]
    Jail {
        /// The machine.
        name: String,
        /// What failed.
        source: kapsel_jail::Error,
    },
    /// The channel to the guest failed.
    #[error("machine {name}: {source}")]
    Channel {
        /// The machine.
        name: String,
        /// What failed.
        source: kapsel_channel::Error,
    },
    /// A file or system call failed.
    #[error("{what}: {source}")]
    Io {
        /// What was tried, on what.
        what: String,
        /// The system's answer.
        source: std::io::Error,
    },
}

fn last_lines(text: &str) -> String {
    // In one line, and without what separates a failure from the advice in messages: it is others' text.
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let lines = lines.join(" | ").replace("; ", ", ");
    if lines.is_empty() { lines } else { format!(", its last lines: {lines}") }
}

/// Adds what was tried to an I/O error.
pub(crate) trait Context<T> {
    /// `what` tells what was tried, on what.
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<std::io::Error>> Context<T> for Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| Error::Io { what: what(), source: error.into() })
    }
}
