//! [`Body`]: a request body that can be withdrawn until it is sent.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};

/// The body of a request, in one piece. hyper polls the body only when the request has a connection, and then writes the bytes at
/// once.
pub(super) struct Body {
    bytes: Option<Bytes>,
    is_wanted: Option<Box<dyn Fn() -> bool + Send + Sync>>,
}

/// The error of a body that was withdrawn.
#[derive(Debug)]
pub(super) struct Withdrawn;

impl Body {
    pub(super) fn new(bytes: Bytes) -> Self {
        Self { bytes: Some(bytes).filter(|bytes| !bytes.is_empty()), is_wanted: None }
    }

    /// Sets a check that is called when the body is about to be sent. If `is_wanted` returns false, the request is withdrawn.
    pub(super) fn leave_only_if(&mut self, is_wanted: impl Fn() -> bool + Send + Sync + 'static) {
        self.is_wanted = Some(Box::new(is_wanted));
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Withdrawn;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Withdrawn>>> {
        let Self { bytes, is_wanted } = self.get_mut();
        Poll::Ready(bytes.take().map(|bytes| match is_wanted {
            Some(is_wanted) if !is_wanted() => Err(Withdrawn),
            _ => Ok(Frame::data(bytes)),
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.bytes.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
    }
}

impl fmt::Display for Withdrawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the request was withdrawn")
    }
}

impl Error for Withdrawn {}

/// Reports whether a request failed because its body was withdrawn.
pub(super) fn was_withdrawn(error: &(dyn Error + 'static)) -> bool {
    error.is::<Withdrawn>() || error.source().is_some_and(was_withdrawn)
}
