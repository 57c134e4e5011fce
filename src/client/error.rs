//! [`ClientError`]: the error of a call to the server, and its classification, for example as retryable.

use std::error::Error;
use std::fmt;
use std::io;
use std::time::Duration;

use hyper::StatusCode;

use crate::backoff::Retryable;

/// The error of a call to the server.
#[derive(Debug)]
pub enum ClientError {
    /// No connection could be made.
    Connect(Box<dyn Error + Send + Sync>),
    /// The connection of a take stream failed before the stream began.
    Transport(hyper::Error),
    /// A request failed after its connection was opened. The server may have executed the request.
    Request(hyper_util::client::legacy::Error),
    /// The peer closed the connection without an answer, and has never answered before. A TLS port may do this when it receives
    /// plain HTTP.
    ClosedUnanswered(Box<Self>),
    /// The answer could not be read to its end, or could not be parsed.
    Answer(Box<dyn Error + Send + Sync>),
    /// No answer arrived within the time limit. The server may have executed the request.
    TimedOut(Duration),
    /// The server, or a proxy in front of the server, answered with a status that the call does not expect.
    Refused {
        /// The status of the answer.
        status: StatusCode,
        /// The reason in the answer, or an empty text.
        message: String,
        /// The wait that the answer asks for (`Retry-After`), at most [`MAX_RETRY_AFTER`].
        retry_after: Option<Duration>,
    },
    /// The answer does not seem to come from a Zizq server, for example an error from a proxy without a backend, or a login page.
    NotTheServer {
        /// The status of the answer.
        status: StatusCode,
        /// The first line of the answer, or an empty text.
        message: String,
    },
    /// A query of the state of a job was refused, and a retry may succeed.
    Hidden(Box<Self>),
    /// The answer to a take request is not a stream of jobs.
    NotAStream,
    /// The request was withdrawn before it was sent.
    Withdrawn,
    /// The request cannot be built, because a part of it is not valid HTTP.
    Unsendable(Box<dyn Error + Send + Sync>),
}

/// The longest wait that a `Retry-After` header can cause. Without this limit, a wrong header could stop a worker for hours.
pub const MAX_RETRY_AFTER: Duration = Duration::from_secs(5 * 60);

/// The 4xx statuses after which a refused request is retried, because their cause may pass, for example expired credentials or a
/// rate limit.
const PASSING: [StatusCode; 7] = [
    StatusCode::UNAUTHORIZED,
    StatusCode::FORBIDDEN,
    StatusCode::PROXY_AUTHENTICATION_REQUIRED,
    StatusCode::REQUEST_TIMEOUT,
    StatusCode::MISDIRECTED_REQUEST,
    StatusCode::TOO_EARLY,
    StatusCode::TOO_MANY_REQUESTS,
];

/// The 4xx statuses with a short-lived cause: the same request may succeed a moment later.
const MOMENTARY: [StatusCode; 4] = [
    StatusCode::REQUEST_TIMEOUT,
    StatusCode::MISDIRECTED_REQUEST,
    StatusCode::TOO_EARLY,
    StatusCode::TOO_MANY_REQUESTS,
];

/// The 4xx statuses that do not indicate a mistake in the worker's settings.
const NO_MISTAKE: [StatusCode; 3] = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];

impl ClientError {
    /// Reports whether the server may have executed the request despite the error.
    pub fn may_have_arrived(&self) -> bool {
        match self {
            Self::Connect(_) | Self::Hidden(_) | Self::NotAStream | Self::Withdrawn | Self::Unsendable(_) => false,
            // A proxy that has lost the server's answer sends a 5xx. A 4xx other than 408 means that the request was not
            // executed.
            Self::Refused { status, .. } | Self::NotTheServer { status, .. } => {
                !status.is_client_error() || *status == StatusCode::REQUEST_TIMEOUT
            }
            Self::Transport(_) | Self::Request(_) | Self::ClosedUnanswered(_) | Self::Answer(_) | Self::TimedOut(_) => {
                true
            }
        }
    }

