//! The daemon's reactions to faults of the network and of the server.

use std::fs;
use std::net::TcpStream;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Admin, BodyFault, Call, Daemon, Fault, Proxy, RawServer, Running, Server, eventually, runtime};

const QUICK: [&str; 4] = ["--retry-min-wait", "10ms", "--retry-max-wait", "50ms"];

/// A script that records the job's id, attempt and payload.
const NOTES: &str = "echo $ZIZQ_JOB_ID $ZIZQ_JOB_ATTEMPTS $(cat) >> $DIR/ran";

/// A script that runs until the test's directory has a file `go`. It succeeds only for jobs of type `good`.
const UNTIL_GO: &str = "echo $ZIZQ_JOB_ID >> $DIR/started
until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done
[ $ZIZQ_JOB_TYPE = good ]";

/// The beginning of each job's payload, with characters of one to four bytes in UTF-8.
const TEXT: &str = "aß€😀";

fn go(daemon: &Running) {
    fs::write(daemon.dir().join("go"), "").unwrap();
}

/// Asserts that `count` jobs all succeed, each after one run with its own payload, despite the faults that `lay` sets up.
fn jobs_arrive_in_spite_of(count: usize, lay: impl Fn(&Proxy)) {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    lay(&proxy);
    let job = |number| json!({"queue": "q", "type": "t", "payload": format!("{TEXT}{number}")});
    let ids = server.enqueue_all((0..count).map(job));
    let daemon = Daemon::of(&proxy).args(QUICK).args(["--prefetch", "4"]).sh(NOTES).start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    let ran = daemon.wait_for_lines(count, "ran");
    let expected: Vec<String> =
        ids.iter().enumerate().map(|(number, id)| format!("{id} 0 \"{TEXT}{number}\"")).collect();
    assert_eq!(ran, expected);
    daemon.sigterm();
    daemon.assert_exit(0);
}

#[test]
fn a_stream_that_comes_byte_by_byte_carries_the_same_jobs() {
    jobs_arrive_in_spite_of(3, |proxy| {
        proxy.fault(Call::Take, Fault::Body(BodyFault::Drip));
    });
}

#[test]
fn a_stream_that_is_cut_within_a_job_loses_none() {
    jobs_arrive_in_spite_of(12, |proxy| {
        for bytes in [1, 30, 150, 151, 152, 153, 154, 155, 500, 777] {
            proxy.fault_times(1, Call::Take, Fault::Body(BodyFault::CutAfterBytes(bytes)));
        }
    });
}

#[test]
fn a_stream_that_is_cut_after_some_jobs_loses_none() {
    jobs_arrive_in_spite_of(12, |proxy| {
        for jobs in [1, 2, 3, 1] {
            proxy.fault_times(1, Call::Take, Fault::Body(BodyFault::CutAfterJobs(jobs)));
        }
    });
}

#[test]
fn a_server_that_is_slow_to_answer_is_waited_for() {
    jobs_arrive_in_spite_of(3, |proxy| {
        for call in [Call::Take, Call::Successes] {
            proxy.fault(call, Fault::Delay(Duration::from_millis(150)));
        }
    });
}

#[test]
fn requests_that_are_reset_or_refused_are_made_again() {
    jobs_arrive_in_spite_of(3, |proxy| {
        for call in [Call::Take, Call::Successes] {
            for fault in [Fault::Reset, Fault::Answer(500, ""), Fault::Answer(502, "<html>"), Fault::Answer(503, "")] {
                proxy.fault_times(1, call, fault);
            }
        }
    });
}

/// The connection of the take stream stays open, but nothing more arrives over the connection.
#[test]
fn a_stream_that_falls_silent_is_opened_again() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(1, Call::Take, Fault::Body(BodyFault::StallAfterJobs(1)));
    let daemon = Daemon::of(&proxy).args(QUICK).args(["--stream-idle-timeout", "300ms"]).sh(NOTES).start();
    let ids = server.enqueue_all(vec![json!({"queue": "q", "type": "t", "payload": 1}); 3]);
    let lost = daemon.wait_for_message("stream lost, reconnecting");
    assert_eq!((&lost["error"], &lost["level"]), (&json!("nothing came for 300ms"), &json!("WARN")));
    ids.iter().for_each(|id| server.wait_until_done(id));
    proxy.wait_until_closed(proxy.calls(Call::Take)[0].connection);
    assert_eq!(daemon.wait_for_lines(3, "ran").len(), 3);
}

#[test]
fn heartbeats_keep_a_stream_open_for_as_long_as_they_come() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(QUICK).args(["--stream-idle-timeout", "1s"]).sh("true").start();
    let mut stream = server.take();
    let opened = Instant::now();
    while opened.elapsed() < Duration::from_millis(2500) {
        stream.heartbeat();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(stream.is_open());
    daemon.wait_for_message("stream lost, reconnecting");
    stream.wait_until_closed();
    let silent = opened.elapsed();
    assert!(silent >= Duration::from_millis(3300), "{silent:?}");
}

