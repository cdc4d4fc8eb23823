//! kapsel-fsd's filter.

use std::io;

use libc::{
    SYS_accept4, SYS_access, SYS_arch_prctl, SYS_brk, SYS_capget, SYS_capset, SYS_clock_gettime, SYS_clone,
    SYS_clone3, SYS_close, SYS_copy_file_range, SYS_dup, SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_pwait,
    SYS_epoll_wait, SYS_eventfd2, SYS_exit, SYS_exit_group, SYS_fallocate, SYS_fchdir, SYS_fchmod,
    SYS_fchmodat, SYS_fchownat, SYS_fcntl, SYS_fdatasync, SYS_flock, SYS_fstat, SYS_fstatfs, SYS_fsync,
    SYS_ftruncate, SYS_futex, SYS_getdents64, SYS_getegid, SYS_geteuid, SYS_getpid, SYS_getrandom,
    SYS_gettid, SYS_linkat, SYS_lseek, SYS_madvise, SYS_mkdirat, SYS_mknodat, SYS_mmap, SYS_mprotect,
    SYS_mremap, SYS_munmap, SYS_newfstatat, SYS_openat, SYS_openat2, SYS_poll, SYS_prctl, SYS_pread64,
    SYS_preadv, SYS_preadv2, SYS_prlimit64, SYS_pwrite64, SYS_pwritev, SYS_pwritev2, SYS_read,
    SYS_readlinkat, SYS_readv, SYS_recvmsg, SYS_renameat, SYS_renameat2, SYS_restart_syscall, SYS_rseq,
    SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sched_getaffinity, SYS_sched_yield,
    SYS_seccomp, SYS_sendmsg, SYS_set_robust_list, SYS_set_tid_address, SYS_setgroups, SYS_setresgid,
    SYS_setresuid, SYS_sigaltstack, SYS_statx, SYS_symlinkat, SYS_syncfs, SYS_tgkill, SYS_umask,
    SYS_unlinkat, SYS_utimensat, SYS_write, SYS_writev,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch};

use super::{AllowList, Arg, THREAD_FLAGS};
use crate::error::{Error, Result};
use crate::sys;

/// `SECCOMP_SET_MODE_FILTER`.
const SET_MODE_FILTER: u64 = 1;

/// The allow-list of kapsel-fsd from its first instruction on, its dynamic loader included.
///
/// There is no socket to be made, no process, no path-based call that follows links, no extended attribute, and no file to be opened by
/// handle (which with `CAP_DAC_READ_SEARCH` would open any file of the host).
pub fn fsd() -> Result<BpfProgram> {
    AllowList::new("kapsel-fsd")
        // Memory and threads.
        .allow(&[SYS_brk, SYS_mmap, SYS_mprotect, SYS_munmap, SYS_mremap, SYS_madvise])
        .allow(&[SYS_futex, SYS_set_robust_list, SYS_rseq, SYS_set_tid_address, SYS_gettid, SYS_getpid])
        .allow(&[
            SYS_sched_yield,
            SYS_sched_getaffinity,
            SYS_exit,
            SYS_exit_group,
            SYS_getrandom,
            SYS_clock_gettime,
        ])
        .allow(&[SYS_rt_sigaction, SYS_rt_sigprocmask, SYS_rt_sigreturn, SYS_sigaltstack, SYS_tgkill])
        .allow(&[SYS_restart_syscall])
        .allow_if(SYS_clone, &[Arg(0).is(THREAD_FLAGS)])
        .refuse(libc::ENOSYS, &[SYS_clone3])
        // The loader's start.
        .allow(&[SYS_access, SYS_prlimit64])
        .allow_values(SYS_arch_prctl, 0, &[0x1002, 0x3001])
        .allow_values(SYS_prctl, 0, &prctls())
        .allow_if(
            SYS_prctl,
            &[Arg(0).is(libc::PR_CAP_AMBIENT as u64), Arg(1).is(libc::PR_CAP_AMBIENT_IS_SET as u64)],
        )
        // Only to tighten the filter further.
        .allow_values(SYS_seccomp, 0, &[SET_MODE_FILTER])
        // The monitor's connection: accepted, never made.
        .allow(&[SYS_accept4, SYS_recvmsg, SYS_sendmsg, SYS_eventfd2, SYS_poll])
        .allow(&[SYS_epoll_create1, SYS_epoll_ctl, SYS_epoll_wait, SYS_epoll_pwait])
        // Files: by descriptor, or by a name in a directory's descriptor.
        .allow(&[SYS_read, SYS_readv, SYS_pread64, SYS_preadv, SYS_preadv2])
        .allow(&[SYS_write, SYS_writev, SYS_pwrite64, SYS_pwritev, SYS_pwritev2])
        .allow(&[SYS_openat, SYS_openat2, SYS_close, SYS_dup, SYS_lseek, SYS_fchdir, SYS_umask])
        .allow(&[SYS_fstat, SYS_newfstatat, SYS_statx, SYS_fstatfs, SYS_getdents64, SYS_readlinkat])
        .allow(&[
            SYS_mkdirat,
            SYS_mknodat,
            SYS_symlinkat,
            SYS_linkat,
            SYS_unlinkat,
            SYS_renameat,
            SYS_renameat2,
        ])
        .allow(&[SYS_fchmod, SYS_fchmodat, SYS_fchownat, SYS_utimensat, SYS_ftruncate, SYS_fallocate])
        .allow(&[SYS_fsync, SYS_fdatasync, SYS_syncfs, SYS_flock, SYS_copy_file_range])
        .allow_values(SYS_fcntl, 1, &fcntls())
        // Creating a file as the guest's user.
        .allow(&[
            SYS_geteuid,
            SYS_getegid,
            SYS_setresuid,
            SYS_setresgid,
            SYS_setgroups,
            SYS_capget,
            SYS_capset,
        ])
        .compile()
}

