//! Answers: whole bodies and streams, and the ways in which a request is turned down.
//!
//! Statuses and error texts are the real server's, so that a client which logs or matches them
//! sees the same from both. Where the real server falls back on its framework's plain text (a
//! bad query on the take stream, an id that is not UTF-8), this one stays with its formats.

use std::convert::Infallible;

use bytes::Bytes;
use futures_util::Stream;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full, StreamBody};
use hyper::body::Frame;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use serde_json::json;

use super::format::{Format, StreamFormat};
use super::order::OrderError;
use super::patch::PatchError;

/// A whole or a streamed body. It never fails, and ends early only with its connection.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;
pub(super) type Answer = Response<Body>;

/// A request that gets an error for an answer.
#[derive(Debug)]
pub(super) enum Rejection {
    /// 400: the text says what to change.
    BadRequest(String),
    /// 403: valid, but only a real server supports it.
    Forbidden(String),
    /// 404: no such path, no such job, or one that is not in flight.
    NotFound(&'static str),
    /// 405, with the methods that the path allows.
    WrongMethod(&'static str),
    /// 406, with the types that could be served.
    NotAcceptable(&'static [&'static str]),
    /// 415, with the types that could be read.
    UnsupportedMediaType(&'static [&'static str]),
    /// 422: well-formed, but not possible.
    Unprocessable(String),
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
            // A real server answers 403 for a feature outside its licence.
            OrderError::Unsupported(text) => Self::Forbidden(text),
        }
    }
}

impl From<PatchError> for Rejection {
    fn from(error: PatchError) -> Self {
        match error {
            PatchError::NoSuchJob => Self::NotFound("job not found"),
            PatchError::Finished(id, status) => {
                Self::Unprocessable(format!("cannot patch job {id} in {status} status"))
            }
        }
    }
}

impl Rejection {
    /// Writes the answer in the format that the client accepts.
    pub(super) fn into_answer(self, format: Format) -> Answer {
        let error = |status, text: &str| whole(format, status, &json!({"error": text}));
        match self {
            Self::BadRequest(text) => error(StatusCode::BAD_REQUEST, &text),
            Self::Forbidden(text) => error(StatusCode::FORBIDDEN, &text),
            Self::NotFound(text) => error(StatusCode::NOT_FOUND, text),
            Self::WrongMethod(allowed) => wrong_method(allowed),
            Self::NotAcceptable(supported) => {
                let body = json!({"error": "not acceptable", "supported": supported});
                whole(format, StatusCode::NOT_ACCEPTABLE, &body)
            }
            Self::UnsupportedMediaType(supported) => {
                let body = json!({"error": "unsupported media type", "supported": supported});
                whole(format, StatusCode::UNSUPPORTED_MEDIA_TYPE, &body)
            }
            Self::Unprocessable(text) => error(StatusCode::UNPROCESSABLE_ENTITY, &text),
        }
    }
}

/// Writes a whole body.
pub(super) fn whole(format: Format, status: StatusCode, value: &impl Serialize) -> Answer {
    let mut answer = Response::new(Full::new(format.write(value).into()).boxed_unsync());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.media_type()));
    answer
}

/// Returns a 204 without a body, because a body would violate HTTP/2.
pub(super) fn no_content() -> Answer {
    empty(StatusCode::NO_CONTENT)
}

/// Writes a body that goes on as long as `frames` does.
pub(super) fn streamed<S>(format: StreamFormat, frames: S) -> Answer
where
    S: Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static,
{
    let mut answer = Response::new(StreamBody::new(frames).boxed_unsync());
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(format.media_type()));
    if format == StreamFormat::Events {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    }
    answer
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
