//! The server: a listener and its connections.
//!
//! The server stops abruptly, not gracefully, because the worker's tests need a server that dies like a killed process.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream, ToSocketAddrs};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::api;
use super::store::Store;

/// The wait after a failed accept. The usual cause is a lack of file descriptors, so an immediate retry would fail again
/// and the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A server in this process, bound but not yet serving.
#[derive(Debug)]
pub struct EmbeddedServer {
    listener: TcpListener,
    address: SocketAddr,
    store: Store,
    tls: Option<Arc<ServerConfig>>,
}

impl EmbeddedServer {
    /// Binds `address` for a server with the jobs of `store`. Requeues the jobs that a previous server left in flight.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
    pub async fn bind(address: impl ToSocketAddrs, store: Store) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        store.with(|jobs, _| jobs.start());
        Ok(Self { listener, address, store, tls: None })
    }

    /// Makes the server use TLS. `config` determines whether clients need a certificate.
    #[must_use]
    pub fn with_tls(mut self, config: Arc<ServerConfig>) -> Self {
        self.tls = Some(config);
        self
    }

    /// Returns the address of the listener, with the actual port if port 0 was requested.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is cancelled, then drops every connection, as if the server's process
    /// had died. Every job in flight is requeued.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, address, store, tls } = self;
        let connections = Connections { end: CancellationToken::new(), tasks: TaskTracker::new() };
        // End the connections even if this future is dropped before `stop` is cancelled.
        let _end = connections.end.clone().drop_guard();
        tracing::debug!(%address, "embedded server started");
        connections.execute(store.clone().keep_time());
        stop.run_until_cancelled(accept(listener, tls.map(TlsAcceptor::from), store.clone(), connections.clone()))
            .await;
        store.with(|jobs, _| jobs.halt());
        connections.end.cancel();
        connections.tasks.close();
        connections.tasks.wait().await;
        tracing::debug!(%address, "embedded server stopped");
    }
}

/// The tasks of the server. All of them end when `end` is cancelled. This struct is also the executor of hyper, which spawns
/// a task for each HTTP/2 stream. On another executor, such a task could continue to take jobs after the server has stopped.
#[derive(Clone)]
struct Connections {
    end: CancellationToken,
    tasks: TaskTracker,
}

impl<F> Executor<F> for Connections
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        let end = self.end.clone();
        self.tasks.spawn(end.run_until_cancelled_owned(task));
    }
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, store: Store, connections: Connections) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Nagle's algorithm would delay small answers, although the client waits for them.
                let _ = stream.set_nodelay(true);
                connections.execute(greet(stream, tls.clone(), store.clone(), connections.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves a new connection, after a handshake if the server uses TLS. The handshake runs here and not in `accept`, so that a
/// slow client does not delay other connections.
async fn greet(stream: TcpStream, tls: Option<TlsAcceptor>, store: Store, connections: Connections) {
    let Some(tls) = tls else { return serve(stream, store, connections).await };
    match tls.accept(stream).await {
        Ok(stream) => serve(stream, store, connections).await,
        Err(error) => tracing::debug!(%error, "TLS handshake failed"),
    }
}

/// Serves HTTP/1.1 or HTTP/2 over one connection.
async fn serve<S>(stream: S, store: Store, connections: Connections)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(|request| {
        let store = store.clone();
        async { Ok::<_, Infallible>(api::answer(store, request).await) }
    });
    let builder = auto::Builder::new(connections);
    if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
        tracing::debug!(error, "connection ended");
    }
}
