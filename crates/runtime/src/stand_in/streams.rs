//! The standard streams of a process in the guest, connected to the stand-in's own.

use std::time::Duration;

use anyhow::Context;
use kapsel_sandbox::{
    client::Io,
    streams::{Outputs, Streams, carry, pass_input},
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
    /// Standard input is passed on.
    pub stdin: bool,
    /// One terminal instead of three streams.
    pub terminal: bool,
}

/// Streams between which bytes move.
pub struct Running {
    done: mpsc::UnboundedReceiver<()>,
    open: usize,
    outputs: Outputs,
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

/// Starts moving bytes, one thread for each direction. When nobody reads what would be written (the engine was killed) the rest is
/// dropped, and the container goes on.
pub fn run(streams: Streams) -> anyhow::Result<Running> {
    let (sender, done) = mpsc::unbounded_channel();
    if let Some(to) = streams.stdin {
        carry("stdin", move || pass_input(&to)).context("cannot start a thread")?;
    }
    let ended = move |_| {
        // Nobody listens any more when this process is about to end.
        let _ = sender.send(());
    };
    let outputs = Outputs::start(streams.outputs, ended).context("cannot start a thread")?;
    // This process's own standard streams stay open: engines look at them.
    Ok(Running { done, open: outputs.count(), outputs })
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
                Err(_) => quiet = if self.outputs.idle() { quiet + LOOK } else { Duration::ZERO },
            }
        }
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
