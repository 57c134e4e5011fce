//! The producer, which keeps one take stream open despite faults.

use hyper::Version;
use serde_json::{Value, json};

use crate::support::{Call, Daemon, Fault, Proxy, RawServer, Running, Server, unused_address};

/// Backoff flags with waits that are too short to slow a test down, and that differ clearly from each other.
const QUICK: [&str; 6] = ["--retry-min-wait", "100ms", "--retry-max-wait", "10s", "--retry-multiplier", "3"];

/// Returns the wait that an event announces, in seconds.
fn wait_of(event: &Value) -> f64 {
    let text = event["reconnect_in"].as_str().unwrap_or_else(|| panic!("no reconnect_in: {event}"));
    text.strip_suffix('s').unwrap().parse().unwrap()
}

/// Asserts that the event announces a wait of 0.1 × 3^`number` seconds, plus a jitter of up to a quarter of that wait.
#[track_caller]
fn assert_wait(event: &Value, number: i32) {
    let (wait, least) = (wait_of(event), 0.1 * 3f64.powi(number));
    assert!((least - 0.01..=least * 1.25 + 0.01).contains(&wait), "wait {number}: {event}");
}

#[test]
fn the_take_request_names_queues_prefetch_and_worker_id() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(["--queues", "mail,a b/ü", "--prefetch", "7", "--worker-id", "w 1"]);
    let _daemon = daemon.sh("true").start();
    let request = server.request();
    assert_eq!(request.line(), "GET /jobs/take?prefetch=7&queue=mail,a%20b%2F%C3%BC HTTP/1.1");
    assert_eq!(request.header("worker-id"), Some("w 1"));
    assert_eq!(request.header("accept"), Some("application/x-ndjson"));
    assert_eq!(request.header("host"), server.url().strip_prefix("http://"));
}

#[test]
fn without_queues_the_take_request_names_none() {
    let server = RawServer::start();
    let _daemon = Daemon::at(&server.url()).args(["-t", "2", "-f", "3"]).sh("true").start();
    assert_eq!(server.request().line(), "GET /jobs/take?prefetch=12 HTTP/1.1");
}

#[test]
fn a_path_prefix_of_the_url_is_kept() {
    let server = RawServer::start();
    let _daemon = Daemon::at(&format!("{}/zizq/", server.url())).sh("true").start();
    let mut stream = server.request();
    assert_eq!(stream.line(), "GET /zizq/jobs/take?prefetch=2 HTTP/1.1");
    stream = stream.open();
    stream.job("1");
    let report = server.request();
    assert_eq!(report.line(), "POST /zizq/jobs/success HTTP/1.1");
    assert_eq!(report.body, r#"{"ids":["1"]}"#);
}

#[test]
fn the_stream_has_a_connection_of_its_own() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let daemon = Daemon::of(&proxy).sh("[ $ZIZQ_JOB_TYPE = good ]").start();
    let good = server.enqueue("q", "good", json!(1));
    let bad = server.enqueue("q", "bad", json!(1));
    server.wait_until_done(&good);
    server.wait_for_error(&bad, 1);
    let take = proxy.calls(Call::Take).remove(0);
    assert_eq!(take.version, Version::HTTP_11);
    for report in [proxy.calls(Call::Successes), proxy.calls(Call::Failure)].concat() {
        assert_ne!(report.connection, take.connection);
    }
    daemon.sigterm();
    daemon.assert_exit(0);
    assert_eq!(proxy.calls(Call::Take).len(), 1);
}

#[test]
fn heartbeats_are_no_jobs_and_no_end() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).sh("echo $ZIZQ_JOB_ID >> $DIR/ids").start();
    let mut stream = server.take();
    stream.heartbeat().heartbeat().job("1").chunk("\n\n\n");
    server.request().answer("204 No Content", "");
    stream.heartbeat().job("2").heartbeat();
    server.request().answer("204 No Content", "");
    assert_eq!(daemon.wait_for_lines(2, "ids"), ["1", "2"]);
    daemon.sigterm();
    stream.wait_until_closed();
    let finished = daemon.assert_exit(0);
    assert!(!finished.has("stream lost, reconnecting"));
    assert_eq!(finished.all("job received").len(), 2);
}

