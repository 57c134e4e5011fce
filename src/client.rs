//! [`Client`]: the calls of the Zizq HTTP API that a worker makes.

use std::error::Error;
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderValue, LOCATION, USER_AGENT};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::client::legacy::Client as PooledClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioIo};
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;
use tower_service::Service;

use crate::backoff::Retryable;
use crate::job::{Failure, JobId};
use crate::stream::TakeStream;

/// Where a Zizq server listens unless told otherwise.
pub const DEFAULT_URL: &str = "http://localhost:7890";

/// How long a server may take to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long it may take to answer a request; the body of the take stream is not part of it.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// After how much silence the kernel asks whether the peer still lives.
const TCP_KEEPALIVE: Duration = Duration::from_secs(15);

/// More of an answer than this is not read; all that the server has to say to a worker is shorter.
const MAX_ANSWER_BYTES: usize = 1024 * 1024;

/// What a path segment or query value may hold as it is (RFC 3986, unreserved).
const UNRESERVED: AsciiSet = NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// Where the server is: `http` or `https`, a host, and maybe a port and a path prefix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerUrl(Uri);

impl Default for ServerUrl {
    fn default() -> Self {
        Self(Uri::from_static(DEFAULT_URL))
    }
}

impl FromStr for ServerUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wanted = || format!("url must be http://HOST[:PORT][/PREFIX] or https://… (got {text:?})");
        let uri: Uri = text.trim_end_matches('/').parse().map_err(|_| wanted())?;
        let authority = uri.authority().ok_or_else(wanted)?;
        let fits = matches!(uri.scheme_str(), Some("http" | "https"))
            && !authority.host().is_empty()
            && !authority.as_str().contains('@')
            && uri.query().is_none()
            // Nobody can be reached at port 0, and an embedded server there would be at another one.
            && authority.port_u16() != Some(0)
            && (authority.port_u16().is_some() || authority.as_str() == authority.host());
        if fits { Ok(Self(uri)) } else { Err(wanted()) }
    }
}

impl fmt::Display for ServerUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_string().trim_end_matches('/'))
    }
}

impl ServerUrl {
    /// The host name or address, without brackets.
    pub fn host(&self) -> &str {
        self.0.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']')
    }

    /// The port, by the scheme when none is written.
    pub fn port(&self) -> u16 {
        self.0.port_u16().unwrap_or(if self.is_https() { 443 } else { 80 })
    }

    /// Whether the connection is encrypted.
    pub fn is_https(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }

    /// The part of each request's path that comes before the API's own.
    pub fn prefix(&self) -> &str {
        self.0.path().trim_end_matches('/')
    }
}

/// What the server calls a worker in its log: a legal header value. `HOSTNAME-PID` by default.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WorkerId(HeaderValue);

impl FromStr for WorkerId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let value = HeaderValue::from_str(text.trim()).ok().filter(|value| !value.is_empty() && value.to_str().is_ok());
        value.map(Self).ok_or_else(|| format!("worker_id must be printable ASCII, and not empty (got {text:?})"))
    }
}

impl Default for WorkerId {
    fn default() -> Self {
        let (host, pid) = (gethostname::gethostname(), std::process::id());
        format!("{}-{pid}", host.to_string_lossy()).parse().unwrap_or_else(|_| Self(HeaderValue::from(pid)))
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.to_str().unwrap_or_default())
    }
}

/// A client for one server, under one worker id. Reports share pooled connections; each take stream has its own.
#[derive(Debug)]
pub struct Client {
    url: ServerUrl,
    worker_id: WorkerId,
    connector: HttpConnector,
    reports: PooledClient<HttpConnector, Full<Bytes>>,
}

/// What the server made of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Acceptance {
    /// It counts.
    Accepted,
    /// The job was not in flight: reported before, or handed out again since.
    AlreadyHandled,
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
    pub fn new(url: ServerUrl, worker_id: WorkerId) -> Self {
        let mut connector = HttpConnector::new();
        connector.enforce_http(false);
        connector.set_nodelay(true);
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        connector.set_keepalive(Some(TCP_KEEPALIVE));
        let reports = PooledClient::builder(TokioExecutor::new()).build(connector.clone());
        Self { url, worker_id, connector, reports }
    }

    /// Where it connects to.
    pub fn url(&self) -> &ServerUrl {
        &self.url
    }

    /// Opens a take stream. At most `prefetch` unreported jobs are held over it; no queues means all queues.
    ///
    /// # Errors
    /// When no connection can be made, or the server does not answer with a stream.
    pub async fn take(&self, queues: &[String], prefetch: usize) -> Result<TakeStream, ClientError> {
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
                StatusCode::OK => Ok(TakeStream::new(response.into_body(), connection)),
                _ => Err(refusal(response).await),
            }
        })
        .await
    }

    async fn connect(&self) -> Result<TokioIo<TcpStream>, ClientError> {
        let connected = self.connector.clone().call(self.url.0.clone()).await;
        connected.map_err(|error| ClientError::Connect(error.into()))
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
        request.headers_mut().insert(ACCEPT, HeaderValue::from_static("application/x-ndjson"));
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

    async fn post(&self, path: &str, body: &impl Serialize) -> Result<Response<Incoming>, ClientError> {
        let body = serde_json::to_vec(body).map_err(invalid)?;
        let mut request = self.request(Method::POST, path, body.into())?;
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
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
            .uri(format!("{}{path}", self.url))
            .header(USER_AGENT, concat!("zizq-worker/", env!("CARGO_PKG_VERSION")))
            .header("worker-id", &self.worker_id.0)
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

async fn within_request_timeout<T>(call: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    tokio::time::timeout(REQUEST_TIMEOUT, call).await.unwrap_or(Err(ClientError::TimedOut(REQUEST_TIMEOUT)))
}

async fn read(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let collected = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect();
    within_request_timeout(async { collected.await.map_err(ClientError::Answer) }).await.map(|body| body.to_bytes())
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
    /// The request cannot be put into words that HTTP knows.
    Unsendable(Box<dyn Error + Send + Sync>),
}

impl ClientError {
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
            Self::TimedOut(_) | Self::Refused { .. } => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(url: &str) -> Client {
        Client::new(url.parse().unwrap(), "w-1".parse().unwrap())
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
    fn urls_that_cannot_work_are_refused() {
        for bad in [
            "",
            "localhost:7890",
            "ftp://h",
            "http://",
            "http://u:p@h",
            "http://h?x=1",
            "http://h:99999",
            "http://h:0",
            "/x",
        ] {
            let error = bad.parse::<ServerUrl>().unwrap_err();
            assert!(error.starts_with("url must be http://HOST"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_url_knows_its_parts() {
        let url: ServerUrl = "https://[::1]/q".parse().unwrap();
        assert_eq!((url.host(), url.port(), url.prefix(), url.is_https()), ("::1", 443, "/q", true));
        assert_eq!("http://h:7890/".parse::<ServerUrl>().unwrap().to_string(), "http://h:7890");
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