fn fcntls() -> Vec<u64> {
    [libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC]
        .map(|cmd| u64::from(cmd.unsigned_abs()))
        .to_vec()
}

/// The name of a thread; what libcap-ng asks to know the capabilities that it may change; and to tighten the filter.
fn prctls() -> Vec<u64> {
    [
        libc::PR_SET_NAME,
        libc::PR_CAPBSET_READ,
        libc::PR_GET_SECUREBITS,
        libc::PR_GET_NO_NEW_PRIVS,
        libc::PR_SET_DUMPABLE,
        libc::PR_SET_NO_NEW_PRIVS,
    ]
    .map(|option| u64::from(option.unsigned_abs()))
    .to_vec()
}

/// Second stage, which kapsel-fsd calls for itself when its loader is done: no memory becomes executable any more, no
/// further filter, and nobody may look into the process.
///
/// # Errors
/// With the reason of the system when a step is refused.
pub fn lock_down_fsd() -> Result<()> {
    let compile = |source| Error::Filter { name: "kapsel-fsd, second stage", source };
    let exec = || {
        let condition = seccompiler::SeccompCondition::new(
            2,
            seccompiler::SeccompCmpArgLen::Dword,
            Arg(2).with(libc::PROT_EXEC as u64).1,
            libc::PROT_EXEC as u64,
        )?;
        Ok(vec![SeccompRule::new(vec![condition])?])
    };
    let rules = [
        (SYS_mmap, exec().map_err(compile)?),
        (SYS_mprotect, exec().map_err(compile)?),
        (SYS_seccomp, Vec::new()),
        (libc::SYS_execve, Vec::new()),
        (libc::SYS_execveat, Vec::new()),
    ];
    let filter = SeccompFilter::new(
        rules.into_iter().collect(),
        SeccompAction::Allow,
        SeccompAction::KillProcess,
        TargetArch::x86_64,
    );
    let program = filter.and_then(BpfProgram::try_from).map_err(compile)?;
    let refused = |step: &'static str| {
        move |errno: sys::Errno| Error::Prepare {
            name: "kapsel-fsd".to_owned(),
            action: step,
            subject: "this process".to_owned(),
            source: io::Error::from_raw_os_error(errno.0),
        }
    };
    let len = u16::try_from(program.len()).unwrap_or(u16::MAX);
    let fprog = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    // SAFETY: prctl options that take numbers; and a program of `len` instructions, in seccompiler's copy of `struct sock_filter`, which
    // the kernel only reads.
    unsafe {
        sys::prctl(libc::PR_SET_DUMPABLE as usize, 0, 0, 0, 0).map_err(refused("hide"))?;
        sys::prctl(libc::PR_SET_NO_NEW_PRIVS as usize, 1, 0, 0, 0)
            .map_err(refused("set no_new_privs for"))?;
        let filter = &raw const fprog as usize;
        sys::seccomp(SET_MODE_FILTER as usize, 0, filter).map_err(refused("install a seccomp filter in"))?;
    }
    Ok(())
}
