//! A guest of four instructions, and how fast it runs.

use std::io;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit};

/// How long the measurement may take.
const DEADLINE: Duration = Duration::from_secs(2);

/// Turns of the first loop: few, so that a software KVM is done in milliseconds.
const FEW: u32 = 2_000;
/// A loop of [`FEW`] that takes longer tells enough.
const SLOW: Duration = Duration::from_millis(100);
/// By so much more turns the next loop has.
const GROWTH: u32 = 8;
/// Turns of the longest loop.
const MANY: u32 = 1_000_000;

/// Bytes of guest memory, at address 0.
const MEMORY: usize = 4096;

/// Instructions that the guest executes in a second.
pub(super) fn speed() -> io::Result<f64> {
    let (tell, told) = mpsc::channel();
    // In a thread of its own: a KVM that never returns must not keep the caller.
    std::thread::Builder::new().name("kvm-probe".into()).spawn(move || tell.send(measure()))?;
    told.recv_timeout(DEADLINE)
        .unwrap_or_else(|_| Err(io::Error::other(format!("a loop of {FEW} turns did not end"))))
}

/// Entering and leaving the guest takes time of its own, which on an emulated host is more than a long loop's: what counts is how
/// much longer a longer loop takes.
fn measure() -> io::Result<f64> {
    let few = fastest(FEW)?;
    // Two instructions a turn.
    if few > SLOW {
        return Ok(2.0 * f64::from(FEW) / few.as_secs_f64());
    }
    let mut turns = FEW;
    loop {
        turns = turns.saturating_mul(GROWTH).min(MANY);
        let many = fastest(turns)?;
        if many >= 2 * few || turns == MANY {
            // Not less than a part of it all, should the first one have been held up.
            let longer = many.saturating_sub(few).max(many / GROWTH);
            return Ok(2.0 * f64::from(turns - FEW) / longer.as_secs_f64());
        }
    }
}

/// The time of a loop. Of two tries the shorter, since another program may have had the processor.
fn fastest(turns: u32) -> io::Result<Duration> {
    Ok(run(turns)?.min(run(turns)?))
}

/// Runs a loop of `rounds` turns in real mode.
fn run(rounds: u32) -> io::Result<Duration> {
    let vm = Kvm::new()?.create_vm()?;
    let memory = Memory::new()?;
    // mov ecx, rounds; again: dec ecx; jnz again; hlt
    let [a, b, c, d] = rounds.to_le_bytes();
    memory.write(&[0x66, 0xb9, a, b, c, d, 0x66, 0x49, 0x75, 0xfc, 0xf4]);
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory.0 as u64,
    };
    // SAFETY: the region is memory of our own that nothing else uses, and it is unmapped only after the machine is gone: `memory`
    // is dropped last, below; on an early return the guest does not run.
    unsafe { vm.set_user_memory_region(region) }?;
    let mut vcpu = vm.create_vcpu(0)?;
    let mut segments = vcpu.get_sregs()?;
    segments.cs.base = 0;
    segments.cs.selector = 0;
    vcpu.set_sregs(&segments)?;
    let mut registers = vcpu.get_regs()?;
    registers.rip = 0;
    registers.rflags = 2;
    vcpu.set_regs(&registers)?;
    let begun = Instant::now();
    let exit = vcpu.run()?;
    let took = begun.elapsed();
    let halted = matches!(exit, VcpuExit::Hlt);
    let what = format!("{exit:?}");
    drop((vcpu, vm));
    drop(memory);
    if halted { Ok(took) } else { Err(io::Error::other(format!("the guest ended with {what}"))) }
}

/// A page of anonymous memory.
struct Memory(*mut std::ffi::c_void);

impl Memory {
    fn new() -> io::Result<Memory> {
        use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
        // SAFETY: a new mapping at an address that the kernel chooses overlaps nothing.
        let page = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                MEMORY,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        };
        Ok(Memory(page?))
    }

    fn write(&self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(MEMORY)];
        // SAFETY: the page is ours, at least as long as `bytes`, and no reference to it exists.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0.cast(), bytes.len()) };
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `new` with this length, and nobody uses it any more.
        let _ = unsafe { rustix::mm::munmap(self.0, MEMORY) };
    }
}
