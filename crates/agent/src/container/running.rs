//! A process of a container as the agent sees it: how it is born, what it says until its program runs, and how it ends.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use kapsel_protocol::stdio::{Kind, Token};
use kapsel_protocol::{NOT_EXECUTABLE_PREFIX, NOT_FOUND_PREFIX, api, limits};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::thread::ThreadNameSpaceType;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;

use crate::error::{Error, Result};
use crate::reaper::{Exit, Reaper};
use crate::stdio::{self, Streams};
use crate::sys::{self, Child};

use super::report::{self, ChildError, Message, Step, Timing};
use super::terminal;

/// Set in every child, whose panic must not end the guest.
pub static IN_CHILD: AtomicBool = AtomicBool::new(false);

/// A process that was born.
#[derive(Debug)]
pub struct Running {
    /// In the guest's root pid namespace.
    pub pid: i32,
    pidfd: OwnedFd,
    exit: watch::Receiver<Option<Exit>>,
    control: AsyncFd<OwnedFd>,
    tty: OnceLock<Arc<AsyncFd<OwnedFd>>>,
}

/// The streams of a process to be born: what it gets, and what the agent keeps.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Standard streams; `None` with a terminal.
    pub child: Option<[OwnedFd; 3]>,
    agent: Vec<(Kind, AsyncFd<OwnedFd>)>,
    token: Option<Token>,
}

impl Stdio {
    /// Makes the pipes that are asked for.
    ///
    /// # Errors
    /// For a token that is none, and those of pipe2(2).
    pub fn new(request: &api::Stdio, terminal: bool) -> Result<Self> {
        let token = match request.token.as_str() {
            "" => None,
            token => Some(token.parse::<Token>().map_err(|e| Error::Invalid(e.to_string()))?),
        };
        if terminal {
            return Ok(Self { child: None, agent: vec![], token });
        }
        let mut agent = Vec::new();
        let mut stream = |wanted: bool, kind: Kind| -> io::Result<OwnedFd> {
            if !wanted || token.is_none() {
                return Ok(rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?);
            }
            let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
            let (theirs, ours, interest) = match kind {
                Kind::Stdin => (reader, writer, Interest::WRITABLE | Interest::ERROR),
                _ => (writer, reader, Interest::READABLE),
            };
            agent.push((kind, stdio::watch(ours, interest)?));
            Ok(theirs)
        };
        let child = [
            stream(request.stdin, Kind::Stdin)?,
            stream(request.stdout, Kind::Stdout)?,
            stream(request.stderr, Kind::Stderr)?,
        ];
        Ok(Self { child: Some(child), agent, token })
    }

    /// Starts to move bytes. The child's ends must be gone from the agent by now, or they would never end.
    fn pump(self, streams: &Streams) {
        let Some(token) = self.token else { return };
        for (kind, pipe) in self.agent {
            let stream = streams.claim(token, kind);
            match kind {
                Kind::Stdin => drop(tokio::spawn(stdio::input(pipe, stream))),
                _ => drop(tokio::spawn(stdio::output(pipe, stream))),
            }
        }
    }
}

/// Where a process is born.
#[derive(Debug)]
pub struct Birthplace<'a> {
    /// CLONE_NEW*.
    pub new_namespaces: u64,
    /// A pid namespace to be born in: of a link in /proc, or of a process by its pidfd.
    pub pid_namespace: Option<BorrowedFd<'a>>,
    /// The cgroup.
    pub cgroup: BorrowedFd<'a>,
}

