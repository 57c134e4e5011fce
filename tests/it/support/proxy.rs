//! A proxy in front of a server. The proxy records requests, and imitates faults of the network and of the server.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1 as client;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

use super::server::{Server, runtime};
use super::{Api, eventually};

/// A running proxy. Dereferences to an `Api` whose calls go through the proxy.
pub struct Proxy {
    api: Api,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

/// A kind of call into which faults can be injected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Take,
    Successes,
    Failure,
    /// `GET /jobs/{id}`.
    Job,
}

/// A fault that the proxy injects into a call.
#[derive(Debug, Clone)]
pub enum Fault {
    /// The proxy answers with this status and body. The server does not receive the call.
    Answer(u16, &'static str),
    /// The call waits at the gate, and passes when the gate is released.
    Hold(Gate),
    /// The connection is cut before the server receives the call.
    Cut,
    /// The connection is reset before the server receives the call.
    Reset,
    /// The server executes the call, but the connection is cut before the answer arrives.
    Swallow,
    /// The server executes the call, but the proxy replaces the answer with an answer of this status.
    Lose(u16),
    /// The call passes after a delay.
    Delay(Duration),
    /// The call passes, but this fault is injected into the body of the answer.
    Body(BodyFault),
}

/// A fault in the body of an answer. For a take call, this body is the take stream.
#[derive(Debug, Clone, Copy)]
pub enum BodyFault {
    /// The connection is cut after this many bytes.
    CutAfterBytes(usize),
    /// The connection is cut after this many jobs.
    CutAfterJobs(usize),
    /// The body arrives byte by byte.
    Drip,
    /// After this many jobs nothing more arrives, not even the end of the body.
    StallAfterJobs(usize),
}

/// A gate that holds calls back until the gate is released.
#[derive(Debug, Clone)]
pub struct Gate(watch::Sender<Held>);

#[derive(Debug, Default)]
struct Held {
    count: usize,
    released: bool,
}

/// An event at the proxy.
#[derive(Debug, Clone)]
pub enum Event {
    Request(Seen),
    /// The connection with this number has been closed by either side.
    Closed(usize),
}

/// A request that arrived at the proxy.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The number of the connection that carried the request.
    pub connection: usize,
    pub call: Option<Call>,
    pub path: String,
    pub version: Version,
    pub body: Bytes,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    rules: Mutex<Vec<Rule>>,
    events: Mutex<Vec<Event>>,
    /// The connections with a take stream.
    streams: Mutex<Vec<Connection>>,
    tls: Option<Arc<ServerConfig>>,
    http1_only: bool,
}

#[derive(Debug)]
struct Rule {
    call: Call,
    fault: Fault,
    times: usize,
}

impl std::ops::Deref for Proxy {
    type Target = Api;

    fn deref(&self) -> &Api {
        &self.api
    }
}

impl Proxy {
    /// Starts a proxy without faults in front of a server. The proxy speaks only HTTP/1.1, like many reverse proxies.
    pub fn before(server: &Server) -> Self {
        Self::start(server.address(), None, true)
    }

    /// Starts a proxy without faults in front of the server at this address. The proxy speaks only HTTP/1.1.
    pub fn before_address(server: SocketAddr) -> Self {
        Self::start(server, None, true)
    }

    /// Starts a proxy that terminates TLS, without faults.
    pub fn with_tls(server: &Server, tls: Arc<ServerConfig>, http1_only: bool) -> Self {
        Self::start(server.address(), Some(tls), http1_only)
    }

    fn start(upstream: SocketAddr, tls: Option<Arc<ServerConfig>>, http1_only: bool) -> Self {
        let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let scheme = if tls.is_some() { "https" } else { "http" };
        let api = Api::new(format!("{scheme}://{}", listener.local_addr().unwrap()));
        let shared = Arc::new(Shared {
            upstream,
            rules: Mutex::default(),
            events: Mutex::default(),
            streams: Mutex::default(),
            tls,
            http1_only,
        });
        let stop = CancellationToken::new();
        runtime().spawn(stop.clone().run_until_cancelled_owned(accept(listener, Arc::clone(&shared))));
        Self { api, shared, _stop: stop.drop_guard() }
    }