#[test]
fn a_server_that_is_down_at_the_start_is_waited_for() {
    let address = unused_address();
    let daemon = Daemon::at(&format!("http://{address}")).args(QUICK).sh("true").start();
    let down = daemon.wait_for_messages(2, "server unreachable, reconnecting");
    assert_wait(&down[0], 0);
    assert_wait(&down[1], 1);
    assert!(down[0]["error"].as_str().unwrap().contains("refused"), "{}", down[0]);
    let server = RawServer::at(address);
    server.take();
    daemon.wait_for_message("connected, listening for jobs");
}

#[test]
fn the_waits_grow_until_a_connection_and_then_start_again() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(QUICK).sh("true").start();
    server.request().answer("503 Service Unavailable", "");
    server.request().answer("500 Internal Server Error", r#"{"error":"disk full"}"#);
    server.take().end();
    server.request().answer("502 Bad Gateway", "");
    let unreachable = daemon.wait_for_messages(3, "server unreachable, reconnecting");
    let ended = daemon.wait_for_message("server ended the stream, reconnecting");
    assert_wait(&unreachable[0], 0);
    assert_wait(&unreachable[1], 1);
    assert!(unreachable[1]["error"].as_str().unwrap().contains("disk full"), "{}", unreachable[1]);
    assert_wait(&ended, 0);
    assert_wait(&unreachable[2], 1);
}

#[test]
fn a_broken_stream_is_opened_again_and_takes_new_jobs() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let daemon = Daemon::of(&proxy).args(QUICK).sh("echo $ZIZQ_JOB_ID >> $DIR/ids").start();
    proxy.wait_for_calls(Call::Take, 1);
    daemon.wait_for_message("connected, listening for jobs");
    proxy.cut_streams();
    assert_wait(&daemon.wait_for_message("stream lost, reconnecting"), 0);
    proxy.wait_for_calls(Call::Take, 2);
    let id = server.enqueue("q", "t", json!(null));
    server.wait_until_done(&id);
    assert_eq!(daemon.wait_for_lines(1, "ids"), [id]);
}

#[test]
fn a_server_that_restarts_is_found_again() {
    let mut server = Server::start();
    let daemon = Daemon::of(&server).args(QUICK).sh("true").start();
    daemon.wait_for_message("connected, listening for jobs");
    server.stop();
    daemon.wait_for_message("server unreachable, reconnecting");
    server.resume();
    let id = server.enqueue("q", "t", json!(null));
    server.wait_until_done(&id);
}

/// Asserts that the daemon exits with status 1, and that its last log line has the server's message `said`.
fn assert_refused(daemon: Running, said: &str) {
    let finished = daemon.assert_exit(1);
    let complaint = finished.log.last().unwrap();
    assert!(complaint.starts_with("zizq-worker: cannot take jobs") && complaint.contains(said), "{complaint}");
}

#[test]
fn a_4xx_on_the_first_connection_ends_the_worker() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).sh("true").start();
    server.request().answer("400 Bad Request", r#"{"error":"no such queue"}"#);
    assert_refused(daemon, "400 Bad Request: no such queue");
}

#[test]
fn a_4xx_after_a_5xx_still_ends_the_worker() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(QUICK).sh("true").start();
    server.request().answer("503 Service Unavailable", "");
    server.request().answer("404 Not Found", "no zizq here");
    assert_refused(daemon, "the answer 404 Not Found is no Zizq server's, look for a proxy on the way: no zizq here");
}

#[test]
fn a_4xx_on_reconnecting_is_tried_again() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let daemon = Daemon::of(&proxy).args(QUICK).sh("true").start();
    daemon.wait_for_message("connected, listening for jobs");
    proxy.fault_times(2, Call::Take, Fault::Answer(403, r#"{"error":"go away"}"#)).cut_streams();
    let refused = daemon.wait_for_messages(2, "server refuses the worker, reconnecting");
    assert!(refused[0]["error"].as_str().unwrap().contains("403 Forbidden: go away"), "{}", refused[0]);
    let id = server.enqueue("q", "t", json!(null));
    server.wait_until_done(&id);
}
