//! Moves bytes between two file descriptors: any bytes, any amount, at the speed of the slower side.
//!
//! splice(2) moves them inside the kernel where one side is a pipe; elsewhere a buffer is used. A pump waits for either side, so
//! it has a thread of its own, and memory does not grow with the amount.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::SpliceFlags;

/// Bytes moved at a time.
const CHUNK: usize = 256 << 10;

/// How a pump ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// There is nothing more to read.
    Eof,
    /// Nobody reads what would be written.
    ReaderGone,
}

/// Moves everything from `from` to `to`, until there is no more or nobody takes it. `holding` is set while bytes were
/// read that are not written yet.
///
/// # Errors
/// When reading or writing fails for another reason than that the other side has gone.
pub fn pump(from: impl AsFd, to: impl AsFd, holding: &AtomicBool) -> Result<End, Errno> {
    let (from, to) = (from.as_fd(), to.as_fd());
    match run(from, to, splice_some) {
        // Neither side is a pipe, or one cannot be spliced (a file opened for appending, a terminal).
        Err(Errno::INVAL) => {
            let mut buffer = vec![0; CHUNK];
            run(from, to, |from, to| {
                let count = rustix::io::read(from, &mut buffer)?;
                holding.store(true, Ordering::SeqCst);
                let written = write_all(to, &buffer[..count]);
                holding.store(false, Ordering::SeqCst);
                written.map(|()| count)
            })
        }
        end => end,
    }
}

fn run(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    mut step: impl FnMut(BorrowedFd<'_>, BorrowedFd<'_>) -> Result<usize, Errno>,
) -> Result<End, Errno> {
    loop {
        match step(from, to) {
            Ok(0) => return Ok(End::Eof),
            Ok(_) | Err(Errno::INTR) => {}
            // Nothing to read or no room to write, on whichever side.
            Err(Errno::AGAIN) => {
                wait(from, PollFlags::IN)?;
                wait(to, PollFlags::OUT)?;
            }
            // EIO: a terminal whose other side has hung up. ECONNRESET: a socket closed with data unread.
            Err(Errno::PIPE) => return Ok(End::ReaderGone),
            Err(Errno::IO | Errno::CONNRESET) => return Ok(End::Eof),
            Err(error) => return Err(error),
        }
    }
}

fn splice_some(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> Result<usize, Errno> {
    // A splice that waits for input holds the lock of the pipe that it writes to: what is in there could not be read meanwhile.
    rustix::pipe::splice(from, None, to, None, CHUNK, SpliceFlags::MOVE | SpliceFlags::NONBLOCK)
}

/// Writes all bytes, also to a descriptor that somebody made non-blocking.
///
/// # Errors
/// When writing fails.
pub fn write_all(to: impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(&to, bytes) {
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(to.as_fd(), PollFlags::OUT)?,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads some bytes, also from a descriptor that somebody made non-blocking; 0 at the end.
///
/// # Errors
/// When reading fails.
pub fn read_some(from: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    loop {
        match rustix::io::read(&from, &mut *buffer) {
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(from.as_fd(), PollFlags::IN)?,
            other => return other,
        }
    }
}

fn wait(descriptor: BorrowedFd<'_>, events: PollFlags) -> Result<(), Errno> {
    match poll(&mut [PollFd::from_borrowed_fd(descriptor, events)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn data() -> Vec<u8> {
        (0..3_000_001u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
    }

    /// Sends `data` through a pump whose sides are made by `sides`, and checks that all of it arrives.
    fn through(
        from: impl AsFd + Send,
        mut feed: impl Write + Send,
        to: impl AsFd + Send,
        mut drain: impl Read + Send,
    ) {
        let sent = data();
        let mut got = Vec::new();
        let end = std::thread::scope(|scope| {
            let pump = scope.spawn(move || {
                let result = pump(&from, &to, &AtomicBool::new(false));
                drop((from, to));
                result
            });
            scope.spawn(|| {
                feed.write_all(&sent).unwrap();
                drop(feed);
            });
            drain.read_to_end(&mut got).unwrap();
            pump.join().unwrap()
        });
        assert_eq!(end, Ok(End::Eof));
        assert!(got == sent);
    }

    #[test]
    fn sockets_and_pipes_in_all_combinations() {
        let (socket_in, socket_feed) = UnixStream::pair().unwrap();
        let (pipe_drain, pipe_out) = std::io::pipe().unwrap();
        through(socket_in, socket_feed, pipe_out, pipe_drain);
        let (pipe_in, pipe_feed) = std::io::pipe().unwrap();
        let (socket_drain, socket_out) = UnixStream::pair().unwrap();
        through(pipe_in, pipe_feed, socket_out, socket_drain);
        let (socket_in, socket_feed) = UnixStream::pair().unwrap();
        let (socket_drain, socket_out) = UnixStream::pair().unwrap();
        through(socket_in, socket_feed, socket_out, socket_drain);
    }

    #[test]
    fn a_non_blocking_side_loses_nothing() {
        let (socket_in, socket_feed) = UnixStream::pair().unwrap();
        let (pipe_drain, pipe_out) = std::io::pipe().unwrap();
        rustix::fs::fcntl_setfl(&pipe_out, rustix::fs::OFlags::NONBLOCK).unwrap();
        through(socket_in, socket_feed, pipe_out, pipe_drain);
    }

    #[test]
    fn what_has_come_can_be_read_while_more_is_waited_for() {
        let (input, mut feed) = UnixStream::pair().unwrap();
        let (mut drain, output) = std::io::pipe().unwrap();
        let pump = std::thread::spawn(move || pump(&input, &output, &AtomicBool::new(false)));
        feed.write_all(b"x").unwrap();
        // Until it has moved that and waits for more.
        std::thread::sleep(std::time::Duration::from_millis(100));
        let (sender, read) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let mut byte = [0];
            drain.read_exact(&mut byte).unwrap();
            sender.send((byte, drain)).unwrap();
        });
        let read = read.recv_timeout(std::time::Duration::from_secs(10));
        drop(feed);
        let (byte, _drain) = read.expect("the reader waits for the pump");
        assert_eq!(byte, *b"x");
        assert_eq!(pump.join().unwrap(), Ok(End::Eof));
    }

    #[test]
    fn a_file_opened_for_appending() {
        let mut file = tempfile::tempfile().unwrap();
        rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::APPEND).unwrap();
        let (input, mut feed) = std::io::pipe().unwrap();
        feed.write_all(b"all of it").unwrap();
        drop(feed);
        assert_eq!(pump(&input, &file, &AtomicBool::new(false)), Ok(End::Eof));
        file.rewind().unwrap();
        let mut got = String::new();
        file.read_to_string(&mut got).unwrap();
        assert_eq!(got, "all of it");
    }

    #[test]
    fn a_reader_that_goes_away_ends_the_pump() {
        let (input, mut feed) = std::io::pipe().unwrap();
        let (drain, output) = std::io::pipe().unwrap();
        drop(drain);
        feed.write_all(b"nobody").unwrap();
        assert_eq!(pump(&input, &output, &AtomicBool::new(false)), Ok(End::ReaderGone));
    }
}
