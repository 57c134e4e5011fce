//! [`Job`]: the store's record of a job. [`JobView`]: a job in an answer, with exactly the real server's fields.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::id::JobId;
use super::options::Backoff;
use super::payload::Payload;

/// Where a job is in its life. The order is the order of that life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Waits for its `ready_at`.
    Scheduled,
    /// Goes to the next worker.
    Ready,
    /// A worker has it.
    InFlight,
    /// Done, and kept for a while.
    Completed,
    /// Given up, and kept for a while.
    Dead,
}

impl Status {
    /// Whether nothing more happens to the job.
    pub(super) fn is_finished(self) -> bool {
        matches!(self, Self::Completed | Self::Dead)
    }

    /// Returns the name on the wire, in answers and in filters.
    fn name(self) -> &'static str {
        match self {
            Self::Scheduled => "scheduled",
            Self::Ready => "ready",
            Self::InFlight => "in_flight",
            Self::Completed => "completed",
            Self::Dead => "dead",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Status {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let all = [Self::Scheduled, Self::Ready, Self::InFlight, Self::Completed, Self::Dead];
        let known = all.into_iter().find(|status| status.name() == text);
        known.ok_or_else(|| format!("unknown status: {text}"))
    }
}

/// The fields of a job that its producer sets. Clones of the job share them until a patch.
#[derive(Debug, Clone)]
pub(super) struct Spec {
    /// `type` on the wire, which is a keyword here.
    pub(super) kind: String,
    pub(super) queue: String,
    /// 0 is the most urgent.
    pub(super) priority: u16,
    pub(super) payload: Payload,
    // `None` in the next three fields means the server's default.
    pub(super) retry_limit: Option<u32>,
    pub(super) backoff: Option<JobBackoff>,
    pub(super) retention: Option<Retention>,
    pub(super) unique: Option<Unique>,
}

/// One job. Cheap to clone, so that JSON is written outside the store's lock.
#[derive(Debug, Clone)]
pub(super) struct Job {
    pub(super) id: JobId,
    pub(super) spec: Arc<Spec>,
    pub(super) status: Status,
    /// The time from which the job is ready. A retry changes the time, a requeue does not.
    pub(super) ready_at: u64,
    /// How many attempts have failed. A closed connection is not a failed attempt.
    pub(super) attempts: u32,
    /// The time at which a worker took the latest attempt. A requeue keeps it, as on the real server.
    pub(super) dequeued_at: Option<u64>,
    pub(super) failed_at: Option<u64>,
    pub(super) completed_at: Option<u64>,
    /// When a finished job is forgotten.
    pub(super) purge_at: Option<u64>,
}

impl Job {
    /// Returns the place in the ready queue: by priority, then by age. A requeued job keeps its place.
    pub(super) fn place(&self) -> (u16, JobId) {
        (self.spec.priority, self.id)
    }
}

/// A job's own backoff, in its wire form.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct JobBackoff {
    exponent: f32,
    base_ms: u32,
    jitter_ms: u32,
}

impl From<JobBackoff> for Backoff {
    fn from(backoff: JobBackoff) -> Self {
        let millis = |ms: u32| std::time::Duration::from_millis(ms.into());
        Self { base: millis(backoff.base_ms), exponent: backoff.exponent, jitter: millis(backoff.jitter_ms) }
    }
}

/// A job's own retention, in its wire form.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Retention {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) completed_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dead_ms: Option<u64>,
}

/// A unique key. No second job with the key is enqueued while the first is within the scope.
#[derive(Debug, Clone)]
pub(super) struct Unique {
    pub(super) key: String,
    pub(super) scope: UniqueScope,
}

/// The states in which a job blocks a new job with the same key. The new job's scope applies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum UniqueScope {
    /// Until a worker has it.
    #[default]
    Queued,
    /// Until it is done or dead.
    Active,
    /// As long as it is kept at all.
    Exists,
}

impl UniqueScope {
    /// Whether a job of this status keeps a newcomer out. Relies on the order of [`Status`].
    pub(super) fn covers(self, other: Status) -> bool {
        match self {
            Self::Queued => other <= Status::Ready,
            Self::Active => other <= Status::InFlight,
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

/// One failed attempt, as `GET /jobs/{id}/errors` shows it.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ErrorRecord {
    /// From 1, so it is the job's `attempts` after the failure.
    pub(super) attempt: u32,
    pub(super) message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) error_type: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) backtrace: Option<String>,
    pub(super) dequeued_at: u64,
    pub(super) failed_at: u64,
}

/// A job in an answer, with the real server's field names, in its order. A field without a value
/// is absent rather than null, and official clients rely on that.
#[derive(Debug, Serialize)]
pub(super) struct JobView<'a> {
    id: JobId,
    #[serde(rename = "type")]
    kind: &'a str,
    queue: &'a str,
    priority: u16,
    status: Status,
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
    /// The whole job, as a stream or a look-up shows it.
    pub(super) fn full(job: &'a Job) -> Self {
        Self { payload: Some(&job.spec.payload), ..Self::bare(job) }
    }

    /// Without the payload, as a failure report answers.
    pub(super) fn bare(job: &'a Job) -> Self {
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

    /// As an enqueue answers. Nothing is ever folded: that takes jq.
    pub(super) fn enqueued(job: &'a Job, duplicate: bool) -> Self {
        Self { duplicate: Some(duplicate), folded: Some(false), ..Self::bare(job) }
    }
}
