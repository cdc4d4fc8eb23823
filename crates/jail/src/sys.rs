//! Raw system calls for the time between clone and exec.
//!
//! The child is a copy of one thread of a process that may have had many. Any lock (the allocator's, stdio's, libc's own) may have
//! been held by a thread that the copy does not have, so that nothing here allocates, locks, formats or panics, and
//! libc's wrappers are avoided where they do more than the call (`setresuid` of glibc signals all threads, for one).

use std::ffi::CStr;
use std::os::fd::RawFd;

/// An errno value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Errno(pub i32);

pub(crate) type Res<T = ()> = Result<T, Errno>;

/// The call's result, or errno.
///
/// # Safety
/// The arguments must be what the system call `nr` takes: pointers valid for what the kernel reads and writes.
pub(crate) unsafe fn call(nr: libc::c_long, args: [usize; 6]) -> Res<usize> {
    let [a, b, c, d, e, f] = args;
    // SAFETY: the caller vouches for the arguments. libc's syscall() only moves registers and sets errno, which is thread-local.
    let ret = unsafe { libc::syscall(nr, a, b, c, d, e, f) };
    if ret == -1 {
        // SAFETY: the errno location of the calling thread is always valid.
        return Err(Errno(unsafe { *libc::__errno_location() }));
    }
    Ok(ret.cast_unsigned() as usize)
}

/// A C string's address as an argument.
pub(crate) fn ptr(s: &CStr) -> usize {
    s.as_ptr() as usize
}

/// A descriptor, or `AT_FDCWD`, as an argument.
pub(crate) fn fd(raw: RawFd) -> usize {
    // Sign-extended: the kernel takes the low 32 bits as an int.
    raw as isize as usize
}

macro_rules! calls {
    ($($(#[$doc:meta])* fn $name:ident($($arg:ident),*) = $nr:ident;)*) => { $(
        $(#[$doc])*
        ///
        /// # Safety
        /// As [`call`].
        pub(crate) unsafe fn $name($($arg: usize),*) -> Res<usize> {
            let mut args = [0; 6];
            for (slot, value) in args.iter_mut().zip([$($arg),*]) {
                *slot = value;
            }
            // SAFETY: the caller vouches for the arguments.
            unsafe { call(libc::$nr, args) }
        }
    )* };
}

calls! {
    /// openat2(2)
    fn openat2(dir, path, how, size) = SYS_openat2;
    /// fstat(2)
    fn fstat(fd, stat) = SYS_fstat;
    /// close(2)
    fn close(fd) = SYS_close;
    /// write(2)
    fn write(fd, data, len) = SYS_write;
    /// mkdirat(2)
    fn mkdirat(dir, path, mode) = SYS_mkdirat;
    /// mknodat(2)
    fn mknodat(dir, path, mode, dev) = SYS_mknodat;
    /// fchownat(2)
    fn fchownat(dir, path, uid, gid, flags) = SYS_fchownat;
    /// mount(2)
    fn mount(source, target, kind, flags, data) = SYS_mount;
    /// fsopen(2)
    fn fsopen(kind, flags) = SYS_fsopen;
    /// fsconfig(2)
    fn fsconfig(fd, cmd, key, value, aux) = SYS_fsconfig;
    /// fsmount(2)
    fn fsmount(fd, flags, attrs) = SYS_fsmount;
    /// open_tree(2)
    fn open_tree(dir, path, flags) = SYS_open_tree;
    /// mount_setattr(2)
    fn mount_setattr(dir, path, flags, attr, size) = SYS_mount_setattr;
    /// move_mount(2)
    fn move_mount(from_dir, from, to_dir, to, flags) = SYS_move_mount;
    /// pivot_root(2)
    fn pivot_root(new, old) = SYS_pivot_root;
    /// umount2(2)
    fn umount2(target, flags) = SYS_umount2;
    /// fchdir(2)
    fn fchdir(fd) = SYS_fchdir;
    /// chdir(2)
    fn chdir(path) = SYS_chdir;
    /// unshare(2)
    fn unshare(flags) = SYS_unshare;
    /// setsid(2)
    fn setsid() = SYS_setsid;
    /// fcntl(2)
    fn fcntl(fd, cmd, arg) = SYS_fcntl;
    /// dup3(2)
    fn dup3(from, to, flags) = SYS_dup3;
    /// close_range(2)
    fn close_range(first, last, flags) = SYS_close_range;
    /// prlimit64(2)
    fn prlimit64(pid, resource, new, old) = SYS_prlimit64;
    /// umask(2)
    fn umask(mask) = SYS_umask;
    /// prctl(2)
    fn prctl(option, a, b, c, d) = SYS_prctl;
    /// setgroups(2)
    fn setgroups(count, list) = SYS_setgroups;
    /// setresgid(2)
    fn setresgid(real, effective, saved) = SYS_setresgid;
    /// setresuid(2)
    fn setresuid(real, effective, saved) = SYS_setresuid;
    /// capset(2)
    fn capset(header, data) = SYS_capset;
    /// poll(2)
    fn poll(fds, count, timeout) = SYS_poll;
    /// rt_sigaction(2)
    fn rt_sigaction(signal, new, old, size) = SYS_rt_sigaction;
    /// rt_sigprocmask(2)
    fn rt_sigprocmask(how, new, old, size) = SYS_rt_sigprocmask;
    /// landlock_add_rule(2)
    fn landlock_add_rule(ruleset, kind, rule, flags) = SYS_landlock_add_rule;
    /// landlock_restrict_self(2)
    fn landlock_restrict_self(ruleset, flags) = SYS_landlock_restrict_self;
    /// seccomp(2)
    fn seccomp(operation, flags, args) = SYS_seccomp;
    /// execve(2)
    fn execve(path, argv, envp) = SYS_execve;
    /// exit_group(2)
    fn exit_group(code) = SYS_exit_group;
}
