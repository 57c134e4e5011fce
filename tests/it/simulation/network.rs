//! [`Network`]: in-memory connections that have latency and faults, and that may split the bytes of one write.

use std::collections::BTreeMap;
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use fastrand::Rng;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadBuf, duplex, split};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use zizq_worker::Connector;

use super::checks::Book;
use super::draw::{chance, millis, one_of};
use super::server::Server;
use super::trace::Trace;

/// The longest random latency in one direction. Only bytes that are split into two pieces can take this long, because the second
/// piece is delayed twice.
pub const MAX_LATENCY: Duration = Duration::from_millis(150);

/// The size in bytes of each buffer between the two ends of a connection.
const CAPACITY: usize = 16 * 1024;

/// A network between workers and servers. Clones share it.
#[derive(Clone)]
pub struct Network(Arc<Inner>);

struct Inner {
    state: Mutex<State>,
    /// A token that is cancelled when the faults end. Stalled connections then continue, and other broken connections are reset.
    calm: CancellationToken,
    book: Book,
    trace: Trace,
}

struct State {
    rng: Rng,
    hosts: BTreeMap<&'static str, Server>,
    links: Vec<Arc<Link>>,
    made: u64,
    /// The latency of new connections. Drawn for each connection if `None`.
    latency: Option<Duration>,
    /// The time that new connections take to open. Equal to their latency if `None`.
    opening: Option<Duration>,
    /// The probability that the opening of a connection is refused, slow or unanswered. An open connection gets a fault with the
    /// same probability.
    trouble: f64,
}

/// A connection from a worker to a server.
pub struct Link {
    /// The number of the connection.
    pub id: u64,
    /// The name of the worker that opened the connection.
    pub worker: String,
    host: String,
    latency: Duration,
    pieces: bool,
    fate: Mutex<Fate>,
    /// A notification that triggers the connection's fault at once.
    struck: Notify,
    end: CancellationToken,
    seen: Mutex<Seen>,
    rng: Mutex<Rng>,
}

/// The facts about a connection that the checks use.
#[derive(Clone, Copy, Default)]
struct Seen {
    /// The time of the worker's last write.
    sent: Option<Instant>,
    /// The time at which the worker closed the connection.
    closed: Option<Instant>,
    /// Whether the connection has had a fault.
    faulted: bool,
}

/// The fault that a connection gets.
#[derive(Debug, Clone, Copy)]
enum Fate {
    /// No fault.
    Sound,
    /// A cut that both ends see.
    Cut { after: Duration },
    /// A cut that both ends see, after this many bytes from the server.
    CutWithin { bytes: usize },
    /// A pause in which no bytes arrive. All bytes arrive after the pause.
    Stall { after: Duration, lasting: Duration },
    /// A silent loss. No more bytes arrive, and neither end notices until the connection is reset.
    Silent { after: Duration, lasting: Duration },
    /// A close that only the server sees. The worker's end stays open.
    LostByServer { after: Duration, lasting: Duration },
    /// A close that only the worker sees. The server's end stays open.
    LostByWorker { after: Duration, lasting: Duration },
}

impl Fate {
    fn draw(rng: &mut Rng) -> Self {
        let (after, lasting) = (millis(rng, 0..30_000), millis(rng, 500..60_000));
        match rng.u8(0..7) {
            0 | 1 => Self::Cut { after },
            2 => Self::CutWithin { bytes: rng.usize(0..2000) },
            3 => Self::Stall { after, lasting },
            4 => Self::Silent { after, lasting },
            5 => Self::LostByServer { after, lasting },
            _ => Self::LostByWorker { after, lasting },
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Sound => "sound",
            Self::Cut { .. } => "connection cut",
            Self::CutWithin { .. } => "connection cut within an answer",
            Self::Stall { .. } => "connection stalled",
            Self::Silent { .. } => "connection silent",
            Self::LostByServer { .. } => "connection half-open at the worker",
            Self::LostByWorker { .. } => "connection half-open at the server",
        }
    }

