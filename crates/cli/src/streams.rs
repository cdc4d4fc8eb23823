//! A process's standard streams, connected to kapsel's own.

use std::os::unix::net::UnixStream;

use kapsel_sandbox::pump::{self, End};
use kapsel_sandbox::streams::{Outputs, Streams, carry, pass_input};
use tokio::sync::mpsc;

use crate::detach::{Detector, Typed};
use crate::failure::Failure;

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

/// Streams between which bytes move.
pub struct Running {
    /// What happens to them.
    pub events: mpsc::UnboundedReceiver<Event>,
    /// How many outputs are not complete yet.
    pub open: usize,
    /// The outputs.
    pub outputs: Outputs,
}

/// Starts moving bytes, one thread for each direction.
///
/// # Errors
/// When a thread cannot be started.
pub fn run(streams: Streams, detach_keys: Option<Vec<u8>>) -> Result<Running, Failure> {
    let (sender, events) = mpsc::unbounded_channel();
    let cannot = |error| Failure::new(format!("cannot start a thread: {error}"));
    if let Some(to) = streams.stdin {
        let sender = sender.clone();
        let input = move || match detach_keys {
            Some(keys) => typed(&to, keys, &sender),
            None => pass_input(&to),
        };
        carry("stdin", input).map_err(cannot)?;
    }
    let done = move |end| {
        let event = match end {
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
    let outputs = Outputs::start(streams.outputs, done).map_err(cannot)?;
    Ok(Running { events, open: outputs.count(), outputs })
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
