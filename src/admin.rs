//! [`AdminServer`]: serves the worker's health, status and metrics over HTTP, and an HTML status page.

mod inspector;
mod page;

use std::convert::Infallible;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::header::{REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tracing::{debug, info, warn};

pub(crate) use inspector::Inspector;

/// Maximum number of open connections. Further clients wait. Without a limit, many clients could use up the worker's file
/// descriptors.
const MAX_CONNECTIONS: usize = 64;

/// Time limit of a connection, which serves one request. Without a time limit, silent clients could occupy all
/// `MAX_CONNECTIONS` slots.
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after a failed accept. The usual cause is a lack of file descriptors, so immediate retries would fail in a busy loop.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Content type of the text format of Prometheus.
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

const JSON: &str = "application/json";

/// Headers of every response. They forbid caching, content sniffing, referrers, and the use of a response by other sites.
const HEADERS: [(HeaderName, &str); 4] = [
    (CACHE_CONTROL, "no-store"),
    (X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (REFERRER_POLICY, "no-referrer"),
    (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
];

/// An admin server that listens, and serves requests once `serve` is called.
#[derive(Debug)]
pub(crate) struct AdminServer(TcpListener);

impl AdminServer {
    /// Starts to listen on an address.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub(crate) async fn bind(address: SocketAddr) -> io::Result<Self> {
        TcpListener::bind(address).await.map(Self)
    }

    /// Returns the URL at which a browser on this machine can open the status page.
    #[cfg_attr(not(feature = "embedded"), expect(dead_code, reason = "only a worker with an embedded server logs it"))]
    pub(crate) fn page_url(&self) -> io::Result<String> {
        let mut address = self.0.local_addr()?;
        if address.ip().is_unspecified() {
            address.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
        }
        Ok(format!("http://{address}/"))
    }

    /// Serves requests until the future is dropped.
    pub(crate) async fn serve(self, inspector: Arc<Inspector>) {
        if let Ok(address) = self.0.local_addr() {
            info!(%address, "admin server listening");
        }
        let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        loop {
            // The error case never happens, because the semaphore is never closed.
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            match self.0.accept().await {
                Ok((stream, _)) => {
                    let inspector = Arc::clone(&inspector);
                    tokio::spawn(async move {
                        answer_one(stream, inspector).await;
                        drop(place);
                    });
                }
                Err(error) => {
                    warn!(%error, "admin server cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }
}

async fn answer_one(stream: TcpStream, inspector: Arc<Inspector>) {
    let service = service_fn(|request| std::future::ready(Ok::<_, Infallible>(answer(&request, &inspector))));
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(None).keep_alive(false);
    match timeout(CONNECTION_TIMEOUT, server.serve_connection(TokioIo::new(stream), service)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "connection of the admin server failed"),
        Err(_) => debug!("connection of the admin server took too long"),
    }
}

fn answer(request: &Request<Incoming>, inspector: &Inspector) -> Response<Full<Bytes>> {
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refusal = json_body(StatusCode::METHOD_NOT_ALLOWED, &json!({"error": "only GET and HEAD"}));
        refusal.headers_mut().insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return refusal;
    }
    match request.uri().path() {
        "/live" => json_body(StatusCode::OK, &json!({"live": true})),
        "/ready" => {
            let reasons = inspector.unready();
            let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            json_body(status, &json!({"ready": reasons.is_empty(), "reasons": reasons}))
        }
        "/" => page_body(),
        "/status" => body(StatusCode::OK, JSON, inspector.status() + "\n"),
        "/metrics" => body(StatusCode::OK, PROMETHEUS, inspector.metrics()),
        _ => {
            let error = "not found; there are / (a page), /live, /ready, /status and /metrics";
            json_body(StatusCode::NOT_FOUND, &json!({"error": error}))
        }
    }
}

fn json_body(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    body(status, JSON, format!("{value}\n"))
}

fn page_body() -> Response<Full<Bytes>> {
    let mut response = body(StatusCode::OK, "text/html; charset=utf-8", page::text());
    response.headers_mut().insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(page::POLICY));
    response
}

fn body(status: StatusCode, content_type: &'static str, text: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(text.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    for (name, value) in HEADERS {
        response.headers_mut().insert(name, HeaderValue::from_static(value));
    }
    response
}
