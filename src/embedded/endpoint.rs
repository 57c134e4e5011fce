//! [`Endpoint`]: the endpoint that is selected by a method and a path.
//!
//! A path is split before its parts are percent-decoded, so an encoded slash does not split an id. A known path with an
//! unsupported method gets a 405, and an unknown path gets a 404.

use hyper::Method;
use percent_encoding::percent_decode_str;

use super::answer::Rejection;

/// The endpoint of a request.
#[derive(Debug, PartialEq)]
pub(super) enum Endpoint {
    Health,
    Version,
    Queues,
    Enqueue,
    EnqueueBulk,
    List,
    Count,
    PatchMatching,
    DeleteMatching,
    Take,
    Get(String),
    Patch(String),
    Delete(String),
    Complete(String),
    CompleteBulk,
    Fail(String),
    Errors(String),
    Error(String, u32),
    Reset,
}

impl Endpoint {
    /// Parses a method and a path. `HEAD` is treated as `GET`, because hyper omits the body of the answer to a `HEAD`
    /// request. A fixed name such as `bulk` is never an id, so `DELETE /jobs/bulk` gets a 405.
    pub(super) fn parse(method: &Method, path: &str) -> Result<Self, Rejection> {
        let method = if method == Method::HEAD { &Method::GET } else { method };
        let path = path.strip_prefix('/').unwrap_or(path);
        let segments: Vec<&str> = path.split('/').collect();
        Ok(match (method, &segments[..]) {
            (&Method::GET, ["health"]) => Self::Health,
            (&Method::GET, ["version"]) => Self::Version,
            (&Method::GET, ["queues"]) => Self::Queues,
            (_, ["health" | "version" | "queues"]) => return Err(Rejection::WrongMethod("GET,HEAD")),
            (&Method::POST, ["reset"]) => Self::Reset,
            (_, ["reset"]) => return Err(Rejection::WrongMethod("POST")),

            (&Method::GET, ["jobs"]) => Self::List,
            (&Method::POST, ["jobs"]) => Self::Enqueue,
            (&Method::PATCH, ["jobs"]) => Self::PatchMatching,
            (&Method::DELETE, ["jobs"]) => Self::DeleteMatching,
            (_, ["jobs"]) => return Err(Rejection::WrongMethod("GET,HEAD,POST,PATCH,DELETE")),
            (_, ["jobs", "", ..]) => return Err(Rejection::NotFound("not found")),
            (&Method::GET, ["jobs", "take"]) => Self::Take,
            (&Method::GET, ["jobs", "count"]) => Self::Count,
            (_, ["jobs", "take" | "count"]) => return Err(Rejection::WrongMethod("GET,HEAD")),
            (&Method::POST, ["jobs", "bulk"]) => Self::EnqueueBulk,
            (&Method::POST, ["jobs", "success"]) => Self::CompleteBulk,
            (_, ["jobs", "bulk" | "success"]) => return Err(Rejection::WrongMethod("POST")),

            (&Method::GET, ["jobs", id]) => Self::Get(decode(id)?),
            (&Method::PATCH, ["jobs", id]) => Self::Patch(decode(id)?),
            (&Method::DELETE, ["jobs", id]) => Self::Delete(decode(id)?),
            (_, ["jobs", _]) => return Err(Rejection::WrongMethod("GET,HEAD,PATCH,DELETE")),
            (&Method::POST, ["jobs", id, "success"]) => Self::Complete(decode(id)?),
            (&Method::POST, ["jobs", id, "failure"]) => Self::Fail(decode(id)?),
            (_, ["jobs", _, "success" | "failure"]) => return Err(Rejection::WrongMethod("POST")),
            (&Method::GET, ["jobs", id, "errors"]) => Self::Errors(decode(id)?),
            (&Method::GET, ["jobs", id, "errors", attempt]) => Self::Error(decode(id)?, number(attempt)?),
            (_, ["jobs", _, "errors"] | ["jobs", _, "errors", _]) => return Err(Rejection::WrongMethod("GET,HEAD")),
            _ => return Err(Rejection::NotFound("not found")),
        })
    }
}

/// Percent-decodes an id. Rejects an id that is not UTF-8. Any other invalid id is accepted here and gets a 404 later,
/// when the job is looked up.
fn decode(id: &str) -> Result<String, Rejection> {
    let decoded = percent_decode_str(id).decode_utf8();
    let text = decoded.map_err(|_| Rejection::BadRequest("id is not UTF-8".to_owned()))?;
    Ok(text.into_owned())
}

/// Parses the number of an attempt. A zero is accepted here and gets a 404 later, because attempts are counted from 1.
fn number(attempt: &str) -> Result<u32, Rejection> {
    let error = |_| Rejection::BadRequest(format!("attempt is not a number: {attempt:?}"));
    attempt.parse().map_err(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_percent_decoded() {
        let endpoint = Endpoint::parse(&Method::POST, "/jobs/a%20b/success").unwrap();
        assert_eq!(endpoint, Endpoint::Complete("a b".to_owned()));
    }

    #[test]
    fn an_unknown_path_is_not_found() {
        for path in ["/nope", "/jobs/", "//jobs", "/jobs/a/b", "/jobs/a/b/c/d", "/"] {
            assert!(matches!(Endpoint::parse(&Method::GET, path), Err(Rejection::NotFound(_))), "{path}");
        }
    }
}
