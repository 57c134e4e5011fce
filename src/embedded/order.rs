//! Orders: requests from producers to enqueue jobs, and the checks on these requests.
//!
//! Every job of a bulk request is checked before the first one is stored, so that the request is accepted or rejected as
//! a whole, without a rollback.

use std::fmt;

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::job::{JobBackoff, Retention, Spec, Unique};
use super::payload::Payload;

/// The real server's default priority: the middle of the range.
const DEFAULT_PRIORITY: u16 = 32_768;
/// The characters that the names of queues and job types must not contain, because the real server reserves them for
/// future patterns.
const RESERVED: [char; 7] = ['*', '?', '[', ']', '{', '}', '\\'];

/// A checked request to enqueue one job.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) spec: Spec,
    /// The time at which the job becomes ready. The job is ready at once if this time is absent or in the past.
    pub(super) ready_at: Option<u64>,
}

/// The body of `POST /jobs`. Unknown fields are ignored, as on the real server.
#[derive(Debug, Deserialize)]
pub(super) struct EnqueueRequest {
    #[serde(rename = "type")]
    kind: String,
    queue: String,
    priority: Option<u16>,
    /// The payload. It may be null, but must not be absent, because a request without a payload is most likely a mistake.
    payload: Payload,
    ready_at: Option<u64>,
    retry_limit: Option<u32>,
    backoff: Option<JobBackoff>,
    retention: Option<Retention>,
    unique_key: Option<String>,
    /// The scope as text. `UniqueScope` parses it, so that the error for an unknown scope lists the valid ones.
    unique_while: Option<String>,
    /// The batch of a batched job. Its contents are ignored, because batched jobs are refused.
    batch: Option<IgnoredAny>,
}

/// The body of `POST /jobs/bulk`.
#[derive(Debug, Deserialize)]
pub(super) struct BulkRequest {
    pub(super) jobs: Vec<EnqueueRequest>,
}

/// The reason why an order is refused. Each variant has its own HTTP status.
#[derive(Debug, PartialEq)]
pub(super) enum OrderError {
    Invalid(String),
    /// The request is valid, but only a real server supports it.
    Unsupported(String),
}

impl OrderError {
    /// Adds the job's index in the bulk request to the text of an `Invalid` error.
    pub(super) fn at(self, index: usize) -> Self {
        match self {
            Self::Invalid(text) => Self::Invalid(format!("jobs[{index}]: {text}")),
            Self::Unsupported(text) => Self::Unsupported(text),
        }
    }
}

impl fmt::Display for OrderError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Invalid(text) | Self::Unsupported(text)) = self;
        f.write_str(text)
    }
}

impl EnqueueRequest {
    /// Checks the request and converts it to an order. The checks run in the real server's order, so that a request with
    /// several errors gets the same answer from both servers.
    pub(super) fn into_order(self) -> Result<Order, OrderError> {
        check_name("type", &self.kind).map_err(OrderError::Invalid)?;
        check_name("queue", &self.queue).map_err(OrderError::Invalid)?;
        let is_batch = self.batch.is_some();
        let unique = unique(self.unique_key, self.unique_while, is_batch)?;
        if is_batch {
            let text = "batched jobs need a real server";
            return Err(OrderError::Unsupported(text.to_owned()));
        }
        let spec = Spec {
            kind: self.kind,
            queue: self.queue,
            priority: self.priority.unwrap_or(DEFAULT_PRIORITY),
            payload: self.payload,
            retry_limit: self.retry_limit,
            backoff: self.backoff,
            retention: self.retention,
            unique,
        };
        Ok(Order { spec, ready_at: self.ready_at })
    }
}

/// Rejects an empty name, and a name with a comma, a null byte or a reserved character.
pub(super) fn check_name(field: &str, name: &str) -> Result<(), String> {
    if name.is_empty() {
        return Err(format!("{field} must not be empty"));
    }
    if name.contains(',') {
        return Err(format!("{field} must not contain ','"));
    }
    if name.contains('\0') {
        return Err(format!("{field} must not contain null bytes"));
    }
    match name.chars().find(|char| RESERVED.contains(char)) {
        Some(char) => Err(format!("{field} must not contain '{char}' (reserved)")),
        None => Ok(()),
    }
}

/// Returns the unique key, if the request has one. Refuses a scope without a key, because the scope would have no effect.
/// Also refuses a key for a batched job.
fn unique(key: Option<String>, scope: Option<String>, is_batch: bool) -> Result<Option<Unique>, OrderError> {
    let invalid = |text: &str| OrderError::Invalid(text.to_owned());
    if scope.is_some() && key.is_none() {
        return Err(invalid("unique_while requires unique_key"));
    }
    if key.is_some() && is_batch {
        return Err(invalid("unique_key and batch cannot be combined"));
    }
    let scope = match scope {
        Some(text) => text.parse().map_err(OrderError::Invalid)?,
        None => Default::default(),
    };
    Ok(key.map(|key| Unique { key, scope }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(json: &str) -> Result<Order, OrderError> {
        serde_json::from_str::<EnqueueRequest>(json).unwrap().into_order()
    }

    #[test]
    fn a_batch_is_refused_rather_than_run_unbatched() {
        let json = r#"{"type":"t","queue":"q","payload":1,"batch":{"key":"k"}}"#;
        assert!(matches!(order(json), Err(OrderError::Unsupported(_))));
    }

    #[test]
    fn a_unique_scope_needs_a_key() {
        let json = r#"{"type":"t","queue":"q","payload":1,"unique_while":"active"}"#;
        assert_eq!(order(json).unwrap_err().to_string(), "unique_while requires unique_key");
    }
}
