//! The lists: what every thread of a Rust program does, what each kind of thread does beside it, and what devices declare.

use kapsel_devices::calls::{SystemCall, SystemCalls, any, only};
use kvm_bindings::{
    kvm_clock_data, kvm_cpuid2, kvm_debugregs, kvm_dirty_log, kvm_irqchip, kvm_lapic_state, kvm_mp_state,
    kvm_msrs, kvm_regs, kvm_sregs, kvm_userspace_memory_region, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

/// What a thread may call.
pub type Calls = Vec<SystemCall>;

/// Memory (never executable), locks, events, time, messages, and the thread's end.
const EVERY_THREAD: &[SystemCall] = &[
    only(libc::SYS_mmap, 2, libc::PROT_NONE as u32),
    only(libc::SYS_mmap, 2, READ_WRITE),
    only(libc::SYS_mprotect, 2, READ_WRITE),
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_brk),
    only(libc::SYS_madvise, 2, libc::MADV_DONTNEED as u32),
    any(libc::SYS_futex),
    any(libc::SYS_sched_yield),
    any(libc::SYS_read),
    any(libc::SYS_write),
    any(libc::SYS_writev),
    any(libc::SYS_close),
    // glibc counts processors before it makes an arena for another thread.
    any(libc::SYS_sched_getaffinity),
    any(libc::SYS_clock_gettime),
    any(libc::SYS_clock_nanosleep),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_sigaltstack),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
];

const READ_WRITE: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;

/// Clients are accepted, read from and written to.
const API: &[SystemCall] = &[
    any(libc::SYS_accept4),
    only(libc::SYS_ioctl, 1, libc::FIONBIO as u32),
    any(libc::SYS_poll),
    any(libc::SYS_ppoll),
    any(libc::SYS_recvfrom),
    any(libc::SYS_sendto),
];

/// Descriptors are waited for; processors are held by a signal; a machine that is held is saved to files.
const EVENT_LOOP: &[SystemCall] = &[
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_getpid),
    any(libc::SYS_tgkill),
    any(libc::SYS_openat),
    any(libc::SYS_statx),
    any(libc::SYS_ftruncate),
    any(libc::SYS_pwrite64),
    any(libc::SYS_fallocate),
    any(libc::SYS_fsync),
    kvm(WRITE, 0x42, size_of::<kvm_dirty_log>()),
    kvm(READ, 0x7c, size_of::<kvm_clock_data>()),
    kvm(READ | WRITE, 0x62, size_of::<kvm_irqchip>()),
    kvm(READ, 0x81, size_of::<kvm_regs>()),
    kvm(READ, 0x83, size_of::<kvm_sregs>()),
    kvm(READ | WRITE, 0x88, size_of::<kvm_msrs>()),
    kvm(READ, 0x8e, size_of::<kvm_lapic_state>()),
    kvm(READ | WRITE, 0x91, size_of::<kvm_cpuid2>()),
    kvm(READ, 0x98, size_of::<kvm_mp_state>()),
    kvm(READ, 0x9f, size_of::<kvm_vcpu_events>()),
    kvm(READ, 0xa1, size_of::<kvm_debugregs>()),
    kvm(0, 0xa3, 0),
    kvm(READ, 0xa4, size_of::<kvm_xsave>()),
    kvm(READ, 0xa6, size_of::<kvm_xcrs>()),
    kvm(0, 0xad, 0),
];

const WRITE: u32 = 1;
const READ: u32 = 2;

/// A request to KVM (linux/kvm.h): direction, number and size of its argument.
const fn kvm(direction: u32, number: u32, size: usize) -> SystemCall {
    only(libc::SYS_ioctl, 1, direction << 30 | (size as u32) << 16 | 0xae << 8 | number)
}

/// Gives a guest memory, or takes it away.
pub const fn set_memory_region() -> SystemCall {
    kvm(WRITE, 0x46, size_of::<kvm_userspace_memory_region>())
}

const KVM_RUN: SystemCall = kvm(0, 0x80, 0);

/// The guest's code runs; the signal that ends that is taken.
const PROCESSOR: &[SystemCall] = &[KVM_RUN, any(libc::SYS_rt_sigpending), any(libc::SYS_rt_sigtimedwait)];

/// What the API's thread calls.
pub fn api() -> Calls {
    [EVERY_THREAD, API].concat()
}

/// What the threads of a machine call.
pub struct Machine {
    /// The event loop.
    pub event_loop: Calls,
    /// Each processor.
    pub processor: Calls,
}

/// What the threads of a machine with these devices call.
pub fn machine(devices: &[SystemCalls]) -> Machine {
    let registers: Calls = devices.iter().flat_map(|device| device.registers).copied().collect();
    let events: Calls = devices.iter().flat_map(|device| device.events).copied().collect();
    Machine {
        event_loop: [EVERY_THREAD, EVENT_LOOP, &registers, &events].concat(),
        processor: [EVERY_THREAD, PROCESSOR, &registers].concat(),
    }
}
