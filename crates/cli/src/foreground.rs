//! A process in the foreground: its streams are kapsel's, signals for kapsel are for it, its end is kapsel's.

use std::time::Duration;

use kapsel_sandbox::client::{Client, Error as ClientError, Fate};

use crate::failure::{Failure, Outcome};
use crate::streams::{self, Running};
use crate::terminal;
use kapsel_sandbox::signals::{self, Signals};

/// How long to wait for more output of a process that has ended, while another holds its streams open.
const LINGER: Duration = Duration::from_secs(2);
/// How often to look whether output still comes then.
const LOOK: Duration = Duration::from_millis(50);
/// After so many requests to end, kapsel does not wait for the process any more.
const PATIENCE: u32 = 3;

/// Signals that ask a program to end.
const ENDINGS: [i32; 4] = [1, 2, 3, 15];
/// Exit codes that can come from the sandbox as well as from the process: killed, and lost.
const AMBIGUOUS: [u8; 2] = [137, 255];
/// Linux's SIGPIPE.
const SIGPIPE: i32 = 13;

/// How the foreground was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// The process ended.
    Exited(u8),
    /// The person let go; the process runs.
    Detached,
    /// Nobody reads the output: the process was told by SIGPIPE, and kapsel ends like a tool that gets it.
    ReaderGone,
    /// The person asked to end again and again, or kapsel's terminal is gone.
    GivenUp(u8),
}

/// A process that is started, with kapsel in front of it.
pub struct Foreground<'a> {
    /// Speaks to its shim.
    pub client: &'a Client,
    /// Which process; empty for the container's first.
    pub exec_id: &'a str,
    /// It has a terminal.
    pub terminal: bool,
}

impl Foreground<'_> {
    /// Stays in front until the process ends or the person lets go.
    ///
    /// # Errors
    /// When the sandbox breaks.
    pub async fn stay(&self, mut streams: Running, signals: &mut Signals) -> Result<Left, Failure> {
        if self.terminal {
            self.resize().await;
        }
        let exited = self.client.wait(self.exec_id);
        tokio::pin!(exited);
        let mut endings = 0;
        loop {
            tokio::select! {
                status = &mut exited => {
                    let status = status?;
                    self.drain(&mut streams).await;
                    return Ok(Left::Exited(u8::try_from(status.code).unwrap_or(u8::MAX)));
                }
                Some(event) = streams.events.recv() => match event {
                    streams::Event::OutputDone => streams.open -= 1,
                    streams::Event::Detached => return Ok(Left::Detached),
                    streams::Event::ReaderGone => {
                        self.send(SIGPIPE).await;
                        return Ok(Left::ReaderGone);
                    }
                },
                event = signals.next() => match event {
                    signals::Event::Resized => self.resize().await,
                    signals::Event::Forward(signal) => {
                        endings += u32::from(ENDINGS.contains(&signal));
                        if endings >= PATIENCE {
                            return Ok(Left::GivenUp(128 + u8::try_from(signal).unwrap_or(0)));
                        }
                        self.send(signal).await;
                    }
                },
            }
        }
    }

    /// Waits until everything that the process wrote is through. A process that it left behind may hold the streams
    /// open for ever: then only until nothing comes any more.
    async fn drain(&self, streams: &mut Running) {
        let mut quiet = Duration::ZERO;
        while streams.open > 0 && quiet < LINGER {
            match tokio::time::timeout(LOOK, streams.events.recv()).await {
                Ok(Some(streams::Event::OutputDone)) => streams.open -= 1,
                Ok(_) => return,
                // The container's first process takes all others with it: its streams do end.
                Err(_) if self.exec_id.is_empty() => {}
                Err(_) => quiet = if streams.outputs.idle() { quiet + LOOK } else { Duration::ZERO },
            }
        }
    }

    /// The exit code for a process that ended with `code`: its own, unless it was the sandbox that failed.
    ///
    /// # Errors
    /// Tells why the sandbox failed.
    pub async fn verdict(&self, code: u8) -> Outcome {
        if !AMBIGUOUS.contains(&code) {
            return Ok(code);
        }
        match self.client.fate(self.exec_id).await {
            Fate::Ordinary => Ok(code),
            Fate::OutOfMemory(message) => {
                Failure::worded(&message).warn();
                Ok(code)
            }
            Fate::Lost(message) => Err(Failure::new(message)
                .hint("'kapsel doctor' checks this machine; a container run without --rm keeps its logs")),
        }
    }

    async fn send(&self, signal: i32) {
        match self.client.kill(self.exec_id, signal, false).await {
            // It has ended: the news is on its way.
            Ok(()) | Err(ClientError::NotFound(_) | ClientError::Gone { .. }) => {}
            Err(error) => Failure::from(error).warn(),
        }
    }

    /// A size that does not arrive is not worth ending for: the next one may.
    async fn resize(&self) {
        if let Some(size) = terminal::size() {
            let _ = self.client.resize(self.exec_id, size.width, size.height).await;
        }
    }
}
