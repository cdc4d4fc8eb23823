//! Making the guest small before it is saved as a template, whose every clone has to be given what is in its memory.

use std::io;

use rustix::mm::{Advice, MapFlags, ProtFlags};

/// What is left alone, so that nothing else runs out of memory meanwhile.
const RESERVE: u64 = 16 << 20;

/// Drops what is cached, has `keep` read what shall be, and zeroes what is free.
///
/// # Errors
/// When the kernel does not say how much is free, or refuses.
pub fn quiesce(keep: impl FnOnce()) -> io::Result<()> {
    std::fs::write("/proc/sys/vm/drop_caches", "3")?;
    keep();
    let len = free()?.saturating_sub(RESERVE) as usize;
    if len == 0 {
        return Ok(());
    }
    // The kernel zeroes pages before it gives them to a process, and they stay so when it has them back.
    // SAFETY: a new private mapping at an address of the kernel's choice; nothing refers to it after it was unmapped.
    unsafe {
        let zeroes = rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::NORESERVE,
        )?;
        let populated = rustix::mm::madvise(zeroes, len, Advice::LinuxPopulateWrite);
        rustix::mm::munmap(zeroes, len)?;
        populated?;
    }
    Ok(())
}

/// Bytes of memory that nobody uses and a process can have: not those that the kernel keeps for itself.
fn free() -> io::Result<u64> {
    let info = std::fs::read_to_string("/proc/meminfo")?;
    let of = |key: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(key)?.trim().strip_suffix(" kB"));
        let kib = line.and_then(|kib| kib.trim().parse::<u64>().ok());
        kib.map(|kib| kib << 10).ok_or_else(|| io::Error::other(format!("/proc/meminfo has no {key}")))
    };
    Ok(of("MemFree:")?.min(of("MemAvailable:")?))
}
