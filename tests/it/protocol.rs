//! The rules of the protocol, tested on the embedded server over real sockets.

use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::TryStreamExt;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::rt::Executor;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_util::sync::{CancellationToken, DropGuard};
use zizq_worker::embedded::{EmbeddedServer, JobStatus, Options, ServerBackoff, Store};

/// The time limit of each wait for an event. Only a failing test waits this long.
const DEADLINE: Duration = Duration::from_secs(20);

type Body = Full<Bytes>;

/// An embedded server, which runs on a free port until it is stopped or dropped.
struct Server {
    address: SocketAddr,
    store: Store,
    stop: DropGuard,
    running: JoinHandle<()>,
}

impl Server {
    async fn start() -> Self {
        Self::with(Options::default()).await
    }

    async fn with(options: Options) -> Self {
        Self::on("127.0.0.1:0", Store::new(options)).await
    }

    async fn on(address: &str, store: Store) -> Self {
        let server = EmbeddedServer::bind(address, store.clone()).await.unwrap();
        let (address, stop) = (server.local_addr(), CancellationToken::new());
        let running = tokio::spawn(server.run(stop.clone()));
        Self { address, store, stop: stop.drop_guard(), running }
    }

    async fn stop(self) -> (SocketAddr, Store) {
        drop(self.stop);
        soon(self.running).await.unwrap();
        (self.address, self.store)
    }

    fn enqueue(&self, count: usize) -> Vec<String> {
        (0..count).map(|n| self.enqueue_in("q", &n.to_string(), "")).collect()
    }

    fn enqueue_in(&self, queue: &str, payload: &str, extra: &str) -> String {
        let line = format!(r#"{{"type":"t","queue":"{queue}","payload":{payload}{extra}}}"#);
        self.store.enqueue_line(&line).unwrap()
    }

    /// Sends one request over a new connection. Returns the status and the JSON of the answer.
    async fn call(&self, method: Method, path: &str, body: &str) -> (u16, Value) {
        let mut connection = Connection::http1(self.address).await;
        let answer = connection.send(method, path, body).await;
        let status = answer.status().as_u16();
        let bytes = soon(answer.into_body().collect()).await.unwrap().to_bytes();
        (status, serde_json::from_slice(&bytes).unwrap_or(Value::Null))
    }

    async fn get(&self, path: &str) -> Value {
        let (status, body) = self.call(Method::GET, path, "").await;
        assert_eq!(status, 200, "{path}: {body}");
        body
    }

    async fn succeed(&self, id: &str) -> u16 {
        self.call(Method::POST, &format!("/jobs/{id}/success"), "").await.0
    }

    async fn fail(&self, id: &str, report: Value) -> (u16, Value) {
        self.call(Method::POST, &format!("/jobs/{id}/failure"), &report.to_string()).await
    }

    async fn take(&self, query: &str) -> Stream {
        Connection::http1(self.address).await.take(query).await
    }

    async fn count_is(&self, status: JobStatus, count: usize) {
        soon(async {
            while self.store.count(status) != count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        })
        .await;
    }
}

async fn soon<T>(event: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, event).await.expect("the event did not happen in time")
}

#[expect(clippy::disallowed_methods, reason = "the protocol's times are wall times")]
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

enum Sender {
    Http1(http1::SendRequest<Body>),
    Http2(http2::SendRequest<Body>),
}

/// An executor for the tasks of one connection. For HTTP/2, hyper's client spawns several tasks. The token cancels all of them.
#[derive(Clone)]
struct Tasks(CancellationToken);

impl<F: Future<Output: Send> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        tokio::spawn(self.0.clone().run_until_cancelled_owned(task));
    }
}

/// One TCP connection. Dropping the value closes the connection.
struct Connection {
    sender: Sender,
    _open: DropGuard,
}

impl Connection {
    async fn http1(address: SocketAddr) -> Self {
        let tasks = Tasks(CancellationToken::new());
        let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
        let (sender, connection) = http1::handshake(io).await.unwrap();
        tasks.execute(connection);
        Self { sender: Sender::Http1(sender), _open: tasks.0.drop_guard() }
    }

    async fn http2(address: SocketAddr) -> Self {
        let tasks = Tasks(CancellationToken::new());
        let io = TokioIo::new(TcpStream::connect(address).await.unwrap());
        let (sender, connection) = http2::handshake(tasks.clone(), io).await.unwrap();
        tasks.execute(connection);
        Self { sender: Sender::Http2(sender), _open: tasks.0.drop_guard() }
    }