#[test]
fn a_stream_that_opens_and_ends_at_once_is_no_hot_loop() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(["--retry-min-wait", "100ms"]).sh("true").start();
    let started = Instant::now();
    for _ in 0..6 {
        server.take().end();
    }
    assert!(started.elapsed() >= Duration::from_millis(500), "{:?}", started.elapsed());
    assert_waits(&daemon.wait_for_messages(6, "server ended the stream, reconnecting"), 100.0);
}

/// Asserts that each event announces a wait of `millis` milliseconds, plus a jitter of up to a quarter of that time.
#[track_caller]
fn assert_waits(events: &[Value], millis: f64) {
    let wait = |event: &Value| event["reconnect_in"].as_str().unwrap().trim_end_matches('s').parse::<f64>().unwrap();
    let waits: Vec<f64> = events.iter().map(wait).collect();
    let possible = millis / 1000.0 - 0.01..=millis * 1.25 / 1000.0 + 0.01;
    assert!(waits.iter().all(|wait| possible.contains(wait)), "{waits:?}");
}

/// The minimum and the maximum wait are equal, so only the jitter makes the waits differ.
#[test]
fn the_first_wait_and_the_capped_ones_have_their_jitter() {
    let server = RawServer::start();
    let same = ["--retry-min-wait", "300ms", "--retry-max-wait", "300ms"];
    let daemon = Daemon::at(&server.url()).args(same).sh("true").start();
    for _ in 0..6 {
        server.request().answer("503 Service Unavailable", "");
    }
    let events = daemon.wait_for_messages(6, "server unreachable, reconnecting");
    assert_waits(&events, 300.0);
    assert!(events.iter().any(|event| event["reconnect_in"] != events[0]["reconnect_in"]), "no jitter in {events:?}");
}

/// The time limit for an answer is fixed at 30 seconds, so the test cannot shorten it.
#[test]
fn an_unanswered_report_is_sent_again_after_thirty_seconds() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(QUICK).sh("true").start();
    let mut stream = server.take();
    stream.job("1");
    let (_unanswered, asked) = (server.request(), Instant::now());
    while asked.elapsed() < Duration::from_secs(29) {
        stream.heartbeat();
        assert!(server.is_quiet(), "sent again after {:?}", asked.elapsed());
        std::thread::sleep(Duration::from_millis(200));
    }
    let again = server.request();
    assert_eq!(again.body, r#"{"ids":["1"]}"#);
    again.answer("204 No Content", "");
    assert_eq!(daemon.wait_for_message("report failed, trying again")["error"], "no answer within 30s");
}

#[test]
fn an_unaccepted_connection_is_given_up_after_ten_seconds() {
    let full = runtime().block_on(async {
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
        socket.listen(0).unwrap()
    });
    let address = full.local_addr().unwrap();
    // Fill the listener's backlog, so that the kernel accepts no connection from the worker.
    let mut queued = Vec::new();
    while let Ok(connection) = TcpStream::connect_timeout(&address, Duration::from_millis(300)) {
        queued.push(connection);
    }
    let started = Instant::now();
    let daemon = Daemon::at(&format!("http://{address}")).args(QUICK).sh("true").start();
    let event = daemon.wait_for_message("server unreachable, reconnecting");
    assert!(started.elapsed() >= Duration::from_secs(10), "{:?}", started.elapsed());
    assert!(event["error"].as_str().unwrap().starts_with("cannot connect: "), "{event}");
}

