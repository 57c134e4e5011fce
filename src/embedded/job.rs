//! [`StoredJob`]: the store's record of a job. [`JobView`]: a job as it appears in an answer, with exactly the real server's
//! fields.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::id::StoredJobId;
use super::options::ServerBackoff;
use super::payload::Payload;

/// The status of a job. The order of the variants matters, because `UniqueScope::covers` compares statuses with `<=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobStatus {
    /// The job waits until its `ready_at`.
    Scheduled,
    /// The job waits for a worker.
    Ready,
    /// A worker has taken the job and has not yet reported a result.
    InFlight,
    /// The job has succeeded, and is kept until its `purge_at`.
    Completed,
    /// The job has failed and is not retried. It is kept until its `purge_at`.
    Dead,
}

impl JobStatus {
    pub(super) fn is_finished(self) -> bool {
        matches!(self, Self::Completed | Self::Dead)
    }
}

impl fmt::Display for JobStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Scheduled => "scheduled",
            Self::Ready => "ready",
            Self::InFlight => "in_flight",
            Self::Completed => "completed",
            Self::Dead => "dead",
        })
    }
}

impl FromStr for JobStatus {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Scheduled, Self::Ready, Self::InFlight, Self::Completed, Self::Dead];
        let known = all.into_iter().find(|status| status.to_string() == text);
        known.ok_or_else(|| format!("unknown status: {text}"))
    }
}

/// The fields of a job that its producer sets. Clones of a job share one `Spec`. A patch copies a shared `Spec` before it
/// changes a field.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    /// The field `type` of the API, renamed because `type` is a keyword in Rust.
    pub(super) kind: String,
    pub(super) queue: String,
    /// The priority. Jobs with lower numbers are taken first; 0 is the most urgent.
    pub(super) priority: u16,
    pub(super) payload: Payload,
    // `None` in the next three fields means the server's default.
    pub(super) retry_limit: Option<u32>,
    pub(super) backoff: Option<JobBackoff>,
    pub(super) retention: Option<Retention>,
    pub(super) unique: Option<Unique>,
}

/// A job. Cloning is cheap, so that a job can be cloned under the store's lock and serialized after the lock is released.
#[derive(Debug, Clone)]
pub(super) struct StoredJob {
    pub(super) id: StoredJobId,
    pub(super) spec: Arc<Spec>,
    pub(super) status: JobStatus,
    /// The time at which the job becomes ready. A retry changes this time, but a requeue does not.
    pub(super) ready_at: u64,
    /// The number of failed attempts. An attempt that ends because the take stream closes is not counted.
    pub(super) attempts: u32,
    /// The time at which a worker last took the job. As on the real server, a requeue does not clear this time.
    pub(super) dequeued_at: Option<u64>,
    pub(super) failed_at: Option<u64>,
    pub(super) completed_at: Option<u64>,
    /// The time at which a finished job is removed.
    pub(super) purge_at: Option<u64>,
}

impl StoredJob {
    /// Returns the job's sort key in the ready queue: priority, then id. A requeue changes neither, so a requeued job
    /// returns to its old position.
    pub(super) fn place(&self) -> (u16, StoredJobId) {
        (self.spec.priority, self.id)
    }
}

/// A job's own backoff, in the format of the API.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct JobBackoff {
    exponent: f32,
    base_ms: u32,
    jitter_ms: u32,
}

impl From<JobBackoff> for ServerBackoff {
    fn from(backoff: JobBackoff) -> Self {
        let millis = |ms: u32| std::time::Duration::from_millis(ms.into());
        Self { base: millis(backoff.base_ms), exponent: backoff.exponent, jitter: millis(backoff.jitter_ms) }
    }
}

/// A job's own retention, in the format of the API. `None` means the server's default.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Retention {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) completed_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dead_ms: Option<u64>,
}

/// A job's unique key. The job is not enqueued while another job with the same key has a status that `scope` covers.
#[derive(Debug, Clone)]
pub(super) struct Unique {
    pub(super) key: String,
    pub(super) scope: UniqueScope,
}

/// The statuses in which an existing job blocks a new job with the same key. The scope of the new job applies, not the
/// scope of the existing one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum UniqueScope {
    /// Scheduled or ready.
    #[default]
    Queued,
    /// Scheduled, ready or in flight.
    Active,
    /// Any status, until the job is removed.
    Exists,
}

impl UniqueScope {
    /// Reports whether an existing job with the status `other` blocks a new job with the same key. Relies on the order of
    /// [`JobStatus`].
    pub(super) fn covers(self, other: JobStatus) -> bool {
        match self {
            Self::Queued => other <= JobStatus::Ready,
            Self::Active => other <= JobStatus::InFlight,
            Self::Exists => true,
        }
    }
}

impl FromStr for UniqueScope {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "queued" => Ok(Self::Queued),
            "active" => Ok(Self::Active),
            "exists" => Ok(Self::Exists),
            _ => Err(format!("invalid unique_while: {text:?} (expected \"queued\", \"active\", or \"exists\")")),
        }
    }
}

/// A failed attempt, in the format of `GET /jobs/{id}/errors`.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ErrorRecord {
    /// The number of the attempt, counted from 1. It equals the job's `attempts` after the failure.
    pub(super) attempt: u32,
    pub(super) message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backtrace: Option<String>,
    pub(super) dequeued_at: u64,
    pub(super) failed_at: u64,
}

/// A job as it appears in an answer, with the field names and the field order of the real server. A field without a value
/// is omitted rather than null, because the official clients rely on this.
#[derive(Debug, Serialize)]
pub(super) struct JobView<'a> {
    id: StoredJobId,
    #[serde(rename = "type")]
    kind: &'a str,
    queue: &'a str,
    priority: u16,
    status: JobStatus,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<&'a Payload>,
    ready_at: u64,
    attempts: u32,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_limit: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backoff: Option<JobBackoff>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dequeued_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    failed_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retention: Option<Retention>,
    #[serde(skip_serializing_if = "Option::is_none")]
    purge_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unique_key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unique_while: Option<UniqueScope>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duplicate: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    folded: Option<bool>,
}

impl<'a> JobView<'a> {
    /// Returns the view with the payload, for take streams and lookups.
    pub(super) fn full(job: &'a StoredJob) -> Self {
        Self { payload: Some(&job.spec.payload), ..Self::bare(job) }
    }

    /// Returns the view without the payload, for the answers to failure reports and patches.
    pub(super) fn bare(job: &'a StoredJob) -> Self {
        let spec = &*job.spec;
        let unique = spec.unique.as_ref();
        Self {
            id: job.id,
            kind: &spec.kind,
            queue: &spec.queue,
            priority: spec.priority,
            status: job.status,
            payload: None,
            ready_at: job.ready_at,
            attempts: job.attempts,
            retry_limit: spec.retry_limit,
            backoff: spec.backoff,
            dequeued_at: job.dequeued_at,
            failed_at: job.failed_at,
            retention: spec.retention,
            purge_at: job.purge_at,
            completed_at: job.completed_at,
            unique_key: unique.map(|unique| unique.key.as_str()),
            unique_while: unique.map(|unique| unique.scope),
            duplicate: None,
            folded: None,
        }
    }

    /// Returns the view for the answer to an enqueue. `folded` is always false, because folding needs jq, which this
    /// server does not support.
    pub(super) fn enqueued(job: &'a StoredJob, duplicate: bool) -> Self {
        Self { duplicate: Some(duplicate), folded: Some(false), ..Self::bare(job) }
    }
}
