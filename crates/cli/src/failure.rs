//! What went wrong, for a person: one line that says what failed, and one that says what to do.

use std::fmt::Display;

use crate::output;

/// Docker's exit code for "the tool itself failed": the container was not run, or its fate is unknown.
pub const FAILED: u8 = 125;

/// A command that could not do what it was asked to.
#[derive(Debug)]
pub struct Failure {
    /// What failed, on what, and why.
    message: String,
    /// What the person can do.
    hint: Option<String>,
    /// With what kapsel exits.
    code: u8,
}

/// What a command gives back: the exit code.
pub type Outcome = Result<u8, Failure>;

impl Failure {
    /// A failure of kapsel itself.
    pub fn new(message: impl Display) -> Self {
        Failure { message: message.to_string(), hint: None, code: FAILED }
    }

    /// A failure that a library words: `what failed: why; what to do`.
    pub fn worded(text: &str) -> Self {
        match text.split_once("; ") {
            Some((message, hint)) => Failure::new(message).hint(hint),
            None => Failure::new(text),
        }
    }

    /// Adds what the person can do.
    pub fn hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }

    /// Exits with this code instead of 125.
    pub fn code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// Puts what was tried before the message.
    pub fn about(mut self, tried: &str) -> Self {
        self.message = format!("{tried}: {}", self.message);
        self
    }

    /// Prints the failure on standard error and gives the exit code.
    pub fn report(&self) -> u8 {
        let style = output::stderr_style();
        self.print(style.red(), "kapsel");
        self.code
    }

    /// Prints it as something that the command could do without.
    pub fn warn(&self) {
        let style = output::stderr_style();
        self.print(style.yellow(), "kapsel: warning");
    }

    fn print(&self, colour: &str, prefix: &str) {
        let style = output::stderr_style();
        let (cyan, reset) = (style.cyan(), style.reset());
        // A message of several lines would bury the hint; and parts of it may come from a guest.
        let clean = |text: &str| text.trim_end().lines().map(str::trim).collect::<Vec<_>>().join(" | ");
        let message = output::table::harmless(&clean(&self.message), 4000);
        output::complain(&format!("{colour}{prefix}: {reset}{message}"));
        if let Some(hint) = &self.hint {
            output::complain(&format!("{cyan}hint: {reset}{}", output::table::harmless(&clean(hint), 4000)));
        }
    }
}

impl Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.message)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::worded(&error.to_string())
    }
}

/// Prints what clap says: help on standard output (0), a usage error on standard error (125).
pub fn report_usage(error: &clap::Error) -> u8 {
    // Nothing can be done when there is nobody to read it.
    let _ = error.print();
    if error.use_stderr() { FAILED } else { 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_becomes_the_hint() {
        let failure = Failure::from(std::io::Error::other("no image x here: gone; pull it; or not"));
        assert_eq!(failure.message, "no image x here: gone");
        assert_eq!(failure.hint.as_deref(), Some("pull it; or not"));
        assert_eq!(failure.code, FAILED);
    }
}
