//! The API's socket, and the thread behind it.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::connection::Connection;
use super::control::Answer;
use super::fault::Fault;
use super::http::Message;
use super::request::{self, Request};
use crate::confine::Filter;

/// More connections have to wait.
const CONNECTIONS_MAX: usize = 10;

/// A request and where its answer goes.
#[derive(Debug)]
pub struct Call {
    /// What is asked for.
    pub request: Request,
    /// Takes the answer.
    pub reply: Sender<Result<Answer, Fault>>,
}

/// The machine's end of the API.
#[derive(Debug)]
pub struct Server {
    calls: Receiver<Call>,
    event: Arc<EventFd>,
}

/// A connection's end.
struct Caller {
    calls: Sender<Call>,
    event: Arc<EventFd>,
}

impl Server {
    /// Listens at `path`, where nothing may be yet, in a thread that is confined by `filter`.
    ///
    /// # Errors
    /// When the socket or the thread cannot be made.
    pub fn start(path: &Path, filter: Filter) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let (sender, calls) = mpsc::channel();
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let caller = Caller { calls: sender, event: event.clone() };
        std::thread::Builder::new().name("api".into()).spawn(move || {
            let served = filter.apply().map_err(io::Error::other).and_then(|()| serve(&listener, &caller));
            if let Err(error) = served {
                tracing::error!(%error, "the API has ended");
            }
        })?;
        Ok(Server { calls, event })
    }

    /// Waits for the next request.
    pub fn wait(&self) -> Option<Call> {
        self.calls.recv().ok()
    }

    /// The next request that is there already.
    pub fn next(&self) -> Option<Call> {
        // The count only wakes; what is to be done is in the channel.
        let _ = self.event.read();
        self.calls.try_recv().ok()
    }

    /// Readable when there is a request.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// Everything that the API does, in one thread: the machine does one request at a time anyway.
fn serve(listener: &UnixListener, caller: &Caller) -> io::Result<()> {
    let mut connections: Vec<Connection> = Vec::new();
    loop {
        let ready = wait(listener, &connections)?;
        let now = Instant::now();
        let mut index = 0;
        connections.retain_mut(|connection| {
            index += 1;
            if ready[index - 1] {
                connection.advance(&mut |message| answer(message, caller))
            } else {
                connection.deadline() > now
            }
        });
        if ready[index] {
            accept(listener, &mut connections);
        }
    }
}

/// Waits for connections and, in the last place, for the listener; says who is ready. A full house does not listen.
fn wait(listener: &UnixListener, connections: &[Connection]) -> io::Result<Vec<bool>> {
    let mut descriptors: Vec<_> =
        connections.iter().map(|connection| PollFd::new(connection, connection.interest())).collect();
    let welcome = if connections.len() < CONNECTIONS_MAX { PollFlags::IN } else { PollFlags::empty() };
    descriptors.push(PollFd::new(listener, welcome));
    let patience = connections.iter().map(Connection::deadline).min();
    let patience = patience.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let patience = patience.and_then(|duration| Timespec::try_from(duration).ok());
    match rustix::event::poll(&mut descriptors, patience.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(descriptors.iter().map(|descriptor| !descriptor.revents().is_empty()).collect())
}

fn accept(listener: &UnixListener, connections: &mut Vec<Connection>) {
    match listener.accept().and_then(|(stream, _)| Connection::new(stream)) {
        Ok(connection) => connections.push(connection),
        Err(error) => {
            tracing::warn!(%error, "an API connection could not be accepted");
            // The reason, such as too many open files, does not go away by trying at once.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}

fn answer(message: &Message, caller: &Caller) -> (u16, String) {
    let request = match request::parse(&message.method, &message.path, &message.body) {
        Ok(request) => request,
        Err(invalid) => return (400, fault_body(&invalid.to_string())),
    };
    tracing::info!(method = message.method, path = message.path, "API request");
    match call(request, caller) {
        Ok(Answer::Done) => (204, String::new()),
        Ok(Answer::Value(value)) => (200, value.to_string()),
        Err(fault) => (400, fault_body(&fault.to_string())),
    }
}

fn call(request: Request, caller: &Caller) -> Result<Answer, Fault> {
    let (reply, answer) = mpsc::channel();
    caller.calls.send(Call { request, reply }).map_err(|_| Fault::Ended)?;
    if let Err(error) = caller.event.write(1) {
        tracing::debug!(%error, "the machine looks at the API with its next event");
    }
    answer.recv().map_err(|_| Fault::Ended)?
}

pub(super) fn fault_body(message: &str) -> String {
    serde_json::json!({ "fault_message": message }).to_string()
}
