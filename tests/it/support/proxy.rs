//! A proxy in front of a server: it records what passes, and does to it what networks and servers do on bad days.

use std::convert::Infallible;
use std::future::pending;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::{Stream, stream};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::{Request, Response, Version};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

use super::server::{Server, runtime};
use super::{Api, eventually};

/// A running proxy; its API is the server's, through it.
pub struct Proxy {
    api: Api,
    shared: Arc<Shared>,
    _stop: DropGuard,
}

/// The calls that a fault can be laid on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    Take,
    Successes,
    Failure,
}

/// What happens to a call instead of its passing.
#[derive(Debug, Clone)]
pub enum Fault {
    /// It is answered here, with this status and body; the server does not hear of it.
    Answer(u16, &'static str),
    /// It waits at the gate, and passes when the gate is released.
    Hold(Gate),
    /// Its connection is cut before the server hears of it.
    Cut,
    /// The server carries it out, but its connection is cut before the answer arrives.
    Swallow,
}

/// Holds calls back until it is released.
#[derive(Debug, Clone)]
pub struct Gate(watch::Sender<Held>);

#[derive(Debug, Default)]
struct Held {
    count: usize,
    released: bool,
}

/// What the proxy has seen, in order.
#[derive(Debug, Clone)]
pub enum Event {
    Request(Seen),
    /// The connection with that number has ended, whoever ended it.
    Closed(usize),
}

/// A request as it arrived.
#[derive(Debug, Clone)]
pub struct Seen {
    /// The number of its connection.
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
    /// How to cut each connection that carries a take stream.
    streams: Mutex<Vec<CancellationToken>>,
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
    /// A proxy without faults.
    pub fn before(server: &Server) -> Self {
        let listener = runtime().block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let api = Api::new(format!("http://{}", listener.local_addr().unwrap()));
        let shared = Arc::new(Shared {
            upstream: server.address(),
            rules: Mutex::default(),
            events: Mutex::default(),
            streams: Mutex::default(),
        });
        let stop = CancellationToken::new();
        runtime().spawn(stop.clone().run_until_cancelled_owned(accept(listener, Arc::clone(&shared))));
        Self { api, shared, _stop: stop.drop_guard() }
    }

    /// Lays a fault on every such call from now on.
    pub fn fault(&self, call: Call, fault: Fault) -> &Self {
        self.fault_times(usize::MAX, call, fault)
    }

    /// Lays a fault on the next `times` such calls. Faults on the same call take turns in the order of their laying.
    pub fn fault_times(&self, times: usize, call: Call, fault: Fault) -> &Self {
        self.shared.rules.lock().unwrap().push(Rule { call, fault, times });
        self
    }

    /// Holds such calls back until the gate is released.
    pub fn hold(&self, call: Call) -> Gate {
        let gate = Gate(watch::Sender::default());
        self.fault(call, Fault::Hold(gate.clone()));
        gate
    }

    /// Takes all faults away; what is held stays held.
    pub fn heal(&self) -> &Self {
        self.shared.rules.lock().unwrap().clear();
        self
    }

    /// Cuts the connections of all take streams, without a word.
    pub fn cut_streams(&self) {
        self.shared.streams.lock().unwrap().drain(..).for_each(|stream| stream.cancel());
    }

    pub fn events(&self) -> Vec<Event> {
        self.shared.events.lock().unwrap().clone()
    }

    /// The calls of one kind so far.
    pub fn calls(&self, call: Call) -> Vec<Seen> {
        let requests = self.events().into_iter().filter_map(|event| match event {
            Event::Request(seen) => Some(seen),
            Event::Closed(_) => None,
        });
        requests.filter(|seen| seen.call == Some(call)).collect()
    }

    /// Waits until there have been at least that many calls of one kind, and returns them.
    pub fn wait_for_calls(&self, call: Call, count: usize) -> Vec<Seen> {
        eventually(&format!("{count} × {call:?}"), || Some(self.calls(call)).filter(|calls| calls.len() >= count))
    }

    /// Whether a connection has ended.
    pub fn has_closed(&self, connection: usize) -> bool {
        self.events().iter().any(|event| matches!(event, Event::Closed(closed) if *closed == connection))
    }

    /// Waits until a connection has ended.
    pub fn wait_until_closed(&self, connection: usize) {
        eventually("the end of a connection", || self.has_closed(connection).then_some(()));
    }
}

impl Gate {
    /// Lets everything pass, from now on as well.
    pub fn release(&self) {
        self.0.send_modify(|held| held.released = true);
    }

    /// Waits until that many calls have come to the gate.
    pub fn wait_for(&self, count: usize) {
        eventually(&format!("{count} calls held back"), || (self.0.borrow().count >= count).then_some(()));
    }

