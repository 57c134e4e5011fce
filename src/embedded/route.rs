//! [`Route`]: the endpoint that is selected by a method and a path.
//!
//! A path is split before its parts are percent-decoded, so an encoded slash does not split an id. A known path with an
//! unsupported method gets a 405, and an unknown path gets a 404.

use hyper::Method;
use percent_encoding::percent_decode_str;

use super::answer::Rejection;

/// The endpoint of a request.
#[derive(Debug, PartialEq)]
pub(super) enum Route {
    /// `GET /health`
    Health,
    /// `GET /version`
    Version,
    /// `GET /queues`
    Queues,
    /// `POST /jobs`
    Enqueue,
    /// `POST /jobs/bulk`
    EnqueueBulk,
    /// `GET /jobs`
    List,
    /// `GET /jobs/count`
    Count,
    /// `PATCH /jobs`
    PatchMatching,
    /// `DELETE /jobs`
    DeleteMatching,
    /// `GET /jobs/take`
    Take,
    /// `GET /jobs/{id}`
    Get(String),
    /// `PATCH /jobs/{id}`
    Patch(String),
    /// `DELETE /jobs/{id}`
    Delete(String),
    /// `POST /jobs/{id}/success`
    Complete(String),
    /// `POST /jobs/success`
    CompleteBulk,
    /// `POST /jobs/{id}/failure`
    Fail(String),
    /// `GET /jobs/{id}/errors`
    Errors(String),
    /// `GET /jobs/{id}/errors/{attempt}`
    Error(String, u32),
    /// `POST /reset`
    Reset,
}

impl Route {
    /// Parses a method and a path. `HEAD` is treated as `GET`, because hyper omits the body of the answer to a `HEAD`
    /// request.
    pub(super) fn parse(method: &Method, path: &str) -> Result<Self, Rejection> {
        let method = if method == Method::HEAD { &Method::GET } else { method };
        let path = path.strip_prefix('/').unwrap_or(path);
        match path.split('/').collect::<Vec<_>>()[..] {
            ["jobs"] => Self::jobs(method),
            ["jobs", id] => Self::jobs_child(method, id),
            ["jobs", id, rest] if !id.is_empty() => Self::of_job(method, id, rest),
            ["jobs", id, "errors", attempt] if !id.is_empty() => match *method {
                Method::GET => Ok(Self::Error(decode(id)?, number(attempt)?)),
                _ => Err(Rejection::WrongMethod("GET,HEAD")),
            },
            [name] => Self::top_level(method, name),
            _ => Err(Rejection::NotFound("not found")),
        }
    }

    /// Parses a path of one segment, other than `/jobs`.
    fn top_level(method: &Method, name: &str) -> Result<Self, Rejection> {
        match (name, method) {
            ("health", &Method::GET) => Ok(Self::Health),
            ("version", &Method::GET) => Ok(Self::Version),
            ("queues", &Method::GET) => Ok(Self::Queues),
            ("health" | "version" | "queues", _) => Err(Rejection::WrongMethod("GET,HEAD")),
            ("reset", &Method::POST) => Ok(Self::Reset),
            ("reset", _) => Err(Rejection::WrongMethod("POST")),
            _ => Err(Rejection::NotFound("not found")),
        }
    }

    /// Returns the route for a method on `/jobs`.
    fn jobs(method: &Method) -> Result<Self, Rejection> {
        match *method {
            Method::GET => Ok(Self::List),
            Method::POST => Ok(Self::Enqueue),
            Method::PATCH => Ok(Self::PatchMatching),
            Method::DELETE => Ok(Self::DeleteMatching),
            _ => Err(Rejection::WrongMethod("GET,HEAD,POST,PATCH,DELETE")),
        }
    }

    /// Parses a path `/jobs/{name}`. A fixed name such as `bulk` is never an id, even with a method that is allowed only
    /// for ids.
    fn jobs_child(method: &Method, name: &str) -> Result<Self, Rejection> {
        match (name, method) {
            ("", _) => Err(Rejection::NotFound("not found")),
            ("take", &Method::GET) => Ok(Self::Take),
            ("count", &Method::GET) => Ok(Self::Count),
            ("take" | "count", _) => Err(Rejection::WrongMethod("GET,HEAD")),
            ("bulk", &Method::POST) => Ok(Self::EnqueueBulk),
            ("success", &Method::POST) => Ok(Self::CompleteBulk),
            ("bulk" | "success", _) => Err(Rejection::WrongMethod("POST")),
            (id, &Method::GET) => Ok(Self::Get(decode(id)?)),
            (id, &Method::PATCH) => Ok(Self::Patch(decode(id)?)),
            (id, &Method::DELETE) => Ok(Self::Delete(decode(id)?)),
            _ => Err(Rejection::WrongMethod("GET,HEAD,PATCH,DELETE")),
        }
    }

    /// Parses a path `/jobs/{id}/{rest}`.
    fn of_job(method: &Method, id: &str, rest: &str) -> Result<Self, Rejection> {
        match (rest, method) {
            ("success", &Method::POST) => Ok(Self::Complete(decode(id)?)),
            ("failure", &Method::POST) => Ok(Self::Fail(decode(id)?)),
            ("success" | "failure", _) => Err(Rejection::WrongMethod("POST")),
            ("errors", &Method::GET) => Ok(Self::Errors(decode(id)?)),
            ("errors", _) => Err(Rejection::WrongMethod("GET,HEAD")),
            _ => Err(Rejection::NotFound("not found")),
        }
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
        let route = Route::parse(&Method::POST, "/jobs/a%20b/success").unwrap();
        assert_eq!(route, Route::Complete("a b".to_owned()));
    }

    #[test]
    fn a_fixed_name_is_not_an_id() {
        assert!(matches!(Route::parse(&Method::GET, "/jobs/bulk"), Err(Rejection::WrongMethod(_))));
        assert_eq!(Route::parse(&Method::GET, "/jobs/count").unwrap(), Route::Count);
    }

    #[test]
    fn an_unknown_path_is_not_found() {
        for path in ["/nope", "/jobs/", "//jobs", "/jobs/a/b", "/jobs/a/b/c/d", "/"] {
            assert!(matches!(Route::parse(&Method::GET, path), Err(Rejection::NotFound(_))), "{path}");
        }
    }
}
