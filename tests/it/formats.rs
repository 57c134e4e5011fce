//! The API's answers in JSON and in MessagePack, from the embedded server and, in ignored tests, from a real one.
//!
//! A transcript holds the answers to a fixed sequence of requests, with placeholders for ids, times and the queue.
//! `real_answers.ndjson` is the transcript of a real server. Each format on each server must give the same transcript.

use std::sync::LazyLock;

use reqwest::header::{ACCEPT, ALLOW, CONTENT_TYPE};
use reqwest::{RequestBuilder, Response};
use serde_json::{Value, json};

use crate::support::{Api, PATIENCE, Server, runtime};

const JSON: &str = "application/json";
const MSGPACK: &str = "application/msgpack";
const NDJSON: &str = "application/x-ndjson";
const FRAMES: &str = "application/vnd.zizq.msgpack-stream";
const RECORD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/real_answers.ndjson");
const EVENTS: &str = "text/event-stream";

static HTTP: LazyLock<reqwest::Client> =
    LazyLock::new(|| reqwest::Client::builder().timeout(PATIENCE).build().unwrap());

#[test]
fn both_formats_give_the_answers_of_the_real_server() {
    let server = Server::start();
    for format in [JSON, MSGPACK] {
        compare(&Transcript::of(&server, format), &recorded());
    }
}

#[test]
fn a_silent_stream_has_heartbeats_in_its_own_form() {
    heartbeats(&Server::start());
}

#[test]
fn formats_are_negotiated_as_by_the_real_server() {
    negotiation(&Server::start());
}

#[test]
fn a_jq_filter_is_refused_by_every_endpoint_that_has_one() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!({"a": 1}));
    for (method, path) in [("GET", "/jobs"), ("GET", "/jobs/count"), ("PATCH", "/jobs"), ("DELETE", "/jobs")] {
        for format in [JSON, MSGPACK] {
            let (status, answer) = call(&server, format, method, &format!("{path}?filter=.a"), Some(json!({})));
            assert_eq!(status, 400, "{method} {path}");
            assert_eq!(answer, json!({"error": "invalid filter: jq needs a real server"}), "{method} {path}");
        }
    }
    assert!(server.job(&id).is_some());
}

mod real_server {
    use super::*;

    fn real_server() -> Api {
        Api::new(std::env::var("ZIZQ_URL").expect("ZIZQ_URL names the server").trim_end_matches('/'))
    }

    #[test]
    #[ignore = "needs a Zizq server at ZIZQ_URL"]
    fn both_formats_give_the_answers_on_record() {
        let server = real_server();
        for format in [JSON, MSGPACK] {
            let transcript = Transcript::of(&server, format);
            if std::env::var_os("UPDATE").is_some() {
                record(&transcript);
            }
            compare(&transcript, &recorded());
        }
    }

    #[test]
    #[ignore = "needs a Zizq server at ZIZQ_URL"]
    fn a_silent_stream_has_heartbeats_in_its_own_form() {
        heartbeats(&real_server());
    }

    #[test]
    #[ignore = "needs a Zizq server at ZIZQ_URL"]
    fn formats_are_negotiated_as_by_the_real_server() {
        negotiation(&real_server());
    }
}

/// Sends a request and waits for the head of its answer.
fn send(request: RequestBuilder) -> Response {
    // Create the future inside the runtime, because the request's timeout needs the runtime's timer.
    runtime().block_on(async { request.send().await }).unwrap()
}

fn request(server: &Api, method: &str, path: &str) -> RequestBuilder {
    HTTP.request(method.parse().unwrap(), format!("{}{path}", server.url))
}

/// Sends a request whose body, if any, is in `format`, and asks for an answer in the same format. Returns the status and the body
/// of the answer.
fn call(server: &Api, format: &str, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
    let mut request = request(server, method, path).header(ACCEPT, format);
    if let Some(body) = body {
        let bytes = if format == JSON { serde_json::to_vec(&body).unwrap() } else { rmp_serde::to_vec(&body).unwrap() };
        request = request.header(CONTENT_TYPE, format).body(bytes);
    }
    let answer = send(request);
    let status = answer.status().as_u16();
    let media_type = answer.headers().get(CONTENT_TYPE).map(|value| value.to_str().unwrap().to_owned());
    let bytes = runtime().block_on(answer.bytes()).unwrap();
    if bytes.is_empty() {
        return (status, Value::Null);
    }
    assert_eq!(media_type.as_deref(), Some(format), "{method} {path}");
    (status, decode(format, &bytes))
}

