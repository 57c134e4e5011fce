//! [`ConfigError`]: a mistake in a setting, displayed on one line.

use std::fmt::{self, Write};
use std::io::{self, ErrorKind};

use super::Source;
use crate::chain::OneLine;

/// A problem with a setting, with the setting's source and the exit status for the problem.
#[derive(Debug)]
pub struct ConfigError {
    source: Source,
    problem: String,
    status: u8,
}

/// Exit status for a temporary failure, after which a service manager restarts the worker.
const STATUS_FAILURE: u8 = 1;

/// Exit status for a mistake on the command line, as is usual on Unix.
const STATUS_USAGE: u8 = 2;

/// Exit status for a mistake in the configuration: `EX_CONFIG` of sysexits(3).
const STATUS_CONFIG: u8 = 78;

impl ConfigError {
    /// Returns the error for an invalid value from `source`.
    pub(crate) fn new(source: Source, problem: impl Into<String>) -> Self {
        let status = if matches!(source, Source::File(..)) { STATUS_CONFIG } else { STATUS_USAGE };
        Self { source, problem: problem.into(), status }
    }

    /// Returns the error for a value that is well-formed but unusable, such as the path of a file that cannot be read.
    pub fn unusable(source: Source, problem: impl Into<String>) -> Self {
        Self { source, problem: problem.into(), status: STATUS_CONFIG }
    }

    /// Returns the error for a system call that fails although the setting is valid. A permanent failure, such as a missing
    /// permission, has the exit status of a configuration mistake. Any other failure has the status of a temporary failure.
    pub(crate) fn refused(source: Source, error: &io::Error, problem: impl Into<String>) -> Self {
        let status = if is_lasting(error) { STATUS_CONFIG } else { STATUS_FAILURE };
        Self { source, problem: problem.into(), status }
    }

    /// Returns the error for a failure to create the worker's directory for result files.
    pub(crate) fn no_room_for_results(error: &io::Error) -> Self {
        let directory = std::env::temp_dir();
        let problem = format!(
            "cannot make a directory for result files in {}: {error}; name one that can be written and has space",
            directory.display()
        );
        Self::refused(Source::Variable("TMPDIR".to_owned()), error, problem)
    }

    /// Reports whether the error is temporary, so that a retry with the same settings can succeed.
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

/// Reports whether an error is permanent: the call keeps failing until an administrator changes a path, a permission or the
/// kernel.
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
