//! [`Client`]: the calls to the Zizq HTTP API.

mod answer;
mod body;
mod connector;
mod error;
mod health;
mod skimmer;
mod stream_settings;
pub(crate) mod tls;
pub(crate) mod url;

use std::error::Error;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderValue, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as PooledClient;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio_util::task::AbortOnDropHandle;
use tower_service::Service;

use crate::job::{Failure, JobId};
use crate::stream::{StreamLimits, TakeStream};

use answer::{acceptance, is_ndjson, job_state, not_found, refusal, version_of};
use body::{Body, was_withdrawn};
pub use connector::Connector;
use connector::Dialer;
pub use error::{ClientError, MAX_RETRY_AFTER};
use health::Health;
pub(crate) use stream_settings::StreamSettings;
pub use tls::Tls;
pub use url::{DEFAULT_URL, ServerUrl, WorkerId};

/// The content type of a take stream.
const NDJSON: &str = "application/x-ndjson";

/// The time limit from the start of a request to the headers of its answer. Reading the body of the answer has a separate limit of
/// the same length, but the body of a take stream has no such limit.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// Both the interval and the timeout of HTTP/2 pings while requests are in flight. All reports share one connection, so without
/// pings they would all time out again and again on a dead connection.
const HTTP2_KEEPALIVE: Duration = Duration::from_secs(10);

/// The maximum number of failure reports in flight: enough to hide the round trip, few enough to spare the server.
const MAX_FAILURES_IN_FLIGHT: usize = 8;

/// The characters that are escaped in a path segment or query value: all except the unreserved ones (RFC 3986, section 2.3).
const UNRESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A client for one server, under one worker id. Reports share pooled connections, and each take stream has a connection of its
/// own.
#[derive(Debug)]
pub struct Client {
    url: ServerUrl,
    /// The url as text, to which paths are appended.
    base: String,
    worker_id: WorkerId,
    connector: HttpsConnector<Dialer>,
    reports: PooledClient<HttpsConnector<Dialer>, Body>,
    health: Health,
    /// Whether the server has answered a request since the client was made.
    has_answered: AtomicBool,
    failure_slots: Semaphore,
}

/// The server's answer to a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceptance {
    /// The server has recorded the report.
    Accepted,
    /// The job was not in flight, for example because it was reported before or has been requeued.
    AlreadyHandled,
}

/// The parts of a job's state on the server that matter for a report.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct JobState {
    /// `scheduled`, `ready`, `in_flight`, `completed` or `dead`.
    pub status: String,
    /// The number of failed attempts.
    pub attempts: u32,
}

impl JobState {
    /// Reports whether the job is completed or dead.
    pub fn is_over(&self) -> bool {
        matches!(self.status.as_str(), "completed" | "dead")
    }

    /// Reports whether the job is ready to be delivered.
    pub fn is_ready(&self) -> bool {
        self.status == "ready"
    }

    /// Reports whether the job is in flight.
    pub fn is_in_flight(&self) -> bool {
        self.status == "in_flight"
    }
}

#[derive(Serialize)]
struct Successes<'a> {
    ids: &'a [JobId],
}

impl Client {
    /// Returns a client for the server at `url`. Connections are opened on demand.
    pub fn new(url: ServerUrl, worker_id: WorkerId, tls: &Tls, connector: &Connector) -> Self {
        let dialer = connector.dialer(&url);
        let connector = HttpsConnector::from((dialer.clone(), tls.speaking(&["http/1.1"])));
        let pooled = HttpsConnector::from((dialer, tls.speaking(&["h2", "http/1.1"])));
        let mut reports = PooledClient::builder(TokioExecutor::new());
        reports.timer(TokioTimer::new()).pool_timer(TokioTimer::new());
        reports.http2_keep_alive_interval(HTTP2_KEEPALIVE).http2_keep_alive_timeout(HTTP2_KEEPALIVE);
        let reports = reports.build(pooled);
        let failure_slots = Semaphore::new(MAX_FAILURES_IN_FLIGHT);
        let (base, health, has_answered) = (url.to_string(), Health::default(), AtomicBool::new(false));
        Self { url, base, worker_id, connector, reports, health, has_answered, failure_slots }
    }