    fn after(self) -> Option<Duration> {
        match self {
            Self::Sound | Self::CutWithin { .. } => None,
            Self::Cut { after }
            | Self::Stall { after, .. }
            | Self::Silent { after, .. }
            | Self::LostByServer { after, .. }
            | Self::LostByWorker { after, .. } => Some(after),
        }
    }
}

/// The course of a connection attempt: opened after a delay, refused, or never answered.
enum Opening {
    At(Duration),
    Refused,
    Never,
}

impl Network {
    /// Returns a network without faults.
    pub fn new(rng: Rng, book: Book, trace: Trace) -> Self {
        let state = State {
            rng,
            hosts: BTreeMap::new(),
            links: Vec::new(),
            made: 0,
            latency: None,
            opening: None,
            trouble: 0.0,
        };
        Self(Arc::new(Inner { state: Mutex::new(state), calm: CancellationToken::new(), book, trace }))
    }

    /// Makes a host name resolve to this server.
    pub fn name(&self, host: &'static str, server: &Server) {
        self.0.state.lock().unwrap().hosts.insert(host, server.clone());
    }

    /// Returns the server behind a host name.
    pub fn server(&self, host: &str) -> Server {
        self.0.state.lock().unwrap().hosts[host].clone()
    }

    /// Sets the probability that the opening of a new connection is refused, slow or unanswered. An open connection gets a fault
    /// with the same probability.
    pub fn set_trouble(&self, trouble: f64) {
        self.0.state.lock().unwrap().trouble = trouble;
    }

    /// Sets the latency of new connections.
    pub fn set_latency(&self, latency: Duration) {
        self.0.state.lock().unwrap().latency = Some(latency);
    }

    /// Sets the time that new connections take to open. With `None`, this time equals the latency of the connection.
    pub fn set_opening(&self, opening: Option<Duration>) {
        self.0.state.lock().unwrap().opening = opening;
    }

    /// Ends the faults of connections. Stalled connections continue, and other broken connections are reset.
    pub fn calm(&self) {
        self.set_trouble(0.0);
        self.0.calm.cancel();
    }

    /// Resets all connections of a worker.
    pub fn cut_worker(&self, worker: &str) {
        self.cut("all connections of a worker cut", |link| link.worker == worker);
    }

    /// Resets all connections to a server.
    pub fn cut_server(&self, server: &Server) {
        let hosts = self.0.state.lock().unwrap().hosts.clone();
        self.cut("all connections to a server cut", |link| hosts[link.host.as_str()].is(server));
    }

    /// Closes a connection at the server's end only. The worker's end stays open for up to a minute.
    pub fn lose_at_server(&self, number: u64) {
        self.strike(number, Fate::LostByServer { after: Duration::ZERO, lasting: Duration::from_secs(60) });
    }

    /// Resets one connection.
    pub fn cut_connection(&self, number: u64) {
        self.strike(number, Fate::Cut { after: Duration::ZERO });
    }

    fn strike(&self, number: u64, fate: Fate) {
        let links = self.0.state.lock().unwrap().links.clone();
        for link in links.iter().filter(|link| link.id == number) {
            *link.fate.lock().unwrap() = fate;
            link.struck.notify_one();
        }
    }

    fn cut(&self, what: &'static str, which: impl Fn(&Link) -> bool) {
        self.0.book.fault(what);
        let links = std::mem::take(&mut self.0.state.lock().unwrap().links);
        let (cut, left): (Vec<_>, Vec<_>) = links.into_iter().partition(|link| which(link));
        self.0.state.lock().unwrap().links = left;
        for link in cut {
            link.fault();
            link.end.cancel();
        }
    }

    /// Returns a connector that opens a worker's connections in this network.
    pub fn connector(&self, worker: &str) -> Connector {
        let (network, worker) = (self.clone(), worker.to_owned());
        Connector::new(move |url| network.clone().connect(worker.clone(), url.host().to_owned()))
    }