    async fn send(&mut self, method: Method, path: &str, body: &str) -> Response<Incoming> {
        let request = Request::builder().method(method).uri(format!("http://embedded{path}"));
        let request = request.header("content-type", "application/json").header("host", "embedded");
        let request = request.body(Full::from(body.to_owned())).unwrap();
        match &mut self.sender {
            Sender::Http1(sender) => soon(sender.send_request(request)).await.unwrap(),
            Sender::Http2(sender) => soon(sender.send_request(request)).await.unwrap(),
        }
    }

    async fn take(mut self, query: &str) -> Stream {
        let body = self.open(query).await;
        Stream { body, buffer: BytesMut::new(), scanned: 0, _connection: Some(self) }
    }

    /// Opens a take stream that can be dropped without closing the connection.
    async fn take_on(&mut self, query: &str) -> Stream {
        let body = self.open(query).await;
        Stream { body, buffer: BytesMut::new(), scanned: 0, _connection: None }
    }

    async fn open(&mut self, query: &str) -> Incoming {
        let answer = self.send(Method::GET, &format!("/jobs/take{query}"), "").await;
        assert_eq!(answer.status(), 200);
        assert_eq!(answer.headers()["content-type"], "application/x-ndjson");
        answer.into_body()
    }
}

/// The lines of a take stream.
struct Stream {
    body: Incoming,
    buffer: BytesMut,
    /// The number of bytes at the start of the buffer that are known to contain no line break.
    scanned: usize,
    _connection: Option<Connection>,
}

