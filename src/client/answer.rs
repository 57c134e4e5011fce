//! Parses the server's answers, and distinguishes them from the answers of a proxy or another server.
//!
//! An answer settles a job only if the answer is recognisably the server's, for example a 204, the job itself in answer to a
//! failure report, or a refusal with the server's JSON `error`.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, LOCATION, RETRY_AFTER};
use hyper::{HeaderMap, Response, StatusCode};
use serde::Deserialize;
use serde_json::{Map, Value};

use super::skimmer::Skimmer;
use super::{Acceptance, ClientError, JobState, MAX_RETRY_AFTER, NDJSON, within_request_timeout};
use crate::job::JobId;

/// The maximum size of an answer that is read whole. The server's answers are shorter, except for the answer to `GET /jobs/{id}`,
/// which contains the payload and is read through `Skimmer`.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;

#[derive(Deserialize)]
struct NotFound {
    not_found: Vec<String>,
}

/// The server's answer to a failure report: the failed job.
#[derive(Deserialize)]
struct FailedJob {
    id: String,
}

/// The JSON body of a refusal. The server sends only the field `error`. Gateways add other fields.
#[derive(Deserialize)]
struct Refusal {
    error: String,
    #[serde(flatten)]
    others: Map<String, Value>,
}

/// The fields that show that a refusal comes from a common gateway or framework, not from the server. Other unknown fields are
/// accepted, because a later version of the server may add them.
const FIELDS_OF_GATEWAYS: [&str; 4] = ["path", "status", "statusCode", "timestamp"];

impl Refusal {
    /// Parses a refusal by the server. Returns `None` for any other body.
    fn read(body: &[u8]) -> Option<Self> {
        let refusal: Self = serde_json::from_slice(body).ok()?;
        let is_gateways = FIELDS_OF_GATEWAYS.iter().any(|field| refusal.others.contains_key(*field));
        (!is_gateways).then_some(refusal)
    }
}

/// Reports whether the answer has the content type of a take stream, unlike a page from a proxy or another server.
pub(super) fn is_ndjson(response: &Response<Incoming>) -> bool {
    let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|content_type| content_type.starts_with(NDJSON))
}

/// Reads the answer to a bulk report of successes. Returns the ids that were not in flight.
pub(super) async fn not_found(response: Response<Incoming>) -> Result<Vec<JobId>, ClientError> {
    let status = response.status();
    if status.is_success() {
        return accepted(response, |_| false).await.map(|()| Vec::new());
    }
    // The server answers 422 for ids that are not in flight, so a 404 comes from a proxy or another server.
    if status == StatusCode::NOT_FOUND {
        let body = read(response.into_body()).await?;
        return Err(ClientError::NotTheServer { status, message: first_line(&body) });
    }
    if status != StatusCode::UNPROCESSABLE_ENTITY {
        return Err(refusal(response).await);
    }
    let (parts, body) = response.into_parts();
    let body = read(body).await?;
    match serde_json::from_slice::<NotFound>(&body) {
        Ok(known) => Ok(known.not_found.iter().map(|id| JobId::from(id.as_str())).collect()),
        Err(_) => Err(refused(status, &parts.headers, &body)),
    }
}

/// Reads the answer to a failure report about the job `id`.
pub(super) async fn acceptance(response: Response<Incoming>, id: &JobId) -> Result<Acceptance, ClientError> {
    let is_of_job =
        |body: &[u8]| serde_json::from_slice::<FailedJob>(body).is_ok_and(|failed| failed.id == id.as_str());
    match response.status() {
        status if status.is_success() => accepted(response, is_of_job).await.map(|()| Acceptance::Accepted),
        StatusCode::NOT_FOUND => denied(response).await.map(|()| Acceptance::AlreadyHandled),
        _ => Err(refusal(response).await),
    }
}

/// Reads the answer to `GET /jobs/{id}`, and skips the payload, which has no size limit. Returns `None` if the server does not
/// have the job.
pub(super) async fn job_state(response: Response<Incoming>) -> Result<Option<JobState>, ClientError> {
    match response.status() {
        status if status.is_success() => {
            let body = skim(response.into_body()).await?;
            serde_json::from_slice(body.kept()).map(Some).map_err(|error| ClientError::Answer(error.into()))
        }
        StatusCode::NOT_FOUND => denied(response).await.map(|()| None),
        _ => Err(refusal(response).await),
    }
}

/// Reads the answer to `GET /version`.
pub(super) async fn version_of(response: Response<Incoming>) -> Result<String, ClientError> {
    #[derive(Deserialize)]
    struct Version {
        version: String,
    }
    if !response.status().is_success() {
        return Err(refusal(response).await);
    }
    let body = read(response.into_body()).await?;
    let answer: Version = serde_json::from_slice(&body).map_err(|error| ClientError::Answer(error.into()))?;
    Ok(answer.version)
}

/// Reads an answer with a 2xx status. Fails unless the status is 204 or `is_the_servers` recognises the body. The body is read to
/// its end, because otherwise the connection could not be reused.
async fn accepted(response: Response<Incoming>, is_the_servers: impl Fn(&[u8]) -> bool) -> Result<(), ClientError> {
    let status = response.status();
    let body = read(response.into_body()).await?;
    if status == StatusCode::NO_CONTENT || is_the_servers(&body) {
        Ok(())
    } else {
        Err(ClientError::NotTheServer { status, message: first_line(&body) })
    }
}