    /// Reports whether a retry may succeed. This is false for a 4xx refusal that is permanent, and for a request that cannot be
    /// built.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused { status, .. } => !status.is_client_error() || PASSING.contains(status),
            Self::Unsendable(_) => false,
            _ => true,
        }
    }

    /// Returns the status of an unexpected answer.
    fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Refused { status, .. } | Self::NotTheServer { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// Reports whether this error, as the result of the worker's first request, indicates a wrong setting, such as the url, the
    /// queues or the credentials.
    pub(crate) fn is_mistake(&self) -> bool {
        matches!(self, Self::Unsendable(_))
            || self.status().is_some_and(|status| status.is_client_error() && !NO_MISTAKE.contains(&status))
    }

    /// Reports whether the server or a proxy refused the call, and would probably refuse it again.
    pub(crate) fn is_refusal(&self) -> bool {
        self.status().is_some_and(|status| status.is_client_error() && !MOMENTARY.contains(&status))
    }

    /// Reports whether the answer is a 5xx.
    pub(crate) fn is_server_error(&self) -> bool {
        self.status().is_some_and(|status| status.is_server_error())
    }

    /// Reports whether the answer is not HTTP, for example the alert of a TLS port.
    fn is_no_http(&self) -> bool {
        causes(self).any(|cause| cause.downcast_ref().is_some_and(hyper::Error::is_parse))
    }

    /// Reports whether the peer closed or reset the connection before the answer was complete.
    pub(super) fn is_closed_connection(&self) -> bool {
        causes(self).any(|cause| {
            cause.downcast_ref().is_some_and(hyper::Error::is_incomplete_message)
                || cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::ConnectionReset)
        })
    }
}

/// Returns an error and its causes. The cause of an `io::Error` is taken from `get_ref`, because `source` skips the wrapped error.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| match error.downcast_ref::<io::Error>() {
        Some(outer) => outer.get_ref().map(|inner| inner as &(dyn Error + 'static)),
        None => error.source(),
    })
}

/// Reports whether the peer answered the TLS handshake with bytes that are not TLS.
fn is_without_tls(error: &(dyn Error + 'static)) -> bool {
    let tls_error = causes(error).find_map(|cause| cause.downcast_ref::<rustls::Error>());
    matches!(tls_error, Some(rustls::Error::InvalidMessage(_)))
}

/// Reports whether the peer closed the connection during the TLS handshake.
fn is_closed_handshake(error: &(dyn Error + 'static)) -> bool {
    causes(error).any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::UnexpectedEof)
    })
}

impl Retryable for ClientError {
    fn is_retryable(&self) -> bool {
        Self::is_retryable(self)
    }

    fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Refused { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(error) if is_without_tls(error.as_ref()) => {
                f.write_str("cannot connect: url is https, and the port seems to speak no TLS; try http")
            }
            Self::Connect(error) if is_closed_handshake(error.as_ref()) => {
                f.write_str("cannot connect: the port closed the connection; if it speaks no TLS, write http in url")
            }
            Self::Connect(_) => f.write_str("cannot connect"),
            Self::Transport(_) | Self::Request(_) if self.is_no_http() => {
                f.write_str("the answer is no HTTP: if url is http and the port speaks TLS, make it https")
            }
            Self::Transport(_) | Self::Request(_) => f.write_str("the request failed"),
            Self::ClosedUnanswered(_) => f.write_str(
                "the connection was closed before a whole answer: if url is http and the port speaks TLS, make it https",
            ),
            Self::Answer(_) => f.write_str("the answer broke off"),
            Self::TimedOut(limit) => write!(f, "no answer within {}", humantime::format_duration(*limit)),
            Self::Refused { status, message, .. } if message.is_empty() => write!(f, "the server answered {status}"),
            Self::Refused { status, message, .. } => write!(f, "the server answered {status}: {message}"),
            Self::NotTheServer { status, message } => {
                write!(f, "the answer {status} is no Zizq server's, look for a proxy on the way")?;
                if message.is_empty() { Ok(()) } else { write!(f, ": {message}") }
            }
            Self::Hidden(_) => f.write_str("the job of a report in doubt cannot be looked at"),
            Self::NotAStream => f.write_str("what answers there is no Zizq server: it sent no stream of jobs"),
            Self::Withdrawn => f.write_str("the request was withdrawn before it left"),
            Self::Unsendable(_) => f.write_str("the request cannot be sent"),
        }
    }
}

impl Error for ClientError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Self::Connect(error) | Self::Answer(error) | Self::Unsendable(error) => Some(error.as_ref()),
            Self::Transport(error) => Some(error),
            Self::Request(error) => Some(error),
            Self::ClosedUnanswered(error) => error.source(),
            Self::Hidden(error) => Some(error),
            Self::TimedOut(_)
            | Self::Refused { .. }
            | Self::NotTheServer { .. }
            | Self::NotAStream
            | Self::Withdrawn => None,
        }
    }
}
