//! The standard streams of a sandbox's processes: from channel streams to whoever listens, and back.
//!
//! Every process has a [`Hub`], where attachers wait for its streams, also before it is created. [`Streams::connect`] then
//! opens the channel streams and lets one small task pump each. Nothing is buffered beyond one piece per stream: a
//! process waits for its slowest lossless listener, all the way through the guest's pipe.

mod endpoint;
mod file;
mod hub;
mod input;
mod logger;
mod output;

use std::sync::{Arc, Mutex};

pub use endpoint::{Endpoint, Error, Plan};
pub use hub::{Attacher, Hub};
use kapsel_channel::Channel;
use kapsel_protocol::{
    STDIO_PORT, api,
    stdio::{Header, Kind, Token},
};
pub use logger::Owner;
use tokio::{io::AsyncWriteExt, task::JoinHandle};

use crate::{
    attach::StreamKind,
    logs::{self, Writer},
};

/// The most bytes that are on their way from or to a stream at a time.
const PIECE: usize = 32 << 10;

/// The log of a container, shared by the pumps of its two output streams.
pub type Log = Arc<Mutex<Writer>>;

/// The connected streams of one process.
#[derive(Debug)]
pub struct Streams {
    inputs: Vec<JoinHandle<()>>,
    outputs: Vec<JoinHandle<()>>,
    close_stdin: Option<input::Closer>,
}

/// What the agent must know to pair the streams.
pub fn announce(plan: &Plan, token: Token) -> api::Stdio {
    api::Stdio {
        token: if plan.is_silent() { String::new() } else { token.to_string() },
        stdin: plan.stdin != Endpoint::Nowhere,
        stdout: plan.stdout != Endpoint::Nowhere,
        stderr: plan.stderr != Endpoint::Nowhere,
        ..Default::default()
    }
}

/// A fresh token.
pub fn token() -> Token {
    Token::from_random(u128::from_ne_bytes(crate::paths::random_bytes()))
}

impl Streams {
    /// Opens the streams that `plan` names and starts their pumps.
    ///
    /// # Errors
    /// When the channel is closed, or a FIFO or file cannot be opened.
    pub async fn connect(
        channel: &dyn Channel,
        token: Token,
        plan: &Plan,
        hub: &Hub,
        log: Option<Log>,
    ) -> Result<Self, Error> {
        let mut streams = Self { inputs: Vec::new(), outputs: Vec::new(), close_stdin: None };
        if plan.is_silent() {
            return Ok(streams);
        }
        let mut loggers = match plan.logger() {
            Some(program) => program.start(&plan.owner).await?.map(Some),
            None => [None, None],
        };
        if plan.terminal {
            let [logger, _] = loggers;
            streams.terminal(channel, token, plan, hub, log, logger).await?;
            return Ok(streams);
        }
        if plan.stdin != Endpoint::Nowhere {
            let guest = open(channel, token, Kind::Stdin).await?;
            let (pump, closer) =
                input::start(guest, hub.take(StreamKind::Stdin), input::fifo(&plan.stdin, false)?, true);
            streams.inputs.push(pump);
            streams.close_stdin = Some(closer);
        }
        let outputs = [
            (Kind::Stdout, StreamKind::Stdout, &plan.stdout, logs::Stream::Stdout),
            (Kind::Stderr, StreamKind::Stderr, &plan.stderr, logs::Stream::Stderr),
        ];
        for ((kind, attached, endpoint, logged), logger) in outputs.into_iter().zip(&mut loggers) {
            if *endpoint == Endpoint::Nowhere {
                continue;
            }
            let guest = open(channel, token, kind).await?;
            let sinks = output::Sinks::open(endpoint, log.clone(), logged, logger.take())?;
            streams.outputs.push(output::start(guest, hub.take(attached), sinks));
        }
        Ok(streams)
    }

    async fn terminal(
        &mut self,
        channel: &dyn Channel,
        token: Token,
        plan: &Plan,
        hub: &Hub,
        log: Option<Log>,
        logger: Option<tokio::net::unix::pipe::Sender>,
    ) -> Result<(), Error> {
        let guest = open(channel, token, Kind::Tty).await?;
        let (reader, writer) = tokio::io::split(guest);
        let fifo = input::fifo(&plan.stdin, true)?;
        let (pump, closer) = input::start(writer, hub.take(StreamKind::Stdin), fifo, false);
        let sinks = output::Sinks::open(&plan.stdout, log, logs::Stream::Stdout, logger)?;
        self.outputs.push(output::start_terminal(reader, hub.take(StreamKind::Tty), sinks, closer.clone()));
        self.inputs.push(pump);
        self.close_stdin = Some(closer);
        Ok(())
    }

    /// Ends the process's input, as `CloseIO` asks.
    pub async fn close_stdin(&self) {
        if let Some(closer) = &self.close_stdin {
            closer.close().await;
        }
    }

    /// The process ended: its input goes nowhere, its output is delivered to the end.
    pub fn ended(&self) {
        self.inputs.iter().for_each(JoinHandle::abort);
    }

    /// Waits until all output has been delivered.
    pub async fn drained(&mut self) {
        for pump in self.outputs.drain(..) {
            // An aborted pump has nothing left to deliver.
            let _ = pump.await;
        }
    }
}

impl Drop for Streams {
    fn drop(&mut self) {
        self.inputs.iter().chain(&self.outputs).for_each(JoinHandle::abort);
    }
}

/// Opens one stream of a process that was announced with `token`.
pub(crate) async fn open(
    channel: &dyn Channel,
    token: Token,
    kind: Kind,
) -> Result<kapsel_channel::Stream, Error> {
    let mut stream = channel.open(STDIO_PORT).await?;
    stream.write_all(Header { token, kind }.to_string().as_bytes()).await?;
    stream.flush().await?;
    Ok(stream)
}

#[cfg(test)]
mod tests;
