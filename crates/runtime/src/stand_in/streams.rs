//! The standard streams of a process in the guest, connected to the stand-in's own.

use std::{
    net::Shutdown,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::Context;
use kapsel_sandbox::{
    attach::{self, StreamKind},
    client::Io,
    paths::Bundle,
    pump::pump,
};
use rustix::termios::{OptionalActions, Termios};
use tokio::sync::mpsc;

/// How long to wait for more output of an added process that has ended, while another holds its streams open.
const LINGER: Duration = Duration::from_millis(500);
/// How often to look whether output still comes then.
const LOOK: Duration = Duration::from_millis(20);

/// Which streams a process gets.
#[derive(Clone, Copy, Debug)]
pub struct Wanted {
    stdin: bool,
    terminal: bool,
}

/// Connections, before any byte has moved.
pub struct Streams {
    stdin: Option<UnixStream>,
    outputs: Vec<(UnixStream, OwnedFd)>,
}

/// Streams between which bytes move.
pub struct Running {
    done: mpsc::UnboundedReceiver<()>,
    open: usize,
    outputs: Vec<(UnixStream, Arc<AtomicBool>)>,
}

impl Wanted {
    /// What this process itself has.
    pub fn of(terminal: bool) -> Self {
        Self { stdin: terminal || !is_null(rustix::stdio::stdin()), terminal }
    }

    /// As the Task API says it. The engine has a log of its own.
    pub fn io(self) -> Io {
        Io::attached(self.stdin, self.terminal, false)
    }
}

/// Whether nothing can come from a descriptor: then nothing needs to be carried.
fn is_null(fd: std::os::fd::BorrowedFd<'_>) -> bool {
    let null = rustix::fs::makedev(1, 3);
    rustix::fs::fstat(fd).is_ok_and(|stat| {
        rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device() && stat.st_rdev == null
    })
}

impl Streams {
    /// Connects. From here on, nothing that the process writes is missed.
    pub fn open(bundle: &Bundle, exec_id: &str, wanted: Wanted) -> anyhow::Result<Self> {
        let open = |kind| attach::open(bundle, exec_id, kind, true);
        let own =
            |fd: std::os::fd::BorrowedFd<'_>| fd.try_clone_to_owned().context("cannot use my own output");
        let stdout = own(rustix::stdio::stdout())?;
        if wanted.terminal {
            let tty = open(StreamKind::Tty)?;
            return Ok(Self { stdin: Some(tty.try_clone()?), outputs: vec![(tty, stdout)] });
        }
        let stdin = wanted.stdin.then(|| open(StreamKind::Stdin)).transpose()?;
        let stderr = own(rustix::stdio::stderr())?;
        Ok(Self {
            stdin,
            outputs: vec![(open(StreamKind::Stdout)?, stdout), (open(StreamKind::Stderr)?, stderr)],
        })
    }

    /// Starts moving bytes, one thread for each direction. When nobody reads what would be written (the engine was killed) the
    /// rest is dropped, and the container goes on.
    pub fn run(self) -> anyhow::Result<Running> {
        let (sender, done) = mpsc::unbounded_channel();
        let builder = |name: &str| thread::Builder::new().name(name.into()).stack_size(128 << 10);
        if let Some(to) = self.stdin {
            let input = move || {
                // When the process does not read its input any more there is nobody to tell.
                let _ = pump(rustix::stdio::stdin(), &to, &AtomicBool::new(false));
                let _ = to.shutdown(Shutdown::Write);
            };
            builder("stdin").spawn(input).context("cannot start a thread")?;
        }
        let mut outputs = Vec::new();
        for (from, to) in self.outputs {
            let holding = Arc::new(AtomicBool::new(false));
            outputs.push((from.try_clone()?, holding.clone()));
            let sender = sender.clone();
            let output = move || {
                let _ = pump(&from, &to, &holding);
                let _ = sender.send(());
            };
            builder("output").spawn(output).context("cannot start a thread")?;
        }
        // This process's own standard streams stay open: engines look at them.
        Ok(Running { done, open: outputs.len(), outputs })
    }
}

impl Running {
    /// Waits until everything that the process wrote is through. `all`: its end is the end of all others, so its streams do end;
    /// else only until nothing comes any more.
    pub async fn drain(&mut self, all: bool) {
        let mut quiet = Duration::ZERO;
        while self.open > 0 && quiet < LINGER {
            match tokio::time::timeout(LOOK, self.done.recv()).await {
                Ok(Some(())) => self.open -= 1,
                Ok(None) => return,
                Err(_) if all => {}
                Err(_) => quiet = if self.idle() { quiet + LOOK } else { Duration::ZERO },
            }
        }
    }

    fn idle(&self) -> bool {
        self.outputs.iter().all(|(stream, holding)| {
            rustix::io::ioctl_fionread(stream.as_fd()).unwrap_or(0) == 0 && !holding.load(Ordering::SeqCst)
        })
    }
}

/// Columns and rows of the terminal that standard input is.
pub fn size() -> Option<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(rustix::stdio::stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

/// Holds the terminal of a command in the foreground in raw mode.
pub struct Raw(Termios);

impl Raw {
    /// Until this is dropped.
    pub fn enter() -> anyhow::Result<Self> {
        let stdin = rustix::stdio::stdin();
        let before = rustix::termios::tcgetattr(stdin).context("cannot use the terminal")?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(stdin, OptionalActions::Drain, &raw).context("cannot use the terminal")?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // When the terminal is gone (hung up) there is nothing to restore.
        let _ = rustix::termios::tcsetattr(rustix::stdio::stdin(), OptionalActions::Drain, &self.0);
    }
}
