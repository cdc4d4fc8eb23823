//! The few system calls that neither `rustix` nor `std` has, each in a safe or precisely qualified wrapper.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Turns the result of a raw system call into ours.
fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        value => Ok(value),
    }
}

/// A child as its parent sees it.
#[derive(Debug)]
pub struct Child {
    /// In the caller's pid namespace.
    pub pid: i32,
    /// Names the process without the danger of a pid that was used again.
    pub pidfd: OwnedFd,
}

/// Forks with `flags` (CLONE_NEW*), straight into `cgroup`. `None` in the child.
///
/// # Safety
/// The calling process must be single-threaded, as with fork(2): the child has copies of every lock. The child must end in
/// `execve` or `_exit` and must not return to the caller's event loop.
///
/// # Errors
/// Those of clone3(2).
pub unsafe fn clone3(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Option<Child>> {
    /// libc has it as a C int, which it does not fit.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let mut pidfd: RawFd = -1;
    // SAFETY: clone_args is plain data; all zeros is its documented default.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = flags | libc::CLONE_PIDFD as u64;
    args.pidfd = &raw mut pidfd as u64;
    args.exit_signal = libc::SIGCHLD as u64;
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the kernel reads `args` and writes `pidfd`, both of which live on; without CLONE_VM and with no stack given
    // the child continues here on a copy of this stack, as after fork(2); the caller vouches for the rest.
    let pid = check(unsafe { libc::syscall(libc::SYS_clone3, &raw const args, size_of_val(&args)) })?;
    if pid == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel has just opened this descriptor for us, close-on-exec; nobody else knows it.
    let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
    Ok(Some(Child { pid: pid as i32, pidfd }))
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountAttr {
    /// MOUNT_ATTR_* to set.
    pub set: u64,
    /// MOUNT_ATTR_* to clear.
    pub clear: u64,
    /// MS_SHARED and its like; 0 leaves it.
    pub propagation: u64,
    /// For id-mapped mounts, which are not made here: 0.
    pub userns_fd: u64,
}

impl MountAttr {
    /// Whether it would change nothing.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// mount_setattr(2) on the mount that `mount` (a file on it, or a detached tree) belongs to.
///
/// # Errors
/// Those of mount_setattr(2).
pub fn mount_setattr(mount: BorrowedFd<'_>, recursive: bool, attr: &MountAttr) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the empty path and `attr`, whose size is given, outlive the call; the kernel only reads them.
    check(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size_of_val(attr),
        )
    })?;
    Ok(())
}

/// Installs a classic BPF program (an array of `struct sock_filter`) as seccomp filter of this process, for good.
///
/// # Errors
/// Those of seccomp(2); `InvalidInput` when the length is no whole number of instructions.
pub fn seccomp_filter(program: &[u8], flags: u32) -> io::Result<()> {
    const INSTRUCTION: usize = size_of::<libc::sock_filter>();
    let len = u16::try_from(program.len() / INSTRUCTION).map_err(io::Error::other)?;
    if len == 0 || !program.len().is_multiple_of(INSTRUCTION) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // The kernel copies the instructions bytewise, so their alignment here does not matter.
    let prog = libc::sock_fprog { len, filter: program.as_ptr() as *mut libc::sock_filter };
    // SAFETY: `prog` describes `program` exactly, both outlive the call, and the kernel only reads them.
    check(unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const prog)
    })?;
    Ok(())
}

/// Marks every descriptor from `first` up close-on-exec.
///
/// # Errors
/// Those of close_range(2).
pub fn cloexec_from(first: u32) -> io::Result<()> {
    // SAFETY: only sets a flag on descriptors; none is closed now.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) })?;
    Ok(())
}

/// Closes every descriptor from 3 up but those in `keep`. For a forked child, which never drops what it has copies of.
///
/// # Errors
/// Those of close_range(2).
pub fn close_except(keep: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut kept: Vec<u32> = keep.iter().map(|fd| fd.as_raw_fd() as u32).filter(|fd| *fd > 2).collect();
    kept.sort_unstable();
    let mut first = 3;
    for last in kept.into_iter().chain([u32::MAX]) {
        if last > first {
            let end = if last == u32::MAX { last } else { last - 1 };
            // SAFETY: the owners of these descriptors in this copy of the agent's memory are never used again: the caller
            // is a child that goes on with what it keeps, and ends in execve or _exit.
            check(unsafe { libc::syscall(libc::SYS_close_range, first, end, 0) })?;
        }
        first = last.saturating_add(1);
    }
    Ok(())
}