    async fn pass(&self) {
        self.0.send_modify(|held| held.count += 1);
        // It fails only once every sender is gone, and `self` is one.
        let _ = self.0.subscribe().wait_for(|held| held.released).await;
    }
}

impl Seen {
    /// The ids that a bulk report names.
    pub fn ids(&self) -> Vec<String> {
        let body: Value = serde_json::from_slice(&self.body).unwrap();
        body["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()).collect()
    }
}

impl Shared {
    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    /// The fault that is next for such a call.
    fn next_fault(&self, call: Call) -> Option<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let rule = rules.iter_mut().find(|rule| rule.call == call && rule.times > 0)?;
        rule.times -= 1;
        Some(rule.fault.clone())
    }
}

type Body = UnsyncBoxBody<Bytes, hyper::Error>;

/// One connection of a client.
#[derive(Debug, Clone)]
struct Connection {
    number: usize,
    shared: Arc<Shared>,
    cut: CancellationToken,
}

/// All that belongs to the proxy ends with this.
async fn accept(listener: TcpListener, shared: Arc<Shared>) {
    let mut connections = tokio::task::JoinSet::new();
    for number in 0.. {
        let Ok((stream, _)) = listener.accept().await else { return };
        let connection = Connection { number, shared: Arc::clone(&shared), cut: CancellationToken::new() };
        connections.spawn(connection.serve(stream));
    }
}

impl Connection {
    async fn serve(self, stream: TcpStream) {
        let service = service_fn(|request| self.clone().answer(request));
        let serving = server::Builder::new().serve_connection(TokioIo::new(stream), service);
        // Cut: dropped as it stands, whatever was under way.
        let _ = self.cut.run_until_cancelled(serving).await;
        self.shared.record(Event::Closed(self.number));
    }

    async fn answer(self, request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
        let (head, body) = request.into_parts();
        let Ok(body) = body.collect().await else { return self.hang_up().await };
        let request = Request::from_parts(head, body.to_bytes());
        let call = call(request.uri().path());
        self.shared.record(Event::Request(Seen {
            connection: self.number,
            call,
            path: request.uri().to_string(),
            version: request.version(),
            body: request.body().clone(),
        }));
        if call == Some(Call::Take) {
            self.shared.streams.lock().unwrap().push(self.cut.clone());
        }
        match call.and_then(|call| self.shared.next_fault(call)) {
            Some(Fault::Answer(status, body)) => return Ok(say(status, body)),
            Some(Fault::Hold(gate)) => gate.pass().await,
            Some(Fault::Cut) => return self.hang_up().await,
            Some(Fault::Swallow) => {
                // Read to its end: by then the server has done what was asked.
                if let Ok(answer) = self.forward(request).await {
                    let _ = answer.into_body().collect().await;
                }
                return self.hang_up().await;
            }
            None => {}
        }
        match self.forward(request).await {
            Ok(answer) => Ok(answer),
            Err(_) => self.hang_up().await,
        }
    }

    /// Cuts this connection; there is no answer.
    async fn hang_up(&self) -> Result<Response<Body>, Infallible> {
        self.cut.cancel();
        pending().await
    }

    /// Passes a request on, over a connection of its own, which ends with the answer's body.
    async fn forward(&self, request: Request<Bytes>) -> io::Result<Response<Body>> {
        let stream = TcpStream::connect(self.shared.upstream).await?;
        let (mut sender, upstream) = client::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
        let upstream = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = upstream.await;
        }));
        let answer = sender.send_request(request.map(Full::new)).await.map_err(io::Error::other)?;
        Ok(answer.map(|body| StreamBody::new(frames(body, upstream)).boxed_unsync()))
    }
}

/// An answer's body as it passes; faults of a body belong here.
fn frames(body: Incoming, upstream: AbortOnDropHandle<()>) -> impl Stream<Item = hyper::Result<Frame<Bytes>>> + Send {
    stream::unfold((body, upstream), async |(mut body, upstream)| {
        let frame = body.frame().await?;
        Some((frame, (body, upstream)))
    })
}

fn call(path: &str) -> Option<Call> {
    match path {
        "/jobs/take" => Some(Call::Take),
        "/jobs/success" => Some(Call::Successes),
        path if path.ends_with("/failure") => Some(Call::Failure),
        _ => None,
    }
}

fn say(status: u16, body: &'static str) -> Response<Body> {
    let body = Full::new(Bytes::from_static(body.as_bytes())).map_err(|never| match never {}).boxed_unsync();
    Response::builder().status(status).body(body).unwrap()
}
