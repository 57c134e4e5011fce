//! [`ClientError`]: why a call to the server did not succeed, and what that means for the next one.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use hyper::StatusCode;

use crate::backoff::Retryable;

/// Why a call to the server did not succeed.
#[derive(Debug)]
pub enum ClientError {
    /// No connection could be made.
    Connect(Box<dyn Error + Send + Sync>),
    /// The connection of a take stream failed before the stream began.
    Transport(hyper::Error),
    /// A request failed under way; the server may have carried it out.
    Request(hyper_util::client::legacy::Error),
    /// The answer could not be read to its end.
    Answer(Box<dyn Error + Send + Sync>),
    /// No answer came in time; the server may have carried the request out.
    TimedOut(Duration),
    /// The server answered, but not with what was asked for.
    Refused {
        /// Its status.
        status: StatusCode,
        /// What it said, as far as it said anything.
        message: String,
    },
    /// The server answered a take request with something else than a stream of jobs.
    NotAStream,
    /// The request cannot be put into words that HTTP knows.
    Unsendable(Box<dyn Error + Send + Sync>),
}

impl ClientError {
    /// Whether the server may have carried the request out all the same.
    pub fn may_have_arrived(&self) -> bool {
        match self {
            Self::Connect(_) | Self::NotAStream | Self::Unsendable(_) => false,
            // An error of the server, or of a proxy that lost the answer; what a client error refuses is not done.
            Self::Refused { status, .. } => !status.is_client_error(),
            Self::Transport(_) | Self::Request(_) | Self::Answer(_) | Self::TimedOut(_) => true,
        }
    }

    /// Whether the same call may succeed later: everything but a client error (4xx) of the server.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Refused { status, .. } => !status.is_client_error(),
            Self::Unsendable(_) => false,
            _ => true,
        }
    }
}

impl Retryable for ClientError {
    fn is_retryable(&self) -> bool {
        Self::is_retryable(self)
    }
}

impl fmt::Display for ClientError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(_) => f.write_str("cannot connect"),
            Self::Transport(_) | Self::Request(_) => f.write_str("the request failed"),
            Self::Answer(_) => f.write_str("the answer broke off"),
            Self::TimedOut(limit) => write!(f, "no answer within {}", humantime::format_duration(*limit)),
            Self::Refused { status, message } if message.is_empty() => write!(f, "the server answered {status}"),
            Self::Refused { status, message } => write!(f, "the server answered {status}: {message}"),
            Self::NotAStream => f.write_str("what answers there is no Zizq server: it sent no stream of jobs"),
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
            Self::TimedOut(_) | Self::Refused { .. } | Self::NotAStream => None,
        }
    }
}
