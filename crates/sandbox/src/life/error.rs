//! Why a sandbox did not do what it was asked.

use std::path::PathBuf;

use super::guest_spec;
use crate::{annotations, record, seccomp, stdio};

/// Typed, so that the Task API can say it with the right status code.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The specification cannot be read.
    #[error("cannot read the container's specification {path}: {reason}")]
    Spec {
        /// `config.json`.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The specification cannot be followed.
    #[error(transparent)]
    GuestSpec(#[from] guest_spec::Error),
    /// An annotation cannot be followed.
    #[error(transparent)]
    Annotation(#[from] annotations::Error),
    /// The seccomp profile cannot be compiled.
    #[error(transparent)]
    Seccomp(#[from] seccomp::Error),
    /// A stream cannot be connected.
    #[error(transparent)]
    Stdio(#[from] stdio::Error),
    /// The record cannot be kept.
    #[error(transparent)]
    Record(#[from] record::Error),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// There is not enough of something on the host.
    #[error("{0}")]
    Resources(String),
    /// No such container or process.
    #[error("{0}")]
    NotFound(String),
    /// It is there already.
    #[error("{0}")]
    AlreadyExists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// What a sandbox needs is not installed.
    #[error("{0}")]
    Missing(String),
    /// The machine could not be started.
    #[error("cannot start the sandbox's machine: {0}; `kapsel doctor` checks what machines need")]
    Machine(#[from] kapsel_machine::Error),
    /// The sandbox cannot be connected.
    #[error(transparent)]
    Network(#[from] kapsel_network::Error),
    /// A port of the host cannot be had.
    #[error(transparent)]
    Port(#[from] crate::publish::Error),
    /// A process of the host could not be confined or started.
    #[error("cannot start {what}: {reason}; `kapsel doctor` checks what machines need")]
    Helper {
        /// The process.
        what: String,
        /// Why.
        reason: String,
    },
    /// The guest said no.
    #[error("{message}")]
    Guest {
        /// As the agent classed it.
        code: ttrpc::Code,
        /// As the agent said it, cut.
        message: String,
    },
    /// The guest does not answer.
    #[error("the guest did not answer {call} within {seconds} s; `kapsel rm -f` ends the sandbox by force")]
    Timeout {
        /// The call.
        call: &'static str,
        /// How long it was given.
        seconds: u64,
    },
    /// The guest's agent sent something that is no answer.
    #[error("the guest answered {call} with nonsense: {reason}; the sandbox was ended")]
    Nonsense {
        /// The call.
        call: &'static str,
        /// What was wrong.
        reason: String,
    },
    /// The sandbox ended meanwhile.
    #[error("the sandbox has ended: {0}")]
    Ended(String),
    /// The sandbox ended, and not since its container did.
    #[error("the sandbox was lost: {0}")]
    Lost(String),
    /// The container ended since it used up its memory.
    #[error("the container ran out of memory; give it more with --memory")]
    OutOfMemory,
}

impl Error {
    /// The status code of the Task API.
    pub fn code(&self) -> ttrpc::Code {
        use ttrpc::Code;
        match self {
            Self::Spec { .. }
            | Self::GuestSpec(_)
            | Self::Annotation(_)
            | Self::Seccomp(_)
            | Self::Invalid(_) => Code::INVALID_ARGUMENT,
            Self::Network(error) => match error {
                kapsel_network::Error::Namespace { .. }
                | kapsel_network::Error::Host(_)
                | kapsel_network::Error::TooMany { .. } => Code::INVALID_ARGUMENT,
                _ => Code::FAILED_PRECONDITION,
            },
            Self::Port(_) => Code::FAILED_PRECONDITION,
            Self::Resources(_) | Self::OutOfMemory => Code::RESOURCE_EXHAUSTED,
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::State(_) | Self::Missing(_) => Code::FAILED_PRECONDITION,
            Self::Guest { code, .. } => *code,
            Self::Timeout { .. } => Code::DEADLINE_EXCEEDED,
            Self::Ended(_) => Code::UNAVAILABLE,
            Self::Lost(_) => Code::ABORTED,
            Self::Stdio(_)
            | Self::Record(_)
            | Self::Machine(_)
            | Self::Helper { .. }
            | Self::Nonsense { .. } => Code::UNKNOWN,
        }
    }
}
