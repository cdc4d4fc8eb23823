//! `kapsel-runtime`: the OCI runtime command line as engines call runc, each container in a virtual machine of its own.
//!
//! | file | idea |
//! | --- | --- |
//! | `args` | the command line |
//! | `report` | errors, as engines find them |
//! | `state` | the containers of one engine |
//! | `stand_in` | the host process that stands for a process in a guest |
//! | `console` | terminals |
//! | `hooks` | hooks that run on the host |
//! | `verbs` | one file for each group of verbs |
//!
//! A `create` is: check the bundle, start a stand-in, run the hooks against it, let it launch the sandbox, note what there is. The
//! stand-in stays: it carries the container's streams and signals, and ends as the container ends.

mod args;
mod console;
mod hooks;
mod report;
mod stand_in;
mod state;
mod verbs;

use std::process::ExitCode;

use clap::Parser;
use report::Report;

fn main() -> ExitCode {
    let cli = args::Cli::parse();
    if let Some(args::Verb::StandIn { control_fd }) = cli.verb {
        return stand_in::run(control_fd);
    }
    keep_descriptors();
    let report = Report::new(&cli.global);
    match verbs::carry_out(&cli, &report) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            report.error(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Keeps what this command inherited besides its standard streams from its children: they live longer than it, and a descriptor
/// of the engine's that stays open with them would keep the engine waiting.
fn keep_descriptors() {
    const FIRST: libc::c_uint = 3;
    const FLAGS: libc::c_uint = libc::CLOSE_RANGE_CLOEXEC;
    // SAFETY: close_range(2) with this flag changes a flag of descriptors, touches no memory and closes none. When it fails (a
    // kernel before 5.11) descriptors stay as they were, which is what every program without this call has.
    unsafe { libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, FLAGS) };
}
