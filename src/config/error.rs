//! [`ConfigError`]: a mistake in a setting, in one line.

use std::fmt::{self, Write};

use super::Source;
use crate::chain::OneLine;

/// A mistake in a setting: where it is, and what would be right.
#[derive(Debug)]
pub struct ConfigError {
    source: Source,
    problem: String,
    status: u8,
}

/// Exit status for a mistake on the command line, as everywhere.
const STATUS_USAGE: u8 = 2;

/// Exit status for a mistake in the configuration: `EX_CONFIG` of sysexits(3).
const STATUS_CONFIG: u8 = 78;

impl ConfigError {
    /// A mistake in the value that `source` gives.
    pub(crate) fn new(source: Source, problem: impl Into<String>) -> Self {
        let status = if matches!(source, Source::File(..)) { STATUS_CONFIG } else { STATUS_USAGE };
        Self { source, problem: problem.into(), status }
    }

    /// A mistake in what `source` refers to: a file or a handler.
    pub fn unusable(source: Source, problem: impl Into<String>) -> Self {
        Self { source, problem: problem.into(), status: STATUS_CONFIG }
    }

    /// The exit status that tells it apart.
    pub fn exit_status(&self) -> u8 {
        self.status
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(OneLine(f), "{}: {}", self.source, self.problem)
    }
}

impl std::error::Error for ConfigError {}
