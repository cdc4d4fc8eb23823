//! How things are printed: colours only for a terminal, tables in columns, JSON for programs.

pub mod size;
pub mod table;
pub mod time;

use std::io::{IsTerminal, Write};

/// Escape sequences, or nothing where they would only be noise.
#[derive(Clone, Copy)]
pub struct Style {
    colours: bool,
}

impl Style {
    fn code(self, sequence: &'static str) -> &'static str {
        if self.colours { sequence } else { "" }
    }

    /// For what failed.
    pub fn red(self) -> &'static str {
        self.code("\x1b[1;31m")
    }

    /// For what needs attention.
    pub fn yellow(self) -> &'static str {
        self.code("\x1b[33m")
    }

    /// For what is well.
    pub fn green(self) -> &'static str {
        self.code("\x1b[32m")
    }

    /// For advice.
    pub fn cyan(self) -> &'static str {
        self.code("\x1b[36m")
    }

    /// For headings.
    pub fn bold(self) -> &'static str {
        self.code("\x1b[1m")
    }

    /// Ends any of them.
    pub fn reset(self) -> &'static str {
        self.code("\x1b[0m")
    }
}

/// Whether escape sequences make sense on a stream: it is a terminal, not a dumb one, and NO_COLOR is not set.
fn colours(stream: &impl IsTerminal) -> bool {
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    !no_colour && std::env::var_os("TERM").is_none_or(|term| term != "dumb") && stream.is_terminal()
}

/// For standard output.
pub fn stdout_style() -> Style {
    Style { colours: colours(&std::io::stdout()) }
}

/// For standard error.
pub fn stderr_style() -> Style {
    Style { colours: colours(&std::io::stderr()) }
}

/// One line on standard error. That nobody can read it is no reason to fail.
pub fn complain(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Prints on standard output. When the reader has gone (`kapsel ps | head -1`), ends as a Unix tool does: by SIGPIPE.
pub fn print(bytes: &[u8]) {
    let mut stdout = std::io::stdout().lock();
    if let Err(error) = stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        if error.kind() != std::io::ErrorKind::BrokenPipe {
            complain(&format!("kapsel: cannot write to standard output: {error}"));
        }
        die_of_broken_pipe();
    }
}

/// Ends this process as if SIGPIPE had never been ignored.
pub fn die_of_broken_pipe() -> ! {
    // 128 + SIGPIPE: what a shell shows for it.
    std::process::exit(128 + 13)
}

/// Prints JSON on standard output: indented for a person, on one line for a program.
pub fn json(value: &impl serde::Serialize) {
    let pretty = std::io::stdout().is_terminal();
    let text = if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) };
    // Our own types have string keys and finite numbers: nothing in them can fail to serialise.
    print(format!("{}\n", text.unwrap_or_default()).as_bytes());
}
