//! QEMU's filter.

use libc::{
    SYS_accept4, SYS_access, SYS_arch_prctl, SYS_bind, SYS_brk, SYS_chmod, SYS_clock_gettime,
    SYS_clock_nanosleep, SYS_clone, SYS_clone3, SYS_close, SYS_connect, SYS_dup, SYS_dup2, SYS_dup3,
    SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait, SYS_epoll_wait, SYS_eventfd2, SYS_exit,
    SYS_exit_group, SYS_fadvise64, SYS_fallocate, SYS_fchdir, SYS_fchmod, SYS_fcntl, SYS_fdatasync,
    SYS_fstat, SYS_fstatfs, SYS_fsync, SYS_ftruncate, SYS_futex, SYS_get_mempolicy, SYS_getcwd,
    SYS_getdents64, SYS_getegid, SYS_geteuid, SYS_getgid, SYS_getpeername, SYS_getpid, SYS_getppid,
    SYS_getrandom, SYS_getsockname, SYS_getsockopt, SYS_gettid, SYS_gettimeofday, SYS_getuid,
    SYS_io_uring_setup, SYS_ioctl, SYS_listen, SYS_lseek, SYS_madvise, SYS_membarrier, SYS_memfd_create,
    SYS_mmap, SYS_mprotect, SYS_mremap, SYS_munmap, SYS_nanosleep, SYS_newfstatat, SYS_openat, SYS_pipe2,
    SYS_poll, SYS_ppoll, SYS_prctl, SYS_pread64, SYS_preadv, SYS_prlimit64, SYS_pwrite64, SYS_pwritev,
    SYS_read, SYS_readlink, SYS_readv, SYS_recvfrom, SYS_recvmsg, SYS_restart_syscall, SYS_rseq,
    SYS_rt_sigaction, SYS_rt_sigpending, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_rt_sigtimedwait,
    SYS_sched_getaffinity, SYS_sched_setscheduler, SYS_sched_yield, SYS_seccomp, SYS_sendmsg, SYS_sendto,
    SYS_set_mempolicy, SYS_set_robust_list, SYS_set_tid_address, SYS_setsockopt, SYS_shutdown,
    SYS_sigaltstack, SYS_signalfd4, SYS_socket, SYS_socketpair, SYS_statfs, SYS_statx, SYS_sysinfo,
    SYS_tgkill, SYS_timerfd_create, SYS_timerfd_settime, SYS_umask, SYS_uname, SYS_unlink, SYS_userfaultfd,
    SYS_write, SYS_writev,
};
use seccompiler::{BpfProgram, SeccompCmpOp};

use super::{AllowList, Arg, THREAD_FLAGS};
use crate::error::Result;

