//! Creates the child in its namespaces and hears how far it came.
//!
//! **The thread that clones.** A parent-death signal is sent when the *thread* that created the child ends, not the process. A
//! caller may be on a pool thread that ends when idle, so that the clone is made on one thread of this module that
//! lives as long as the process does (or on the main thread, when that is the caller's: it lives as long, too).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, OnceLock};

use crate::child;
use crate::error::{Error, Result, Step};
use crate::jail::Jail;
use crate::plan::Plan;
use crate::process::{Child, Exit};
use crate::sys;

pub(crate) fn spawn(jail: Jail) -> Result<Child> {
    let name = jail.name.clone();
    let plan = Plan::of(jail)?;
    if rustix::thread::gettid() == rustix::process::getpid() {
        return start(&plan);
    }
    let lost = || Error::Clone {
        name: name.clone(),
        source: io::Error::other("the thread that starts children is gone"),
    };
    let (reply, answer) = channel();
    let job: Job = Box::new(move || {
        // The receiver waits below, in this very call.
        let _ = reply.send(start(&plan));
    });
    lasting_thread(&name)?.lock().map_err(|_| lost())?.send(job).map_err(|_| lost())?;
    answer.recv().map_err(|_| lost())?
}

type Job = Box<dyn FnOnce() + Send>;

/// The thread of this process that creates children, started at first use and never ended.
fn lasting_thread(name: &str) -> Result<&'static Mutex<Sender<Job>>> {
    static THREAD: OnceLock<Mutex<Sender<Job>>> = OnceLock::new();
    if let Some(thread) = THREAD.get() {
        return Ok(thread);
    }
    let (jobs, queue) = channel::<Job>();
    std::thread::Builder::new()
        .name("jail".into())
        .stack_size(256 << 10)
        .spawn(move || queue.into_iter().for_each(|job| job()))
        .map_err(|source| Error::Clone { name: name.to_owned(), source })?;
    // Two first callers may race: the loser's thread ends, its queue being closed, before it has created anything.
    Ok(THREAD.get_or_init(|| Mutex::new(jobs)))
}

/// Clones the child and waits until it executes its program or fails.
fn start(plan: &Plan) -> Result<Child> {
    let pipe = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC);
    let (reports, report_to) =
        pipe.map_err(|e| plan.prepare("create a pipe for", "the child's report", e.into()))?;
    let mut child = {
        // A signal handler of ours must not run in the child, where it would act on a copy of our memory.
        let _quiet = AllSignalsBlocked::new();
        clone(plan, &report_to)?
    };
    // Our end of the pipe would keep it open.
    drop(report_to);
    let mut report = Vec::with_capacity(2 * child::REPORT_LEN);
    let read = File::from(reports).take(2 * child::REPORT_LEN as u64).read_to_end(&mut report);
    read.map_err(|e| plan.prepare("read", "the child's report", e))?;
    let records = report.as_chunks::<{ child::REPORT_LEN }>().0;
    match records.last().map(child::Report::from_bytes) {
        // The child announces its exec; silence after that is success.
        Some(report) if report.errno == 0 => Ok(child),
        Some(report) => {
            // It has failed and exits by itself.
            let _ = child.wait();
            Err(Error::Confine {
                name: plan.name.clone(),
                step: Step::from_number(report.step).unwrap_or(Step::Exec),
                subject: plan.subject(report.step, report.index),
                source: io::Error::from_raw_os_error(report.errno),
            })
        }
        None => {
            let exit = child.wait().unwrap_or(Exit::Signal(libc::SIGKILL));
            Err(Error::Died { name: plan.name.clone(), exit })
        }
    }
}

/// `struct clone_args` of clone3(2), as of Linux 5.7.
#[repr(C)]
#[derive(Default)]
struct CloneArgs {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

const CLONE_PIDFD: u64 = 0x1000;
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

fn clone(plan: &Plan, report_to: &OwnedFd) -> Result<Child> {
    let mut pidfd: i32 = -1;
    let mut args = CloneArgs {
        flags: plan.clone_flags | CLONE_PIDFD,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD.unsigned_abs().into(),
        ..CloneArgs::default()
    };
    if let Some(cgroup) = &plan.cgroup_v2 {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().unsigned_abs());
    }
    // SAFETY: `args` is a valid clone_args of the given size, and its pidfd points to an i32 that outlives the call. Without CLONE_VM
    // the child gets a copy of our memory and continues on a copy of this stack, as after fork; it calls only
    // `child::run`, which keeps to what is allowed there (see `sys`) and never returns.
    let cloned =
        unsafe { sys::call(libc::SYS_clone3, [&raw mut args as usize, size_of::<CloneArgs>(), 0, 0, 0, 0]) };
    match cloned {
        Ok(0) => child::run(plan, report_to.as_raw_fd()),
        Ok(pid) => {
            // SAFETY: clone3 succeeded with CLONE_PIDFD, so that it stored a new descriptor that nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Child::new(u32::try_from(pid).unwrap_or(u32::MAX), pidfd))
        }
        Err(errno) => {
            Err(Error::Clone { name: plan.name.clone(), source: io::Error::from_raw_os_error(errno.0) })
        }
    }
}

/// Blocks all signals of this thread until dropped.
struct AllSignalsBlocked(libc::sigset_t);

impl AllSignalsBlocked {
    fn new() -> AllSignalsBlocked {
        // SAFETY: sigset_t is plain bits, for which zeroes are a value; both sets are valid for the calls.
        unsafe {
            let (mut all, mut old) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut old);
            AllSignalsBlocked(old)
        }
    }
}

impl Drop for AllSignalsBlocked {
    fn drop(&mut self) {
        // SAFETY: the set was filled in by pthread_sigmask.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}
