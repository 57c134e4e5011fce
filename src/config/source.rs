//! [`Source`]: the origin of a setting's value.

use std::fmt;
use std::path::PathBuf;

/// The origin of a setting's value, which error messages name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A flag, with its dashes.
    Flag(String),
    /// The words after `--`.
    TrailingCommand,
    /// An environment variable.
    Variable(String),
    /// A line of the configuration file.
    File(PathBuf, usize),
    /// No origin, because the setting is not given.
    Missing,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) | Self::Variable(name) => f.write_str(name),
            Self::TrailingCommand => f.write_str("the command after --"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Missing => f.write_str("the command line"),
        }
    }
}
