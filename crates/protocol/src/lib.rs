//! The agent's ttrpc API and its limits: the whole contract between host and guest.
//!
//! - `agent.proto` is the API; [`api`] holds its messages, [`service`] the client and the server's trait.
//! - [`stdio`] says how the streams beside the API begin.
//! - [`limits`] bounds everything, for both sides: the guest is hostile to the host, and the host's request may carry what
//!   a hostile image wrote.

pub mod limits;
pub mod stdio;

/// The generated code, laid out as it refers to itself.
#[allow(missing_docs, unused, nonstandard_style, clippy::all, clippy::unwrap_used)]
mod generated {
    pub mod agent {
        include!(concat!(env!("OUT_DIR"), "/agent.rs"));
    }
    pub mod agent_ttrpc {
        include!(concat!(env!("OUT_DIR"), "/agent_ttrpc.rs"));
    }
}

/// The messages of `agent.proto`.
pub use generated::agent as api;

/// The ttrpc service of `agent.proto`: [`service::AgentClient`] for the host, [`service::Agent`] and
/// [`service::create_agent`] for the guest.
pub use generated::agent_ttrpc as service;

/// The version that [`api::HelloResponse`] carries. Host and agent come from one build: another version is an error.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// What the agent is when a process of a container executes it.
pub mod program {
    /// Its path there: each process is the agent until it executes something.
    pub const PATH: &str = "/proc/self/exe";
    /// Its first argument for a first process that passes signals on to the command in the others, reaps, and ends as that does.
    pub const INIT: &str = "init";
    /// Its first argument for a program that does nothing.
    pub const REHEARSE: &str = "rehearse";
}

/// The channel port on which the agent serves ttrpc.
pub const AGENT_PORT: u32 = 1024;

/// The channel port to which the host opens the streams of processes and copies; see [`stdio`].
pub const STDIO_PORT: u32 = 1025;

/// How the message of a `NOT_FOUND` status from `Start` begins when the program does not exist (exit code 127).
pub const NOT_FOUND_PREFIX: &str = "not found:";

/// How the message of a `PERMISSION_DENIED` status from `Start` begins when the program cannot be executed (exit code
/// 126).
pub const NOT_EXECUTABLE_PREFIX: &str = "not executable:";

/// The directory in the guest below which storages are mounted.
pub const STORAGE_ROOT: &str = "/run/kapsel";
