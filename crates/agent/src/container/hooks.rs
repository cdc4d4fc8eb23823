//! `startContainer` hooks: programs of the container's that run in it, before its own.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions};

use crate::sys;

use super::child::Inheritance;
use super::plan::HookPlan;
use super::report::{ChildError, During, Step};

/// A hook that names no timeout still may not stop the container for ever.
const TIMEOUT: Duration = Duration::from_secs(300);

/// Runs the hooks one after the other, each with the container's state (OCI) on its standard input.
///
/// # Errors
/// When one cannot be run, fails, or takes too long.
pub fn run(hooks: &[HookPlan], id: &str, inherited: &Inheritance<'_>) -> Result<(), ChildError> {
    let pid = std::process::id();
    let state = format!(
        r#"{{"ociVersion":"1.2.0","id":"{id}","status":"created","pid":{pid},"bundle":"{}/{id}"}}"#,
        kapsel_protocol::STORAGE_ROOT
    );
    hooks.iter().try_for_each(|hook| run_one(hook, state.as_bytes(), inherited))
}

fn run_one(hook: &HookPlan, state: &[u8], inherited: &Inheritance<'_>) -> Result<(), ChildError> {
    let context = || format!("running the startContainer hook {}", hook.path.to_string_lossy());
    let (reader, writer) =
        rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).during(Step::Hooks, context)?;
    // SAFETY: this process is a fork of the single-threaded agent and has made no threads; the child only executes.
    let child = match unsafe { sys::clone3(0, None) }.during(Step::Hooks, context)? {
        Some(child) => child,
        None => become_hook(hook, &reader, inherited),
    };
    drop(reader);
    // The state is smaller than a pipe; a hook that does not read it is none the worse (SIGPIPE is ignored here).
    let _ = std::fs::File::from(writer).write_all(state);
    wait(&child.pidfd, hook.timeout.map_or(TIMEOUT, |s| Duration::from_secs(s.into())))
        .during(Step::Hooks, context)
}

fn become_hook(hook: &HookPlan, stdin: &OwnedFd, inherited: &Inheritance<'_>) -> ! {
    let pointers = |list: &[std::ffi::CString]| -> Vec<*const libc::c_char> {
        list.iter().map(|s| s.as_ptr()).chain([std::ptr::null()]).collect()
    };
    if sys::dup_onto(stdin, 0).is_ok() && sys::close_except(&[inherited.socket.as_fd()]).is_ok() {
        sys::reset_signals();
        sys::execve(&hook.path, &pointers(&hook.args), &pointers(&hook.env));
    }
    sys::exit_now(127)
}

fn wait(pidfd: &OwnedFd, timeout: Duration) -> rustix::io::Result<()> {
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: 0 };
    let mut ready = [PollFd::new(pidfd, PollFlags::IN)];
    let timed_out = rustix::event::poll(&mut ready, Some(&timeout))? == 0;
    if timed_out {
        // It is a child that nobody has waited for, so it still exists.
        let _ = sys::pidfd_send_signal(pidfd.as_fd(), libc::SIGKILL);
    }
    let status = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED)?;
    match status.and_then(|s| s.exit_status()) {
        _ if timed_out => Err(Errno::TIMEDOUT),
        Some(0) => Ok(()),
        Some(127) => Err(Errno::NOENT),
        _ => Err(Errno::CANCELED),
    }
}
