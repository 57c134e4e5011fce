//! Reports: the bodies in which a worker says how a job ended.
//!
//! A report names a job by its id alone. Which connection it comes over does not matter, only
//! that the job is in flight.

use serde::Deserialize;

use super::job::{ErrorRecord, Job};

/// The body of `POST /jobs/success`.
#[derive(Debug, Deserialize)]
pub(super) struct Successes {
    pub(super) ids: Vec<String>,
}

/// The body of `POST /jobs/{id}/failure`.
#[derive(Debug, Deserialize)]
pub(super) struct Failure {
    /// Error text. Required, because a failure without one cannot be explained.
    message: String,
    error_type: Option<String>,
    backtrace: Option<String>,
    /// Replaces the backoff; a time in the past means at once.
    pub(super) retry_at: Option<u64>,
    /// No further attempt, whatever the limit says.
    #[serde(default)]
    pub(super) kill: bool,
}

impl Failure {
    /// The record of the attempt that `job` has just failed.
    pub(super) fn into_record(self, job: &Job, now: u64) -> ErrorRecord {
        ErrorRecord {
            attempt: job.attempts,
            message: self.message,
            error_type: self.error_type,
            backtrace: self.backtrace,
            dequeued_at: job.dequeued_at.unwrap_or_default(),
            failed_at: now,
        }
    }
}
