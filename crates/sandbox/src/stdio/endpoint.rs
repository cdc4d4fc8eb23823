//! Where a stream goes, as the Task API names it.

use std::{io, path::PathBuf};

use super::logger::{Owner, Program};

/// Why a stream cannot be connected.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not an address of a stream.
    #[error(
        "{0:?} is no place for a stream: expected a FIFO's path, file:///path, binary:///program or kapsel:"
    )]
    BadUri(String),
    /// The FIFO or file cannot be opened.
    #[error("cannot open {path} for a stream of the container: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The guest is gone.
    #[error("the channel to the guest broke: {0}")]
    Channel(#[from] kapsel_channel::Error),
    /// The guest is gone.
    #[error("the channel to the guest broke: {0}")]
    Io(#[from] io::Error),
}

/// Where one stream goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// The process has /dev/null there.
    Nowhere,
    /// A named pipe that somebody made.
    Fifo(PathBuf),
    /// A file that grows, within a bound.
    File(PathBuf),
    /// A program that reads it.
    Logger(Program),
    /// Attachers, and the log.
    Kapsel {
        /// Whether output goes to the log too.
        log: bool,
    },
}

impl Endpoint {
    /// Reads a URI of the Task API.
    ///
    /// # Errors
    /// When it names no place that this shim knows.
    pub fn parse(uri: &str) -> Result<Self, Error> {
        let bad = || Error::BadUri(uri.into());
        Ok(match uri.split_once(':') {
            _ if uri.is_empty() => Self::Nowhere,
            Some(("kapsel", "")) => Self::Kapsel { log: true },
            Some(("kapsel", "?log=off")) => Self::Kapsel { log: false },
            Some(("file", rest)) => {
                let path = rest.strip_prefix("//").unwrap_or(rest);
                Self::File(Some(path).filter(|path| path.starts_with('/')).ok_or_else(bad)?.into())
            }
            Some(("binary", rest)) => {
                let rest = rest.strip_prefix("//").unwrap_or(rest);
                Self::Logger(Program::parse(rest).ok_or_else(bad)?)
            }
            Some(("fifo", rest)) => {
                let path = rest.strip_prefix("//").unwrap_or(rest);
                Self::Fifo(Some(path).filter(|path| path.starts_with('/')).ok_or_else(bad)?.into())
            }
            _ if uri.starts_with('/') => Self::Fifo(uri.into()),
            _ => return Err(bad()),
        })
    }
}

/// Where the streams of one process go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// One stream for both directions.
    pub terminal: bool,
    /// To the process.
    pub stdin: Endpoint,
    /// From the process.
    pub stdout: Endpoint,
    /// From the process.
    pub stderr: Endpoint,
    /// Whose they are, for programs that log.
    pub owner: Owner,
}

impl Plan {
    /// Reads the URIs of a Create or Exec request.
    ///
    /// # Errors
    /// When one names no place that this shim knows.
    pub fn parse(terminal: bool, stdin: &str, stdout: &str, stderr: &str) -> Result<Self, Error> {
        Ok(Self {
            terminal,
            stdin: Endpoint::parse(stdin)?,
            stdout: Endpoint::parse(stdout)?,
            stderr: Endpoint::parse(stderr)?,
            owner: Owner::default(),
        })
    }

    /// The program that reads the output; one for both streams, as engines name it for both.
    pub(super) fn logger(&self) -> Option<&Program> {
        [&self.stdout, &self.stderr].into_iter().find_map(|endpoint| match endpoint {
            Endpoint::Logger(program) => Some(program),
            _ => None,
        })
    }

    /// Whether no stream is connected at all.
    pub fn is_silent(&self) -> bool {
        !self.terminal
            && [&self.stdin, &self.stdout, &self.stderr].into_iter().all(|e| *e == Endpoint::Nowhere)
    }

    /// Whether the output is to be logged.
    pub fn logs(&self) -> bool {
        [&self.stdout, &self.stderr].into_iter().any(|endpoint| *endpoint == Endpoint::Kapsel { log: true })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris() {
        for (uri, endpoint) in [
            ("", Endpoint::Nowhere),
            ("/run/x", Endpoint::Fifo("/run/x".into())),
            ("fifo:///run/x", Endpoint::Fifo("/run/x".into())),
            ("file:///var/log/x", Endpoint::File("/var/log/x".into())),
            ("file:/var/log/x", Endpoint::File("/var/log/x".into())),
            ("kapsel:", Endpoint::Kapsel { log: true }),
            ("kapsel:?log=off", Endpoint::Kapsel { log: false }),
        ] {
            assert_eq!(Endpoint::parse(uri).unwrap(), endpoint, "{uri}");
        }
        assert!(matches!(Endpoint::parse("binary:///bin/logger?a=b").unwrap(), Endpoint::Logger(_)));
        for uri in ["x", "file://x", "kapsel:?log=maybe", "binary://logger", "http://x"] {
            assert!(Endpoint::parse(uri).is_err(), "{uri}");
        }
    }
}
