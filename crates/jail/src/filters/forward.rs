//! kapsel-forward's filter.

use libc::{
    SYS_accept4, SYS_access, SYS_arch_prctl, SYS_bind, SYS_brk, SYS_clock_gettime, SYS_clock_nanosleep,
    SYS_close, SYS_connect, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_pwait2,
    SYS_epoll_wait, SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_fcntl, SYS_fstat, SYS_futex, SYS_getpeername,
    SYS_getpid, SYS_getrandom, SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_lseek, SYS_madvise, SYS_mmap,
    SYS_mprotect, SYS_mremap, SYS_munmap, SYS_newfstatat, SYS_openat, SYS_poll, SYS_ppoll, SYS_prctl,
    SYS_pread64, SYS_prlimit64, SYS_read, SYS_readlink, SYS_readv, SYS_recvfrom, SYS_restart_syscall,
    SYS_rseq, SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_yield,
    SYS_sendto, SYS_set_robust_list, SYS_set_tid_address, SYS_setsockopt, SYS_shutdown, SYS_sigaltstack,
    SYS_socket, SYS_socketpair, SYS_write, SYS_writev,
};
use seccompiler::BpfProgram;

use super::{AllowList, Arg};
use crate::error::Result;

/// The allow-list of kapsel-forward: one thread, sockets of TCP and UDP over IPv4, and waiting for them. It opens nothing for writing, and
/// listens on nothing that it has made itself (it binds for datagrams, to a port of the kernel's choice).
pub fn forward() -> Result<BpfProgram> {
    let ioctls = [libc::FIONBIO, libc::TCGETS];
    let prctls = [libc::PR_SET_NAME, libc::PR_GET_NAME].map(|option| u64::from(option.unsigned_abs()));
    let fcntls = [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC];
    let fcntls = fcntls.map(|command| u64::from(command.unsigned_abs()));
    AllowList::new("kapsel-forward")
        .allow(&[SYS_brk, SYS_mmap, SYS_mprotect, SYS_munmap, SYS_mremap, SYS_madvise])
        .allow(&[SYS_futex, SYS_set_robust_list, SYS_rseq, SYS_set_tid_address, SYS_gettid, SYS_getpid])
        .allow(&[SYS_sched_yield, SYS_sched_getaffinity, SYS_exit, SYS_exit_group, SYS_restart_syscall])
        .allow(&[SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sigaltstack])
        .allow(&[SYS_clock_gettime, SYS_clock_nanosleep, SYS_getrandom, SYS_prlimit64])
        .allow_values(SYS_arch_prctl, 0, &[0x1002, 0x3001])
        .allow_values(SYS_prctl, 0, &prctls)
        // Its libraries.
        .allow_if(SYS_openat, &[Arg(2).is((libc::O_RDONLY | libc::O_CLOEXEC) as u64)])
        .allow(&[SYS_access, SYS_readlink, SYS_pread64, SYS_fstat, SYS_newfstatat, SYS_lseek, SYS_close])
        // Waiting.
        .allow(&[SYS_poll, SYS_ppoll, SYS_eventfd2])
        .allow(&[SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait, SYS_epoll_pwait2])
        // Sockets; the runtime has a pair of its own for signals.
        .allow_values(SYS_socket, 0, &[libc::AF_INET as u64])
        .allow_values(SYS_socketpair, 0, &[libc::AF_UNIX as u64])
        .allow(&[SYS_connect, SYS_accept4, SYS_bind, SYS_shutdown, SYS_getsockname, SYS_getpeername])
        .allow(&[SYS_getsockopt, SYS_setsockopt, SYS_sendto, SYS_recvfrom])
        .allow(&[SYS_read, SYS_readv, SYS_write, SYS_writev])
        .allow_values(SYS_fcntl, 1, &fcntls)
        .allow_values(libc::SYS_ioctl, 1, &ioctls)
        .compile()
}