    /// Injects a fault into every later call of this kind.
    pub fn fault(&self, call: Call, fault: Fault) -> &Self {
        self.fault_times(usize::MAX, call, fault)
    }

    /// Injects a fault into the next `times` calls of this kind. If several faults are set for one kind of call, they are used up
    /// in the order in which they were set, one fault per call.
    pub fn fault_times(&self, times: usize, call: Call, fault: Fault) -> &Self {
        self.shared.rules.lock().unwrap().push(Rule { call, fault, times });
        self
    }

    /// Holds back later calls of this kind until the returned gate is released.
    pub fn hold(&self, call: Call) -> Gate {
        let gate = Gate(watch::Sender::default());
        self.fault(call, Fault::Hold(gate.clone()));
        gate
    }

    /// Removes all faults. Calls that are already held stay held.
    pub fn heal(&self) -> &Self {
        self.shared.rules.lock().unwrap().clear();
        self
    }

    /// Cuts all connections with a take stream.
    pub fn cut_streams(&self) {
        self.shared.streams.lock().unwrap().drain(..).for_each(|stream| stream.cut.cancel());
    }

    /// Resets all connections with a take stream. Bytes in flight are lost.
    pub fn reset_streams(&self) {
        self.shared.streams.lock().unwrap().drain(..).for_each(|stream| stream.reset());
    }

    /// Silences all open take streams. Nothing more arrives over these streams, not even their end.
    pub fn stall_streams(&self) {
        self.shared.streams.lock().unwrap().drain(..).for_each(|stream| stream.stall.cancel());
    }

    pub fn events(&self) -> Vec<Event> {
        self.shared.events.lock().unwrap().clone()
    }

    /// Returns the calls of one kind so far.
    pub fn calls(&self, call: Call) -> Vec<Seen> {
        let requests = self.events().into_iter().filter_map(|event| match event {
            Event::Request(seen) => Some(seen),
            Event::Closed(_) => None,
        });
        requests.filter(|seen| seen.call == Some(call)).collect()
    }

    /// Waits until there have been at least this many calls of one kind, and returns them.
    pub fn wait_for_calls(&self, call: Call, count: usize) -> Vec<Seen> {
        eventually(&format!("{count} × {call:?}"), || Some(self.calls(call)).filter(|calls| calls.len() >= count))
    }

    /// Reports whether a connection has ended.
    pub fn has_closed(&self, connection: usize) -> bool {
        self.events().iter().any(|event| matches!(event, Event::Closed(closed) if *closed == connection))
    }

    /// Waits until a connection has ended.
    pub fn wait_until_closed(&self, connection: usize) {
        eventually("the end of a connection", || self.has_closed(connection).then_some(()));
    }
}

impl Gate {
    /// Releases all held calls, and lets later calls pass.
    pub fn release(&self) {
        self.0.send_modify(|held| held.released = true);
    }

    /// Waits until this many calls have reached the gate.
    pub fn wait_for(&self, count: usize) {
        eventually(&format!("{count} calls held back"), || (self.0.borrow().count >= count).then_some(()));
    }

    async fn pass(&self) {
        self.0.send_modify(|held| held.count += 1);
        // `wait_for` fails only if all senders are dropped, and `self` is a sender.
        let _ = self.0.subscribe().wait_for(|held| held.released).await;
    }
}

impl Seen {
    /// Returns the job ids in a bulk report of successes.
    pub fn ids(&self) -> Vec<String> {
        let body: Value = serde_json::from_slice(&self.body).unwrap();
        body["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
    }
}

impl Shared {
    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    /// Returns the fault for the next call of this kind, if any, and decrements the number of further calls that get the fault.
    fn next_fault(&self, call: Call) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let rule = rules.iter_mut().find(|rule| rule.call == call && rule.times > 0)?;
        rule.times -= 1;
        Some(rule.fault.clone())
    }
}

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// One connection from a client to the proxy.
#[derive(Debug, Clone)]
struct Connection {
    number: usize,
    shared: Arc<Shared>,
    cut: CancellationToken,
    stall: CancellationToken,
    /// Whether the connection ends with a reset.
    is_reset: Arc<AtomicBool>,
}