fn decode(format: &str, bytes: &[u8]) -> Value {
    match format {
        JSON | NDJSON => serde_json::from_slice(bytes).unwrap(),
        _ => rmp_serde::from_slice(bytes).unwrap(),
    }
}

/// The answers to a fixed sequence of requests, with placeholders for ids, times and the queue.
struct Transcript<'a> {
    server: &'a Api,
    format: &'static str,
    queue: String,
    ids: Vec<String>,
    answers: Vec<Answer>,
}

/// A request, with the status and the body of its answer.
type Answer = (String, u16, Value);

/// Returns the recorded transcript of a real server.
fn recorded() -> Vec<Answer> {
    let text = std::fs::read_to_string(RECORD).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn record(transcript: &Transcript<'_>) {
    let lines = transcript.answers.iter().map(|answer| serde_json::to_string(answer).unwrap() + "\n");
    std::fs::write(RECORD, lines.collect::<String>()).unwrap();
}

/// Asserts that a transcript equals the recorded one. Compares one answer at a time, to keep the panic message short.
fn compare(transcript: &Transcript<'_>, recorded: &[Answer]) {
    for (answer, recorded) in transcript.answers.iter().zip(recorded) {
        assert_eq!(answer, recorded, "{}", transcript.format);
    }
    assert_eq!(transcript.answers.len(), recorded.len());
}

impl<'a> Transcript<'a> {
    fn of(server: &'a Api, format: &'static str) -> Self {
        let queue = format!("zizq-worker-test-{:x}", fastrand::u64(..));
        let mut transcript = Self { server, format, queue, ids: Vec::new(), answers: Vec::new() };
        transcript.enqueue();
        transcript.read();
        transcript.patch();
        transcript.patch_many();
        transcript.take_and_report();
        transcript.patch_after_the_end();
        transcript.delete();
        transcript
    }

    /// Sends a request, adds the answer to the transcript, and returns the answer unchanged.
    fn call(&mut self, method: &str, path: &str, body: Option<Value>) -> Value {
        let path = path.replace("QUEUE", &self.queue);
        let (status, answer) = call(self.server, self.format, method, &path, body);
        for job in std::iter::once(&answer).chain(answer["jobs"].as_array().into_iter().flatten()) {
            let id = job["id"].as_str().map(str::to_owned);
            self.ids.extend(id.filter(|id| !self.ids.contains(id)));
        }
        let request = self.words(Value::from(format!("{method} {path}")));
        let note = (request.as_str().unwrap().to_owned(), status, self.words(answer.clone()));
        self.answers.push(note);
        answer
    }

    fn get(&mut self, path: &str) {
        self.call("GET", path, None);
    }

    fn job(&self, payload: Value) -> Value {
        json!({"queue": self.queue, "type": "t", "payload": payload})
    }

    /// Replaces ids, times and the queue, which differ from run to run, with placeholders.
    fn words(&self, value: Value) -> Value {
        match value {
            Value::String(text) => {
                let text = text.replace(&self.queue, "QUEUE");
                let ids = self.ids.iter().enumerate();
                Value::String(ids.fold(text, |text, (index, id)| text.replace(id, &format!("ID{index}"))))
            }
            Value::Number(number) if number.as_u64() > Some(1_000_000_000_000) => json!("TIME"),
            Value::Array(values) => values.into_iter().map(|value| self.words(value)).collect(),
            Value::Object(map) => map.into_iter().map(|(key, value)| (key, self.words(value))).collect(),
            value => value,
        }
    }

    fn enqueue(&mut self) {
        let payload = json!({"z": [1.5, -7, u64::from(u32::MAX), null, true], "a": "é\n", "m": {"x": {}}});
        self.call("POST", "/jobs", Some(self.job(payload)));
        let mut full = self.job(json!("full"));
        full["priority"] = json!(7);
        full["ready_at"] = json!(99_999_999_999_999_u64);
        full["retry_limit"] = json!(3);
        full["backoff"] = json!({"exponent": 1.5, "base_ms": 10, "jitter_ms": 0});
        full["retention"] = json!({"completed_ms": 60_000, "dead_ms": 70_000});
        self.call("POST", "/jobs", Some(full));
        let jobs: Vec<Value> = (0..3).map(|number| self.job(json!(number))).collect();
        self.call("POST", "/jobs/bulk", Some(json!({ "jobs": jobs })));
        self.call("POST", "/jobs/bulk", Some(json!({"jobs": []})));
        self.call("POST", "/jobs", Some(json!({"queue": "a,b", "type": "t", "payload": 1})));
        self.call("POST", "/jobs", Some(json!({"queue": "", "type": "", "payload": 1})));
        self.call("POST", "/jobs/bulk", Some(json!({"jobs": [{"queue": "q*", "type": "t", "payload": 1}]})));
    }

    fn read(&mut self) {
        for path in ["/health", "/version", "/nope", "/jobs/nope", "/jobs/nope/errors", "/jobs/nope/errors/1"] {
            self.get(path);
        }
        self.get(&format!("/jobs/{}", self.ids[0]));
        self.get("/jobs?queue=QUEUE");
        self.get("/jobs?queue=QUEUE&limit=2");
        self.get(&format!("/jobs?queue=QUEUE&limit=2&from={}&order=desc", self.ids[3]));
        self.get("/jobs?queue=QUEUE&status=scheduled&priority=7&attempts=..4&ready_at=5..");
        self.get("/jobs?queue=QUEUE&limit=0");
        self.get("/jobs?id=nope");
        self.get("/jobs/count?queue=QUEUE&status=ready,scheduled");
    }

    fn patch(&mut self) {
        let path = format!("/jobs/{}", self.ids[1]);
        for patch in [
            json!({}),
            json!({"priority": 9, "retry_limit": null, "type": "ignored"}),
            json!({"retention": {"completed_ms": null}}),
            json!({"retention": {"dead_ms": null}}),
            json!({"backoff": null, "retention": {"dead_ms": 5}}),
            json!({"backoff": {"exponent": 2.0, "base_ms": 1, "jitter_ms": 2}, "retention": null}),
            json!({"ready_at": 99_999_999_999_998_u64}),
            json!({"ready_at": null}),
            json!({"ready_at": null}),
            json!({"ready_at": 99_999_999_999_997_u64, "retry_limit": 0}),
            json!({"ready_at": 5}),
            json!({"queue": null}),
            json!({"queue": "a,b"}),
            json!({"priority": null}),
        ] {
            self.call("PATCH", &path, Some(patch));
        }
        self.get(&path);
        self.call("PATCH", "/jobs/nope", Some(json!({"priority": 1})));
        self.call("PATCH", "/jobs/nope", Some(json!({"priority": null})));
    }

    fn patch_many(&mut self) {
        let path = "/jobs?queue=QUEUE";
        self.call("PATCH", path, Some(json!({})));
        self.call("PATCH", "/jobs?queue=QUEUE&priority=9", Some(json!({"priority": 10, "ready_at": null})));
        let both = format!("/jobs?queue=QUEUE&id={},{}", self.ids[3], self.ids[4]);
        self.call("PATCH", &both, Some(json!({"ready_at": 99_999_999_999_999_u64})));
        self.call("PATCH", &format!("{path}&status=scheduled"), Some(json!({"ready_at": 1, "priority": 40_000})));
        self.call("PATCH", &format!("{path}&status=dead,ready&id=nope"), Some(json!({})));
        self.call("PATCH", &format!("{path}&id=nope"), Some(json!({"queue": null})));
        self.call("PATCH", path, Some(json!({"queue": null})));
        self.call("PATCH", path, Some(json!({"queue": "a\u{0}b", "priority": null})));
        self.call("PATCH", path, Some(json!({"priority": null})));
        self.get(path);
    }

    fn take_and_report(&mut self) {
        let accept = if self.format == JSON { NDJSON } else { FRAMES };
        let path = format!("/jobs/take?queue={}&prefetch=5", self.queue);
        let mut stream = Stream::open(self.server, &path, accept);
        let taken: Vec<Value> = (0..5).map(|_| stream.job()).collect();
        for job in &taken {
            self.answers.push(("taken".to_owned(), 200, self.words(job.clone())));
        }
        let path = |index: usize, rest: &str| format!("/jobs/{}{rest}", taken[index]["id"].as_str().unwrap());
        // Even a job in flight can be patched.
        let patch = json!({"priority": 3, "queue": self.queue, "ready_at": 99_999_999_999_999_u64, "retry_limit": 5});
        self.call("PATCH", &path(0, ""), Some(patch));
        self.call("PATCH", &path(0, ""), Some(json!({"ready_at": null, "retention": {"dead_ms": 600_000}})));
        self.call("PATCH", "/jobs?queue=QUEUE&status=in_flight", Some(json!({"retention": {"completed_ms": 600_000}})));
        self.call("POST", &path(1, "/success"), None);
        self.call("POST", &path(1, "/success"), None);
        let ids = json!({"ids": [taken[2]["id"], taken[2]["id"]]});
        self.call("POST", "/jobs/success", Some(ids.clone()));
        self.call("POST", "/jobs/success", Some(ids));
        self.call("POST", "/jobs/success", Some(json!({"ids": []})));
        let failure =
            json!({"message": "no", "error_type": "E", "backtrace": "b\n", "retry_at": 99_999_999_999_999_u64});
        self.call("POST", &path(0, "/failure"), Some(failure));
        self.call("POST", &path(3, "/failure"), Some(json!({"message": "never", "kill": true})));
        self.call("POST", &path(3, "/failure"), Some(json!({"message": "again"})));
        self.get(&path(0, "/errors"));
        self.get(&path(0, "/errors/1"));
        self.get(&path(0, "/errors/2"));
        self.get("/jobs?queue=QUEUE");
        drop(stream);
    }

    fn patch_after_the_end(&mut self) {
        for id in self.ids.clone() {
            self.call("PATCH", &format!("/jobs/{id}"), Some(json!({"priority": 1})));
        }
        self.call("PATCH", "/jobs?queue=QUEUE", Some(json!({"priority": 2})));
        self.call("PATCH", "/jobs?status=completed", Some(json!({"priority": 2})));
    }

    fn delete(&mut self) {
        let first = format!("/jobs/{}", self.ids[0]);
        self.call("DELETE", &first, None);
        self.call("DELETE", &first, None);
        self.call("DELETE", "/jobs?id=nope", None);
        self.call("DELETE", "/jobs?queue=QUEUE", None);
        self.call("DELETE", "/jobs?queue=QUEUE", None);
        self.get("/jobs/count?queue=QUEUE");
    }
}

/// A take stream. The methods here decode its frames, without the worker's code.
struct Stream {
    answer: Response,
    accept: &'static str,
    buffer: Vec<u8>,
}

impl Stream {
    fn open(server: &Api, path: &str, accept: &'static str) -> Self {
        let answer = send(request(server, "GET", path).header(ACCEPT, accept));
        assert_eq!(answer.status(), 200, "{path}");
        assert_eq!(answer.headers()[CONTENT_TYPE], accept);
        Self { answer, accept, buffer: Vec::new() }
    }

    /// Returns the next `size` bytes of the stream.
    fn read(&mut self, size: usize) -> Vec<u8> {
        while self.buffer.len() < size {
            let chunk = runtime().block_on(self.answer.chunk()).unwrap().expect("the stream has ended");
            self.buffer.extend_from_slice(&chunk);
        }
        self.buffer.drain(..size).collect()
    }

    fn line(&mut self) -> Vec<u8> {
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            line.append(&mut self.read(1));
        }
        line
    }

    /// Returns the next message without its frame. The message is empty for a heartbeat.
    fn message(&mut self) -> Vec<u8> {
        if self.accept == FRAMES {
            let length: [u8; 4] = self.read(4).try_into().unwrap();
            return self.read(u32::from_be_bytes(length) as usize);
        }
        self.line().trim_ascii_end().to_vec()
    }

    /// Skips heartbeats, and returns the next job.
    fn job(&mut self) -> Value {
        loop {
            let message = self.message();
            if !message.is_empty() {
                return decode(self.accept, &message);
            }
        }
    }
}

