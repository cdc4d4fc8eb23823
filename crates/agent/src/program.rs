//! What the agent is when a process of a container executes it: there it is no agent, but one of two small programs.
//!
//! Each process of a container is a fork of the agent until it executes something, so `/proc/self/exe` names it whatever the image has.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use kapsel_protocol::program::{INIT, REHEARSE};
use rustix::process::WaitOptions;

use crate::sys;

/// Docker's exit codes of programs that are not there, or cannot be executed.
const NOT_FOUND: u8 = 127;
const NOT_EXECUTABLE: u8 = 126;

/// Runs the program that the first of the arguments names; `None`: it names none, and this is the agent.
pub fn run(mut arguments: impl Iterator<Item = OsString>) -> Option<ExitCode> {
    let name = arguments.next()?;
    match name.to_str()? {
        // For a machine that stands by: what every start runs shall be translated before somebody waits for it.
        REHEARSE => {
            println!("rehearsed");
            Some(ExitCode::SUCCESS)
        }
        INIT => Some(init(arguments)),
        _ => None,
    }
}

/// A container's first process for a command that was not made to be one: the kernel drops signals at their default action for process
/// 1, so that Ctrl-C would not end `sleep`, and orphans would stay. It ends as its command does.
fn init(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(program) = arguments.next() else {
        eprintln!("kapsel: there is nothing to run");
        return ExitCode::from(NOT_FOUND);
    };
    sys::block_signals();
    let mut command = Command::new(&program);
    let unblocked = || {
        sys::reset_signals();
        Ok(())
    };
    // SAFETY: between fork and exec only the signal mask and a disposition are set, by calls that are async-signal-safe.
    unsafe { command.pre_exec(unblocked) };
    let child = match command.args(arguments).spawn() {
        Ok(child) => child.id() as i32,
        Err(error) => {
            eprintln!("kapsel: cannot execute {}: {error}", program.display());
            let not_found = error.kind() == io::ErrorKind::NotFound;
            return ExitCode::from(if not_found { NOT_FOUND } else { NOT_EXECUTABLE });
        }
    };
    // Readers of its output shall see the end when it does.
    sys::close_streams();
    loop {
        match sys::wait_for_signal() {
            Ok((libc::SIGCHLD, _)) => {
                if let Some(code) = reap(child) {
                    return ExitCode::from(code);
                }
            }
            // What a terminal sends it sends to the command as well.
            Ok((signal, sys::Sender::Process)) => drop(sys::kill(child, signal)),
            Ok(_) | Err(_) => {}
        }
    }
}

/// Reaps whatever has ended; the exit code of `child` if that has.
fn reap(child: i32) -> Option<u8> {
    while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
        let code = status.exit_status().or(status.terminating_signal().map(|signal| 128 + signal));
        if let Some(code) = code.filter(|_| pid.as_raw_nonzero().get() == child) {
            return Some(u8::try_from(code).unwrap_or(u8::MAX));
        }
    }
    None
}
