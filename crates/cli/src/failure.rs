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

    /// Prints the failure on standard error and gives the exit code.
    pub fn report(&self) -> u8 {
        let style = output::stderr_style();
        let (red, cyan, reset) = (style.red(), style.cyan(), style.reset());
        // A message of several lines would bury the hint.
        let message = self.message.replace('\n', "; ");
        output::complain(&format!("{red}kapsel: {reset}{message}"));
        if let Some(hint) = &self.hint {
            output::complain(&format!("{cyan}hint: {reset}{hint}"));
        }
        self.code
    }
}

/// Prints what clap says: help on standard output (0), a usage error on standard error (125).
pub fn report_usage(error: &clap::Error) -> u8 {
    // Nothing can be done when there is nobody to read it.
    let _ = error.print();
    if error.use_stderr() { FAILED } else { 0 }
}