/// Reads a 404. Fails unless the server itself sent the 404, because a proxy's 404 says nothing about the job.
async fn denied(response: Response<Incoming>) -> Result<(), ClientError> {
    let status = response.status();
    let body = read(response.into_body()).await?;
    match Refusal::read(&body) {
        Some(_) => Ok(()),
        None => Err(ClientError::NotTheServer { status, message: first_line(&body) }),
    }
}

/// Turns an answer with an unexpected status into an error.
pub(super) async fn refusal(response: Response<Incoming>) -> ClientError {
    let status = response.status();
    if let Some(location) = response.headers().get(LOCATION).filter(|_| status.is_redirection()) {
        let message = format!("redirects are not followed, and this one leads to {location:?}");
        return ClientError::Refused { status, message, retry_after: None };
    }
    let (parts, body) = response.into_parts();
    refused(status, &parts.headers, &read(body).await.unwrap_or_default())
}

fn refused(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> ClientError {
    match Refusal::read(body) {
        Some(Refusal { error, .. }) => {
            ClientError::Refused { status, message: error, retry_after: retry_after(headers) }
        }
        None if status == StatusCode::NOT_FOUND => ClientError::NotTheServer { status, message: first_line(body) },
        None => ClientError::Refused { status, message: first_line(body), retry_after: retry_after(headers) },
    }
}

/// Returns the first line of a body, or the title of an HTML page.
fn first_line(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let title = text.split_once("<title>").and_then(|(_, rest)| rest.split_once("</title>")).map(|(title, _)| title);
    let line = title.unwrap_or(&text).trim_start().lines().next();
    line.unwrap_or_default().chars().take(200).collect()
}

/// Reads `Retry-After`, which contains seconds or a date (RFC 9110, section 10.2.3). Returns the wait, limited to
/// `MAX_RETRY_AFTER`.
#[expect(clippy::disallowed_methods, reason = "the header's date is wall time")]
fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    let wait = match text.parse() {
        Ok(seconds) => Duration::from_secs(seconds),
        Err(_) => httpdate::parse_http_date(text).ok()?.duration_since(SystemTime::now()).unwrap_or_default(),
    };
    Some(wait.min(MAX_RETRY_AFTER))
}

async fn read(body: Incoming) -> Result<Bytes, ClientError> {
    let collected = Limited::new(body, MAX_ANSWER_BYTES).collect();
    within_request_timeout(async { Ok(collected.await.map_err(ClientError::Answer)?.to_bytes()) }).await
}

async fn skim(mut body: Incoming) -> Result<Skimmer, ClientError> {
    let reading = async {
        let mut skimmer = Skimmer::default();
        while let Some(frame) = body.frame().await {
            if let Some(data) = frame.map_err(|error| ClientError::Answer(error.into()))?.data_ref() {
                skimmer.push(data);
            }
        }
        Ok(skimmer)
    };
    within_request_timeout(reading).await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused_with(code: u16, body: &[u8]) -> ClientError {
        refused(StatusCode::from_u16(code).unwrap(), &HeaderMap::new(), body)
    }

    #[test]
    fn client_errors_that_do_not_pass_are_final() {
        for code in [400, 405, 409, 410, 413, 415, 422, 431] {
            assert!(!refused_with(code, b"").is_retryable(), "{code}");
        }
        for code in [302, 401, 403, 404, 407, 408, 421, 425, 429, 500, 503] {
            assert!(refused_with(code, b"").is_retryable(), "{code}");
        }
        assert!(ClientError::TimedOut(Duration::ZERO).is_retryable());
    }

    #[test]
    fn a_first_request_is_no_mistake_if_its_refusal_passes() {
        for code in [400, 401, 403, 404, 406] {
            assert!(refused_with(code, b"").is_mistake(), "{code}");
        }
        for code in [302, 408, 425, 429, 500, 503] {
            assert!(!refused_with(code, b"").is_mistake(), "{code}");
        }
    }

    #[test]
    fn a_404_without_the_servers_error_is_not_the_servers() {
        assert!(matches!(refused_with(404, b"<html>"), ClientError::NotTheServer { .. }));
        let gateways = br#"{"timestamp":1761750000,"status":404,"error":"Not Found","path":"/jobs/1"}"#;
        assert!(matches!(refused_with(404, gateways), ClientError::NotTheServer { .. }));
        for servers in [&br#"{"error":"job not found"}"#[..], br#"{"error":"job not found","hint":"a later server's"}"#]
        {
            assert!(matches!(refused_with(404, servers), ClientError::Refused { .. }));
        }
    }

    #[test]
    fn a_refusal_shows_the_servers_message() {
        let error = refused_with(400, br#"{"error":"invalid prefetch"}"#);
        assert_eq!(error.to_string(), "the server answered 400 Bad Request: invalid prefetch");
        let error = refused_with(502, b"<html>\n<body>");
        assert_eq!(error.to_string(), "the server answered 502 Bad Gateway: <html>");
    }

    #[test]
    #[expect(clippy::disallowed_methods, reason = "the header's date is wall time")]
    fn retry_after_is_seconds_or_a_date_and_five_minutes_at_most() {
        let wait = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers)
        };
        assert_eq!(wait("7"), Some(Duration::from_secs(7)));
        assert_eq!(wait("3600"), Some(MAX_RETRY_AFTER));
        assert_eq!(wait("soon"), None);
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:37 GMT"), Some(Duration::ZERO));
        let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(60));
        assert!((58..=60).contains(&wait(&date).unwrap().as_secs()));
    }
}
