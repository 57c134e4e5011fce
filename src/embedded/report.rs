//! Reports: the request bodies in which a worker reports that jobs have succeeded or failed.
//!
//! A report names a job by its id alone. The job must be in flight, but the report may arrive over any connection.

use serde::Deserialize;

use super::job::{ErrorRecord, StoredJob};

/// The body of `POST /jobs/success`.
#[derive(Debug, Deserialize)]
pub(super) struct SuccessBody {
    pub(super) ids: Vec<String>,
}

/// The body of `POST /jobs/{id}/failure`.
#[derive(Debug, Deserialize)]
pub(super) struct FailureBody {
    /// The error text. It is required, because a failure without a text cannot be explained.
    message: String,
    error_type: Option<String>,
    backtrace: Option<String>,
    /// The time of the next attempt, which replaces the time from the backoff. A time in the past means at once.
    pub(super) retry_at: Option<u64>,
    /// Whether the job becomes dead at once, even if its retry limit is not reached.
    #[serde(default)]
    pub(super) kill: bool,
}

impl FailureBody {
    /// Returns the record of the attempt of `job` that has just failed. The caller has already increased the job's
    /// `attempts`.
    pub(super) fn into_record(self, job: &StoredJob, now: u64) -> ErrorRecord {
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