/// Accepts and serves connections. Dropping this future aborts the tasks of all connections.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = tokio::task::JoinSet::new();
    for number in 0.. {
        let Ok((stream, _)) = listener.accept().await else { return };
        let connection = Connection {
            number,
            shared: Arc::clone(&shared),
            cut: CancellationToken::new(),
            stall: CancellationToken::new(),
            is_reset: Arc::default(),
        };
        connections.spawn(connection.serve(stream));
    }
}

impl Connection {
    async fn serve(self, stream: TcpStream) {
        let stream = stream.into_std().unwrap();
        let socket = TcpStream::from_std(stream.try_clone().unwrap()).unwrap();
        let stream = TcpStream::from_std(stream).unwrap();
        match self.shared.tls.clone() {
            None => self.serve_http(stream).await,
            Some(tls) => {
                if let Ok(stream) = TlsAcceptor::from(tls).accept(stream).await {
                    self.serve_http(stream).await;
                }
            }
        }
        if self.is_reset.load(Ordering::Relaxed) {
            socket.set_zero_linger().unwrap();
        }
        drop(socket);
        self.shared.record(Event::Closed(self.number));
    }

    async fn serve_http(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let service = service_fn(|request| self.clone().answer(request));
        let mut builder = auto::Builder::new(TokioExecutor::new());
        if self.shared.http1_only {
            builder = builder.http1_only();
        }
        // A cut drops the connection, including all bytes that are not sent yet.
        let _ = self.cut.run_until_cancelled(builder.serve_connection(TokioIo::new(stream), service)).await;
    }

    fn reset(&self) {
        self.is_reset.store(true, Ordering::Relaxed);
        self.cut.cancel();
    }

    async fn answer(self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let (head, body) = request.into_parts();
        let Ok(body) = body.collect().await else { return self.hang_up().await };
        let request = Request::from_parts(head, body.to_bytes());
        let call = self.record(&request);
        let mut fault_of_body = None;
        match call.and_then(|call| self.shared.next_fault(call)) {
            Some(Fault::Answer(status, body)) => return Ok(say(status, body)),
            Some(Fault::Hold(gate)) => gate.pass().await,
            Some(Fault::Delay(time)) => tokio::time::sleep(time).await,
            Some(Fault::Cut) => return self.hang_up().await,
            Some(Fault::Reset) => self.reset(),
            Some(Fault::Swallow) => {
                self.carry_out(request).await;
                return self.hang_up().await;
            }
            Some(Fault::Lose(status)) => {
                self.carry_out(request).await;
                return Ok(say(status, "<html>\n"));
            }
            Some(Fault::Body(fault)) => fault_of_body = Some(fault),
            None => {}
        }
        match self.forward(request, fault_of_body).await {
            Ok(answer) => Ok(answer),
            Err(_) => self.hang_up().await,
        }
    }

    /// Records a request, and returns the kind of the call.
    fn record(&self, request: &Request<Bytes>) -> Option<Call> {
        // Version requests are not recorded. A worker sends one after each connect and does not wait for the answer, so
        // tests cannot predict its position among the other requests.
        if request.uri().path() == "/version" {
            return None;
        }
        let call = call(request.uri().path()).filter(|call| *call != Call::Job || request.method() == Method::GET);
        self.shared.record(Event::Request(Seen {
            connection: self.number,
            call,
            path: request.uri().to_string(),
            version: request.version(),
            body: request.body().clone(),
        }));
        if call == Some(Call::Take) {
            self.shared.streams.lock().unwrap().push(self.clone());
        }
        call
    }

    /// Forwards a request to the server, and discards the answer.
    async fn carry_out(&self, request: Request<Bytes>) {
        // Wait for the end of the answer, which shows that the server has executed the call.
        if let Ok(answer) = self.forward(request, None).await {
            let _ = answer.into_body().collect().await;
        }
    }

    /// Cuts this connection without an answer.
    async fn hang_up(&self) -> Result<Response<Body>, Infallible> {
        self.cut.cancel();
        pending().await
    }

    /// Forwards a request to the server over a separate connection. The connection is closed when the answer's body is dropped.
    async fn forward(&self, request: Request<Bytes>, fault: Option<BodyFault>) -> io::Result<Response<Body>> {
        let stream = TcpStream::connect(self.shared.upstream).await?;
        let (mut sender, upstream) = client::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let upstream = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = upstream.await;
        }));
        let answer = sender.send_request(for_http1(request).map(Full::new)).await.map_err(io::Error::other)?;
        let connection = self.clone();
        Ok(answer.map(|body| {
            let passing = Passing { body, fault, connection, passed: 0, rest: Bytes::new(), _upstream: upstream };
            StreamBody::new(passing.frames()).boxed_unsync()
        }))
    }
}