/// Checks the heartbeat of each kind of stream, and then the encoding of a job as a server-sent event.
fn heartbeats(server: &Api) {
    let queue = format!("zizq-worker-test-{:x}", fastrand::u64(..));
    let open = |accept| Stream::open(server, &format!("/jobs/take?queue={queue}"), accept);
    let mut streams = [NDJSON, FRAMES, EVENTS].map(open);
    let heartbeats: [&[u8]; 3] = [b"\n", &[0; 4], b": heartbeat\n\n"];
    for (stream, heartbeat) in streams.iter_mut().zip(heartbeats) {
        assert_eq!(stream.read(heartbeat.len()), heartbeat, "{}", stream.accept);
    }
    let [lines, frames, mut events] = streams;
    drop((lines, frames));
    assert_eq!(events.answer.headers()["cache-control"], "no-cache");
    let id = server.enqueue(&queue, "t", json!(1));
    let event = loop {
        let line = events.line();
        if line.starts_with(b"data") {
            break line;
        }
    };
    let job: Value = serde_json::from_slice(event.strip_prefix(b"data: ").unwrap()).unwrap();
    assert_eq!((&job["id"], &job["status"], &job["payload"]), (&json!(id), &json!("in_flight"), &json!(1)));
    assert_eq!(events.read(1), b"\n");
    server.call("DELETE", &format!("/jobs/{id}"), None);
}

