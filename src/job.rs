//! A [`Job`], its [`Outcome`] and [`Failure`], and their JSON form on the wire.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::de::{IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

/// The server's id of a job: opaque, and cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(transparent)]
pub struct JobId(#[serde(serialize_with = "as_str")] Arc<str>);

fn as_str<S: serde::Serializer>(id: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(id)
}

impl JobId {
    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Finds the id in the JSON text of a malformed or truncated job. Parses the text only up to the id.
    pub(crate) fn find(text: &[u8]) -> Option<Self> {
        let mut found = None;
        // Ignore a parse error: `found` alone shows whether the id was read.
        let _ = serde_json::Deserializer::from_slice(text).deserialize_map(IdSeeker(&mut found));
        found.as_deref().map(Self::from)
    }
}

struct IdSeeker<'a>(&'a mut Option<String>);

impl<'de> Visitor<'de> for IdSeeker<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut fields: A) -> Result<(), A::Error> {
        while let Some(name) = fields.next_key::<Cow<'_, str>>()? {
            if name == "id" {
                *self.0 = Some(fields.next_value()?);
                return Ok(());
            }
            fields.next_value::<IgnoredAny>()?;
        }
        Ok(())
    }
}

impl From<&str> for JobId {
    fn from(id: &str) -> Self {
        Self(id.into())
    }
}

impl fmt::Display for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for JobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

/// One job from the take stream.
#[derive(Debug, Clone)]
pub struct Job {
    /// The server's id of the job.
    pub id: JobId,
    /// The kind of work, for example `send_email`. The type comes from the server, and is never used as a path or a command.
    pub job_type: String,
    /// The queue of the job.
    pub queue: String,
    /// The priority. 0 is the most urgent.
    pub priority: u32,
    /// The number of failed attempts before this one.
    pub attempts: u32,
    /// The time at which the job became ready, in Unix milliseconds.
    pub ready_at: u64,
    /// The number of retries after which the next failure makes the job dead. `None` means the server's default.
    pub retry_limit: Option<u32>,
    /// The payload's JSON text, exactly as the server sent it: a slice of the received line, neither decoded nor copied.
    pub payload: Bytes,
    /// The whole job as JSON text: the received line.
    pub object: Bytes,
}

/// The fields of a job that this worker reads. Other fields are ignored.
#[derive(Deserialize)]
struct JobLine<'a> {
    #[serde(borrow)]
    id: Cow<'a, str>,
    #[serde(borrow, rename = "type")]
    job_type: Cow<'a, str>,
    #[serde(borrow)]
    queue: Cow<'a, str>,
    priority: u32,
    attempts: u32,
    ready_at: u64,
    retry_limit: Option<u32>,
    #[serde(borrow)]
    payload: &'a RawValue,
}

impl Job {
    /// Parses a line of the take stream.
    ///
    /// # Errors
    /// When the line is not a JSON object, or a required field is missing, or a field has the wrong type.
    pub fn from_line(line: &Bytes) -> Result<Self, serde_json::Error> {
        // simdutf8 checks UTF-8 several times faster than `serde_json::from_slice`, which is called only to produce the
        // error message for invalid UTF-8.
        let read: JobLine<'_> = match simdutf8::basic::from_utf8(line) {
            Ok(text) => serde_json::from_str(text)?,
            Err(_) => serde_json::from_slice(line)?,
        };
        Ok(Self {
            id: JobId::from(read.id.as_ref()),
            job_type: read.job_type.into_owned(),
            queue: read.queue.into_owned(),
            priority: read.priority,
            attempts: read.attempts,
            ready_at: read.ready_at,
            retry_limit: read.retry_limit,
            object: line.clone(),
            payload: line.slice_ref(read.payload.get().as_bytes()),
        })
    }
}

/// The result of a job's run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The work is done, and the server may forget the job.
    Success,
    /// The work failed. Unless the failure says otherwise, the server decides whether and when to retry.
    Failure(Failure),
    /// The work was interrupted because this worker is stopping. Nothing is reported, and no attempt is counted. The server
    /// requeues the job when the stream closes.
    Interrupted,
}

