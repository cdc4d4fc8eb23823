//! kapsel-forward's jail.

use std::path::Path;

use crate::error::Result;
use crate::filters;
use crate::identity::Identity;
use crate::jail::{Jail, Namespaces, Resource};

/// Two for each of its connections, one for each client of a port of datagrams, and what it begins with.
const OPEN_FILES: u64 = 64 << 10;

/// kapsel-forward's jail, for the ports of sandbox `id`. It is in our network namespace, since it connects to the sandbox from here; it
/// has no file and no privilege, makes no socket but for TCP and UDP over IPv4, and listens on none but those that it is given.
///
/// # Errors
/// When the program is not there, or a library of it.
pub fn forward(program: &Path, id: &str) -> Result<Jail> {
    Ok(Jail::new("kapsel-forward")
        .program_with_libraries(program)?
        .namespaces(Namespaces { net: false, ..Namespaces::default() })
        .connects()
        .identity(Identity::for_sandbox(id))
        .rlimit(Resource::OpenFiles, OPEN_FILES)
        .seccomp(filters::forward()?))
}