impl Running {
    /// Forks; `become_child` is run in the child, with its end of the control socket.
    ///
    /// # Errors
    /// Those of clone3(2) and setns(2).
    pub fn birth(
        place: &Birthplace<'_>,
        reaper: &Reaper,
        mut stdio: Stdio,
        streams: &Streams,
        become_child: impl FnOnce(&OwnedFd, Option<&[OwnedFd; 3]>),
    ) -> Result<Self> {
        let (control, theirs) = report::pair().map_err(io::Error::from)?;
        let control = sys::in_event_loop(control, Interest::READABLE)?;
        let child = in_pid_namespace(place.pid_namespace, || {
            // SAFETY: the agent is single-threaded (its runtime has one thread and no blocking pool); `become_child` ends in
            // execve or _exit, and the line below makes sure of it.
            unsafe { sys::clone3(place.new_namespaces, Some(place.cgroup)) }.inspect(|child| {
                if child.is_none() {
                    IN_CHILD.store(true, Ordering::Relaxed);
                    become_child(&theirs, stdio.child.as_ref());
                    sys::exit_now(127);
                }
            })
        });
        let Some(Child { pid, pidfd }) =
            child.map_err(|e| Error::Internal(format!("making a process: {e}")))?
        else {
            sys::exit_now(127)
        };
        let exit = reaper.watch(pid);
        stdio.child = None;
        stdio.pump(streams);
        Ok(Self { pid, pidfd, exit, control, tty: OnceLock::new() })
    }

    /// The next thing that the child says; `None` at the end.
    async fn listen(&self) -> Result<Option<Message>> {
        let receive = |fd: &OwnedFd| Message::receive(fd).map_err(io::Error::from);
        let listening = self.control.async_io(Interest::READABLE, receive);
        match tokio::time::timeout(limits::CALL_DEADLINE, listening).await {
            Ok(result) => Ok(result?),
            Err(_) => {
                Err(Error::Internal(format!("the process did not get on within {:?}", limits::CALL_DEADLINE)))
            }
        }
    }

    /// Waits until the container is built, serving the child with what it needs.
    ///
    /// # Errors
    /// What the child reports.
    pub async fn until_ready(&self, id_maps: Option<&(String, String)>) -> Result<Vec<Timing>> {
        loop {
            match self.listen().await? {
                Some(Message::NeedsIdMaps) => self.write_id_maps(id_maps)?,
                Some(Message::Ready(timings, tty)) => {
                    if let Some(tty) = tty {
                        self.adopt(tty)?;
                    }
                    return Ok(timings);
                }
                Some(Message::Failed(error)) => return Err(explain(error)),
                Some(Message::Executing(_)) | None => return Err(self.died().await),
            }
        }
    }

    /// Lets the child go on to its program. Does not wait.
    ///
    /// # Errors
    /// When it is gone.
    pub fn release(&self) -> Result<()> {
        rustix::io::write(self.control.get_ref(), b"s")
            .map_err(|_| Error::State("the process has ended".into()))?;
        Ok(())
    }

    /// Tells a child that waits for it which process to become.
    ///
    /// # Errors
    /// For streams that cannot be made, and when the child is gone.
    pub fn order(&self, request: &api::ExecRequest, streams: &Streams) -> Result<()> {
        let mut stdio = Stdio::new(request.stdio.get_or_default(), request.terminal)?;
        super::order::send(self.control.get_ref(), request, stdio.child.as_ref())
            .map_err(|error| Error::State(format!("the process has ended ({error})")))?;
        stdio.child = None;
        stdio.pump(streams);
        Ok(())
    }

    /// Waits until the program runs.
    ///
    /// # Errors
    /// What the child reports: among others that the program is not there or cannot be executed.
    pub async fn until_executed(&self) -> Result<Vec<Timing>> {
        let mut laps = None;
        loop {
            match (self.listen().await?, laps.take()) {
                (Some(Message::Executing(timings)), _) => laps = Some(timings),
                (Some(Message::Failed(error)), _) => return Err(explain(error)),
                // Its end of the socket is closed: by execve(2).
                (None, Some(timings)) => return Ok(timings),
                _ => return Err(self.died().await),
            }
        }
    }

    /// Why a child ended without a word.
    async fn died(&self) -> Error {
        let code = self.wait().await.code;
        Error::Internal(match code {
            159 => "the process was killed by its own seccomp filter before its program ran; allow what an OCI runtime \
                    needs (write, execve, …)"
                .into(),
            137 => "the process was killed before its program ran (is the memory limit too low?)".into(),
            code => format!("the process ended with code {code} before its program ran"),
        })
    }

