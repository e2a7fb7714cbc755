//! Why a command ends without success: one clear sentence, a hint, an exit code.
//!
//! Tests: `tests/it/cli.rs` reads them from the binary.

use std::process::ExitCode;

use super::out;
use crate::types::Fault;

/// It could not start, or failed.
pub(super) const FAILED: u8 = 1;
/// Wrong usage.
pub(super) const USAGE: u8 = 2;

/// The end of a command that failed.
#[derive(Debug)]
pub struct Failure {
    /// One sentence; more than one line when there is more than one thing wrong.
    pub message: String,
    /// What to do about it.
    pub hint: Option<String>,
    /// Exit code.
    pub code: u8,
}

impl Failure {
    /// A failure with exit code 1.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hint: None, code: FAILED }
    }

    /// Adds what to do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// The failure an error of the house is.
    pub fn of(error: &dyn Fault) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(cause) = source {
            let text = cause.to_string();
            // Transparent errors repeat their cause.
            if !message.contains(&text) {
                message.push_str(&format!(": {text}"));
            }
            source = cause.source();
        }
        Self { message, hint: error.hint(), code: FAILED }
    }

    /// Prints it on standard error and yields the exit code.
    pub fn tell(&self) -> ExitCode {
        if self.message.contains('\n') {
            out::err(&format!("error:\n{}\n", self.message));
        } else {
            out::err(&format!("error: {}\n", self.message));
        }
        if let Some(hint) = &self.hint {
            out::err(&format!("hint: {hint}\n"));
        }
        ExitCode::from(self.code)
    }
}

impl From<crate::config::Error> for Failure {
    fn from(error: crate::config::Error) -> Self {
        Self::of(&error)
    }
}
