//! The marks of pages that were written since the last snapshot: KVM's log of what the guest wrote is added to what the
//! monitor marked ([`kapsel_devices::dirty`]).

use kapsel_devices::Memory;
use kapsel_devices::dirty::PAGE;
use kvm_ioctls::VmFd;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::x86::state;

/// Adds what KVM has logged, which forgets it. `hotplug` has the size of slots of the last region, and those that are there;
/// a region otherwise is one slot. Marks stay until a snapshot is complete ([`forget`]): one that fails leaves
/// the next one with all that changed.
///
/// # Errors
/// [`state::Error::Kvm`].
pub fn collect(vm: &VmFd, memory: &Memory, hotplug: Option<(u64, &[usize])>) -> Result<(), state::Error> {
    let regions = memory.num_regions() - usize::from(hotplug.is_some());
    for (slot, region) in memory.iter().enumerate() {
        let mapping = region.get_mmap();
        let Some(pages) = mapping.bitmap().pages() else { continue };
        match hotplug.filter(|_| slot == regions) {
            None => add(vm, slot, region.len(), pages, 0)?,
            Some((size, plugged)) => {
                for part in plugged {
                    add(vm, slot + part, size, pages, *part as u64 * size)?;
                }
            }
        }
    }
    Ok(())
}

/// Adds what was written in a slot of so many bytes, which begins at `offset` of its region.
fn add(vm: &VmFd, slot: usize, size: u64, pages: &AtomicBitmap, offset: u64) -> Result<(), state::Error> {
    let log = vm.get_dirty_log(slot as u32, size as usize);
    let log = log.map_err(|e| state::Error::Kvm("tell which pages were written", e))?;
    let first = offset as usize / PAGE.get();
    for (index, word) in log.into_iter().enumerate() {
        let mut rest = word;
        while rest != 0 {
            pages.set_bit(first + index * 64 + rest.trailing_zeros() as usize);
            rest &= rest - 1;
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
