//! [`Client`]: the calls of the Zizq HTTP API that a worker makes.

mod connector;
mod error;
mod skim;
pub(crate) mod tls;
mod url;

use std::error::Error;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderValue, LOCATION, USER_AGENT};
use hyper::rt::{Read, Write};
use hyper::{Method, Request, Response, StatusCode};
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as PooledClient;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use tokio_util::task::AbortOnDropHandle;
use tower_service::Service;

use crate::job::{Failure, JobId};
use crate::stream::{StreamLimits, TakeStream};

use connector::Dialer;

pub use connector::Connector;
pub use error::ClientError;
use skim::Skimmer;
pub use tls::Tls;
pub use url::{DEFAULT_URL, ServerUrl, WorkerId};

/// The type of a take stream.
const NDJSON: &str = "application/x-ndjson";

/// How long the server may take to answer a request; the body of the take stream is not part of it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How often an HTTP/2 connection with requests under way is asked for a sign of life, and how long that may take: all
/// reports share it, and would all time out on a dead one, again and again.
const HTTP2_KEEPALIVE: Duration = Duration::from_secs(10);

/// More of an answer than this is not read; all that the server has to say to a worker is shorter.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// What a path segment or query value may hold as it is (RFC 3986, unreserved).
const UNRESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// A client for one server, under one worker id. Reports share pooled connections; each take stream has its own.
#[derive(Debug)]
pub struct Client {
    url: ServerUrl,
    /// The same, in front of a path.
    base: String,
    worker_id: WorkerId,
    connector: HttpsConnector<Dialer>,
    reports: PooledClient<HttpsConnector<Dialer>, Full<Bytes>>,
}

/// What the server made of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceptance {
    /// It counts.
    Accepted,
    /// The job was not in flight: reported before, or handed out again since.
    AlreadyHandled,
}

/// What the server says of a job, as far as a report depends on it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct JobState {
    /// `scheduled`, `ready`, `in_flight`, `completed` or `dead`.
    pub status: String,
    /// How many attempts have failed.
    pub attempts: u32,
}

impl JobState {
    /// Whether it will not be tried again.
    pub fn is_over(&self) -> bool {
        matches!(self.status.as_str(), "completed" | "dead")
    }

    /// Whether it is being tried.
    pub fn is_in_flight(&self) -> bool {
        self.status == "in_flight"
    }
}

#[derive(Serialize)]
struct Successes<'a> {
    ids: &'a [JobId],
}

#[derive(Deserialize)]
struct NotFound {
    not_found: Vec<String>,
}

impl Client {
    /// A client that has not connected yet.
    pub fn new(url: ServerUrl, worker_id: WorkerId, tls: &Tls, connector: &Connector) -> Self {
        let dialer = connector.dialer(&url);
        let connector = HttpsConnector::from((dialer.clone(), tls.speaking(&["http/1.1"])));
        let pooled = HttpsConnector::from((dialer, tls.speaking(&["h2", "http/1.1"])));
        let mut reports = PooledClient::builder(TokioExecutor::new());
        reports.timer(TokioTimer::new()).pool_timer(TokioTimer::new());
        reports.http2_keep_alive_interval(HTTP2_KEEPALIVE).http2_keep_alive_timeout(HTTP2_KEEPALIVE);
        let reports = reports.build(pooled);
        Self { base: url.to_string(), url, worker_id, connector, reports }
    }

    /// Where it connects to.
    pub fn url(&self) -> &ServerUrl {
        &self.url
    }

    /// Opens a take stream. At most `prefetch` unreported jobs are held over it; no queues means all queues.
    ///
    /// # Errors
    /// When no connection can be made, or the server does not answer with a stream.
    pub async fn take(
        &self,
        queues: &[String],
        prefetch: usize,
        limits: StreamLimits,
    ) -> Result<TakeStream, ClientError> {
        within_request_timeout(async {
            let (mut sender, connection) =
                http1::handshake(self.connect().await?).await.map_err(ClientError::Transport)?;
            let connection = AbortOnDropHandle::new(tokio::spawn(async {
                // Its end, good or bad, is seen by the body.
                let _ = connection.await;
            }));
            let sent = sender.send_request(self.take_request(queues, prefetch)?).await;
            let response = sent.map_err(ClientError::Transport)?;
            match response.status() {
                StatusCode::OK if is_ndjson(&response) => Ok(TakeStream::new(response.into_body(), connection, limits)),
                StatusCode::OK => Err(ClientError::NotAStream),
                _ => Err(refusal(response).await),
            }
        })
        .await
    }

