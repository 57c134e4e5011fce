//! [`Connector`]: opens a client's connections to its server, over TCP or through a function of the embedding program.

use std::error::Error;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper::Uri;
use hyper_util::client::legacy::connect::{Connected, Connection, HttpConnector};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tower_service::Service;

use super::ServerUrl;

/// The time limit for opening a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// The idle time after which the kernel sends the first keepalive probe.
const TCP_KEEPALIVE: Duration = Duration::from_secs(15);

/// The interval between keepalive probes.
const TCP_KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);

/// The number of unanswered keepalive probes after which the kernel drops the connection.
const TCP_KEEPALIVE_RETRIES: u32 = 3;

/// The time after which the kernel drops a connection with unacknowledged data. Keepalive covers only idle connections.
#[cfg(target_os = "linux")]
const TCP_USER_TIMEOUT: Duration = Duration::from_secs(30);

type BoxError = Box<dyn Error + Send + Sync>;
pub(super) type Supplier = dyn Fn(ServerUrl) -> BoxFuture<'static, io::Result<Box<dyn Stream>>> + Send + Sync;

/// A connection that can be read and written, before TLS is added. Every type with these supertraits implements `Stream`.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Connection for Box<dyn Stream> {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

/// The source of a client's connections to its server: TCP by default, or a function of the embedding program.
///
/// For an `https` url, TLS runs on top of either.
///
/// ```
/// use tokio::net::UnixStream;
/// use zizq_worker::{Connector, WorkerConfig};
///
/// let connector = Connector::new(|_url| UnixStream::connect("/run/zizq.sock"));
/// let config = WorkerConfig { connector, ..WorkerConfig::default() };
/// ```
#[derive(Clone, Default)]
pub struct Connector {
    /// The function of the embedding program, or `None` for TCP.
    supplier: Option<Arc<Supplier>>,
}

impl Connector {
    /// Returns a connector that calls `connect` for each new connection. A call is abandoned after ten seconds, which is also the
    /// limit for TCP.
    pub fn new<F, T>(connect: impl Fn(ServerUrl) -> F + Send + Sync + 'static) -> Self
    where
        F: Future<Output = io::Result<T>> + Send + 'static,
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let supplier = move |url| -> BoxFuture<'static, io::Result<Box<dyn Stream>>> {
            let connecting = connect(url);
            Box::pin(async move { Ok(Box::new(connecting.await?) as Box<dyn Stream>) })
        };
        Self { supplier: Some(Arc::new(supplier)) }
    }

    /// Returns the service that opens the connections of one client.
    pub(super) fn dialer(&self, url: &ServerUrl) -> Dialer {
        match &self.supplier {
            None => Dialer::Network(tcp()),
            Some(supplier) => Dialer::Supplied(url.clone(), Arc::clone(supplier)),
        }
    }
}

/// Two connectors are equal if both use TCP, or if they are clones of one connector.
impl PartialEq for Connector {
    fn eq(&self, other: &Self) -> bool {
        match (&self.supplier, &other.supplier) {
            (None, None) => true,
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            _ => false,
        }
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.supplier.is_some() { "Connector(supplied)" } else { "Connector(network)" })
    }
}

fn tcp() -> HttpConnector {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_keepalive(Some(TCP_KEEPALIVE));
    tcp.set_keepalive_interval(Some(TCP_KEEPALIVE_INTERVAL));
    tcp.set_keepalive_retries(Some(TCP_KEEPALIVE_RETRIES));
    #[cfg(target_os = "linux")]
    tcp.set_tcp_user_timeout(Some(TCP_USER_TIMEOUT));
    tcp
}

/// The service that opens connections for hyper's client. `HttpsConnector` adds TLS on top.
#[derive(Clone)]
pub(super) enum Dialer {
    Network(HttpConnector),
    Supplied(ServerUrl, Arc<Supplier>),
}

impl Service<Uri> for Dialer {
    type Response = TokioIo<Box<dyn Stream>>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Self::Response, BoxError>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        match self {
            Self::Network(tcp) => tcp.poll_ready(cx).map_err(Into::into),
            Self::Supplied(..) => Poll::Ready(Ok(())),
        }
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        match self {
            Self::Network(tcp) => {
                let connecting = tcp.call(uri);
                Box::pin(async move { Ok(TokioIo::new(Box::new(connecting.await?.into_inner()) as _)) })
            }
            Self::Supplied(url, supplier) => {
                let connecting = tokio::time::timeout(CONNECT_TIMEOUT, supplier(url.clone()));
                Box::pin(async move { Ok(TokioIo::new(connecting.await??)) })
            }
        }
    }
}
