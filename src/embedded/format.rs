//! Formats: JSON and MessagePack for bodies, and the three framings of a take stream.
//!
//! As on the real server, a header is only searched for the names of media types. Parameters and weights are ignored, and
//! MessagePack takes precedence over JSON.

use hyper::HeaderMap;
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderName};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::answer::Rejection;
use super::job::{JobView, StoredJob};

const JSON: &str = "application/json";
const MSGPACK: &str = "application/msgpack";
const EVENTS: &str = "text/event-stream";
const NDJSON: &str = "application/x-ndjson";
const MSGPACK_STREAM: &str = "application/vnd.zizq.msgpack-stream";
const ANY: &str = "*/*";

/// The media types of request and response bodies.
const BODIES: &[&str] = &[JSON, MSGPACK];
/// The media types of take streams.
const STREAMS: &[&str] = &[EVENTS, NDJSON, MSGPACK_STREAM];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    Json,
    MsgPack,
}

impl Format {
    /// Returns the format for the answer. Without an `accept` header, the format is JSON.
    pub(super) fn accepted(headers: &HeaderMap) -> Result<Self, Rejection> {
        match header(headers, ACCEPT) {
            None => Ok(Self::Json),
            Some(types) if types.contains(MSGPACK) => Ok(Self::MsgPack),
            Some(types) if types.contains(JSON) || types.contains(ANY) => Ok(Self::Json),
            Some(_) => Err(Rejection::NotAcceptable(BODIES)),
        }
    }

    /// Returns the format of the request's body. Without a `content-type` header, the format is JSON.
    pub(super) fn of_body(headers: &HeaderMap) -> Result<Self, Rejection> {
        match header(headers, CONTENT_TYPE) {
            None => Ok(Self::Json),
            Some(types) if types.contains(MSGPACK) => Ok(Self::MsgPack),
            Some(types) if types.contains(JSON) => Ok(Self::Json),
            Some(_) => Err(Rejection::UnsupportedMediaType(BODIES)),
        }
    }

    pub(super) fn media_type(self) -> &'static str {
        match self {
            Self::Json => JSON,
            Self::MsgPack => MSGPACK,
        }
    }

    pub(super) fn read<T: DeserializeOwned>(self, bytes: &[u8]) -> Result<T, Rejection> {
        let value = match self {
            Self::Json => serde_json::from_slice(bytes).map_err(|error| format!("invalid JSON: {error}")),
            Self::MsgPack => rmp_serde::from_slice(bytes).map_err(|error| format!("invalid MessagePack: {error}")),
        };
        value.map_err(Rejection::BadRequest)
    }

    pub(super) fn write(self, value: &impl Serialize) -> Vec<u8> {
        // Cannot fail, because all map keys are strings, and the output goes to memory.
        match self {
            Self::Json => serde_json::to_vec(value).unwrap_or_default(),
            Self::MsgPack => rmp_serde::to_vec_named(value).unwrap_or_default(),
        }
    }
}

/// The framing of a take stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamFormat {
    /// One server-sent event for each job; a heartbeat is a comment.
    Events,
    /// One line of JSON for each job; a heartbeat is an empty line.
    Lines,
    /// Each job in MessagePack, after its length as a big-endian `u32`; a heartbeat is a length of zero.
    Frames,
}

impl StreamFormat {
    /// Returns the framing for the stream. Without an `accept` header, the framing is lines of JSON.
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

    pub(super) fn media_type(self) -> &'static str {
        match self {
            Self::Events => EVENTS,
            Self::Lines => NDJSON,
            Self::Frames => MSGPACK_STREAM,
        }
    }

    /// Returns a heartbeat. A heartbeat shows the client that the server is alive. If the client is dead, the write of
    /// the heartbeat fails.
    pub(super) fn heartbeat(self) -> &'static [u8] {
        match self {
            Self::Events => b": heartbeat\n\n",
            Self::Lines => b"\n",
            Self::Frames => &[0; 4],
        }
    }

    pub(super) fn write(self, job: &StoredJob, chunk: &mut Vec<u8>) {
        let job = JobView::full(job);
        match self {
            Self::Events => wrap(b"data: ", &Format::Json.write(&job), b"\n\n", chunk),
            Self::Lines => wrap(b"", &Format::Json.write(&job), b"\n", chunk),
            Self::Frames => {
                let body = Format::MsgPack.write(&job);
                // The length of a job that was enqueued by a request fits into a `u32`, because `MAX_BODY_BYTES` is far
                // below `u32::MAX`.
                let length = u32::try_from(body.len()).unwrap_or_default();
                wrap(&length.to_be_bytes(), &body, b"", chunk);
            }
        }
    }
}

fn wrap(head: &[u8], body: &[u8], tail: &[u8], chunk: &mut Vec<u8>) {
    for part in [head, body, tail] {
        chunk.extend_from_slice(part);
    }
}

/// Returns a header's text. A value that is not text becomes an empty string, which matches no media type.
fn header(headers: &HeaderMap, name: HeaderName) -> Option<&str> {
    headers.get(name).map(|value| value.to_str().unwrap_or_default())
}
