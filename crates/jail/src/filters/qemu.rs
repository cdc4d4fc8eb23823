//! QEMU's filter.

use seccompiler::BpfProgram;

use super::AllowList;
use crate::error::Result;

/// The allow-list of QEMU.
pub fn qemu() -> Result<BpfProgram> {
    AllowList::new("qemu").allow(&(0..335).collect::<Vec<_>>()).compile()
}
