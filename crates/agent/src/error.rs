//! Errors as the API tells them.

use kapsel_protocol::limits::ERROR_MESSAGE_MAX;
use ttrpc::Code;

use crate::container::plan::PlanError;

/// Why a request failed. Each variant is one status code; see `agent.proto`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The request can never work.
    #[error("{0}")]
    Invalid(String),
    /// No such container, process, path or program.
    #[error("{0}")]
    NotFound(String),
    /// The name is in use.
    #[error("{0}")]
    Exists(String),
    /// Not in this state.
    #[error("{0}")]
    State(String),
    /// A limit of the protocol.
    #[error("{0}")]
    Exhausted(String),
    /// This guest cannot do it.
    #[error("{0}")]
    Unimplemented(String),
    /// The program cannot be executed.
    #[error("{0}")]
    Denied(String),
    /// All else.
    #[error("{0}")]
    Internal(String),
}

/// `Result` with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        match error {
            PlanError::Unsupported(_)
            | PlanError::Option(_)
            | PlanError::Limit(crate::container::limits::LimitError::Unsupported(_)) => {
                Self::Unimplemented(error.to_string())
            }
            _ => Self::Invalid(error.to_string()),
        }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::Internal(error.to_string())
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let code = match error {
            Error::Invalid(_) => Code::INVALID_ARGUMENT,
            Error::NotFound(_) => Code::NOT_FOUND,
            Error::Exists(_) => Code::ALREADY_EXISTS,
            Error::State(_) => Code::FAILED_PRECONDITION,
            Error::Exhausted(_) => Code::RESOURCE_EXHAUSTED,
            Error::Unimplemented(_) => Code::UNIMPLEMENTED,
            Error::Denied(_) => Code::PERMISSION_DENIED,
            Error::Internal(_) => Code::INTERNAL,
        };
        let mut message = error.to_string();
        let end = (0..=ERROR_MESSAGE_MAX.min(message.len())).rev().find(|&i| message.is_char_boundary(i));
        message.truncate(end.unwrap_or(0));
        ttrpc::Error::RpcStatus(ttrpc::get_status(code, message))
    }
}