    /// Returns the server's url.
    pub fn url(&self) -> &ServerUrl {
        &self.url
    }

    pub(crate) fn health(&self) -> &Health {
        &self.health
    }

    /// Waits until a slot for a failure report is free. A report that waits for its retry holds no slot.
    pub(crate) async fn failure_slot(&self) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed, so the result is always `Some`.
        self.failure_slots.acquire().await.ok()
    }

    /// Opens a take stream. The server keeps at most `prefetch` unreported jobs in flight over the stream. An empty `queues`
    /// means all queues.
    ///
    /// # Errors
    /// When no connection can be made, or the server does not answer with a stream.
    pub async fn take(
        &self,
        queues: &[String],
        prefetch: usize,
        limits: StreamLimits,
    ) -> Result<TakeStream, ClientError> {
        let opened = within_request_timeout(async {
            let connected = self.connector.clone().call(self.url.uri()).await.map_err(ClientError::Connect)?;
            let (mut sender, connection) = http1::handshake(connected).await.map_err(ClientError::Transport)?;
            let connection = AbortOnDropHandle::new(tokio::spawn(async {
                // Ignore the result, because the response body reports the end of the connection and any error.
                let _ = connection.await;
            }));
            let sent = sender.send_request(self.take_request(queues, prefetch)?).await;
            let response = self.first_answer(sent.map_err(ClientError::Transport))?;
            match response.status() {
                StatusCode::OK if is_ndjson(&response) => Ok(TakeStream::new(response.into_body(), connection, limits)),
                StatusCode::OK => Err(ClientError::NotAStream),
                _ => Err(refusal(response).await),
            }
        })
        .await;
        if opened.is_ok() {
            self.health.connected();
        }
        self.health.observe(opened)
    }

    fn take_request(&self, queues: &[String], prefetch: usize) -> Result<Request<Body>, ClientError> {
        let names: Vec<String> = queues.iter().map(|queue| encode(queue)).collect();
        let filter = if names.is_empty() { String::new() } else { format!("&queue={}", names.join(",")) };
        let mut request =
            self.request(Method::GET, &format!("/jobs/take?prefetch={prefetch}{filter}"), Bytes::new())?;
        // Unlike `PooledClient`, a low-level hyper connection does not add a `Host` header, and does not reduce the target to its
        // path and query.
        let host = request.uri().authority().map(|authority| authority.as_str().to_owned()).unwrap_or_default();
        let target = request.uri().path_and_query().map(|target| target.as_str().to_owned()).unwrap_or_default();
        *request.uri_mut() = target.parse().map_err(invalid)?;
        request.headers_mut().insert(HOST, host.parse().map_err(invalid)?);
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static(NDJSON));
        Ok(request)
    }

    /// Reports jobs as succeeded, in one request. Returns the jobs that were not in flight. The server completes all other jobs.
    ///
    /// # Errors
    /// When the request fails, or the server refuses it as a whole.
    pub async fn success(&self, ids: &[JobId]) -> Result<Vec<JobId>, ClientError> {
        let request = self.post_request("/jobs/success", &Successes { ids })?;
        let reported = async { not_found(self.send(request).await?).await };
        self.health.observe(reported.await)
    }

    /// Reports a job as failed.
    ///
    /// # Errors
    /// When the request fails, or the server refuses it.
    pub async fn failure(&self, id: &JobId, failure: &Failure) -> Result<Acceptance, ClientError> {
        self.failure_if(id, failure, || true).await
    }

    /// Reports a job as failed, unless `is_wanted` returns false. `is_wanted` is called when the report is about to be sent,
    /// after any wait for a connection.
    ///
    /// # Errors
    /// When `is_wanted` returns false, the request fails, or the server refuses it.
    pub(crate) async fn failure_if(
        &self,
        id: &JobId,
        failure: &Failure,
        is_wanted: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Result<Acceptance, ClientError> {
        let mut request = self.post_request(&format!("/jobs/{}/failure", encode(id.as_str())), failure)?;
        request.body_mut().leave_only_if(is_wanted);
        let reported = async { acceptance(self.send(request).await?, id).await };
        self.health.observe(reported.await)
    }

    /// Asks for the state of a job. Returns `None` if the server does not have the job.
    ///
    /// # Errors
    /// When the request fails, or the server refuses it.
    pub async fn job(&self, id: &JobId) -> Result<Option<JobState>, ClientError> {
        let request = self.request(Method::GET, &format!("/jobs/{}", encode(id.as_str())), Bytes::new())?;
        let asked = async { job_state(self.send(request).await?).await };
        self.health.observe(asked.await)
    }

    /// Asks for the server's version.
    ///
    /// # Errors
    /// When the request fails, or the answer contains no version.
    pub async fn version(&self) -> Result<String, ClientError> {
        let request = self.request(Method::GET, "/version", Bytes::new())?;
        version_of(self.send(request).await?).await
    }

    fn post_request(&self, path: &str, body: &impl Serialize) -> Result<Request<Body>, ClientError> {
        let body = serde_json::to_vec(body).map_err(invalid)?;
        let mut request = self.request(Method::POST, path, body.into())?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(request)
    }

    async fn send(&self, request: Request<Body>) -> Result<Response<Incoming>, ClientError> {
        within_request_timeout(async {
            self.first_answer(self.reports.request(request).await.map_err(|error| match error {
                error if was_withdrawn(&error) => ClientError::Withdrawn,
                error if error.is_connect() => ClientError::Connect(error.into()),
                error => ClientError::Request(error),
            }))
        })
        .await
    }

    /// Records whether the server has answered. If a peer that has never answered closes a plain HTTP connection, the error
    /// becomes `ClosedUnanswered`, because the port may speak TLS.
    fn first_answer<T>(&self, answer: Result<T, ClientError>) -> Result<T, ClientError> {
        if answer.is_ok() {
            self.has_answered.store(true, Ordering::Relaxed);
        }
        let is_unknown = !self.url.is_https() && !self.has_answered.load(Ordering::Relaxed);
        answer.map_err(|error| match error {
            error if is_unknown && error.is_closed_connection() => ClientError::ClosedUnanswered(error.into()),
            error => error,
        })
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Body>, ClientError> {
        Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(USER_AGENT, concat!("zizq-worker/", env!("CARGO_PKG_VERSION")))
            .header("worker-id", self.worker_id.header())
            .body(Body::new(body))
            .map_err(invalid)
    }
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, &UNRESERVED).to_string()
}

