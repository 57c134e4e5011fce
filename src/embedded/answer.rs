//! Answers: responses with a whole body or a stream, and the rejections of requests.
//!
//! Statuses and error texts are the real server's, so that a client that logs or matches them gets the same from both
//! servers. There are two exceptions: a bad query on the take stream, and an id that is not UTF-8. In these cases, the real
//! server answers in the plain text of its web framework, and this server answers in JSON or MessagePack.

use std::convert::Infallible;
use std::fmt::Display;

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

/// The body of an answer, whole or streamed. Reading the body cannot fail.
pub(super) type AnswerBody = UnsyncBoxBody<Bytes, Infallible>;
pub(super) type HttpAnswer = Response<AnswerBody>;

/// The reason why a request is answered with an error.
#[derive(Debug, PartialEq)]
pub(super) enum Rejection {
    /// 400, with a text that describes the error.
    BadRequest(String),
    /// 403: the request is valid, but only a real server supports it.
    Forbidden(String),
    /// 404: there is no such path, job or failed attempt, or the job is not in flight.
    NotFound(&'static str),
    /// 405, with the methods that the path allows.
    WrongMethod(&'static str),
    /// 406, with the media types that the server can send.
    NotAcceptable(&'static [&'static str]),
    /// 415, with the media types that the server can read.
    UnsupportedMediaType(&'static [&'static str]),
    /// 422: the request is well-formed, but cannot be carried out.
    Unprocessable(String),
}

impl Rejection {
    /// Returns the rejection for a query whose fields cannot be parsed.
    pub(super) fn bad_query(error: impl Display) -> Self {
        Self::BadRequest(format!("invalid query parameters: {error}"))
    }

    pub(super) fn into_answer(self, format: Format) -> HttpAnswer {
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

impl From<OrderError> for Rejection {
    fn from(error: OrderError) -> Self {
        match error {
            OrderError::Invalid(text) => Self::BadRequest(text),
            // 403 is the real server's answer to a request for a feature outside its licence.
            OrderError::Unsupported(text) => Self::Forbidden(text),
        }
    }
}

/// Returns an answer whose body is `value`, serialized in `format`.
pub(super) fn whole(format: Format, status: StatusCode, value: &impl Serialize) -> HttpAnswer {
    let mut answer = Response::new(Full::new(format.write(value).into()).boxed_unsync());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(format.media_type()));
    answer
}

pub(super) fn no_content() -> HttpAnswer {
    empty(StatusCode::NO_CONTENT)
}

/// Returns a 200 answer with the body `frames`. The body ends when the stream ends.
pub(super) fn streamed<S>(format: StreamFormat, frames: S) -> HttpAnswer
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

/// Returns a 405 answer. The body is empty, because the `allow` header lists the methods of the path.
fn wrong_method(allowed: &'static str) -> HttpAnswer {
    let mut answer = empty(StatusCode::METHOD_NOT_ALLOWED);
    answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
    answer
}

fn empty(status: StatusCode) -> HttpAnswer {
    let mut answer = Response::new(Empty::new().boxed_unsync());
    *answer.status_mut() = status;
    answer
}
