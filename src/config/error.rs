//! [`ConfigError`]: a mistake in a setting, displayed on one line.

use std::fmt::{self, Write};
use std::io::{self, ErrorKind};

use super::Source;
use crate::chain::OneLine;

/// A mistake in a setting, its source and its remedy.
#[derive(Debug)]
pub struct ConfigError {
    source: Source,
    problem: String,
    status: u8,
}

/// Exit status for a temporary failure. A service manager restarts the worker.
const STATUS_FAILURE: u8 = 1;

/// Exit status for a mistake on the command line, as is usual on Unix.
const STATUS_USAGE: u8 = 2;

/// Exit status for a mistake in the configuration: `EX_CONFIG` of sysexits(3).
const STATUS_CONFIG: u8 = 78;

impl ConfigError {
    /// Returns the error of an invalid value from `source`.
    pub(crate) fn new(source: Source, problem: impl Into<String>) -> Self {
        let status = if matches!(source, Source::File(..)) { STATUS_CONFIG } else { STATUS_USAGE };
        Self { source, problem: problem.into(), status }
    }

    /// Returns the error of an unusable file or handler that `source` refers to.
    pub fn unusable(source: Source, problem: impl Into<String>) -> Self {
        Self { source, problem: problem.into(), status: STATUS_CONFIG }
    }

    /// Returns the error of a call that the system refuses for a valid setting. A refusal that lasts until a person changes
    /// something has the exit status of a mistake. Any other refusal is a temporary failure.
    pub(crate) fn refused(source: Source, error: &io::Error, problem: impl Into<String>) -> Self {
        let status = if is_lasting(error) { STATUS_CONFIG } else { STATUS_FAILURE };
        Self { source, problem: problem.into(), status }
    }

    /// Returns the error of a worker that cannot create its directory for result files.
    pub(crate) fn no_room_for_results(error: &io::Error) -> Self {
        let directory = std::env::temp_dir();
        let problem = format!(
            "cannot make a directory for result files in {}: {error}; name one that can be written and has space",
            directory.display()
        );
        Self::refused(Source::Variable("TMPDIR".to_owned()), error, problem)
    }

    /// Reports whether the error is temporary: a retry can succeed with the same settings.
    pub(crate) fn may_pass(&self) -> bool {
        self.status == STATUS_FAILURE
    }

    /// Returns the exit status for the error.
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

/// Reports whether the call fails until a person changes a path, a permission or the kernel.
fn is_lasting(error: &io::Error) -> bool {
    let kinds = [
        ErrorKind::NotFound,
        ErrorKind::PermissionDenied,
        ErrorKind::NotADirectory,
        ErrorKind::ReadOnlyFilesystem,
        ErrorKind::InvalidInput,
        ErrorKind::InvalidFilename,
        ErrorKind::Unsupported,
        ErrorKind::Other,
    ];
    kinds.contains(&error.kind()) || error.raw_os_error() == Some(libc::EAFNOSUPPORT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_lasting_refusal_is_a_mistake() {
        let status = |error: io::Error| ConfigError::refused(Source::Missing, &error, "refused").exit_status();
        for lasting in [libc::EACCES, libc::EPERM, libc::EAFNOSUPPORT, libc::ENOENT, libc::ENOTDIR, libc::EROFS] {
            assert_eq!(status(io::Error::from_raw_os_error(lasting)), STATUS_CONFIG, "{lasting}");
        }
        for passing in [libc::EADDRINUSE, libc::EADDRNOTAVAIL, libc::EMFILE, libc::ENOBUFS, libc::ENOSPC, libc::EDQUOT]
        {
            assert_eq!(status(io::Error::from_raw_os_error(passing)), STATUS_FAILURE, "{passing}");
        }
        assert_eq!(status(io::Error::other("the path is too long")), STATUS_CONFIG);
    }
}
