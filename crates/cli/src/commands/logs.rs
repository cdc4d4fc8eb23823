//! `kapsel logs`.

use std::os::fd::BorrowedFd;

use kapsel_sandbox::logs::{Error, ReadOptions, Reader, Stream};
use kapsel_sandbox::owner::{self, Owner};
use kapsel_sandbox::record::{Record, Status};
use rustix::io::Errno;

use super::host::Host;
use crate::failure::{Failure, Outcome};
use crate::flags::container::Logs;
use kapsel_sandbox::pump;

use crate::output;

/// Prints what a container wrote, each stream where it belongs.
pub fn run(host: &Host, flags: &Logs) -> Outcome {
    let sandbox = host.find(&flags.name)?;
    let log = sandbox.bundle.output_log();
    if !log.exists() {
        // It has not been created yet, or it has written nothing so far.
        return Ok(0);
    }
    let options = ReadOptions { follow: flags.follow, tail: flags.tail, ..ReadOptions::default() };
    let mut reader = Reader::open(&log, options)?;
    if flags.follow {
        let bundle = sandbox.bundle.clone();
        reader.stop_when(move || {
            let ended = Record::read(&bundle).map_or(true, |record| record.status == Status::Exited);
            ended || matches!(owner::of(&bundle), Owner::Gone | Owner::Clearing)
        });
    }
    for entry in reader {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error @ Error::Damaged { .. }) => {
                Failure::from(error).warn();
                continue;
            }
            Err(error) => return Err(error.into()),
        };
        let to: BorrowedFd<'static> = match entry.stream {
            Stream::Stdout => rustix::stdio::stdout(),
            Stream::Stderr => rustix::stdio::stderr(),
        };
        match pump::write_all(to, &entry.bytes) {
            Ok(()) => {}
            Err(Errno::PIPE) => output::die_of_broken_pipe(),
            Err(error) => return Err(Failure::new(format!("cannot print the log: {error}"))),
        }
    }
    Ok(0)
}
