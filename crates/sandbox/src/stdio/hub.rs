//! Where attachers meet the streams of one process.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use tokio::{net::UnixStream, sync::mpsc};

use crate::attach::StreamKind;

/// How many clients may wait for one stream. More is a mistake of theirs.
const WAITING: usize = 32;

/// A client that wants a stream.
#[derive(Debug)]
pub struct Attacher {
    /// Its connection; raw bytes from here on.
    pub connection: UnixStream,
    /// The process waits for it.
    pub lossless: bool,
}

type Queue = (mpsc::Sender<Attacher>, Option<mpsc::Receiver<Attacher>>);

/// The attachers of one process, by stream; they may come before the streams are there.
#[derive(Debug)]
pub struct Hub {
    queues: Mutex<HashMap<StreamKind, Queue>>,
}

impl Default for Hub {
    fn default() -> Self {
        let kinds = [StreamKind::Stdin, StreamKind::Stdout, StreamKind::Stderr, StreamKind::Tty];
        let queue = |kind| {
            let (sender, receiver) = mpsc::channel(WAITING);
            (kind, (sender, Some(receiver)))
        };
        Self { queues: Mutex::new(kinds.map(queue).into()) }
    }
}

impl Hub {
    /// Adds a client to a stream.
    ///
    /// # Errors
    /// Says why not, in words for the client.
    pub fn attach(&self, kind: StreamKind, attacher: Attacher) -> Result<(), String> {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((sender, _)) = queues.get(&kind) else { return Err(format!("there is no stream {kind:?}")) };
        sender.try_send(attacher).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => "too many clients wait for this stream".into(),
            mpsc::error::TrySendError::Closed(_) => "the process has no such stream, or ended".into(),
        })
    }

    /// Whether a client can still attach.
    pub fn accepts(&self, kind: StreamKind) -> bool {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.get(&kind).is_some_and(|(sender, _)| !sender.is_closed())
    }

    /// The clients of a stream, for its pump; when the pump drops them the stream takes no more.
    pub(super) fn take(&self, kind: StreamKind) -> mpsc::Receiver<Attacher> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        // A second pump for one stream would be a mistake here: it gets a queue that nobody fills.
        queues.get_mut(&kind).and_then(|(_, receiver)| receiver.take()).unwrap_or_else(|| mpsc::channel(1).1)
    }

    /// Turns away the clients of streams that the process does not have, and all that come later for them.
    pub fn close_unused(&self) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.values_mut().for_each(|(_, receiver)| drop(receiver.take()));
    }
}