impl Stream {
    /// Returns the next line, or `None` when the stream has ended or broken. The line of a heartbeat is empty.
    async fn line(&mut self) -> Option<String> {
        loop {
            let fresh = &self.buffer[self.scanned..];
            if let Some(end) = fresh.iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.scanned + end);
                self.buffer.advance(1);
                self.scanned = 0;
                return Some(String::from_utf8(line.to_vec()).unwrap());
            }
            self.scanned = self.buffer.len();
            let frame = soon(self.body.frame()).await?.ok()?;
            self.buffer.extend_from_slice(&frame.into_data().unwrap());
        }
    }

    async fn job(&mut self) -> Value {
        loop {
            match self.line().await.expect("the stream has ended").as_str() {
                "" => continue,
                line => return serde_json::from_str(line).unwrap(),
            }
        }
    }

    async fn id(&mut self) -> String {
        self.job().await["id"].as_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn a_job_arrives_as_one_line_in_the_real_servers_form() {
    let server = Server::start().await;
    let id = server.enqueue_in("mail", r#"{"to":"a@example.org"}"#, r#","retry_limit":3"#);
    let job = server.take("").await.job().await;
    let expected = json!({"id": id, "type": "t", "queue": "mail", "priority": 32768, "status": "in_flight",
        "payload": {"to": "a@example.org"}, "ready_at": job["ready_at"], "attempts": 0, "retry_limit": 3,
        "dequeued_at": job["dequeued_at"]});
    assert_eq!(job, expected);
    assert!(job["dequeued_at"].as_u64() >= job["ready_at"].as_u64());
}

#[tokio::test]
async fn jobs_arrive_by_priority_then_in_order() {
    let server = Server::start().await;
    let ids = server.enqueue(2);
    let urgent = server.enqueue_in("q", "0", r#","priority":0"#);
    let mut stream = server.take("?prefetch=0").await;
    assert_eq!(
        [stream.id().await, stream.id().await, stream.id().await],
        [&urgent, &ids[0], &ids[1]].map(Clone::clone)
    );
}

#[tokio::test]
async fn a_waiting_stream_gets_a_new_job_at_once() {
    let server = Server::start().await;
    let mut stream = server.take("").await;
    let id = server.enqueue(1).remove(0);
    assert_eq!(stream.id().await, id);
}

#[tokio::test]
async fn a_stream_takes_one_job_at_a_time_unless_it_asks_for_more() {
    let server = Server::start().await;
    let ids = server.enqueue(4);
    let mut one = server.take("").await;
    assert_eq!(one.id().await, ids[0]);
    let mut two = server.take("?prefetch=2").await;
    assert_eq!([two.id().await, two.id().await], [ids[1].clone(), ids[2].clone()]);
    assert_eq!((server.store.count(JobStatus::InFlight), server.store.count(JobStatus::Ready)), (3, 1));
}

#[tokio::test]
async fn a_report_frees_a_slot_for_the_next_job_at_once() {
    let server = Server::start().await;
    let ids = server.enqueue(3);
    let mut stream = server.take("?prefetch=1").await;
    assert_eq!(stream.id().await, ids[0]);
    assert_eq!(server.succeed(&ids[0]).await, 204);
    assert_eq!(stream.id().await, ids[1]);
    assert_eq!(server.fail(&ids[1], json!({"message": "no"})).await.0, 200);
    assert_eq!(stream.id().await, ids[2]);
}

#[tokio::test]
async fn a_stream_gets_jobs_of_the_queues_it_names() {
    let server = Server::start().await;
    server.enqueue(1);
    let wanted = server.enqueue_in("r s/é", "1", "");
    let mut stream = server.take("?prefetch=5&queue=r%20s%2F%C3%A9,other").await;
    assert_eq!(stream.id().await, wanted);
    let wanted = server.enqueue_in("other", "1", "");
    assert_eq!(stream.id().await, wanted);
    assert_eq!(server.store.count(JobStatus::Ready), 1);
}

#[tokio::test]
async fn an_idle_stream_gets_empty_lines() {
    let heartbeat_interval = Duration::from_millis(20);
    let server = Server::with(Options { heartbeat_interval, ..Options::default() }).await;
    let mut stream = server.take("").await;
    assert_eq!([stream.line().await, stream.line().await], [Some(String::new()), Some(String::new())]);
}

#[tokio::test]
async fn a_closed_connection_returns_its_jobs_with_attempts_unchanged() {
    let server = Server::start().await;
    let ids = server.enqueue(2);
    server.enqueue(1);
    let mut stream = server.take("?prefetch=2").await;
    stream.id().await;
    stream.id().await;
    drop(stream);
    server.count_is(JobStatus::Ready, 3).await;
    let job = server.store.job(&ids[0]).unwrap();
    assert_eq!((&job["attempts"], &job["status"]), (&json!(0), &json!("ready")));
    // The returned job stays ahead of younger jobs.
    assert_eq!(server.take("").await.id().await, ids[0]);
}

#[tokio::test]
async fn a_reset_http2_stream_returns_its_jobs() {
    let server = Server::start().await;
    server.enqueue(1);
    let mut connection = Connection::http2(server.address).await;
    let mut stream = connection.take_on("").await;
    stream.id().await;
    drop(stream);
    server.count_is(JobStatus::Ready, 1).await;
    assert_eq!(connection.send(Method::GET, "/health", "").await.status(), 200);
}

#[tokio::test]
async fn a_closed_http2_connection_returns_all_its_jobs() {
    let server = Server::start().await;
    server.enqueue(2);
    let mut connection = Connection::http2(server.address).await;
    let mut streams = [connection.take_on("").await, connection.take_on("").await];
    for stream in &mut streams {
        stream.id().await;
    }
    drop(connection);
    server.count_is(JobStatus::Ready, 2).await;
}

#[tokio::test]
async fn a_report_counts_by_id_while_its_job_is_in_flight() {
    let server = Server::start().await;
    let id = server.enqueue(1).remove(0);
    let mut stream = server.take("").await;
    stream.id().await;
    drop(stream);
    server.count_is(JobStatus::Ready, 1).await;
    let (status, body) = server.call(Method::POST, &format!("/jobs/{id}/success"), "").await;
    assert_eq!((status, body), (404, json!({"error": "job not found in in-flight set"})));
    assert_eq!(server.fail(&id, json!({"message": "no"})).await.0, 404);
    let mut other = server.take("").await;
    other.id().await;
    assert_eq!(server.succeed(&id).await, 204);
    assert_eq!(server.get("/jobs/count").await, json!({"count": 0}));
}

#[tokio::test]
async fn bulk_success_acknowledges_jobs_in_flight_and_names_the_rest() {
    let server = Server::start().await;
    let ids = server.enqueue(3);
    let mut stream = server.take("?prefetch=2").await;
    stream.id().await;
    stream.id().await;
    let report = json!({"ids": [ids[0], ids[0], "nonsense", ids[2], ids[1]]});
    let answer = server.call(Method::POST, "/jobs/success", &report.to_string()).await;
    assert_eq!(answer, (422, json!({"not_found": ["nonsense", ids[2]]})));
    assert_eq!(stream.id().await, ids[2]);
    let report = json!({"ids": [ids[2]]});
    assert_eq!(server.call(Method::POST, "/jobs/success", &report.to_string()).await.0, 204);
}

#[tokio::test]
async fn a_failed_job_is_redelivered_with_one_attempt_more() {
    let backoff = ServerBackoff { base: Duration::ZERO, exponent: 0.0, jitter: Duration::ZERO };
    let server = Server::with(Options { backoff, ..Options::default() }).await;
    let id = server.enqueue_in("q", "1", r#","backoff":{"exponent":-60,"base_ms":30,"jitter_ms":0}"#);
    let mut stream = server.take("").await;
    stream.id().await;
    let report = json!({"message": "m", "error_type": "E", "backtrace": "b"});
    let (status, job) = server.fail(&id, report.clone()).await;
    assert_eq!((status, &job["status"], job.get("payload")), (200, &json!("scheduled"), None));
    let again = stream.job().await;
    assert_eq!((&again["id"], &again["attempts"]), (&json!(id), &json!(1)));
    assert!(again["dequeued_at"].as_u64() >= job["ready_at"].as_u64());
    let error = server.get(&format!("/jobs/{id}/errors/1")).await;
    for field in ["message", "error_type", "backtrace"] {
        assert_eq!(error[field], report[field]);
    }
}

#[tokio::test]
async fn retry_at_in_the_past_means_at_once() {
    let server = Server::start().await;
    let id = server.enqueue(1).remove(0);
    let mut stream = server.take("").await;
    stream.id().await;
    let (_, job) = server.fail(&id, json!({"message": "again", "retry_at": 1})).await;
    assert_eq!((&job["status"], &job["ready_at"]), (&json!("scheduled"), &json!(1)));
    assert_eq!(stream.job().await["attempts"], 1);
}

#[tokio::test]
async fn a_killed_job_is_dead() {
    let server = Server::start().await;
    let id = server.enqueue(1).remove(0);
    server.take("").await.id().await;
    let mut stream = server.take("").await;
    stream.id().await;
    let (status, job) = server.fail(&id, json!({"message": "no", "kill": true})).await;
    assert_eq!((status, &job["status"], &job["attempts"]), (200, &json!("dead"), &json!(1)));
    assert_eq!(server.store.count(JobStatus::Dead), 1);
}

#[tokio::test]
async fn a_failure_needs_a_message() {
    let server = Server::start().await;
    let id = server.enqueue(1).remove(0);
    let mut stream = server.take("").await;
    stream.id().await;
    assert_eq!(server.fail(&id, json!({"error_type": "E"})).await.0, 400);
    assert_eq!(server.store.count(JobStatus::InFlight), 1);
}

#[tokio::test]
async fn a_job_for_later_arrives_when_it_is_due() {
    let server = Server::start().await;
    let mut stream = server.take("").await;
    let due = now() + 60;
    server.enqueue_in("q", "1", &format!(r#","ready_at":{due}"#));
    assert_eq!(server.store.count(JobStatus::Scheduled), 1);
    let job = stream.job().await;
    assert!(job["dequeued_at"].as_u64().unwrap() >= due);
}

#[tokio::test]
async fn the_in_flight_limit_spans_all_connections() {
    let server = Server::with(Options { in_flight_limit: 2, ..Options::default() }).await;
    let ids = server.enqueue(3);
    let mut first = server.take("?prefetch=0").await;
    assert_eq!([first.id().await, first.id().await], [ids[0].clone(), ids[1].clone()]);
    let mut second = server.take("?prefetch=0").await;
    // During these requests, a server that ignored its limit would have enough time to send the third job.
    for _ in 0..50 {
        server.get("/health").await;
    }
    assert_eq!(server.store.count(JobStatus::Ready), 1);
    server.succeed(&ids[0]).await;
    // Either stream can receive the third job, but only after the success above.
    tokio::select! {
        id = first.id() => assert_eq!(id, ids[2]),
        id = second.id() => assert_eq!(id, ids[2]),
    }
    assert_eq!(server.store.count(JobStatus::InFlight), 2);
}

#[tokio::test]
async fn an_unlimited_stream_takes_no_more_than_its_client_reads() {
    let server = Server::with(Options { in_flight_limit: 0, ..Options::default() }).await;
    let payload = format!("\"{}\"", "x".repeat(64 * 1024));
    for _ in 0..400 {
        server.enqueue_in("q", &payload, "");
    }
    let mut stream = server.take("?prefetch=0").await;
    stream.id().await;
    // During these requests, the server has enough time to send more jobs than the client reads.
    for _ in 0..50 {
        server.get("/health").await;
    }
    assert!(server.store.count(JobStatus::Ready) > 100);
    for _ in 1..400 {
        assert!(stream.line().await.is_some_and(|line| line.len() > payload.len()));
    }
}

#[tokio::test]
async fn the_successor_of_a_stopped_server_redelivers_its_jobs() {
    let server = Server::start().await;
    let id = server.enqueue(1).remove(0);
    let mut connection = Connection::http2(server.address).await;
    let mut stream = connection.take_on("").await;
    stream.id().await;
    let mut idle = server.take("").await;
    let (address, store) = server.stop().await;
    assert_eq!((stream.line().await, idle.line().await), (None, None));
    assert_eq!(store.count(JobStatus::Ready), 1);
    let server = Server::on(&address.to_string(), store).await;
    let job = server.take("").await.job().await;
    assert_eq!((&job["id"], &job["attempts"]), (&json!(id), &json!(0)));
    server.stop().await;
}

#[tokio::test]
async fn a_large_payload_arrives_byte_for_byte() {
    let server = Server::start().await;
    let payload = format!(r#"{{"z":1.50,"a":1e40,"text":"{}"}}"#, "é".repeat(4_500_000));
    let body = format!(r#"{{"type":"t","queue":"q","payload":{payload}}}"#);
    let (status, job) = server.call(Method::POST, "/jobs", &body).await;
    assert_eq!((status, job.get("payload"), &job["folded"]), (201, None, &json!(false)));
    let line = server.take("").await.line().await.unwrap();
    assert!(line.contains(&payload));
}

#[tokio::test]
async fn a_bulk_is_accepted_whole_or_not_at_all() {
    let server = Server::start().await;
    let good = json!({"type": "t", "queue": "q", "payload": 1});
    let bulk = json!({"jobs": [good, {"type": "", "queue": "q", "payload": 1}]}).to_string();
    let answer = server.call(Method::POST, "/jobs/bulk", &bulk).await;
    assert_eq!(answer, (400, json!({"error": "jobs[1]: type must not be empty"})));
    assert_eq!(server.get("/jobs/count").await, json!({"count": 0}));
    let bulk = json!({"jobs": [good, good]}).to_string();
    let (status, body) = server.call(Method::POST, "/jobs/bulk", &bulk).await;
    assert_eq!((status, body["jobs"].as_array().unwrap().len()), (201, 2));
}

#[tokio::test]
async fn jobs_are_listed_page_by_page() {
    let server = Server::start().await;
    let ids = server.enqueue(5);
    server.enqueue_in("other", "1", "");
    let mut path = "/jobs?queue=q&limit=2".to_owned();
    let mut seen = Vec::new();
    loop {
        let page = server.get(&path).await;
        seen.extend(page["jobs"].as_array().unwrap().iter().map(|job| job["id"].as_str().unwrap().to_owned()));
        match page["pages"]["next"].as_str() {
            Some(next) => path = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(seen, ids);
    let page = server.get(&format!("/jobs?order=desc&from={}&limit=1&status=ready", ids[2])).await;
    assert_eq!(page["jobs"][0]["id"], json!(ids[1]));
    let page = server.get(page["pages"]["prev"].as_str().unwrap()).await;
    assert_eq!(page["jobs"][0]["id"], json!(ids[2]));
}

#[tokio::test]
async fn jobs_are_counted_found_and_deleted() {
    let server = Server::start().await;
    let ids = server.enqueue(3);
    server.enqueue_in("a", "1", "");
    assert_eq!(server.get("/jobs/count?queue=q,none").await, json!({"count": 3}));
    assert_eq!(server.get("/queues").await, json!({"queues": ["a", "q"]}));
    assert_eq!(server.get(&format!("/jobs/{}", ids[1])).await["payload"], 1);
    let path = format!("/jobs/{}", ids[1]);
    assert_eq!(server.call(Method::DELETE, &path, "").await.0, 204);
    assert_eq!(server.call(Method::GET, &path, "").await, (404, json!({"error": "job not found"})));
    assert_eq!(server.call(Method::DELETE, "/jobs?queue=q", "").await, (200, json!({"deleted": 2})));
    assert_eq!(server.call(Method::POST, "/reset", "").await.0, 204);
    assert_eq!(server.get("/jobs/count").await, json!({"count": 0}));
}

#[tokio::test]
async fn deleting_a_job_in_flight_frees_its_slot() {
    let server = Server::start().await;
    let ids = server.enqueue(2);
    let mut stream = server.take("").await;
    stream.id().await;
    server.call(Method::DELETE, &format!("/jobs/{}", ids[0]), "").await;
    assert_eq!(stream.id().await, ids[1]);
}

#[tokio::test]
async fn a_bad_request_gets_an_error_message() {
    let server = Server::start().await;
    for (method, path, body, status) in [
        (Method::GET, "/nope", "", 404),
        (Method::POST, "/health", "", 405),
        (Method::GET, "/jobs/take?prefetch=x", "", 400),
        (Method::GET, "/jobs/take?zz=1", "", 400),
        (Method::GET, "/jobs?limit=0", "", 400),
        (Method::GET, "/jobs?status=nope", "", 400),
        (Method::GET, "/jobs?id=short", "", 400),
        (Method::GET, "/jobs/count?limit=1", "", 400),
        (Method::DELETE, "/jobs?filter=.a", "", 400),
        (Method::POST, "/jobs", "{", 400),
        (Method::POST, "/jobs", r#"{"type":"t","queue":"q"}"#, 400),
        (Method::POST, "/jobs", r#"{"type":"t","queue":"a,b","payload":1}"#, 400),
        (Method::POST, "/jobs/success", r#"{"ids":[]}"#, 400),
        (Method::GET, "/jobs/x/errors", "", 404),
        (Method::POST, "/jobs/%ff/success", "", 400),
    ] {
        let (answer, body) = server.call(method, path, body).await;
        assert_eq!(answer, status, "{path}");
        assert_eq!(body["error"].is_string(), status != 405, "{path}: {body}");
    }
}

#[tokio::test]
async fn the_official_client_feels_at_home_in_both_formats() -> Result<(), Box<dyn std::error::Error>> {
    for format in [zizq::Format::Json, zizq::Format::MessagePack] {
        let server = Server::start().await;
        let client = zizq::Client::builder().url(format!("http://{}", server.address)).format(format).build()?;
        official_round_trip(&client).await?;
    }
    Ok(())
}

#[derive(serde::Serialize, serde::Deserialize, zizq::JobKind)]
#[zizq(name = "greet", queue = "mail")]
struct Greet {
    name: String,
}

fn greet(name: &str) -> Greet {
    Greet { name: name.to_owned() }
}

async fn official_round_trip(client: &zizq::Client) -> Result<(), Box<dyn std::error::Error>> {
    client.health().await?;
    assert_eq!(client.server_version().await?, "0.6.1");
    let first = client.enqueue(greet("Ada")).priority(1).await?;
    let more = client.enqueue_bulk().add(client.enqueue(greet("Bob"))).add(client.enqueue(greet("Eve"))).await?;
    assert_eq!((client.count_jobs().await?, client.list_queues().await?), (3, vec!["mail".to_owned()]));
    let mut stream = client.take().queues(["mail"]).prefetch(3).await?;
    let mut taken = Vec::new();
    for _ in 0..3 {
        taken.push(soon(stream.try_next()).await?.expect("the stream has ended").id);
    }
    assert_eq!(taken, [&first.id, &more[0].id, &more[1].id].map(Clone::clone));
    client.report_failure(&first.id, "no luck").error_type("Luck").backtrace("here").await?;
    client.report_success(&taken[1]).await?;
    client.report_success_bulk([&taken[2]]).await?;
    let jobs: Vec<_> = client.list_jobs().stream().try_collect().await?;
    assert_eq!((jobs.len(), &jobs[0].id, jobs[0].attempts), (1, &first.id, 1));
    assert_eq!(client.get_job(&first.id).await?.attempts, 1);
    let errors: Vec<_> = client.list_errors(&first.id).stream().try_collect().await?;
    assert_eq!((errors.len(), errors[0].message.as_str()), (1, "no luck"));
    assert_eq!(client.get_error(&first.id, 1).await?.backtrace.as_deref(), Some("here"));
    client.delete_job(&first.id).await?;
    assert_eq!(client.count_jobs().await?, 0);
    Ok(())
}