    async fn connect(&self) -> Result<impl Read + Write + Unpin + use<>, ClientError> {
        let connected = self.connector.clone().call(self.url.uri()).await;
        connected.map_err(ClientError::Connect)
    }

    fn take_request(&self, queues: &[String], prefetch: usize) -> Result<Request<Full<Bytes>>, ClientError> {
        let names: Vec<String> = queues.iter().map(|queue| encode(queue)).collect();
        let filter = if names.is_empty() { String::new() } else { format!("&queue={}", names.join(",")) };
        let mut request =
            self.request(Method::GET, &format!("/jobs/take?prefetch={prefetch}{filter}"), Bytes::new())?;
        // A connection of our own wants what a pool would add: the host, and the path alone as the target.
        let host = request.uri().authority().map(|authority| authority.as_str().to_owned()).unwrap_or_default();
        let target = request.uri().path_and_query().map(|target| target.as_str().to_owned()).unwrap_or_default();
        *request.uri_mut() = target.parse().map_err(invalid)?;
        request.headers_mut().insert(HOST, host.parse().map_err(invalid)?);
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static(NDJSON));
        Ok(request)
    }

    /// Reports jobs as done, in one request. Returns those that were not in flight any more; all others count.
    ///
    /// # Errors
    /// When the request fails, or the server refuses it as a whole.
    pub async fn success(&self, ids: &[JobId]) -> Result<Vec<JobId>, ClientError> {
        let response = self.post("/jobs/success", &Successes { ids }).await?;
        match response.status() {
            status if status.is_success() => Ok(Vec::new()),
            StatusCode::UNPROCESSABLE_ENTITY => {
                let body = read(response).await?;
                let known: Result<NotFound, _> = serde_json::from_slice(&body);
                let Ok(known) = known else { return Err(refused(StatusCode::UNPROCESSABLE_ENTITY, &body)) };
                Ok(known.not_found.iter().map(|id| JobId::from(id.as_str())).collect())
            }
            _ => Err(refusal(response).await),
        }
    }

    /// Reports a job as failed.
    ///
    /// # Errors
    /// When the request fails, or the server refuses it.
    pub async fn failure(&self, id: &JobId, failure: &Failure) -> Result<Acceptance, ClientError> {
        let response = self.post(&format!("/jobs/{}/failure", encode(id.as_str())), failure).await?;
        match response.status() {
            status if status.is_success() => Ok(Acceptance::Accepted),
            StatusCode::NOT_FOUND => Ok(Acceptance::AlreadyHandled),
            _ => Err(refusal(response).await),
        }
    }

    /// What the server says of a job; nothing if it does not have it.
    ///
    /// # Errors
    /// When the request fails, or the server refuses it.
    pub async fn job(&self, id: &JobId) -> Result<Option<JobState>, ClientError> {
        let response =
            self.send(self.request(Method::GET, &format!("/jobs/{}", encode(id.as_str())), Bytes::new())?).await?;
        match response.status() {
            status if status.is_success() => {
                let body = skim(response.into_body()).await?;
                serde_json::from_slice(body.kept()).map(Some).map_err(|error| ClientError::Answer(error.into()))
            }
            StatusCode::NOT_FOUND => Ok(None),
            _ => Err(refusal(response).await),
        }
    }

    /// The server's version.
    ///
    /// # Errors
    /// When the request fails, or the answer names no version.
    pub async fn version(&self) -> Result<String, ClientError> {
        #[derive(Deserialize)]
        struct Answer {
            version: String,
        }
        let response = self.send(self.request(Method::GET, "/version", Bytes::new())?).await?;
        if !response.status().is_success() {
            return Err(refusal(response).await);
        }
        let answer: Answer =
            serde_json::from_slice(&read(response).await?).map_err(|error| ClientError::Answer(error.into()))?;
        Ok(answer.version)
    }

    async fn post(&self, path: &str, body: &impl Serialize) -> Result<Response<Incoming>, ClientError> {
        let body = serde_json::to_vec(body).map_err(invalid)?;
        let mut request = self.request(Method::POST, path, body.into())?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        self.send(request).await
    }

    async fn send(&self, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, ClientError> {
        within_request_timeout(async {
            self.reports.request(request).await.map_err(|error| {
                if error.is_connect() { ClientError::Connect(error.into()) } else { ClientError::Request(error) }
            })
        })
        .await
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Result<Request<Full<Bytes>>, ClientError> {
        Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header(USER_AGENT, concat!("zizq-worker/", env!("CARGO_PKG_VERSION")))
            .header("worker-id", self.worker_id.header())
            .body(Full::new(body))
            .map_err(invalid)
    }
}

fn encode(text: &str) -> String {
    utf8_percent_encode(text, &UNRESERVED).to_string()
}

fn invalid(error: impl Into<Box<dyn Error + Send + Sync>>) -> ClientError {
    ClientError::Unsendable(error.into())
}

/// What a page of a proxy, or of some other server altogether, is not.
fn is_ndjson(response: &Response<Incoming>) -> bool {
    let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content_type.is_some_and(|content_type| content_type.starts_with(NDJSON))
}

async fn within_request_timeout<T>(call: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    tokio::time::timeout(REQUEST_TIMEOUT, call).await.unwrap_or(Err(ClientError::TimedOut(REQUEST_TIMEOUT)))
}

async fn read(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let collected = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect();
    within_request_timeout(async { collected.await.map_err(ClientError::Answer) }).await.map(|body| body.to_bytes())
}

/// Reads a job without its payload, which may be larger than all that is held here.
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

/// An answer that is neither success nor anything the call expects, as an error with what the server said.
async fn refusal(response: Response<Incoming>) -> ClientError {
    let status = response.status();
    if let Some(location) = response.headers().get(LOCATION).filter(|_| status.is_redirection()) {
        let message = format!("redirects are not followed, and this one leads to {location:?}");
        return ClientError::Refused { status, message };
    }
    match read(response).await {
        Ok(body) => refused(status, &body),
        Err(_) => refused(status, b""),
    }
}

fn refused(status: StatusCode, body: &[u8]) -> ClientError {
    #[derive(Deserialize)]
    struct Answer {
        error: String,
    }
    let message = serde_json::from_slice(body).map_or_else(
        |_| String::from_utf8_lossy(body).lines().next().unwrap_or_default().chars().take(200).collect(),
        |answer: Answer| answer.error,
    );
    ClientError::Refused { status, message }
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
    fn queue_names_are_percent_encoded_and_the_commas_between_them_are_not() {
        let (_, target) = take_target("http://h", &["a b/c", "ü&x"]);
        assert_eq!(target, "/jobs/take?prefetch=8&queue=a%20b%2Fc,%C3%BC%26x");
    }

    #[test]
    fn client_errors_of_the_server_are_final_and_all_else_is_not() {
        let refused =
            |code| ClientError::Refused { status: StatusCode::from_u16(code).unwrap(), message: String::new() };
        assert!(!refused(400).is_retryable());
        assert!(refused(503).is_retryable() && refused(302).is_retryable());
        assert!(ClientError::TimedOut(REQUEST_TIMEOUT).is_retryable());
    }

    #[test]
    fn a_refusal_says_what_the_server_said() {
        let error = refused(StatusCode::BAD_REQUEST, br#"{"error":"invalid prefetch"}"#);
        assert_eq!(error.to_string(), "the server answered 400 Bad Request: invalid prefetch");
        let error = refused(StatusCode::BAD_GATEWAY, b"<html>\n<body>");
        assert_eq!(error.to_string(), "the server answered 502 Bad Gateway: <html>");
    }
}
