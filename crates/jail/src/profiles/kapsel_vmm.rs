//! kapsel-vmm's jail.

use std::path::Path;

use crate::error::Result;
use crate::jail::{Jail, Resource};

/// Enough for its events, KVM's, disks, and as many connections as a guest can have, twice.
const OPEN_FILES: u64 = 4096;

/// kapsel-vmm's jail: the program and `/dev/kvm`. Arguments, files, and the identity are the caller's to add.
///
/// There is no filter around it: each kind of its threads takes on a narrower one than the whole process could have, before the
/// guest's first instruction.
///
/// # Errors
/// When it is not there, or a library of it.
pub fn kapsel_vmm(program: &Path) -> Result<Jail> {
    let jail = Jail::new("kapsel-vmm").program_with_libraries(program)?;
    Ok(jail.device("/dev/kvm").rlimit(Resource::OpenFiles, OPEN_FILES))
}
