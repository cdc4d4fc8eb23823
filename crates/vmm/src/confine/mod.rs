//! What the monitor's own threads may ask of the host's kernel. A guest that takes one of them over is left with that.
//!
//! Each thread gives up everything but a list of system calls before the guest's first instruction: the API's thread when
//! it starts, the processors' and the event loop's when the machine is built, because their lists ([`lists`]) are made of
//! what the machine's devices declare. A call outside of its list ends the process ([`trap`]).

mod file;
mod lists;
mod program;
mod trap;

use std::path::Path;

use seccompiler::{BpfMap, BpfProgram};

pub use lists::{Calls, Machine, api, machine, set_memory_region};
pub use trap::{EXIT_CODE, install as install_trap, set_log};

/// What a thread is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Thread {
    /// It talks to the API's clients.
    Api = 1,
    /// It serves devices and does what the API asks for.
    EventLoop = 2,
    /// It runs a processor of the guest.
    Processor = 3,
}

impl Thread {
    const ALL: [Thread; 3] = [Thread::Api, Thread::EventLoop, Thread::Processor];

    /// Firecracker's word for such threads.
    pub fn name(self) -> &'static str {
        match self {
            Thread::Api => "api",
            Thread::EventLoop => "vmm",
            Thread::Processor => "vcpu",
        }
    }
}

/// Why a thread cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file with filters cannot be read.
    #[error("cannot read the seccomp filters {path}: {reason}")]
    File {
        /// Which file.
        path: std::path::PathBuf,
        /// Why not.
        reason: String,
    },
    /// A filter cannot be made, or the kernel does not take it.
    #[error("cannot confine the {thread} thread: {reason}; --no-seccomp runs without")]
    Filter {
        /// Which thread.
        thread: &'static str,
        /// Why not.
        reason: String,
    },
}

/// Where filters come from.
#[derive(Debug)]
pub enum Policy {
    /// From what the monitor and its devices declare.
    Declared,
    /// From a file.
    Given(BpfMap),
    /// There are none.
    Off,
}

impl Policy {
    /// Filters of a file: the JSON that Firecracker's and rust-vmm's seccompiler compile, with a filter for each of `api`,
    /// `vmm` and `vcpu`.
    ///
    /// # Errors
    /// [`Error::File`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        file::read(path).map(Policy::Given)
    }

    /// The filter of a thread that makes these calls.
    ///
    /// # Errors
    /// [`Error::Filter`].
    pub fn filter(&self, thread: Thread, calls: &Calls) -> Result<Filter, Error> {
        let program = match self {
            Policy::Off => None,
            Policy::Given(filters) => filters.get(thread.name()).map(|program| file::marked(program, thread)),
            Policy::Declared => {
                Some(program::assemble(calls, thread as u16).map_err(|e| failed(thread, &e))?)
            }
        };
        Ok(Filter { thread, program })
    }
}

fn failed(thread: Thread, error: &dyn std::fmt::Display) -> Error {
    Error::Filter { thread: thread.name(), reason: error.to_string() }
}

/// What a thread gives up.
#[derive(Debug, Clone)]
pub struct Filter {
    thread: Thread,
    program: Option<BpfProgram>,
}

impl Filter {
    /// Confines the calling thread, and those that it starts, for good.
    ///
    /// # Errors
    /// [`Error::Filter`].
    pub fn apply(&self) -> Result<(), Error> {
        let Some(program) = &self.program else { return Ok(()) };
        seccompiler::apply_filter(program).map_err(|e| failed(self.thread, &e))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::{AsRawFd, OwnedFd};

    use kapsel_devices::calls::{SystemCall, any, only};

    use super::*;

    /// Does `act` in a child of this process that is confined to `calls`, and gives its exit code and its log.
    fn confined(thread: Thread, calls: &[SystemCall], act: fn()) -> (i32, String) {
        let filter = Policy::Declared.filter(thread, &calls.to_vec()).unwrap();
        let (mut reader, writer) = std::io::pipe().unwrap();
        let writer = OwnedFd::from(writer);
        // SAFETY: the child makes system calls and ends without returning to what other threads may hold.
        match unsafe { libc::fork() } {
            0 => {
                let confined = install_trap(writer.as_raw_fd()).is_ok() && filter.apply().is_ok();
                if confined {
                    act();
                }
                // SAFETY: the child ends, and nothing of it is to be cleaned up.
                unsafe { libc::_exit(if confined { 0 } else { 1 }) }
            }
            child => {
                drop(writer);
                let mut log = String::new();
                reader.read_to_string(&mut log).unwrap();
                let mut status = 0;
                // SAFETY: the child is ours and not waited for elsewhere.
                assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
                assert!(libc::WIFEXITED(status), "{status:#x}: {log}");
                (libc::WEXITSTATUS(status), log)
            }
        }
    }

    fn yield_now() {
        // SAFETY: the call has no arguments.
        unsafe { libc::syscall(libc::SYS_sched_yield) };
    }

    fn madvise(advice: i32) {
        // SAFETY: no memory is concerned.
        unsafe { libc::syscall(libc::SYS_madvise, 0, 0, advice) };
    }

    const END: SystemCall = any(libc::SYS_exit_group);
    const SAY: SystemCall = any(libc::SYS_write);

    #[test]
    fn a_call_outside_of_the_list_ends_the_process_and_the_log_names_it_and_the_thread() {
        let allowed = [SAY, END, any(libc::SYS_sched_yield)];
        assert_eq!(confined(Thread::Processor, &allowed, yield_now), (0, String::new()));
        for thread in Thread::ALL {
            let (code, log) = confined(thread, &[SAY, END], yield_now);
            assert_eq!(code, EXIT_CODE);
            let expected =
                format!("the {} thread made the system call {}", thread.name(), libc::SYS_sched_yield);
            assert!(log.contains(&expected), "{log:?}");
        }
    }

    #[test]
    fn an_argument_can_be_limited_and_somebody_elses_limit_does_not_count() {
        let free = only(libc::SYS_madvise, 2, libc::MADV_DONTNEED as u32);
        let dontneed = || madvise(libc::MADV_DONTNEED);
        let hugepage = || madvise(libc::MADV_HUGEPAGE);
        assert_eq!(confined(Thread::EventLoop, &[SAY, END, free], dontneed).0, 0);
        assert_eq!(confined(Thread::EventLoop, &[SAY, END, free], hugepage).0, EXIT_CODE);
        let both = [any(libc::SYS_madvise), SAY, END, free];
        assert_eq!(confined(Thread::EventLoop, &both, hugepage).0, 0);
    }

    #[test]
    fn no_thread_may_make_memory_executable_or_start_programs_or_trace() {
        let lists = machine(&[]);
        for list in [api(), lists.event_loop, lists.processor] {
            for forbidden in
                [libc::SYS_execve, libc::SYS_ptrace, libc::SYS_clone, libc::SYS_rt_sigaction, libc::SYS_mount]
            {
                assert!(list.iter().all(|call| call.number != forbidden), "{forbidden}");
            }
            let memory =
                list.iter().filter(|call| [libc::SYS_mmap, libc::SYS_mprotect].contains(&call.number));
            for call in memory {
                assert!(
                    matches!(call.only, Some((2, protection)) if protection & libc::PROT_EXEC as u32 == 0)
                );
            }
        }
    }
}
