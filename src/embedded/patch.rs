//! Patches: the fields that `PATCH` changes in jobs that are not finished.
//!
//! In the body, an absent field leaves the job's field unchanged. A null field resets the job's field to the server's
//! default, but `queue` and `priority` must not be null.

use std::sync::Arc;

use serde::{Deserialize, Deserializer};

use super::answer::Rejection;
use super::job::{JobBackoff, JobStatus, Retention, Spec, StoredJob};
use super::order::check_name;

/// The body of `PATCH /jobs` and `PATCH /jobs/{id}`. Unknown fields are ignored, as on the real
/// server. A patch cannot change a job's type or payload.
#[derive(Debug, Deserialize)]
pub(super) struct PatchRequest {
    #[serde(default, deserialize_with = "present")]
    queue: Option<Option<String>>,
    #[serde(default, deserialize_with = "present")]
    priority: Option<Option<u16>>,
    #[serde(default, deserialize_with = "present")]
    ready_at: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    retry_limit: Option<Option<u32>>,
    #[serde(default, deserialize_with = "present")]
    backoff: Option<Option<JobBackoff>>,
    #[serde(default, deserialize_with = "present")]
    retention: Option<Option<RetentionPatch>>,
}

/// A patch of a job's retention. Each field is kept, set or cleared independently of the other.
#[derive(Debug, Clone, Copy, Deserialize)]
struct RetentionPatch {
    #[serde(default, deserialize_with = "present")]
    completed_ms: Option<Option<u64>>,
    #[serde(default, deserialize_with = "present")]
    dead_ms: Option<Option<u64>>,
}

/// A checked patch. `None` leaves the job's field unchanged. In a field with two levels of `Option`, `Some(None)` clears
/// the job's field.
#[derive(Debug)]
pub(super) struct Patch {
    queue: Option<String>,
    priority: Option<u16>,
    ready_at: Option<Option<u64>>,
    retry_limit: Option<Option<u32>>,
    backoff: Option<Option<JobBackoff>>,
    retention: Option<Option<RetentionPatch>>,
}

/// Deserializes a field of the body to `Some`, even if the field is null. An absent field becomes `None` through
/// `serde(default)`.
fn present<'de, T, D>(deserializer: D) -> Result<Option<Option<T>>, D::Error>
where
    T: Deserialize<'de>,
    D: Deserializer<'de>,
{
    Option::deserialize(deserializer).map(Some)
}

impl PatchRequest {
    pub(super) fn into_patch(self) -> Result<Patch, Rejection> {
        let Self { queue, priority, ready_at, retry_limit, backoff, retention } = self;
        let queue = set("queue", queue)?;
        if let Some(queue) = &queue {
            check_name("queue", queue).map_err(Rejection::Unprocessable)?;
        }
        let priority = set("priority", priority)?;
        Ok(Patch { queue, priority, ready_at, retry_limit, backoff, retention })
    }
}

/// Returns the value of a field, or `None` if the field is absent. Refuses a null.
fn set<T>(name: &str, field: Option<Option<T>>) -> Result<Option<T>, Rejection> {
    match field {
        Some(None) => Err(Rejection::Unprocessable(format!("{name} cannot be null"))),
        field => Ok(field.flatten()),
    }
}

impl Patch {
    /// Applies the patch to a job that is not finished. The caller updates the indexes of `Jobs`.
    pub(super) fn apply(&self, job: &mut StoredJob, now: u64) {
        self.apply_to_spec(Arc::make_mut(&mut job.spec));
        match self.ready_at {
            None => {}
            // A null means "ready now". Only a scheduled job changes, because other jobs are already ready or in flight.
            Some(None) if job.status == JobStatus::Scheduled => {
                job.ready_at = now;
                job.status = JobStatus::Ready;
            }
            Some(None) => {}
            Some(Some(time)) => {
                job.ready_at = time;
                // A job in flight stays in flight, whatever the new time is.
                if job.status != JobStatus::InFlight {
                    job.status = if time > now { JobStatus::Scheduled } else { JobStatus::Ready };
                }
            }
        }
    }

    /// Applies the patch to `spec`, which has the fields that the job's producer sets.
    fn apply_to_spec(&self, spec: &mut Spec) {
        if let Some(queue) = &self.queue {
            spec.queue.clone_from(queue);
        }
        spec.priority = self.priority.unwrap_or(spec.priority);
        spec.retry_limit = self.retry_limit.unwrap_or(spec.retry_limit);
        spec.backoff = self.backoff.unwrap_or(spec.backoff);
        if let Some(retention) = self.retention {
            spec.retention = retention.and_then(|patch| patch.apply(spec.retention));
        }
    }
}

impl RetentionPatch {
    /// Merges the patch into a retention. Returns `None` if no field is set in the result.
    fn apply(self, retention: Option<Retention>) -> Option<Retention> {
        let old = retention.unwrap_or(Retention { completed_ms: None, dead_ms: None });
        let new = Retention {
            completed_ms: self.completed_ms.unwrap_or(old.completed_ms),
            dead_ms: self.dead_ms.unwrap_or(old.dead_ms),
        };
        (new.completed_ms.is_some() || new.dead_ms.is_some()).then_some(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_retention_is_merged_field_by_field() {
        let retention = |json: &str, old: Option<Retention>| {
            let patch = serde_json::from_str::<PatchRequest>(json).unwrap().into_patch().unwrap();
            let patch = patch.retention.flatten().and_then(|patch| patch.apply(old));
            patch.map(|new| (new.completed_ms, new.dead_ms))
        };
        let old = Some(Retention { completed_ms: Some(1), dead_ms: Some(2) });
        assert_eq!(retention(r#"{"retention":{"dead_ms":null}}"#, old), Some((Some(1), None)));
        assert_eq!(retention(r#"{"retention":{"dead_ms":5}}"#, None), Some((None, Some(5))));
        assert_eq!(retention(r#"{"retention":{"dead_ms":null,"completed_ms":null}}"#, old), None);
        assert_eq!(retention(r#"{"retention":null}"#, old), None);
    }
}