/// Sends any signal, real-time ones too.
///
/// # Errors
/// Those of pidfd_send_signal(2).
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: takes numbers and a null pointer.
    check(unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    })?;
    Ok(())
}

/// The mount namespace of a process.
///
/// # Errors
/// `ENOTTY` on kernels before 6.11; `ESRCH` when it has ended.
pub fn mount_namespace(pidfd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: PIDFD_GET_MNT_NAMESPACE takes no argument.
    let fd = check(unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_MNT_NAMESPACE, 0) }.into())?;
    // SAFETY: a new descriptor (close-on-exec, as the kernel opens it) that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Sends any signal to a process by its number.
///
/// # Errors
/// Those of kill(2).
pub fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // SAFETY: takes numbers.
    check(unsafe { libc::kill(pid, signal) }.into())?;
    Ok(())
}

/// One instruction of an extended BPF program.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BpfInsn {
    /// Operation.
    pub code: u8,
    /// Destination in the low, source in the high four bits.
    pub regs: u8,
    /// Jump distance or memory offset.
    pub off: i16,
    /// Constant.
    pub imm: i32,
}

/// Loads a program of type BPF_PROG_TYPE_CGROUP_DEVICE.
///
/// # Errors
/// Those of bpf(2).
pub fn bpf_load_device(program: &[BpfInsn]) -> io::Result<OwnedFd> {
    #[repr(C)]
    #[derive(Default)]
    struct Attr {
        prog_type: u32,
        insn_cnt: u32,
        insns: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log_buf: u64,
        kern_version: u32,
        prog_flags: u32,
    }
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_CGROUP_DEVICE: u32 = 15;
    let attr = Attr {
        prog_type: BPF_PROG_TYPE_CGROUP_DEVICE,
        insn_cnt: program.len() as u32,
        insns: program.as_ptr() as u64,
        license: c"Apache-2.0".as_ptr() as u64,
        ..Attr::default()
    };
    // SAFETY: `attr` has the layout that the kernel defines for BPF_PROG_LOAD up to `prog_flags`, its size is given, and what
    // it points to outlives the call.
    let fd =
        check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, &raw const attr, size_of_val(&attr)) })?;
    // SAFETY: a new descriptor (close-on-exec, as bpf(2) makes them) that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Attaches a loaded device program to a cgroup; one attached before is replaced with `replace`.
///
/// # Errors
/// Those of bpf(2).
pub fn bpf_attach_device(
    cgroup: BorrowedFd<'_>,
    program: BorrowedFd<'_>,
    replace: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    #[repr(C)]
    struct Attr {
        target_fd: u32,
        attach_bpf_fd: u32,
        attach_type: u32,
        attach_flags: u32,
        replace_bpf_fd: u32,
    }
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_CGROUP_DEVICE: u32 = 6;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    const BPF_F_REPLACE: u32 = 4;
    let attr = Attr {
        target_fd: cgroup.as_raw_fd() as u32,
        attach_bpf_fd: program.as_raw_fd() as u32,
        attach_type: BPF_CGROUP_DEVICE,
        attach_flags: BPF_F_ALLOW_MULTI | if replace.is_some() { BPF_F_REPLACE } else { 0 },
        replace_bpf_fd: replace.map_or(0, |fd| fd.as_raw_fd() as u32),
    };
    // SAFETY: `attr` has the layout that the kernel defines for BPF_PROG_ATTACH, its size is given, and it outlives the call.
    check(unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_ATTACH, &raw const attr, size_of_val(&attr)) })?;
    Ok(())
}

/// Blocks SIGCHLD and returns a non-blocking descriptor that becomes readable when children end.
///
/// # Errors
/// Those of signalfd(2).
pub fn child_signals() -> io::Result<OwnedFd> {
    // SAFETY: a signal set is plain data, initialised by sigemptyset before use; the calls only touch it and this process's
    // signal mask.
    let fd = unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()).into())?;
        check(libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK).into())?
    };
    // SAFETY: a new descriptor that nobody else knows.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Whether the kernel lets children of this process go when they end, without a word.
pub fn disown_children(disown: bool) {
    let disposition = if disown { libc::SIG_IGN } else { libc::SIG_DFL };
    // SAFETY: sets a disposition that is no handler; the agent has none that could be running. It cannot fail for this signal.
    unsafe { libc::signal(libc::SIGCHLD, disposition) };
}

/// Gives signals back the state in which programs expect them: none blocked, none ignored.
pub fn reset_signals() {
    // SAFETY: sets dispositions to the default and the mask to empty; the agent has no handlers that could be running.
    // Failures (SIGKILL, SIGSTOP, numbers that do not exist) change nothing.
    unsafe {
        // Only SIGPIPE is ignored by Rust's runtime; the agent itself ignores nothing.
        libc::signal(libc::SIGPIPE, libc::SIG_DFL);
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const set, std::ptr::null_mut());
    }
}

