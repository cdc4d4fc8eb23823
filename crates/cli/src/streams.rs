//! A process's standard streams, connected to kapsel's own.

use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use kapsel_sandbox::attach::{self, StreamKind};
use kapsel_sandbox::paths::Bundle;
use tokio::sync::mpsc;

use crate::detach::{Detector, Typed};
use crate::failure::Failure;
use kapsel_sandbox::pump::{self, End, pump};

/// Which streams a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Standard input is passed on.
    pub stdin: bool,
    /// One terminal instead of three streams.
    pub terminal: bool,
}

/// What happens to the streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// One of the outputs is complete.
    OutputDone,
    /// Nobody reads what kapsel writes any more.
    ReaderGone,
    /// The keys that let go were typed.
    Detached,
}

/// Connections to a process's streams, before any byte has moved.
pub struct Streams {
    stdin: Option<UnixStream>,
    outputs: Vec<(UnixStream, OwnedFd)>,
}

/// Streams between which bytes move.
pub struct Running {
    /// What happens to them.
    pub events: mpsc::UnboundedReceiver<Event>,
    /// How many outputs are not complete yet.
    pub open: usize,
    outputs: Vec<(UnixStream, Arc<AtomicBool>)>,
}

impl Streams {
    /// Connects to the streams of a process. From here on, nothing that it writes is missed.
    ///
    /// # Errors
    /// When the sandbox is gone or has no such process.
    pub fn open(bundle: &Bundle, exec_id: &str, wanted: Wanted) -> Result<Self, Failure> {
        let open = |kind| attach::open(bundle, exec_id, kind, true);
        let own = |fd: std::os::fd::BorrowedFd<'_>| {
            fd.try_clone_to_owned()
                .map_err(|error| Failure::new(format!("cannot use my own output: {error}")))
        };
        let stdout = own(rustix::stdio::stdout())?;
        if wanted.terminal {
            let tty = open(StreamKind::Tty)?;
            let stdin = wanted.stdin.then(|| tty.try_clone()).transpose()?;
            return Ok(Streams { stdin, outputs: vec![(tty, stdout)] });
        }
        let stdin = wanted.stdin.then(|| open(StreamKind::Stdin)).transpose()?;
        let outputs = vec![
            (open(StreamKind::Stdout)?, stdout),
            (open(StreamKind::Stderr)?, own(rustix::stdio::stderr())?),
        ];
        Ok(Streams { stdin, outputs })
    }

    /// Starts moving bytes, one thread for each direction: all calls block, so that each stream goes as fast as its
    /// slower side and no faster.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub fn run(self, detach_keys: Option<Vec<u8>>) -> Result<Running, Failure> {
        let (sender, events) = mpsc::unbounded_channel();
        let cannot = |error| Failure::new(format!("cannot start a thread: {error}"));
        if let Some(to) = self.stdin {
            let sender = sender.clone();
            let input = move || match detach_keys {
                Some(keys) => typed(&to, keys, &sender),
                None => piped(&to),
            };
            thread::Builder::new().name("stdin".into()).spawn(input).map_err(cannot)?;
        }
        let mut outputs = Vec::new();
        for (from, to) in self.outputs {
            let holding = Arc::new(AtomicBool::new(false));
            outputs.push((from.try_clone()?, holding.clone()));
            let sender = sender.clone();
            let output = move || {
                let event = match pump(&from, &to, &holding) {
                    Ok(End::ReaderGone) => Event::ReaderGone,
                    Ok(End::Eof) => Event::OutputDone,
                    Err(error) => {
                        Failure::new(format!("cannot pass the output on: {error}")).warn();
                        Event::OutputDone
                    }
                };
                // Nobody listens any more when kapsel is about to end.
                let _ = sender.send(event);
            };
            thread::Builder::new().name("output".into()).spawn(output).map_err(cannot)?;
        }
        Ok(Running { events, open: outputs.len(), outputs })
    }
}

impl Running {
    /// Whether no output is on its way: none is waiting in a connection, none is being written.
    pub fn idle(&self) -> bool {
        self.outputs.iter().all(|(stream, holding)| {
            let waiting = rustix::io::ioctl_fionread(stream.as_fd()).unwrap_or(0);
            waiting == 0 && !holding.load(Ordering::SeqCst)
        })
    }
}

/// Standard input that is no terminal of the container's: every byte goes, then the end.
fn piped(to: &UnixStream) {
    // When the process does not read its input any more there is nobody to tell.
    let _ = pump(rustix::stdio::stdin(), to, &AtomicBool::new(false));
    let _ = to.shutdown(Shutdown::Write);
}

/// Keys for the container's terminal, watched for those that let go.
fn typed(to: &UnixStream, keys: Vec<u8>, events: &mpsc::UnboundedSender<Event>) {
    let mut detector = Detector::new(keys);
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = pump::read_some(rustix::stdio::stdin(), &mut buffer) {
        let (bytes, detach) = match detector.feed(&buffer[..count]) {
            Typed::Pass(bytes) => (bytes, false),
            Typed::Detach(bytes) => (bytes, true),
        };
        if pump::write_all(to, &bytes).is_err() {
            return;
        }
        if detach {
            let _ = events.send(Event::Detached);
            return;
        }
    }
}
