//! The lists: what every thread of a Rust program does, what each kind of thread does beside it, and what devices declare.

use kapsel_devices::calls::{SystemCall, SystemCalls, any, only};

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

/// Descriptors are waited for; processors are held by a signal.
const EVENT_LOOP: &[SystemCall] = &[
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_getpid),
    any(libc::SYS_tgkill),
];

/// `KVM_RUN`: `_IO(KVMIO, 0x80)`.
const KVM_RUN: u32 = 0xae80;

/// The guest's code runs; the signal that ends that is taken.
const PROCESSOR: &[SystemCall] =
    &[only(libc::SYS_ioctl, 1, KVM_RUN), any(libc::SYS_rt_sigpending), any(libc::SYS_rt_sigtimedwait)];

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