    async fn connect(self, worker: String, host: String) -> io::Result<WorkerEnd> {
        let _under_way = self.0.book.under_way(&worker);
        let (link, opening, server) = self.open(worker, host);
        let refused = || {
            self.0.trace.note(&link.worker, format_args!("connection {} to {}: refused", link.id, link.host));
            Err(io::ErrorKind::ConnectionRefused.into())
        };
        match opening {
            Opening::Never => std::future::pending().await,
            Opening::At(delay) => sleep(delay).await,
            Opening::Refused => sleep(link.latency).await,
        }
        if matches!(opening, Opening::Refused) || !server.is_up() {
            return refused();
        }
        self.0
            .trace
            .note(&link.worker, format_args!("connection {} to {}: made, {:?}", link.id, link.host, link.fate()));
        let ((worker_end, near), (far, server_end)) = (duplex(CAPACITY), duplex(CAPACITY));
        server.serve(server_end, &link);
        self.0.state.lock().unwrap().links.push(Arc::clone(&link));
        tokio::spawn(self.clone().relay(Arc::clone(&link), near, far));
        Ok(WorkerEnd { stream: worker_end, link })
    }

    fn open(&self, worker: String, host: String) -> (Arc<Link>, Opening, Server) {
        let mut state = self.0.state.lock().unwrap();
        let State { rng, hosts, made, latency, opening, trouble, .. } = &mut *state;
        *made += 1;
        let server = hosts[host.as_str()].clone();
        let fate = if chance(rng, *trouble) { Fate::draw(rng) } else { Fate::Sound };
        let drawn = one_of(rng, &[Duration::ZERO, Duration::from_millis(1), MAX_LATENCY / 10, MAX_LATENCY / 2]);
        let latency = latency.unwrap_or(drawn);
        let opening = if chance(rng, *trouble) {
            match rng.u8(0..5) {
                0 | 1 => Opening::Refused,
                2 | 3 => Opening::At(millis(rng, 200..20_000)),
                _ => Opening::Never,
            }
        } else {
            Opening::At(opening.unwrap_or(latency))
        };
        self.0.book.fault(match opening {
            Opening::Refused => "connect refused",
            Opening::Never => "connect without an answer",
            Opening::At(delay) if delay > latency => "connect slow",
            Opening::At(_) => "connect sound",
        });
        let link = Link {
            id: *made,
            worker,
            host,
            latency,
            pieces: rng.bool(),
            fate: Mutex::new(fate),
            struck: Notify::new(),
            end: CancellationToken::new(),
            seen: Mutex::default(),
            rng: Mutex::new(rng.fork()),
        };
        (Arc::new(link), opening, server)
    }

    /// Relays bytes between the two ends of a connection until one end closes. Applies the connection's fault when it is due.
    async fn relay(self, link: Arc<Link>, mut near: DuplexStream, mut far: DuplexStream) {
        let gone = {
            let mut carrying = pin!(link.carry(&mut near, &mut far));
            tokio::select! {
                biased;
                () = link.end.cancelled() => return,
                () = &mut carrying => return,
                () = link.strikes() => {}
                () = self.0.calm.cancelled() => {
                    if let Fate::CutWithin { .. } = link.fate() {
                        return link.fault();
                    }
                    tokio::select! {
                        biased;
                        () = link.end.cancelled() => {}
                        () = carrying => {}
                    }
                    return;
                }
            }
            link.fault();
            self.0.book.fault(link.fate().name());
            self.0.trace.note("network", format_args!("connection {} of {}: {:?}", link.id, link.worker, link.fate()));
            match link.fate() {
                Fate::Sound | Fate::Cut { .. } | Fate::CutWithin { .. } => return,
                Fate::Stall { lasting, .. } => {
                    self.hold(&link, lasting).await;
                    tokio::select! {
                        biased;
                        () = link.end.cancelled() => {}
                        () = carrying => {}
                    }
                    return;
                }
                Fate::Silent { lasting, .. } => (lasting, false, false),
                Fate::LostByServer { lasting, .. } => (lasting, false, true),
                Fate::LostByWorker { lasting, .. } => (lasting, true, false),
            }
        };
        let (lasting, by_worker, by_server) = gone;
        let _near = (!by_worker).then_some(near);
        let _far = (!by_server).then_some(far);
        self.hold(&link, lasting).await;
    }