#[test]
fn a_malformed_job_with_an_id_is_reported_as_failed() {
    for line in [r#"{"id":"1","type":7,"queue":"q"}"#, r#"{"type":"t","id":"1"}"#, r#"{"id":"1","#] {
        let server = RawServer::start();
        let daemon = Daemon::at(&server.url()).args(QUICK).args(["--admin-listen", "127.0.0.1:0"]).sh("true").start();
        let mut stream = server.take();
        stream.chunk(&format!("{line}\n")).job("2");
        let (mut reported, mut done) = (None, false);
        while reported.is_none() || !done {
            let report = server.request();
            match report.line() {
                "POST /jobs/success HTTP/1.1" => done = report.body == r#"{"ids":["2"]}"#,
                _ => reported = Some((report.line().to_owned(), serde_json::from_str::<Value>(&report.body).unwrap())),
            }
            report.answer("204 No Content", "");
        }
        let (request, failure) = reported.unwrap();
        assert_eq!((&*request, &failure["error_type"]), ("POST /jobs/1/failure HTTP/1.1", &json!("MalformedJob")));
        let message = failure["message"].as_str().unwrap();
        assert!(message.starts_with("the worker cannot read this job: "), "{message}");
        let malformed = daemon.wait_for_message("malformed job, reported as failed");
        assert_eq!((&malformed["level"], &malformed["job"]), (&json!("ERROR"), &json!({"id": "1"})));
        Admin::of(&daemon).wait_for_metric(r#"job_failures_total{kind="MalformedJob",type="(other)"}"#, "1");
        daemon.sigterm();
        stream.wait_until_closed();
        daemon.assert_exit(0);
    }
}

#[test]
fn a_line_without_an_id_reopens_the_stream() {
    for (line, problem) in [
        ("nonsense", "expected"),
        (r#"{"type":"t"}"#, "missing field"),
        ("[]", "invalid"),
        (r#"{"id":7}"#, "invalid type"),
        ("\u{0}", "expected"),
    ] {
        let server = RawServer::start();
        let daemon = Daemon::at(&server.url()).args(QUICK).sh("true").start();
        let mut stream = server.take();
        stream.chunk(&format!("{line}\n"));
        let lost = daemon.wait_for_message("stream lost, reconnecting");
        let error = lost["error"].as_str().unwrap();
        assert!(error.contains("a line that is no job, and has no id") && error.contains(problem), "{line}: {error}");
        assert_eq!(lost["level"], "ERROR", "{line}");
        stream.wait_until_closed();
        server.take();
    }
}

#[test]
fn a_job_that_is_too_large_is_reported_as_failed() {
    let server = Server::start();
    let daemon = Daemon::of(&server).args(QUICK).args(["--max-job-size", "100kB"]).sh("cat > /dev/null").start();
    let job = |length: usize| json!({"queue": "q", "type": "t", "payload": "ü".repeat(length / 2)});
    let ids = server.enqueue_all([10, 99_000, 100_000, 5_000_000, 10].map(job));
    for id in [&ids[2], &ids[3]] {
        let error = server.wait_for_error(id, 1);
        assert_eq!(error["error_type"], "MalformedJob");
        assert_eq!(error["message"], "the worker cannot read this job: it is larger than max_job_size");
    }
    [&ids[0], &ids[1], &ids[4]].into_iter().for_each(|id| server.wait_until_done(id));
    daemon.sigterm();
    assert!(!daemon.assert_exit(0).has("stream lost, reconnecting"));
}

#[test]
fn an_endless_line_without_an_id_takes_no_memory() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(QUICK).args(["--max-job-size", "1MiB"]).sh("true").start();
    let mut stream = server.take();
    let before = daemon.resident_kib();
    for _ in 0..200 {
        stream.chunk(&"x".repeat(1 << 20));
    }
    stream.chunk("\n");
    let lost = daemon.wait_for_message("stream lost, reconnecting");
    assert!(lost["error"].as_str().unwrap().contains("larger than max_job_size"), "{lost}");
    let after = daemon.resident_kib();
    assert!(after < before + 32 * 1024, "{before} KiB before, {after} after");
    server.take();
}

#[test]
fn successes_wait_out_a_5xx_and_leave_together() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault(Call::Successes, Fault::Answer(503, ""));
    let daemon = Daemon::of(&proxy).args(QUICK).args(["--prefetch", "20"]).sh("true").start();
    let ids = server.enqueue_all(vec![json!({"queue": "q", "type": "t", "payload": null}); 12]);
    daemon.wait_for_messages(12, "job completed");
    // Wait for two more tries, because the first of them may have begun before the last job was completed.
    let tries = daemon.wait_for_messages(1, "report failed, trying again").len();
    daemon.wait_for_messages(tries + 2, "report failed, trying again");
    proxy.heal();
    ids.iter().for_each(|id| server.wait_until_done(id));
    let mut sent = proxy.calls(Call::Successes).last().unwrap().ids();
    sent.sort();
    assert_eq!(sent, ids);
}

#[test]
fn successes_wait_while_the_server_is_down_and_leave_together() {
    let mut server = Server::start();
    let proxy = Proxy::before(&server);
    let ids = server.enqueue_all(vec![json!({"queue": "q", "type": "good", "payload": null}); 6]);
    let daemon = Daemon::of(&proxy).args(QUICK).threads(6).sh(UNTIL_GO).start();
    daemon.wait_for_lines(6, "started");
    server.stop();
    go(&daemon);
    daemon.wait_for_messages(6, "job completed");
    let tries = daemon.wait_for_messages(1, "report failed, trying again").len();
    daemon.wait_for_messages(tries + 2, "report failed, trying again");
    server.resume();
    ids.iter().for_each(|id| server.wait_until_done(id));
    let together = proxy.calls(Call::Successes).iter().filter(|call| call.ids().len() == 6).count();
    assert!(together >= 1);
    assert_eq!(daemon.wait_for_lines(6, "started").len(), 6);
}

/// Asserts that a drain ends at the shutdown deadline although the job's report always fails, and that the worker logs the dropped
/// report.
fn draining_in_vain(job_type: &str) {
    let mut server = Server::start();
    let id = server.enqueue("q", job_type, json!(null));
    let daemon = Daemon::of(&server).args(QUICK).args(["--shutdown-deadline", "700ms"]).sh(UNTIL_GO).start();
    daemon.wait_for_lines(1, "started");
    server.stop();
    daemon.wait_for_message("server unreachable, reconnecting");
    go(&daemon);
    daemon.wait_for_message(if job_type == "good" { "job completed" } else { "job failed" });
    daemon.sigterm();
    let finished = daemon.assert_exit(1);
    let dropped = finished.event("report dropped");
    assert!(dropped["job"]["id"] == id && dropped["level"] == "ERROR", "{dropped}");
    assert!(finished.has("shutdown deadline reached: killing what still runs"));
    server.resume();
    assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
}

#[test]
fn a_drain_without_a_server_names_the_successes_it_drops() {
    draining_in_vain("good");
}

#[test]
fn a_drain_without_a_server_names_the_failures_it_drops() {
    draining_in_vain("bad");
}

#[test]
fn a_drain_during_a_server_restart_reports_afterwards() {
    let mut server = Server::start();
    let ids = ["good", "bad"].map(|job_type| server.enqueue("q", job_type, json!(null)));
    let daemon = Daemon::of(&server).args(QUICK).threads(2).sh(UNTIL_GO).start();
    daemon.wait_for_lines(2, "started");
    server.stop();
    daemon.wait_for_message("server unreachable, reconnecting");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    go(&daemon);
    daemon.wait_for_message("job completed");
    daemon.wait_for_message("job failed");
    server.resume();
    assert!(!daemon.assert_exit(0).has("report dropped"));
    server.wait_until_done(&ids[0]);
    assert_eq!(server.errors(&ids[1]).len(), 1);
}

#[test]
fn a_4xx_on_reconnecting_is_an_error_and_retried() {
    for status in ["401 Unauthorized", "403 Forbidden", "404 Not Found", "406 Not Acceptable"] {
        let server = RawServer::start();
        let daemon = Daemon::at(&server.url()).args(QUICK).sh("true").start();
        server.take().end();
        for _ in 0..2 {
            server.request().answer(status, r#"{"error":"go away"}"#);
        }
        for event in daemon.wait_for_messages(2, "server refuses the worker, reconnecting") {
            assert_eq!(event["level"], "ERROR");
            assert_eq!(event["error"], format!("the server answered {status}: go away"));
        }
        server.take();
        daemon.wait_for_messages(2, "connected, listening for jobs");
    }
}

#[test]
fn redirects_are_not_followed() {
    let (server, elsewhere) = (RawServer::start(), RawServer::start());
    let daemon = Daemon::at(&server.url()).args(QUICK).sh("true").start();
    let location = format!("302 Found\r\nlocation: {}/jobs", elsewhere.url());
    server.request().answer(&location, "");
    let mut stream = server.take();
    stream.job("1");
    server.request().answer(&location, "");
    server.request().answer("204 No Content", "");
    for message in ["server unreachable, reconnecting", "report failed, trying again"] {
        let error = daemon.wait_for_message(message)["error"].as_str().unwrap().to_owned();
        assert!(error.contains("redirects are not followed") && error.contains(&elsewhere.url()), "{error}");
    }
    assert!(!elsewhere.has_connection());
}

/// The worker holds six failures of the maximum size. Until these failures are reported, the worker gets no more jobs, so its
/// memory stays small.
#[test]
fn memory_stays_bounded_while_large_failures_cannot_be_reported() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault(Call::Failure, Fault::Answer(503, ""));
    let script = "echo $ZIZQ_JOB_ID >> $DIR/started; head -c 3000000 /dev/zero | tr '\\0' 'x' >&2; exit 1";
    let daemon = Daemon::of(&proxy).args(QUICK).args(["--prefetch", "6"]).sh(script).start();
    let ids = server.enqueue_all(vec![json!({"queue": "q", "type": "t", "payload": null}); 40]);
    // The prefetch is six, so the server sends no more than six jobs until reports arrive.
    daemon.wait_for_lines(6, "started");
    let held = eventually("the failures", || Some(daemon.resident_kib()).filter(|_| server.count("in_flight") == 6));
    assert!(held < 64 * 1024, "{held} KiB");
    proxy.heal();
    ids.iter().for_each(|id| drop(server.wait_for_error(id, 1)));
    assert_eq!(daemon.wait_for_lines(40, "started").len(), 40);
    let after = daemon.resident_kib();
    assert!(after < 64 * 1024, "{after} KiB");
}
