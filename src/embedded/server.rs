//! The server: a listener, its connections, and their abrupt end.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hyper::rt::Executor;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, ToSocketAddrs};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::api;
use super::store::Store;

/// After a failed accept (out of descriptors, mostly) trying again at once would only spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A server in this process, bound but not yet serving.
#[derive(Debug)]
pub struct EmbeddedServer {
    listener: TcpListener,
    address: SocketAddr,
    store: Store,
}

impl EmbeddedServer {
    /// Binds `address`, as a server that has just started on the jobs of `store`: what was in
    /// flight under the server before it is ready again.
    ///
    /// # Errors
    ///
    /// If the address cannot be bound.
    pub async fn bind(address: impl ToSocketAddrs, store: Store) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        store.with(|state, _| state.close_all());
        Ok(Self { listener, address, store })
    }

    /// Where it listens; the port is known even if any free one was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`, then drops every connection as the death of a server process would:
    /// no goodbye, and every job in flight is ready again.
    pub async fn run(self, stop: CancellationToken) {
        let Self { listener, address, store } = self;
        let connections = Connections { stop, tasks: TaskTracker::new() };
        tracing::debug!(%address, "embedded server started");
        connections.execute(store.clone().keep_time());
        let accepting = accept(listener, store.clone(), connections.clone());
        connections.stop.run_until_cancelled(accepting).await;
        connections.tasks.close();
        connections.tasks.wait().await;
        store.with(|state, _| state.close_all());
        tracing::debug!(%address, "embedded server stopped");
    }
}

/// Everything that runs for the server. hyper spawns a task per HTTP/2 stream through this, too:
/// left to themselves those would go on, and take jobs, after their connection.
#[derive(Clone)]
struct Connections {
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl<F> Executor<F> for Connections
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    fn execute(&self, task: F) {
        let stop = self.stop.clone();
        self.tasks.spawn(stop.run_until_cancelled_owned(task));
    }
}

async fn accept(listener: TcpListener, store: Store, connections: Connections) {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                // Acks are small and awaited; Nagle would hold back the answers.
                let _ = stream.set_nodelay(true);
                connections.execute(serve(stream, store.clone(), connections.clone()));
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// Serves one connection, HTTP/1.1 or HTTP/2, on whatever carries it.
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