/// Who sent a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sender {
    /// A process, by kill(2) and the like.
    Process,
    /// The kernel, for a terminal or of itself.
    Kernel,
}

/// Blocks all signals, so that they wait for [`wait_for_signal`].
pub fn block_signals() {
    // SAFETY: a signal set is plain data, initialised by sigfillset before use; only this process's signal mask changes.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

/// Waits for the next blocked signal; its number, and who sent it.
///
/// # Errors
/// Those of sigwaitinfo(2).
pub fn wait_for_signal() -> io::Result<(i32, Sender)> {
    // SAFETY: both are plain data, the set initialised by sigfillset before use, and the kernel fills the other.
    let (signal, code) = unsafe {
        let (mut set, mut info): (libc::sigset_t, libc::siginfo_t) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut set);
        (libc::sigwaitinfo(&raw const set, &raw mut info), info.si_code)
    };
    check(signal.into())?;
    Ok((signal, if code <= 0 { Sender::Process } else { Sender::Kernel }))
}

/// Closes the standard streams of a process that uses them no more.
pub fn close_streams() {
    for fd in 0..3 {
        // SAFETY: closes by number what no value owns; whoever used it later would get an error, as nothing is opened in its place.
        unsafe { libc::close(fd) };
    }
}

/// Replaces this process's program. Returns only on failure.
pub fn execve(path: &CStr, argv: &[*const libc::c_char], envp: &[*const libc::c_char]) -> io::Error {
    debug_assert!(argv.last().is_some_and(|p| p.is_null()) && envp.last().is_some_and(|p| p.is_null()));
    // SAFETY: both arrays end in a null pointer (checked above; made so by `pointers`) and every other pointer is to a C
    // string that lives as long as this call.
    unsafe { libc::execve(path.as_ptr(), argv.as_ptr(), envp.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends a forked child without running anything of its parent's.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: ends the process.
    unsafe { libc::_exit(code) }
}

/// Makes this process's memory and /proc entries inaccessible to unprivileged others, until it executes a program.
pub fn set_undumpable() {
    // SAFETY: a flag of this process; PR_SET_DUMPABLE with 0 cannot fail.
    unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0) };
}

/// Adds to the kernel's randomness and lets it count, then has the generator use it at once.
///
/// # Errors
/// Those of the ioctls; needs CAP_SYS_ADMIN.
pub fn reseed(random: BorrowedFd<'_>, entropy: &[u8]) -> io::Result<()> {
    /// `_IOW('R', 0x03, int[2])`
    const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
    /// `_IO('R', 0x07)`
    const RNDRESEEDCRNG: libc::c_ulong = 0x5207;
    let bytes = i32::try_from(entropy.len()).map_err(io::Error::other)?;
    let bits = bytes.checked_mul(8).ok_or(io::ErrorKind::InvalidInput)?;
    let mut info = Vec::with_capacity(8 + entropy.len());
    info.extend_from_slice(&bits.to_ne_bytes());
    info.extend_from_slice(&bytes.to_ne_bytes());
    info.extend_from_slice(entropy);
    // SAFETY: `info` is a struct rand_pool_info: bit count, byte count, and that many bytes; the kernel only reads it.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, info.as_ptr()) }.into())?;
    // SAFETY: takes no argument.
    check(unsafe { libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG) }.into())?;
    Ok(())
}

/// Makes the terminal behind `fd` the controlling one of this session leader.
///
/// # Errors
/// Those of TIOCSCTTY.
pub fn set_controlling_terminal(fd: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCSCTTY, 0) }.into())?;
    Ok(())
}

/// A descriptor again from its raw number, for one that was leaked on purpose across a `fork`.
pub fn dup_onto(fd: impl AsFd, target: RawFd) -> io::Result<()> {
    // SAFETY: dup2 on two numbers; `target` is one of 0, 1 and 2, which no owned descriptor of a forked child has.
    check(unsafe { libc::dup2(fd.as_fd().as_raw_fd(), target) }.into())?;
    Ok(())
}

/// A descriptor in the event loop.
///
/// # Errors
/// Those of epoll_ctl(2).
pub fn in_event_loop(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd keeps its descriptor open, and the same, until it is dropped, which AsyncFd does after deregistering.
    unsafe { AsyncFd::register_with_interest(fd, interest) }.map_err(io::Error::from)
}
