//! Memory that comes and goes: what the monitor does for [`kapsel_devices::mem`], and what its user may ask for.

use std::io;
use std::sync::Arc;

use kapsel_devices::Memory;
use kapsel_devices::calls::{SystemCall, SystemCalls};
use kapsel_devices::mem::{self, Host};
use kvm_bindings::{KVM_MEM_LOG_DIRTY_PAGES, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::memory::{Size, hotplug_range};

/// The smallest block, in MiB.
const BLOCK_MIB_MIN: u32 = 2;
/// The smallest slot, in MiB.
const SLOT_MIB_MIN: u32 = 128;
/// The most slots; KVM has 32764 of them for a machine.
const SLOTS_MAX: u32 = 4096;

/// Memory that can be plugged while the machine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// How much, in MiB.
    pub total_size_mib: u32,
    /// What the guest plugs at least, in MiB.
    #[serde(default = "block_mib")]
    pub block_size_mib: u32,
    /// What the host gives to the guest's processors at least, in MiB.
    #[serde(default = "slot_mib")]
    pub slot_size_mib: u32,
}

fn block_mib() -> u32 {
    BLOCK_MIB_MIN
}

fn slot_mib() -> u32 {
    SLOT_MIB_MIN
}

/// Another size for what is plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Update {
    /// How much the guest shall have plugged, in MiB.
    pub requested_size_mib: u32,
}

/// What is wrong with a configuration, in Firecracker's words where it has some.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Smaller than the smallest.
    #[error("Block size must not be lower than {BLOCK_MIB_MIN} MiB")]
    BlockSize,
    /// Between powers of two.
    #[error("Block size must be a power of 2")]
    BlockSizeNotPowerOfTwo,
    /// Smaller than the smallest.
    #[error("Slot size must not be lower than {SLOT_MIB_MIN} MiB")]
    SlotSize,
    /// A part of a block.
    #[error("Slot size must be a multiple of block size ({0} MiB)")]
    SlotSizeNotMultiple(u32),
    /// Less than a slot.
    #[error("Total size must not be lower than slot size ({0} MiB)")]
    TotalSize(u32),
    /// A part of a slot.
    #[error("Total size must be a multiple of slot size ({0} MiB)")]
    TotalSizeNotMultiple(u32),
    /// More than a machine can have.
    #[error("Total size must not be greater than {max} MiB, nor than {SLOTS_MAX} slots", max = crate::config::MEMORY_MAX_MIB)]
    TooLarge,
}

impl Config {
    /// Whether there can be such memory.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn check(&self) -> Result<(), ConfigError> {
        let Config { total_size_mib: total, block_size_mib: block, slot_size_mib: slot } = *self;
        if block < BLOCK_MIB_MIN {
            return Err(ConfigError::BlockSize);
        }
        if !block.is_power_of_two() {
            return Err(ConfigError::BlockSizeNotPowerOfTwo);
        }
        if slot < SLOT_MIB_MIN {
            return Err(ConfigError::SlotSize);
        }
        if !slot.is_multiple_of(block) {
            return Err(ConfigError::SlotSizeNotMultiple(block));
        }
        if total < slot {
            return Err(ConfigError::TotalSize(slot));
        }
        if !total.is_multiple_of(slot) {
            return Err(ConfigError::TotalSizeNotMultiple(slot));
        }
        if u64::from(total) > crate::config::MEMORY_MAX_MIB || total / slot > SLOTS_MAX {
            return Err(ConfigError::TooLarge);
        }
        Ok(())
    }
}

/// What KVM has to be told in the event loop, where the device works.
const MAP: SystemCall = crate::confine::set_memory_region();

/// The calls of [`Slots`].
pub fn system_calls() -> SystemCalls {
    SystemCalls { events: &[MAP], registers: &[] }
}

/// The region's slots, as KVM knows them.
pub struct Slots {
    vm: Arc<VmFd>,
    // Keeps the region mapped for as long as KVM may know of it.
    memory: Memory,
    /// KVM's number of the first one.
    first: u32,
    address: u64,
    size: u64,
}

impl Slots {
    /// Slots of the last region of `memory`.
    pub fn new(vm: Arc<VmFd>, memory: Memory, first: u32, config: mem::Config) -> Self {
        Slots { vm, memory, first, address: config.address, size: config.slot }
    }
}

impl Host for Slots {
    fn give(&mut self, slot: usize, there: bool) -> io::Result<()> {
        let address = self.address + slot as u64 * self.size;
        let part = self.memory.get_slice(GuestAddress(address), self.size as usize);
        let part = part.map_err(io::Error::other)?;
        let tracked = self.memory.iter().any(|region| region.get_mmap().bitmap().pages().is_some());
        let region = kvm_userspace_memory_region {
            slot: self.first + slot as u32,
            flags: if tracked { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: address,
            // A slot without a size is none any more.
            memory_size: if there { self.size } else { 0 },
            userspace_addr: part.ptr_guard_mut().as_ptr() as u64,
        };
        // SAFETY: the range is a part of a mapping that `memory` keeps until the descriptor of the machine has gone, and no
        // other slot has it.
        unsafe { self.vm.set_user_memory_region(region) }
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }
}

/// The device of such memory, in a machine of this size.
pub fn device(config: &Config, size: Size) -> Option<mem::Config> {
    let (address, size) = hotplug_range(size)?;
    let bytes = |mib: u32| u64::from(mib) << 20;
    Some(mem::Config {
        address,
        size,
        block: bytes(config.block_size_mib),
        slot: bytes(config.slot_size_mib),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_is_refused_in_firecrackers_words() {
        for (total, block, slot, message) in [
            (1024, 1, 128, "Block size must not be lower than 2 MiB"),
            (1024, 6, 128, "Block size must be a power of 2"),
            (1024, 2, 64, "Slot size must not be lower than 128 MiB"),
            (1024, 256, 128, "Slot size must be a multiple of block size (256 MiB)"),
            (128, 2, 256, "Total size must not be lower than slot size (256 MiB)"),
            (300, 2, 128, "Total size must be a multiple of slot size (128 MiB)"),
            (65_536 + 128, 2, 128, "Total size must not be greater than 65536 MiB"),
        ] {
            let config = Config { total_size_mib: total, block_size_mib: block, slot_size_mib: slot };
            assert!(config.check().unwrap_err().to_string().starts_with(message), "{config:?}");
        }
        let config: Config = serde_json::from_str(r#"{"total_size_mib": 1024}"#).unwrap();
        assert_eq!((config.block_size_mib, config.slot_size_mib, config.check()), (2, 128, Ok(())));
    }
}
