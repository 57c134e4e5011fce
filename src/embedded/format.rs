//! Formats: JSON and MessagePack for bodies, and the three framings of a take stream.
//!
//! A header is searched for the name of a type, as the real server does: parameters and weights
//! do not count, and MessagePack wins over JSON.

use hyper::HeaderMap;
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderName};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::answer::Rejection;
use super::job::{Job, JobView};

const JSON: &str = "application/json";
const MSGPACK: &str = "application/msgpack";
const EVENTS: &str = "text/event-stream";
const NDJSON: &str = "application/x-ndjson";
const MSGPACK_STREAM: &str = "application/vnd.zizq.msgpack-stream";
const ANY: &str = "*/*";

/// Types of bodies, in both directions.
const BODIES: &[&str] = &[JSON, MSGPACK];
/// Types of take streams.
const STREAMS: &[&str] = &[EVENTS, NDJSON, MSGPACK_STREAM];

/// A format of bodies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    MsgPack,
}

impl Format {
    /// Finds the format for the answer. Without an `accept` header, it is JSON.
    pub(super) fn accepted(headers: &HeaderMap) -> Result<Self, Rejection> {
        match header(headers, ACCEPT) {
            None => Ok(Self::Json),
            Some(types) if types.contains(MSGPACK) => Ok(Self::MsgPack),
            Some(types) if types.contains(JSON) || types.contains(ANY) => Ok(Self::Json),
            Some(_) => Err(Rejection::NotAcceptable(BODIES)),
        }
    }

    /// Finds the format of the request's body; JSON if the client does not say.
    pub(super) fn of_body(headers: &HeaderMap) -> Result<Self, Rejection> {
        match header(headers, CONTENT_TYPE) {
            None => Ok(Self::Json),
            Some(types) if types.contains(MSGPACK) => Ok(Self::MsgPack),
            Some(types) if types.contains(JSON) => Ok(Self::Json),
            Some(_) => Err(Rejection::UnsupportedMediaType(BODIES)),
        }
    }

    /// The value of `content-type`.
    pub(super) fn media_type(self) -> &'static str {
        match self {
            Self::Json => JSON,
            Self::MsgPack => MSGPACK,
        }
    }

    /// Reads a body.
    pub(super) fn read<T: DeserializeOwned>(self, bytes: &[u8]) -> Result<T, Rejection> {
        let value = match self {
            Self::Json => serde_json::from_slice(bytes).map_err(|error| format!("invalid JSON: {error}")),
            Self::MsgPack => rmp_serde::from_slice(bytes).map_err(|error| format!("invalid MessagePack: {error}")),
        };
        value.map_err(Rejection::BadRequest)
    }

    /// Writes a body.
    pub(super) fn write(self, value: &impl Serialize) -> Vec<u8> {
        // Every value here has string keys and writes into memory, which cannot fail.
        match self {
            Self::Json => serde_json::to_vec(value).unwrap_or_default(),
            Self::MsgPack => rmp_serde::to_vec_named(value).unwrap_or_default(),
        }
    }
}

/// A framing of a take stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamFormat {
    /// Server-sent events; a heartbeat is a comment.
    Events,
    /// A line of JSON for each job; a heartbeat is an empty line.
    Lines,
    /// MessagePack behind its length in four bytes, the highest first; a heartbeat is a length of zero.
    Frames,
}

impl StreamFormat {
    /// Finds the framing for the stream. Without an `accept` header, it is lines.
    pub(super) fn accepted(headers: &HeaderMap) -> Result<Self, Rejection> {
        let Some(types) = header(headers, ACCEPT) else { return Ok(Self::Lines) };
        let has = |names: &[&str]| names.iter().any(|name| types.contains(name));
        if has(&[EVENTS]) {
            Ok(Self::Events)
        } else if has(&[MSGPACK_STREAM, MSGPACK]) {
            Ok(Self::Frames)
        } else if has(&[NDJSON, JSON, ANY]) {
            Ok(Self::Lines)
        } else {
            Err(Rejection::NotAcceptable(STREAMS))
        }
    }

    /// The value of `content-type`.
    pub(super) fn media_type(self) -> &'static str {
        match self {
            Self::Events => EVENTS,
            Self::Lines => NDJSON,
            Self::Frames => MSGPACK_STREAM,
        }
    }

    /// The message that tells a client that the server is alive, and the server that a client is not.
    pub(super) fn heartbeat(self) -> &'static [u8] {
        match self {
            Self::Events => b": heartbeat\n\n",
            Self::Lines => b"\n",
            Self::Frames => &[0; 4],
        }
    }

    /// Appends a job to a chunk.
    pub(super) fn write(self, job: &Job, chunk: &mut Vec<u8>) {
        let job = JobView::full(job);
        match self {
            Self::Events => wrap(b"data: ", &Format::Json.write(&job), b"\n\n", chunk),
            Self::Lines => wrap(b"", &Format::Json.write(&job), b"\n", chunk),
            Self::Frames => {
                let body = Format::MsgPack.write(&job);
                // A body has at most `MAX_BODY_BYTES`, which is far below the largest length.
                let length = u32::try_from(body.len()).unwrap_or_default();
                wrap(&length.to_be_bytes(), &body, b"", chunk);
            }
        }
    }
}

/// Appends a body between its head and its tail.
fn wrap(head: &[u8], body: &[u8], tail: &[u8], chunk: &mut Vec<u8>) {
    for part in [head, body, tail] {
        chunk.extend_from_slice(part);
    }
}

/// Reads a header's text; one that is not text matches no type.
fn header(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.to_str().unwrap_or_default())
}