/// Converts a request to HTTP/1.1, where the host is in a header and not in the target.
fn for_http1(mut request: Request<Bytes>) -> Request<Bytes> {
    if let Some(host) = request.uri().authority().map(|authority| authority.as_str().parse().unwrap()) {
        request.headers_mut().insert(hyper::header::HOST, host);
        *request.uri_mut() = request.uri().path_and_query().unwrap().as_str().parse().unwrap();
    }
    *request.version_mut() = Version::HTTP_11;
    request
}

/// An answer's body on its way through the proxy.
struct Passing {
    body: Incoming,
    fault: Option<BodyFault>,
    connection: Connection,
    /// The number of bytes (for `CutAfterBytes`) or jobs that have been forwarded.
    passed: usize,
    /// The bytes from the server that have not been forwarded yet.
    rest: Bytes,
    _upstream: AbortOnDropHandle<()>,
}

impl Passing {
    fn frames(self) -> impl Stream<Item = hyper::Result<Frame<Bytes>>> + Send {
        stream::unfold(self, async |mut passing| {
            if passing.is_over() {
                return passing.end().await;
            }
            if passing.rest.is_empty() {
                let frame = passing.connection.stall.run_until_cancelled(passing.body.frame()).await;
                let Some(frame) = frame else { return pending().await };
                match frame?.map(Frame::into_data) {
                    Ok(Ok(data)) => passing.rest = data,
                    Ok(Err(other)) => return Some((Ok(other), passing)),
                    Err(error) => return Some((Err(error), passing)),
                }
            }
            Some((Ok(Frame::data(passing.next().await)), passing))
        })
    }

    fn is_over(&self) -> bool {
        match self.fault {
            Some(BodyFault::CutAfterBytes(limit)) => self.passed >= limit,
            Some(BodyFault::CutAfterJobs(limit) | BodyFault::StallAfterJobs(limit)) => self.passed >= limit,
            Some(BodyFault::Drip) | None => false,
        }
    }

    async fn end<T>(self) -> T {
        // hyper flushes a frame only when the next frame is not ready. Without this pause, a cut could lose the last frame.
        tokio::time::sleep(Duration::from_millis(20)).await;
        if !matches!(self.fault, Some(BodyFault::StallAfterJobs(_))) {
            self.connection.cut.cancel();
        }
        pending().await
    }

    /// Splits off and returns the part of `rest` that is to be forwarded next.
    async fn next(&mut self) -> Bytes {
        let all = self.rest.len();
        let length = match self.fault {
            None => all,
            Some(BodyFault::Drip) => {
                // Pause between the bytes, so that the client reads each byte separately.
                tokio::time::sleep(Duration::from_micros(200)).await;
                1
            }
            Some(BodyFault::CutAfterBytes(limit)) => all.min(limit - self.passed),
            Some(BodyFault::CutAfterJobs(_) | BodyFault::StallAfterJobs(_)) => {
                self.rest.iter().position(|byte| *byte == b'\n').map_or(all, |end| end + 1)
            }
        };
        let data = self.rest.split_to(length);
        self.passed += match self.fault {
            Some(BodyFault::CutAfterBytes(_)) => length,
            // A heartbeat does not count as a job.
            _ => usize::from(length > 1 && data.ends_with(b"\n")),
        };
        data
    }
}

fn call(path: &str) -> Option<Call> {
    match path {
        "/jobs/take" => Some(Call::Take),
        "/jobs/success" => Some(Call::Successes),
        path if path.ends_with("/failure") => Some(Call::Failure),
        path if path.strip_prefix("/jobs/").is_some_and(|id| !id.contains('/')) => Some(Call::Job),
        _ => None,
    }
}

fn say(status: u16, body: &'static str) -> Response<Body> {
    let body = Full::new(Bytes::from_static(body.as_bytes())).map_err(|never| match never {}).boxed_unsync();
    Response::builder().status(status).body(body).unwrap()
}