/// The allow-list of QEMU 7.2 for what kapsel does with it: microvm and q35 machines under TCG and KVM, virtio devices, vhost-user
/// devices plugged and unplugged while it runs, snapshots written to and read from descriptors, QMP.
///
/// No network but Unix sockets and the taps that it is given; no process, only threads; no io_uring, whose work no filter sees (QEMU falls back to poll
/// and threads). TCG writes code and runs it, so memory may be writable and executable in turn.
pub fn qemu() -> Result<BpfProgram> {
    AllowList::new("qemu")
        // Memory.
        .allow(&[SYS_brk, SYS_mmap, SYS_mprotect, SYS_munmap, SYS_mremap, SYS_madvise, SYS_memfd_create])
        .allow(&[SYS_get_mempolicy, SYS_set_mempolicy])
        // Threads, signals, time.
        .allow(&[
            SYS_futex,
            SYS_set_robust_list,
            SYS_rseq,
            SYS_set_tid_address,
            SYS_gettid,
            SYS_getpid,
            SYS_getppid,
            SYS_membarrier,
        ])
        .allow(&[SYS_sched_yield, SYS_sched_getaffinity, SYS_exit, SYS_exit_group, SYS_restart_syscall])
        .allow(&[
            SYS_rt_sigaction,
            SYS_rt_sigprocmask,
            SYS_rt_sigreturn,
            SYS_rt_sigpending,
            SYS_rt_sigtimedwait,
        ])
        .allow(&[SYS_sigaltstack, SYS_tgkill, SYS_signalfd4])
        .allow(&[SYS_clock_gettime, SYS_clock_nanosleep, SYS_nanosleep, SYS_gettimeofday])
        .allow_if(SYS_clone, &[Arg(0).is(THREAD_FLAGS)])
        .refuse(libc::ENOSYS, &[SYS_clone3])
        // Who and where it is.
        .allow(&[
            SYS_getuid,
            SYS_geteuid,
            SYS_getgid,
            SYS_getegid,
            SYS_uname,
            SYS_sysinfo,
            SYS_getrandom,
            SYS_getcwd,
        ])
        .allow(&[SYS_access, SYS_readlink, SYS_statfs, SYS_prlimit64])
        .allow_values(SYS_arch_prctl, 0, &[0x1002, 0x3001])
        .allow_values(SYS_prctl, 0, &prctls())
        // Waiting.
        .allow(&[SYS_poll, SYS_ppoll, SYS_eventfd2, SYS_timerfd_create, SYS_timerfd_settime])
        .allow(&[SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait])
        // Files: its libraries, firmware, disks, snapshots.
        .allow(&[
            SYS_openat, SYS_close, SYS_dup, SYS_dup2, SYS_dup3, SYS_pipe2, SYS_lseek, SYS_fchdir, SYS_umask,
        ])
        .allow(&[
            SYS_read,
            SYS_readv,
            SYS_pread64,
            SYS_fadvise64,
            SYS_preadv,
            SYS_write,
            SYS_writev,
            SYS_pwrite64,
            SYS_pwritev,
        ])
        .allow(&[SYS_fstat, SYS_newfstatat, SYS_statx, SYS_fstatfs, SYS_getdents64])
        .allow(&[SYS_ftruncate, SYS_fallocate, SYS_fsync, SYS_fdatasync, SYS_fchmod, SYS_chmod, SYS_unlink])
        .allow_values(SYS_fcntl, 1, &fcntls())
        .allow_values(SYS_ioctl, 1, &ioctls())
        // KVM's requests all have one type byte, and only a KVM descriptor answers them.
        .allow_if(SYS_ioctl, &[(1, SeccompCmpOp::MaskedEq(0xff00), KVM_TYPE)])
        // Unix sockets: QMP, the guest's serial port, file servers.
        .allow_values(SYS_socket, 0, &[libc::AF_UNIX as u64])
        .allow_values(SYS_socketpair, 0, &[libc::AF_UNIX as u64])
        .allow(&[
            SYS_bind,
            SYS_listen,
            SYS_accept4,
            SYS_connect,
            SYS_shutdown,
            SYS_getsockname,
            SYS_getpeername,
        ])
        .allow(&[SYS_getsockopt, SYS_setsockopt, SYS_sendto, SYS_sendmsg, SYS_recvfrom, SYS_recvmsg])
        // Tried, and done without: its own sandbox, kernel rings, post-copy migration, real-time threads.
        .refuse(libc::ENOSYS, &[SYS_io_uring_setup, SYS_seccomp, SYS_userfaultfd])
        .refuse(libc::EPERM, &[SYS_sched_setscheduler])
        .compile()
}

/// `KVMIO << 8`.
const KVM_TYPE: u64 = 0xae00;

/// Names for threads, timers that need not be early, and whether memory errors are to be reported early.
fn prctls() -> Vec<u64> {
    [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_TIMERSLACK, libc::PR_MCE_KILL]
        .map(|option| u64::from(option.unsigned_abs()))
        .to_vec()
}

/// Flags, duplicates, seals of memory files, and locks on disks.
fn fcntls() -> Vec<u64> {
    [
        libc::F_GETFD,
        libc::F_SETFD,
        libc::F_GETFL,
        libc::F_SETFL,
        libc::F_DUPFD_CLOEXEC,
        libc::F_ADD_SEALS,
        libc::F_GET_SEALS,
        libc::F_OFD_GETLK,
        libc::F_OFD_SETLK,
    ]
    .map(|cmd| u64::from(cmd.unsigned_abs()))
    .to_vec()
}

/// What a tap can do, and what of it the guest's driver wants: the header's length and byte order, offloads, how much may be on
/// its way. Not TUNSETIFF, which makes taps and takes those of others.
const TAP: [u64; 8] = [
    libc::TUNGETFEATURES,
    libc::TUNGETIFF,
    libc::TUNSETOFFLOAD,
    libc::TUNSETSNDBUF,
    libc::TUNGETVNETHDRSZ,
    libc::TUNSETVNETHDRSZ,
    libc::TUNSETVNETLE,
    libc::TUNSETVNETBE,
];

/// Questions about descriptors: is it a terminal, is it a block device and of which sector size.
fn ioctls() -> Vec<u64> {
    const BLKSSZGET: u64 = 0x1268;
    const BLKPBSZGET: u64 = 0x127b;
    const BLKGETSIZE64: u64 = 0x8008_1272;
    const XFS_IOC_DIOINFO: u64 = 0x8020_581e;
    let mut all = vec![
        libc::TCGETS,
        libc::FIONBIO,
        libc::FIOCLEX,
        BLKSSZGET,
        BLKPBSZGET,
        BLKGETSIZE64,
        XFS_IOC_DIOINFO,
    ];
    all.extend(TAP);
    all
}
