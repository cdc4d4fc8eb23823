//! The person's terminal: its size, and raw mode that is left again on every way out.

use std::io::IsTerminal;
use std::os::fd::BorrowedFd;
use std::sync::Mutex;

use rustix::termios::{self, OptionalActions, Termios};

use crate::failure::Failure;

/// The terminal's settings before raw mode; `None` when there is nothing to restore.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Columns and rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The size of the terminal that standard input or standard output is; `None` when neither is one.
pub fn size() -> Option<Size> {
    let (stdin, stdout) = (rustix::stdio::stdin(), rustix::stdio::stdout());
    let size = termios::tcgetwinsize(stdin).or_else(|_| termios::tcgetwinsize(stdout)).ok()?;
    // A serial console reports 0 for "unknown".
    (size.ws_col > 0 && size.ws_row > 0).then_some(Size { width: size.ws_col, height: size.ws_row })
}

/// Whether standard input is a terminal.
pub fn stdin_is_terminal() -> bool {
    std::io::stdin().is_terminal()
}

/// Whether both ends of a conversation are terminals.
pub fn is_interactive() -> bool {
    stdin_is_terminal() && std::io::stdout().is_terminal()
}

/// Holds standard input's terminal in raw mode: each key goes to the container, none is handled here.
pub struct Raw(());

impl Raw {
    /// Switches to raw mode, until this is dropped or [`restore`] is called.
    pub fn enter() -> Result<Self, Failure> {
        let stdin = rustix::stdio::stdin();
        let cannot = |error| Failure::new(format!("cannot switch the terminal to raw mode: {error}"));
        let before = termios::tcgetattr(stdin).map_err(cannot)?;
        let mut raw = before.clone();
        raw.make_raw();
        if let Ok(mut slot) = BEFORE.lock() {
            slot.get_or_insert(before);
        }
        set(stdin, &raw).map_err(cannot)?;
        Ok(Raw(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Puts the terminal back as it was. Also for ways out that run no destructors; does nothing the second time.
pub fn restore() {
    // A panic while the lock was held must not keep the terminal raw.
    let mut slot = BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(before) = slot.take() {
        // When the terminal is gone (hung up) there is nothing to restore.
        let _ = set(rustix::stdio::stdin(), &before);
    }
}

fn set(terminal: BorrowedFd<'_>, settings: &Termios) -> rustix::io::Result<()> {
    termios::tcsetattr(terminal, OptionalActions::Drain, settings)
}