    fn write_id_maps(&self, id_maps: Option<&(String, String)>) -> Result<()> {
        let Some((uids, gids)) = id_maps else {
            return Err(Error::Internal("no id maps for a user namespace".into()));
        };
        for (file, map) in [("uid_map", uids), ("gid_map", gids)] {
            std::fs::write(format!("/proc/{}/{file}", self.pid), map)
                .map_err(|e| Error::Invalid(format!("writing {file} of the user namespace: {e}")))?;
        }
        self.release()
    }

    fn adopt(&self, tty: OwnedFd) -> Result<()> {
        // It may come out of a running container, where somebody may have put anything in the place of ptmx.
        terminal::is_master(&tty)
            .map_err(|e| Error::Internal(format!("the container's /dev/pts/ptmx: {e}")))?;
        let tty = stdio::watch(tty, Interest::READABLE | Interest::WRITABLE)?;
        // One terminal is all that a child ever sends.
        let _ = self.tty.set(Arc::new(tty));
        Ok(())
    }

    /// Starts to move the terminal's bytes, if there is one.
    pub fn pump_terminal(&self, request: &api::Stdio, streams: &Streams) {
        let Some(tty) = self.tty.get().cloned() else { return };
        match request.token.parse() {
            Ok(token) => drop(tokio::spawn(stdio::terminal(tty, streams.claim(token, Kind::Tty)))),
            Err(_) => drop(tokio::spawn(stdio::terminal(tty, std::future::ready(None)))),
        }
    }

    /// Sets the terminal's size.
    ///
    /// # Errors
    /// When there is no terminal.
    pub fn resize(&self, columns: u16, rows: u16) -> Result<()> {
        let Some(tty) = self.tty.get() else {
            return Err(Error::State("the process has no terminal".into()));
        };
        Ok(terminal::resize(tty.get_ref(), columns, rows).map_err(io::Error::from)?)
    }

    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Exit {
        let mut exit = self.exit.clone();
        match exit.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit { code: 255, at_ns: 0 }),
            // The reaper keeps every sender until it has sent, so this does not happen.
            Err(_) => Exit { code: 255, at_ns: 0 },
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotFound` when it has ended.
    pub fn signal(&self, signal: i32) -> Result<()> {
        if self.exit().is_some() {
            return Err(Error::NotFound("the process has ended".into()));
        }
        sys::pidfd_send_signal(self.pidfd.as_fd(), signal).map_err(|e| match e.raw_os_error() {
            Some(libc::ESRCH) => Error::NotFound("the process has ended".into()),
            _ => Error::Internal(format!("sending signal {signal}: {e}")),
        })
    }

    /// For joining its namespaces.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

/// Runs `birth` so that its child is in another pid namespace. Only this process's future children are concerned, never itself.
fn in_pid_namespace<T>(
    namespace: Option<BorrowedFd<'_>>,
    birth: impl FnOnce() -> io::Result<T>,
) -> io::Result<T> {
    let Some(namespace) = namespace else { return birth() };
    let own = rustix::fs::open(c"/proc/self/ns/pid", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    rustix::thread::move_into_thread_name_spaces(namespace, ThreadNameSpaceType::PROCESS_ID)?;
    let result = birth();
    rustix::thread::move_into_thread_name_spaces(own.as_fd(), ThreadNameSpaceType::PROCESS_ID)?;
    result
}

/// A child's report as the API tells it.
fn explain(error: ChildError) -> Error {
    let message = error.to_string();
    match (error.step, error.errno) {
        (Step::Exec, Errno::NOENT | Errno::NOTDIR) => {
            Error::NotFound(format!("{NOT_FOUND_PREFIX} {message}"))
        }
        (Step::Exec, _) => Error::Denied(format!("{NOT_EXECUTABLE_PREFIX} {message}")),
        // The whole explanation is in the detail, as there is no error of the kernel.
        (Step::User, Errno::NOENT) => Error::Invalid(error.detail),
        (Step::Cwd, _) => Error::Denied(format!("{NOT_EXECUTABLE_PREFIX} {message}")),
        _ => Error::Internal(message),
    }
}
