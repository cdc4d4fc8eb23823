//! The API's socket: a thread that accepts, and one for each of a few connections.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::control::{Answer, Fault};
use super::http::{self, Message};
use super::request::{self, Request};

/// More connections have to wait.
const CONNECTIONS_MAX: usize = 10;
/// A client that says nothing for so long has gone.
const PATIENCE: Duration = Duration::from_secs(60);

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
#[derive(Clone)]
struct Caller {
    calls: Sender<Call>,
    event: Arc<EventFd>,
}

impl Server {
    /// Listens at `path`, where nothing may be yet.
    ///
    /// # Errors
    /// When the socket or the thread cannot be made.
    pub fn start(path: &Path) -> io::Result<Self> {
        let listener = UnixListener::bind(path)?;
        let (sender, calls) = mpsc::channel();
        let event = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let caller = Caller { calls: sender, event: event.clone() };
        std::thread::Builder::new().name("api".into()).spawn(move || accept(&listener, &caller))?;
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

fn accept(listener: &UnixListener, caller: &Caller) {
    let open = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let stream = match stream {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "an API connection could not be accepted");
                std::thread::sleep(Duration::from_millis(100));
                continue;
            }
        };
        while open.load(Ordering::Acquire) >= CONNECTIONS_MAX {
            std::thread::sleep(Duration::from_millis(10));
        }
        open.fetch_add(1, Ordering::AcqRel);
        let (caller, counter) = (caller.clone(), open.clone());
        let thread = std::thread::Builder::new().name("api connection".into()).stack_size(256 * 1024);
        let spawned = thread.spawn(move || {
            if let Err(error) = serve(stream, &caller) {
                tracing::debug!(%error, "an API connection ended");
            }
            counter.fetch_sub(1, Ordering::AcqRel);
        });
        if let Err(error) = spawned {
            tracing::warn!(%error, "an API connection has no thread");
            open.fetch_sub(1, Ordering::AcqRel);
        }
    }
}

fn serve(mut stream: UnixStream, caller: &Caller) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let mut buffer = Vec::new();
    loop {
        match http::read(&mut stream, &mut buffer) {
            Ok(None) => return Ok(()),
            Ok(Some(message)) => {
                let (status, body) = answer(&message, caller);
                http::write(&mut stream, status, &body, message.keep_alive)?;
                if !message.keep_alive {
                    return Ok(());
                }
            }
            Err(http::Error::Io(error)) => return Err(error),
            // Where the next request would begin is not known.
            Err(error) => return http::write(&mut stream, 400, &fault_body(&error.to_string()), false),
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

fn fault_body(message: &str) -> String {
    serde_json::json!({ "fault_message": message }).to_string()
}
