//! What happens when a thread makes a call that it may not make: the log says so and the process ends, machine and all.

use std::ffi::{c_int, c_void};
use std::io::{self, Cursor, Write};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicI32, Ordering};

use libc::siginfo_t;

use super::Thread;

/// The exit code of a monitor that was ended so; the same as Firecracker's.
pub const EXIT_CODE: i32 = 148;
/// `si_code` of a signal that comes from a filter.
const SYS_SECCOMP: c_int = 1;

/// Where messages go, for a handler that may use nothing that somebody else could hold.
static LOG: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

/// The beginning of `siginfo_t` for such a signal (sigaction(2)).
#[repr(C)]
struct Trapped {
    signal: c_int,
    /// The lower 16 bits of the filter's answer.
    data: c_int,
    code: c_int,
    address: *mut c_void,
    number: c_int,
}

/// From now on a forbidden call is said on `log` and ends the process.
///
/// # Errors
/// When the signal cannot be handled.
pub fn install(log: RawFd) -> io::Result<()> {
    set_log(log);
    vmm_sys_util::signal::register_signal_handler(libc::SIGSYS, handle).map_err(io::Error::from)
}

/// Says forbidden calls on another log, which stays open.
pub fn set_log(log: RawFd) {
    LOG.store(log, Ordering::Relaxed);
}

extern "C" fn handle(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the kernel gives a handler a valid siginfo_t, which is longer than `Trapped` and aligned as it is.
    let trapped = unsafe { &*info.cast::<Trapped>() };
    // Somebody sent the signal; that is not a reason to end.
    if trapped.code != SYS_SECCOMP {
        return;
    }
    let name =
        Thread::ALL.iter().find(|thread| **thread as c_int == trapped.data).map_or("unknown", |t| t.name());
    let mut line = Cursor::new([0; 160]);
    // The line is shorter than its room.
    let _ = writeln!(
        line,
        "ERROR kapsel-vmm: the {name} thread made the system call {}, which it may not make (seccomp); the machine ends",
        trapped.number
    );
    let length = line.position() as usize;
    // SAFETY: both calls may be made in a handler, and the bytes are initialised.
    unsafe {
        libc::write(LOG.load(Ordering::Relaxed), line.get_ref().as_ptr().cast(), length);
        libc::_exit(EXIT_CODE)
    }
}