    /// Waits until the fault has lasted for `lasting`, all faults end, or the connection is cut. No bytes pass during this wait.
    async fn hold(&self, link: &Link, lasting: Duration) {
        tokio::select! {
            biased;
            () = link.end.cancelled() => {}
            () = self.0.calm.cancelled() => {}
            () = sleep(lasting) => {}
        }
    }
}

impl Link {
    /// Returns the time of the worker's last write, if any.
    pub fn sent(&self) -> Option<Instant> {
        self.seen.lock().unwrap().sent
    }

    /// Returns the time at which the worker closed the connection, if it has.
    pub fn closed(&self) -> Option<Instant> {
        self.seen.lock().unwrap().closed
    }

    /// Reports whether the connection has had a fault.
    pub fn is_faulted(&self) -> bool {
        self.seen.lock().unwrap().faulted
    }

    /// Records that the connection has had a fault.
    pub fn fault(&self) {
        self.seen.lock().unwrap().faulted = true;
    }

    fn fate(&self) -> Fate {
        *self.fate.lock().unwrap()
    }

    async fn strikes(&self) {
        let by_itself = async {
            match self.fate().after() {
                Some(after) => sleep(after).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            () = self.struck.notified() => {}
            () = by_itself => {}
        }
    }

    async fn carry(&self, near: &mut DuplexStream, far: &mut DuplexStream) {
        let ((from_worker, to_worker), (from_server, to_server)) = (split(near), split(far));
        let limit = if let Fate::CutWithin { bytes } = self.fate() { bytes } else { usize::MAX };
        tokio::select! {
            biased;
            () = self.carry_one_way(from_worker, to_server, usize::MAX) => {}
            () = self.carry_one_way(from_server, to_worker, limit) => {}
        }
    }

    async fn carry_one_way(&self, mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, limit: usize) {
        let (mut buffer, mut left) = (vec![0; CAPACITY], limit);
        loop {
            let read = from.read(&mut buffer).await.unwrap_or(0);
            self.travel().await;
            let carried = read.min(left);
            left -= carried;
            for piece in self.cut_up(&buffer[..carried]) {
                if to.write_all(piece).await.is_err() {
                    return;
                }
                if piece.len() < carried {
                    self.travel().await;
                }
            }
            if carried < read {
                self.fault();
            }
            if carried < read || read == 0 {
                return;
            }
        }
    }

    async fn travel(&self) {
        if self.latency.is_zero() { tokio::task::yield_now().await } else { sleep(self.latency).await }
    }

    /// Splits bytes into one or two pieces.
    fn cut_up<'a>(&self, bytes: &'a [u8]) -> Vec<&'a [u8]> {
        if !self.pieces || bytes.len() < 2 {
            return vec![bytes];
        }
        let (head, tail) = bytes.split_at(self.rng.lock().unwrap().usize(1..bytes.len()));
        vec![head, tail]
    }
}

/// The worker's end of a connection.
pub struct WorkerEnd {
    stream: DuplexStream,
    link: Arc<Link>,
}

impl Drop for WorkerEnd {
    fn drop(&mut self) {
        self.link.seen.lock().unwrap().closed = Some(Instant::now());
    }
}

impl AsyncRead for WorkerEnd {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for WorkerEnd {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.link.seen.lock().unwrap().sent = Some(Instant::now());
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
