//! The stand-in: a host process for each process in a guest that an engine knows of.
//!
//! An engine reads its number from the pid file, waits for it as its subreaper, finds namespaces in its `/proc` directory, and may
//! signal it. It is a child of the command that makes the container, which it outlives. It holds the sandbox by a leash: when it
//! is killed, so is the sandbox.

mod conmon;
mod control;
mod streams;
mod work;

use std::{
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::process::CommandExt,
    },
    process::{Child, Command, ExitCode, ExitStatus, Stdio},
};

use anyhow::Context;
use control::{Answer, Control};
pub use control::{NewContainer, NewProcess, Order};
pub use work::{explain, runtime};

/// A stand-in seen by the command that started it.
pub struct StandIn {
    child: Child,
    control: Control,
}

impl StandIn {
    /// Starts one and tells it what to do. Its standard streams are this command's, or the terminal `console`.
    pub fn start(order: &Order, console: Option<OwnedFd>) -> anyhow::Result<Self> {
        let (ours, theirs) = std::os::unix::net::UnixStream::pair().context("cannot make a socket pair")?;
        let program = std::env::current_exe().context("cannot find my own program")?;
        let mut command = Command::new(program);
        command.arg("stand-in").arg("--control-fd").arg(theirs.as_raw_fd().to_string()).current_dir("/");
        let has_console = console.is_some();
        if let Some(slave) = console {
            let again = || slave.try_clone().map(Stdio::from).context("cannot use the terminal");
            command.stdin(again()?).stdout(again()?).stderr(again()?);
        }
        let control = theirs.as_raw_fd();
        let in_child = move || {
            // The keys of this command's terminal are not for it; its own terminal tells it of changes of size.
            rustix::process::setsid()?;
            if has_console {
                rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            }
            // SAFETY: `theirs` is open until after the spawn.
            let control = unsafe { BorrowedFd::borrow_raw(control) };
            rustix::io::fcntl_setfd(control, rustix::io::FdFlags::empty())?;
            Ok(())
        };
        // SAFETY: the closure makes system calls only; it neither allocates nor takes locks.
        unsafe { command.pre_exec(in_child) };
        let child = command.spawn().context("cannot start the process that stands for the container's")?;
        drop(theirs);
        let mut stand_in = Self { child, control: Control::new(ours) };
        // On an error its answer says more.
        let _ = stand_in.control.send(order);
        Ok(stand_in)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until its namespaces exist.
    pub fn ready(&mut self) -> anyhow::Result<()> {
        match self.control.receive()? {
            Answer::Ready => Ok(()),
            other => Err(other.into_error()),
        }
    }

    /// Lets it go on.
    pub fn go(&mut self) -> anyhow::Result<()> {
        self.control.send(&()).context("the stand-in is gone")
    }

    /// Waits until it has done what it was told.
    pub fn done(&mut self) -> anyhow::Result<()> {
        match self.control.receive()? {
            Answer::Done => Ok(()),
            other => Err(other.into_error()),
        }
    }

    /// Ends it, and its sandbox with it.
    pub fn kill(mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Stays until it ends, passing this command's signals on. `terminal`: standard input is a terminal that is the container's.
    pub fn stay(mut self, terminal: bool) -> anyhow::Result<u8> {
        use kapsel_sandbox::signals::{Event, Signals};
        let _raw = terminal.then(streams::Raw::enter).transpose()?;
        let pid =
            i32::try_from(self.pid()).ok().and_then(rustix::process::Pid::from_raw).context("no process")?;
        let send = |signal: i32| {
            if let Some(signal) = rustix::process::Signal::from_named_raw(signal) {
                let _ = rustix::process::kill_process(pid, signal);
            }
        };
        work::runtime()?.block_on(async {
            let mut signals = Signals::take_over().context("cannot take signals over")?;
            let ended = tokio::task::spawn_blocking(move || self.child.wait());
            tokio::pin!(ended);
            loop {
                tokio::select! {
                    status = &mut ended => return Ok(code(status.context("waiting failed")??)),
                    event = signals.next() => match event {
                        Event::Resized => send(libc::SIGWINCH),
                        Event::Forward(signal) => send(signal),
                    },
                }
            }
        })
    }
}

fn code(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    u8::try_from(code).unwrap_or(u8::MAX)
}

/// What the program does as a stand-in.
pub fn run(control_fd: i32) -> ExitCode {
    let mut control = match Control::adopt(control_fd) {
        Ok(control) => control,
        Err(error) => {
            eprintln!("kapsel-runtime stand-in: {error:#} (kapsel-runtime starts this by itself)");
            return ExitCode::FAILURE;
        }
    };
    let result = control.receive().and_then(|order| match order {
        Order::Container(order) => work::container(&mut control, *order),
        Order::Process(order) => work::process(&mut control, *order),
    });
    match result {
        // Threads that wait for input do not keep it.
        Ok(code) => std::process::exit(code.into()),
        Err(error) => {
            control.fail(&error);
            ExitCode::FAILURE
        }
    }
}