const BODIES: [&str; 2] = [JSON, MSGPACK];
const STREAMS: [&str; 3] = [EVENTS, NDJSON, FRAMES];

/// Checks how a server chooses the format of its answer. The embedded server and a real one follow the same rules.
fn negotiation(server: &Api) {
    let not_acceptable = |supported: &[&str]| json!({"error": "not acceptable", "supported": supported});
    let unsupported = json!({"error": "unsupported media type", "supported": BODIES});
    for (method, path, accept, body_type, status, media_type, body) in [
        ("GET", "/health", "*/*", "", 200, JSON, json!({"status": "ok"})),
        ("GET", "/health", "text/html, */*", "", 200, JSON, json!({"status": "ok"})),
        ("GET", "/health", "application/json, application/msgpack;q=0.1", "", 200, MSGPACK, json!({"status": "ok"})),
        ("GET", "/health", "text/html", "", 406, JSON, not_acceptable(&BODIES)),
        ("GET", "/health", FRAMES, "", 406, JSON, not_acceptable(&BODIES)),
        ("GET", "/nope", "text/html", "", 406, JSON, not_acceptable(&BODIES)),
        ("GET", "/nope", MSGPACK, "", 404, MSGPACK, json!({"error": "not found"})),
        ("GET", "/jobs/take", "text/html", "", 406, JSON, not_acceptable(&STREAMS)),
        ("POST", "/jobs", "*/*", "text/plain", 415, JSON, unsupported.clone()),
        ("POST", "/jobs", MSGPACK, "text/plain", 415, MSGPACK, unsupported.clone()),
        ("POST", "/jobs", "text/html", "text/plain", 406, JSON, not_acceptable(&BODIES)),
        ("PATCH", "/jobs?status=nope", "*/*", "text/plain", 415, JSON, unsupported.clone()),
        ("PATCH", "/jobs/nope", "*/*", "text/plain", 415, JSON, unsupported),
        ("DELETE", "/jobs/nope", MSGPACK, "text/plain", 404, MSGPACK, json!({"error": "job not found"})),
    ] {
        let answer =
            send(request(server, method, path).header(ACCEPT, accept).header(CONTENT_TYPE, body_type).body("x"));
        let case = format!("{method} {path} {accept} {body_type}");
        assert_eq!(answer.status(), status, "{case}");
        assert_eq!(answer.headers()[CONTENT_TYPE], media_type, "{case}");
        let bytes = runtime().block_on(answer.bytes()).unwrap();
        assert_eq!(decode(media_type, &bytes), body, "{case}");
    }
    negotiation_of_streams(server);
    wrong_methods(server);
}

fn negotiation_of_streams(server: &Api) {
    for (accept, media_type) in [
        ("*/*", NDJSON),
        (JSON, NDJSON),
        (MSGPACK, FRAMES),
        ("application/x-ndjson, application/msgpack", FRAMES),
        ("application/vnd.zizq.msgpack-stream, text/event-stream", EVENTS),
    ] {
        let answer = send(request(server, "GET", "/jobs/take?queue=zizq-worker-none").header(ACCEPT, accept));
        assert_eq!(answer.headers()[CONTENT_TYPE], media_type, "{accept}");
    }
}

fn wrong_methods(server: &Api) {
    for (path, allowed) in [
        ("/jobs", "GET,HEAD,POST,PATCH,DELETE"),
        ("/jobs/nope", "GET,HEAD,PATCH,DELETE"),
        ("/jobs/take", "GET,HEAD"),
        ("/jobs/bulk", "POST"),
    ] {
        let answer = send(request(server, "PUT", path).header(ACCEPT, "text/html"));
        assert_eq!((answer.status().as_u16(), &answer.headers()[ALLOW]), (405, &allowed.parse().unwrap()), "{path}");
        assert!(runtime().block_on(answer.bytes()).unwrap().is_empty(), "{path}");
    }
}
