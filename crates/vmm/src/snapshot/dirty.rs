//! The marks of pages that were written since the last snapshot: KVM's log of what the guest wrote is added to what the
//! monitor marked ([`kapsel_devices::dirty`]).

use kapsel_devices::Memory;
use kvm_ioctls::VmFd;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::x86::state;

/// Adds what KVM has logged, which forgets it. Marks stay until a snapshot is complete ([`forget`]): one that fails leaves
/// the next one with all that changed.
///
/// # Errors
/// [`state::Error::Kvm`].
pub fn collect(vm: &VmFd, memory: &Memory) -> Result<(), state::Error> {
    for (slot, region) in memory.iter().enumerate() {
        let mapping = region.get_mmap();
        let Some(pages) = mapping.bitmap().pages() else { continue };
        let log = vm.get_dirty_log(slot as u32, region.len() as usize);
        let log = log.map_err(|e| state::Error::Kvm("tell which pages were written", e))?;
        for (index, word) in log.into_iter().enumerate() {
            let mut rest = word;
            while rest != 0 {
                pages.set_bit(index * 64 + rest.trailing_zeros() as usize);
                rest &= rest - 1;
            }
        }
    }
    Ok(())
}

/// From here on the marks are those of the next snapshot.
pub fn forget(memory: &Memory) {
    for region in memory.iter() {
        if let Some(pages) = region.get_mmap().bitmap().pages() {
            pages.reset();
        }
    }
}
