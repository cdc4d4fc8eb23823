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

/// Who comes then takes the place of the one that was idle for longest, or has to wait while none is.
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
    /// Listens at `path`, where nothing may be yet, in a thread that is confined by `filter`. Bodies of requests have at most
    /// `body_max` bytes.
    ///
    /// # Errors
    /// When the socket or the thread cannot be made.
    pub fn start(path: &Path, body_max: usize, filter: Filter) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let (sender, calls) = mpsc::channel();
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let caller = Caller { calls: sender, event: event.clone() };
        std::thread::Builder::new().name("api".into()).spawn(move || {
            let served =
                filter.apply().map_err(io::Error::other).and_then(|()| serve(&listener, body_max, &caller));
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
fn serve(listener: &UnixListener, body_max: usize, caller: &Caller) -> io::Result<()> {
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
                connection.deadline().is_none_or(|deadline| deadline > now)
            }
        });
        if ready[index] {
            accept(listener, body_max, &mut connections);
        }
    }
}

/// Waits for connections and, in the last place, for the listener; says who is ready. A busy full house does not listen.
fn wait(listener: &UnixListener, connections: &[Connection]) -> io::Result<Vec<bool>> {
    let mut descriptors: Vec<_> =
        connections.iter().map(|connection| PollFd::new(connection, connection.interest())).collect();
    let room = connections.len() < CONNECTIONS_MAX || longest_idle(connections).is_some();
    let welcome = if room { PollFlags::IN } else { PollFlags::empty() };
    descriptors.push(PollFd::new(listener, welcome));
    let patience = connections.iter().filter_map(Connection::deadline).min();
    let patience = patience.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    let patience = patience.and_then(|duration| Timespec::try_from(duration).ok());
    match rustix::event::poll(&mut descriptors, patience.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(descriptors.iter().map(|descriptor| !descriptor.revents().is_empty()).collect())
}

fn longest_idle(connections: &[Connection]) -> Option<usize> {
    let idle = connections.iter().enumerate().filter_map(|(index, one)| Some((one.idle_since()?, index)));
    idle.min().map(|(_, index)| index)
}

fn accept(listener: &UnixListener, body_max: usize, connections: &mut Vec<Connection>) {
    if connections.len() >= CONNECTIONS_MAX {
        match longest_idle(connections) {
            Some(index) => drop(connections.remove(index)),
            None => return,
        }
    }
    match listener.accept().and_then(|(stream, _)| Connection::new(stream, body_max)) {
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
        Err(fault) => (fault.status(), fault_body(&fault.to_string())),
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn who_comes_to_a_full_house_takes_the_place_of_the_longest_idle() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("api");
        let listener = UnixListener::bind(&path).unwrap();
        let caller =
            Caller { calls: mpsc::channel().0, event: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()) };
        std::thread::spawn(move || serve(&listener, crate::api::BODY_MAX, &caller));
        let ask = |stream: &mut UnixStream| {
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            stream.write_all(b"GET /nothing HTTP/1.1\r\n\r\n").unwrap();
            stream.read(&mut [0; 4096]).unwrap()
        };
        let mut all: Vec<_> = (0..CONNECTIONS_MAX).map(|_| UnixStream::connect(&path).unwrap()).collect();
        assert!(all.iter_mut().all(|stream| ask(stream) > 0));
        let mut late = UnixStream::connect(&path).unwrap();
        assert!(ask(&mut late) > 0);
        assert_eq!(all[0].read(&mut [0; 1]).unwrap(), 0, "the first one had to go");
        assert!(ask(&mut all[1]) > 0, "the others stay");
    }
}