fn invalid(error: impl Into<Box<dyn Error + Send + Sync>>) -> ClientError {
    ClientError::Unsendable(error.into())
}

async fn within_request_timeout<T>(call: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    tokio::time::timeout(REQUEST_TIMEOUT, call).await.unwrap_or(Err(ClientError::TimedOut(REQUEST_TIMEOUT)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(url: &str) -> Client {
        Client::new(url.parse().unwrap(), "w-1".parse().unwrap(), &Tls::default(), &Connector::default())
    }

    fn take_target(url: &str, queues: &[&str]) -> (String, String) {
        let queues: Vec<String> = queues.iter().map(|queue| (*queue).to_owned()).collect();
        let request = client(url).take_request(&queues, 8).unwrap();
        (request.headers()[HOST].to_str().unwrap().to_owned(), request.uri().to_string())
    }

    #[test]
    fn a_path_prefix_is_kept() {
        let (host, target) = take_target("http://example.org:81/zizq/", &[]);
        assert_eq!((host.as_str(), target.as_str()), ("example.org:81", "/zizq/jobs/take?prefetch=8"));
    }

    #[test]
    fn queue_names_are_percent_encoded_but_not_their_commas() {
        let (_, target) = take_target("http://h", &["a b/c", "ü&x"]);
        assert_eq!(target, "/jobs/take?prefetch=8&queue=a%20b%2Fc,%C3%BC%26x");
    }
}
