//! Answers: JSON bodies, and the ways in which a request is turned down.
//!
//! Statuses and error texts are the real server's, so that a client which logs or matches them
//! sees the same from both. Where the real server falls back on its framework's plain text (a
//! bad query on the take stream, an id that is not UTF-8), this one stays with JSON.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::json;

use super::order::OrderError;

pub(super) const JSON: &str = "application/json";
pub(super) const NDJSON: &str = "application/x-ndjson";

/// Whole or streamed; a body here cannot fail, it can only be cut off with its connection.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;
pub(super) type Answer = Response<Body>;

/// A request that gets an error for an answer.
#[derive(Debug)]
pub(super) enum Rejection {
    /// 400: the text says what to change.
    BadRequest(String),
    /// 403: right, but not to be had from this server.
    Forbidden(String),
    /// 404: no such path, no such job, or one that is not in flight.
    NotFound(&'static str),
    /// 405, with the methods that the path does know.
    WrongMethod(&'static str),
    /// 406, with the one type that could be served.
    NotAcceptable(&'static str),
    /// 415: a body of a type other than JSON.
    NotJson,
}

impl Rejection {
    /// A query whose fields cannot be read, as opposed to one that asks for too much.
    pub(super) fn bad_query(error: &str) -> Self {
        Self::BadRequest(format!("invalid query parameters: {error}"))
    }
}

impl From<OrderError> for Rejection {
    fn from(error: OrderError) -> Self {
        match error {
            OrderError::Invalid(text) => Self::BadRequest(text),
            // What a real server answers when its licence does not cover the feature.
            OrderError::Unsupported(text) => Self::Forbidden(text),
        }
    }
}

impl From<Rejection> for Answer {
    fn from(rejection: Rejection) -> Self {
        match rejection {
            Rejection::BadRequest(text) => error(StatusCode::BAD_REQUEST, &text),
            Rejection::Forbidden(text) => error(StatusCode::FORBIDDEN, &text),
            Rejection::NotFound(text) => error(StatusCode::NOT_FOUND, text),
            Rejection::WrongMethod(allowed) => wrong_method(allowed),
            Rejection::NotAcceptable(supported) => {
                let body = json!({"error": "not acceptable", "supported": [supported]});
                json(StatusCode::NOT_ACCEPTABLE, &body)
            }
            Rejection::NotJson => {
                let body = json!({"error": "unsupported media type", "supported": [JSON]});
                json(StatusCode::UNSUPPORTED_MEDIA_TYPE, &body)
            }
        }
    }
}

/// A JSON body.
pub(super) fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    // Every value here has string keys and writes into memory, which cannot fail.
    let bytes = serde_json::to_vec(value).unwrap_or_default();
    let mut answer = Response::new(Full::new(bytes.into()).boxed_unsync());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(JSON));
    answer
}

/// 204: done, nothing to say. Really without a body: with HTTP/2 one would break the protocol.
pub(super) fn no_content() -> Answer {
    empty(StatusCode::NO_CONTENT)
}

/// An NDJSON body that goes on as long as `frames` does.
pub(super) fn ndjson<S>(frames: S) -> Answer
where
    S: Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static,
{
    let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(NDJSON));
    answer
}

/// The form of every error that has a text.
fn error(status: StatusCode, text: &str) -> Answer {
    json(status, &json!({"error": text}))
}

/// The one error without a text: the header says it all.
fn wrong_method(allowed: &'static str) -> Answer {
    let mut answer = empty(StatusCode::METHOD_NOT_ALLOWED);
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    answer
}

/// A status and nothing else.
fn empty(status: StatusCode) -> Answer {
    let mut answer = Response::new(Empty::new().boxed_unsync());
    *answer.status_mut() = status;
    answer
}