/// The report of an outcome. An interrupted job has none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Report {
    Success,
    Failure(Failure),
}

impl Report {
    pub(crate) fn of(outcome: Outcome) -> Option<Self> {
        match outcome {
            Outcome::Success => Some(Self::Success),
            Outcome::Failure(failure) => Some(Self::Failure(failure)),
            Outcome::Interrupted => None,
        }
    }
}

/// A failure, as reported to the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Failure {
    /// The error message, for people.
    pub message: String,
    /// The type of error, for programs: `ExitStatus`, `Signal`, `SpawnError`, …
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error_type: Option<String>,
    /// The backtrace: the end of the handler's stderr.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backtrace: Option<String>,
    /// The time of the retry, in Unix milliseconds. `None` lets the server decide.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_at: Option<u64>,
    /// Whether the server marks the job as dead instead of retrying it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub kill: bool,
    /// Whether the handler chose the error type. The metrics count all error types chosen by handlers under one label.
    #[serde(skip)]
    pub is_named_by_handler: bool,
}

impl Failure {
    /// Returns a failure with an error type and a message, and without a backtrace.
    pub fn new(error_type: &str, message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            error_type: Some(error_type.to_owned()),
            backtrace: None,
            retry_at: None,
            kill: false,
            is_named_by_handler: false,
        }
    }

    /// Sets the backtrace. A blank text sets none.
    #[must_use]
    pub fn with_backtrace(mut self, backtrace: String) -> Self {
        self.backtrace = Some(backtrace).filter(|text| !text.trim().is_empty());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"id":"03h","type":"send_\u0065mail","queue":"mail","priority":7,"status":"in_flight","payload":{"to": [1, 2.50]},"ready_at":1795485639928,"attempts":2,"unheard_of":{}}"#;

    #[test]
    fn a_line_becomes_a_job_and_its_payload_keeps_its_bytes() {
        let job = Job::from_line(&Bytes::from_static(LINE.as_bytes())).unwrap();
        assert_eq!(job.id.as_str(), "03h");
        assert_eq!(job.job_type, "send_email");
        assert_eq!((job.queue.as_str(), job.priority, job.attempts), ("mail", 7, 2));
        assert_eq!(job.ready_at, 1_795_485_639_928);
        assert_eq!(&job.payload[..], br#"{"to": [1, 2.50]}"#);
    }

    #[test]
    fn the_payload_is_a_slice_of_the_line_not_a_copy() {
        let line = Bytes::from_static(LINE.as_bytes());
        let job = Job::from_line(&line).unwrap();
        assert!(line.as_ptr_range().contains(&job.payload.as_ptr()));
    }

    #[test]
    fn a_line_without_a_payload_is_no_job() {
        let error = Job::from_line(&Bytes::from_static(br#"{"id":"1","type":"t"}"#)).unwrap_err();
        assert!(error.to_string().contains("missing field"), "{error}");
    }

    #[test]
    fn an_id_is_found_in_a_malformed_job_and_in_a_cut_job() {
        let find = |text: &str| JobId::find(text.as_bytes()).map(|id| id.to_string());
        assert_eq!(find(r#"{"id":"a","type":7}"#).as_deref(), Some("a"));
        assert_eq!(find(r#"{"type":{"id":"x"},"id":"a\u0062","payload":"xxx"#).as_deref(), Some("ab"));
        for text in ["", "null", "[]", "{", r#"{"id":7}"#, r#"{"id":"a"#, r#"{"payload":{"id":"x"#] {
            assert_eq!(find(text), None, "{text}");
        }
    }

    #[test]
    fn a_failure_omits_empty_fields() {
        let wire = serde_json::to_string(&Failure::new("Signal", "gone").with_backtrace(" \n".into())).unwrap();
        assert_eq!(wire, r#"{"message":"gone","error_type":"Signal"}"#);
    }
}
