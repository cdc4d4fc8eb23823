//! `kapsel-fsd`: serves one shared directory to one guest, as a vhost-user back end for virtio-fs.
//!
//! The guest at the other end is hostile: it writes the FUSE requests. kapsel starts this program inside a jail
//! (`kapsel_jail::profiles::fsd`) before it reads its first byte from the guest: the directory is mounted at `/share` in a root that holds
//! nothing else but this program's libraries, there is no network, and a seccomp filter allows file operations only. So whatever a
//! request names, `..` and absolute symbolic links included, it ends in that root. The protocol itself, and the
//! file operations, are those of the virtiofsd crate.

mod args;
mod keep_cache;
mod log;
mod serve;

use std::process::ExitCode;

fn main() -> ExitCode {
    log::init();
    exit_on_panic();
    let done = args::Args::parse(std::env::args_os().skip(1)).and_then(serve::serve);
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::line(format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// A panic on the thread that serves the queues would leave a process that looks alive and answers nothing, and with it a guest that
/// hangs. Process 1 of a pid namespace cannot even abort reliably, as signals that it sends itself are ignored.
fn exit_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        log::line(format_args!("{panic}"));
        std::process::exit(101);
    }));
}
