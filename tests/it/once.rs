//! Each attempt of a job runs once, despite lost connections. When a connection is lost, waiting jobs are dropped, running jobs
//! go on, and ended jobs are reported. A failure costs one attempt.

use std::fs;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Call, Daemon, Fault, Gate, Proxy, RawServer, Restartable, Running, Server, eventually};

const QUICK: [&str; 4] = ["--retry-min-wait", "10ms", "--retry-max-wait", "50ms"];

/// Backoff flags with a maximum wait of an hour. The worker looks up the job of a parked outcome only after the maximum wait, so
/// no test lasts until such a lookup.
const NO_LOOKS: [&str; 4] = ["--retry-min-wait", "10ms", "--retry-max-wait", "1h"];

/// A script that runs until the test's directory has a file `go`. It succeeds only for jobs of type `good`.
const UNTIL_GO: &str = "echo $ZIZQ_JOB_ID $ZIZQ_JOB_ATTEMPTS >> $DIR/started
until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done
[ $ZIZQ_JOB_TYPE = good ]";

/// A script that fails at once in a job's first attempt. In a later attempt, the script runs until the file `go` exists.
const FAILS_FIRST: &str = "echo $ZIZQ_JOB_ID $ZIZQ_JOB_ATTEMPTS >> $DIR/started
[ $ZIZQ_JOB_ATTEMPTS != 0 ] || exit 1
until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done";

const AGAIN: &str = "job received again while it is here, not started";
const ENDED: &str = "job received again after it ended here, reported";
const NOT_STARTED: &str = "job not started: its stream was lost, and the server has it again";
const DENIED_SUCCESS: &str = "success was already handled, or its job was handed out again";
const DENIED_FAILURE: &str = "failure was already handled, or its job was handed out again";
const KEPT: &str = "failure parked until its job is redelivered";

fn go(daemon: &Running) {
    fs::write(daemon.dir().join("go"), "").unwrap();
}

/// Returns a job whose retry is due at once.
fn quick_job(job_type: &str) -> Value {
    let backoff = json!({"base_ms": 1, "exponent": 0.0, "jitter_ms": 0});
    json!({"queue": "q", "type": job_type, "payload": null, "backoff": backoff})
}

/// Starts a daemon behind a proxy, with one job that runs until the file `go` exists.
fn with_a_running_job(job_type: &str) -> (Server, Proxy, Running, String) {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let id = server.enqueue("q", job_type, json!(null));
    let daemon = Daemon::of(&proxy).args(QUICK).sh(UNTIL_GO).start();
    daemon.wait_for_lines(1, "started");
    (server, proxy, daemon, id)
}

/// Asserts that the job succeeds if `failures` is 0, and otherwise that it fails exactly `failures` times.
#[track_caller]
fn assert_settled(server: &Server, id: &str, failures: usize) {
    match failures {
        0 => server.wait_until_done(id),
        _ => drop(server.wait_for_error(id, failures)),
    }
    assert_eq!(server.errors(id).len(), failures);
}

#[test]
fn jobs_that_wait_are_redelivered_after_a_lost_stream() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let ids: Vec<String> = (0..3).map(|_| server.enqueue("q", "good", json!(null))).collect();
    let daemon = Daemon::of(&proxy).args(QUICK).args(["--prefetch", "3"]).sh(UNTIL_GO).start();
    daemon.wait_for_messages(3, "job received");
    daemon.wait_for_lines(1, "started");
    let gate = proxy.hold(Call::Take);
    proxy.cut_streams();
    let dropped = daemon.wait_for_messages(2, NOT_STARTED);
    assert_eq!(dropped.iter().map(|event| event["job"]["id"].as_str().unwrap()).collect::<Vec<_>>(), ids[1..]);
    // After the running job has ended, the loop has no other job to start.
    go(&daemon);
    daemon.wait_for_message(DENIED_SUCCESS);
    assert_eq!(daemon.wait_for_lines(1, "started").len(), 1);
    gate.release();
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(daemon.wait_for_lines(3, "started"), first_attempts(&ids));
}

/// Returns the lines that the first attempts of these jobs record.
fn first_attempts(ids: &[String]) -> Vec<String> {
    ids.iter().map(|id| format!("{id} 0")).collect()
}

fn a_running_job_goes_on(job_type: &str, failures: usize) {
    let (server, proxy, daemon, id) = with_a_running_job(job_type);
    for times in 1..=3 {
        proxy.cut_streams();
        daemon.wait_for_messages(times, AGAIN);
    }
    go(&daemon);
    assert_settled(&server, &id, failures);
    daemon.sigterm();
    assert_eq!(daemon.assert_exit(0).read("started"), format!("{id} 0\n"));
}

#[test]
fn a_running_job_outlives_its_stream_and_its_success_counts() {
    a_running_job_goes_on("good", 0);
}

#[test]
fn a_running_job_outlives_its_stream_and_fails_once() {
    a_running_job_goes_on("bad", 1);
}

/// Asserts that each job runs once although the server is restarted three times. Half of the jobs fail, without a retry.
fn jobs_run_once_over_restarts(server: &mut Restartable) {
    let job = |number: usize| {
        let mut job = server.order(if number.is_multiple_of(2) { "good" } else { "bad" }, json!(null));
        job["retry_limit"] = json!(0);
        job
    };
    let ids = server.enqueue_all((0..12).map(job));
    let daemon = Daemon::of(server).args(["--queues", &server.queue]).args(QUICK).threads(4).sh(UNTIL_GO).start();
    daemon.wait_for_lines(4, "started");
    for restart in 1..=2 {
        server.restart(Duration::from_millis(200));
        // The running jobs are redelivered first, and are not started again.
        daemon.wait_for_messages(4 * restart, AGAIN);
    }
    server.restart(Duration::from_millis(200));
    go(&daemon);
    eventually("all jobs", || (server.unfinished() == 0).then_some(()));
    daemon.sigterm();
    let finished = daemon.assert_exit(0);
    let mut started: Vec<String> = finished.read("started").lines().map(str::to_owned).collect();
    started.sort();
    assert_eq!(started, first_attempts(&ids));
    for (number, id) in ids.iter().enumerate() {
        assert_eq!(server.errors(id).len(), number % 2, "job {number}");
    }
}

#[test]
fn jobs_run_once_over_restarts_of_the_server() {
    jobs_run_once_over_restarts(&mut Restartable::embedded());
}

#[test]
#[ignore = "needs a Zizq server at ZIZQ_URL, and ZIZQ_RESTART_CMD"]
fn real_server_jobs_run_once_over_restarts_of_the_server() {
    if let Some(mut server) = Restartable::real() {
        jobs_run_once_over_restarts(&mut server);
    }
}

fn a_drain_outlives_a_restart(server: &mut Restartable) {
    let mut bad = server.order("bad", json!(null));
    bad["retry_limit"] = json!(0);
    let ids = server.enqueue_all([server.order("good", json!(null)), bad]);
    let daemon = Daemon::of(server).args(["--queues", &server.queue]).args(QUICK).threads(2).sh(UNTIL_GO).start();
    daemon.wait_for_lines(2, "started");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    server.restart(Duration::from_millis(200));
    go(&daemon);
    assert!(!daemon.assert_exit(0).has("report dropped"));
    server.wait_until_done(&ids[0]);
    assert_eq!((server.job(&ids[1]).unwrap()["status"].as_str(), server.errors(&ids[1]).len()), (Some("dead"), 1));
}

#[test]
fn a_drain_outlives_a_restart_of_the_server() {
    a_drain_outlives_a_restart(&mut Restartable::embedded());
}

#[test]
#[ignore = "needs a Zizq server at ZIZQ_URL, and ZIZQ_RESTART_CMD"]
fn real_server_a_drain_outlives_a_restart_of_the_server() {
    if let Some(mut server) = Restartable::real() {
        a_drain_outlives_a_restart(&mut server);
    }
}

/// Ends a job while no stream is open, so that its outcome is parked. Asserts that the outcome is reported when the job is
/// redelivered.
fn an_ended_job_is_reported_when_it_is_redelivered(job_type: &str, kept: &str, failures: usize) {
    let (server, proxy, daemon, id) = with_a_running_job(job_type);
    let gate = proxy.hold(Call::Take);
    proxy.cut_streams();
    gate.wait_for(1);
    server.wait_for_status(&id, "ready");
    go(&daemon);
    daemon.wait_for_message(kept);
    gate.release();
    daemon.wait_for_message(ENDED);
    assert_settled(&server, &id, failures);
    daemon.sigterm();
    assert_eq!(daemon.assert_exit(0).read("started"), format!("{id} 0\n"));
}

#[test]
fn a_parked_success_is_reported_on_redelivery() {
    an_ended_job_is_reported_when_it_is_redelivered("good", DENIED_SUCCESS, 0);
}

#[test]
fn a_parked_failure_is_reported_on_redelivery() {
    an_ended_job_is_reported_when_it_is_redelivered("bad", KEPT, 1);
}

/// The server notices the end of the stream before the worker does, so the server denies the reports of that stream's jobs.
#[test]
fn a_denied_report_waits_for_the_redelivery() {
    for job_type in ["good", "bad"] {
        let server = RawServer::start();
        let daemon = Daemon::at(&server.url()).args(NO_LOOKS).sh(UNTIL_GO).start();
        let mut stream = server.take();
        go(&daemon);
        for id in ["1", "2"] {
            stream.typed_job(id, job_type);
            // If the worker repeated the report of the previous job in a loop, that report would arrive here.
            let report = server.request();
            assert!(report.line().contains(&format!("/{id}/failure")) || report.body.contains(id), "{}", report.line());
            match job_type {
                "good" => report.answer("422 Unprocessable", &format!(r#"{{"not_found":["{id}"]}}"#)),
                _ => report.answer("404 Not Found", r#"{"error":"not in flight"}"#),
            }
            let look = server.request();
            assert_eq!(look.line(), format!("GET /jobs/{id} HTTP/1.1"));
            look.answer("200 OK", r#"{"status":"ready","attempts":0}"#);
        }
        stream.end();
        let mut stream = server.take();
        stream.typed_job("1", job_type);
        daemon.wait_for_message(ENDED);
        // The redelivery shows that the server has not counted this attempt as failed, so the worker reports without another
        // `GET` of the job.
        let again = server.request();
        let path = if job_type == "bad" { "/jobs/1/failure" } else { "/jobs/success" };
        assert_eq!(again.line(), format!("POST {path} HTTP/1.1"));
        again.answer("204 No Content", "");
        assert_eq!(daemon.wait_for_lines(2, "started"), ["1 0", "2 0"]);
    }
}

/// Loses the answer to the report of a failure. The worker looks up the job and finds the next attempt in flight, so it does not
/// send the failure again.
fn a_failure_whose_answer_is_lost_costs_one_attempt(fault: Fault) {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let look = proxy.hold(Call::Job);
    proxy.fault_times(1, Call::Failure, fault);
    let id = server.enqueue_with(quick_job("good"));
    let daemon = Daemon::of(&proxy).args(QUICK).sh(FAILS_FIRST).start();
    assert_eq!(daemon.wait_for_lines(2, "started"), [format!("{id} 0"), format!("{id} 1")]);
    look.wait_for(1);
    look.release();
    daemon.wait_for_message(DENIED_FAILURE);
    assert_eq!(proxy.calls(Call::Failure).len(), 1);
    go(&daemon);
    server.wait_until_done(&id);
    daemon.sigterm();
    assert_eq!(daemon.assert_exit(0).event("worker stopped")["failed"], 1);
}

#[test]
fn a_failure_whose_answer_is_swallowed_costs_one_attempt() {
    a_failure_whose_answer_is_lost_costs_one_attempt(Fault::Swallow);
}

#[test]
fn a_failure_that_a_proxy_answers_with_502_costs_one_attempt() {
    a_failure_whose_answer_is_lost_costs_one_attempt(Fault::Lose(502));
}

#[test]
fn a_failure_that_a_proxy_answers_with_504_costs_one_attempt() {
    a_failure_whose_answer_is_lost_costs_one_attempt(Fault::Lose(504));
}

/// To settle the report in doubt, the worker looks up the job by `GET`. The answer contains the job's large payload.
#[test]
fn a_failure_in_doubt_of_a_large_job_is_settled() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(1, Call::Failure, Fault::Swallow);
    let payload = ["x".repeat(4_000_000), "[".to_owned()];
    let id = server.enqueue("q", "bad", json!({"status": "dead", "text": payload}));
    let daemon = Daemon::of(&proxy).args(QUICK).sh("exit 1").start();
    daemon.wait_for_message(DENIED_FAILURE);
    daemon.sigterm();
    daemon.assert_exit(0);
    assert_eq!((server.errors(&id).len(), proxy.calls(Call::Job).len()), (1, 1));
}

#[test]
fn a_kill_does_not_wait_for_a_look_at_a_job() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(1, Call::Failure, Fault::Swallow);
    let look = proxy.hold(Call::Job);
    let id = server.enqueue("q", "bad", json!(null));
    let daemon = Daemon::of(&proxy).args(QUICK).sh("exit 1").start();
    look.wait_for(1);
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    let killed = Instant::now();
    daemon.sigterm();
    let dropped = daemon.assert_exit(1).event("report dropped");
    assert!(dropped["job"]["id"] == id, "{dropped}");
    assert!(killed.elapsed() < Duration::from_secs(15), "{:?}", killed.elapsed());
}

#[test]
fn a_failure_whose_request_is_lost_is_sent_after_a_look() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(1, Call::Failure, Fault::Reset);
    proxy.fault_times(1, Call::Failure, Fault::Answer(502, ""));
    let id = server.enqueue("q", "bad", json!(null));
    let daemon = Daemon::of(&proxy).args(QUICK).sh("exit 1").start();
    assert_settled(&server, &id, 1);
    daemon.sigterm();
    daemon.assert_exit(0);
    assert_eq!((proxy.calls(Call::Failure).len(), proxy.calls(Call::Job).len()), (3, 2));
}

#[test]
fn a_failure_in_doubt_spares_the_next_attempt_elsewhere() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let look = proxy.hold(Call::Job);
    proxy.fault_times(1, Call::Failure, Fault::Swallow);
    let id = server.enqueue_with(quick_job("good"));
    let blocker = server.enqueue_with(quick_job("good"));
    let script =
        format!("[ $ZIZQ_JOB_ID != {blocker} ] || exec sh -c 'until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done'");
    let first =
        Daemon::of(&proxy).args(QUICK).args(["--prefetch", "1"]).sh(&format!("{script}\n{FAILS_FIRST}")).start();
    // With a prefetch of 1, the first worker holds only one job. After the failure, it holds the job `blocker`, so it does not get
    // the next attempt of the failed job.
    first.wait_for_lines(1, "started");
    look.wait_for(1);
    server.wait_for_status(&blocker, "in_flight");
    let second = Daemon::of(&server).sh(FAILS_FIRST).start();
    assert_eq!(second.wait_for_lines(1, "started"), [format!("{id} 1")]);
    look.release();
    first.wait_for_message(DENIED_FAILURE);
    assert_eq!((proxy.calls(Call::Failure).len(), server.errors(&id).len()), (1, 1));
    [&first, &second].into_iter().for_each(go);
    [&id, &blocker].into_iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(first.wait_for_lines(1, "started"), [format!("{id} 0")]);
}

#[test]
fn a_success_whose_answer_is_lost_is_sent_again() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(2, Call::Successes, Fault::Swallow);
    let id = server.enqueue("q", "good", json!(null));
    let daemon = Daemon::of(&proxy).args(QUICK).sh("echo $ZIZQ_JOB_ID >> $DIR/started").start();
    server.wait_until_done(&id);
    daemon.wait_for_message(DENIED_SUCCESS);
    daemon.sigterm();
    assert_eq!(daemon.assert_exit(0).read("started"), format!("{id}\n"));
}

/// The server rejects one job of a bulk report, and the worker cannot query the state of the rejected job.
#[test]
fn only_unsettled_jobs_of_a_bulk_report_are_sent_again() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(NO_LOOKS).args(["--prefetch", "4"]).sh("true").start();
    let mut stream = server.take();
    stream.job("0");
    let first = server.request();
    stream.job("1").job("2").job("3");
    // The worker has one loop, which queues an outcome before it takes the next job. So the outcomes of jobs 1 and 2 are in the
    // ack queue.
    daemon.wait_for_messages(4, "job completed");
    first.answer("204 No Content", "");
    let all = server.request();
    assert!(all.body.starts_with(r#"{"ids":["1","2""#), "{}", all.body);
    all.answer("422 Unprocessable", r#"{"not_found":["1"]}"#);
    let look = server.request();
    assert_eq!(look.line(), "GET /jobs/1 HTTP/1.1");
    look.answer("503 Service Unavailable", "");
    let again = server.request();
    assert!(again.body.contains(r#""1""#) && !again.body.contains(r#""2""#), "{}", again.body);
    again.answer("422 Unprocessable", r#"{"not_found":["1"]}"#);
    let look = server.request();
    assert_eq!(look.line(), "GET /jobs/1 HTTP/1.1");
    // A proxy refuses the `GET` of the job, so the worker parks the success.
    look.answer("403 Forbidden", "");
    daemon.wait_for_message("cannot look at a job whose report was denied");
    stream.end();
    server.take().job("1");
    daemon.wait_for_message(ENDED);
}

/// The job's next attempt arrives while the report of its previous attempt is still unanswered.
#[test]
fn a_later_attempt_starts_while_the_failure_is_in_doubt() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(QUICK).sh(FAILS_FIRST).start();
    let mut stream = server.take();
    stream.attempt("1", 0);
    let failure = server.request();
    stream.attempt("1", 1);
    assert_eq!(daemon.wait_for_lines(2, "started"), ["1 0", "1 1"]);
    failure.answer("204 No Content", "");
    go(&daemon);
    let success = server.request();
    assert_eq!((success.line(), &*success.body), ("POST /jobs/success HTTP/1.1", r#"{"ids":["1"]}"#));
    success.answer("204 No Content", "");
    daemon.sigterm();
    daemon.assert_exit(0);
}

/// Another client has reported the waiting job as failed, so the server delivers the job's next attempt.
#[test]
fn a_job_redelivered_while_it_waits_runs_once() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(QUICK).args(["--prefetch", "4"]).sh(UNTIL_GO).start();
    let mut stream = server.take();
    stream.typed_job("0", "good").attempt("1", 0).attempt("1", 1);
    daemon.wait_for_messages(3, "job received");
    go(&daemon);
    assert_eq!(daemon.wait_for_lines(2, "started"), ["0 0", "1 1"]);
    drop(stream);
}

/// The server accepts a success of a job, no matter which attempt of the job is in flight.
#[test]
fn a_success_counts_though_a_later_attempt_comes_meanwhile() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(QUICK).sh(UNTIL_GO).start();
    let mut stream = server.take();
    stream.typed_job("1", "good");
    go(&daemon);
    let success = server.request();
    stream.typed_attempt("1", "good", 1);
    daemon.wait_for_message(AGAIN);
    success.answer("422 Unprocessable", r#"{"not_found":["1"]}"#);
    server.request().answer("200 OK", r#"{"status":"in_flight","attempts":1}"#);
    let again = server.request();
    assert_eq!(again.body, r#"{"ids":["1"]}"#);
    again.answer("204 No Content", "");
    assert_eq!(daemon.wait_for_lines(1, "started"), ["1 0"]);
}

/// The server has redelivered the job over a new stream, and accepts the job's report before the worker reads the redelivered line.
#[test]
fn a_line_that_a_report_has_overtaken_starts_nothing() {
    for job_type in ["good", "bad"] {
        let server = RawServer::start();
        let daemon = Daemon::at(&server.url()).args(QUICK).sh(UNTIL_GO).start();
        let mut stream = server.take();
        stream.typed_job("1", job_type);
        daemon.wait_for_lines(1, "started");
        // A failure is sent only while a stream holds the job, so the report must be in flight when the stream ends.
        let report = if job_type == "good" {
            stream.end();
            stream = server.take();
            go(&daemon);
            server.request()
        } else {
            go(&daemon);
            let report = server.request();
            stream.end();
            stream = server.take();
            report
        };
        report.answer("204 No Content", "");
        // When the success of job 2 has been reported, the report of job 1 has been settled.
        stream.typed_job("2", "good");
        server.request().answer("204 No Content", "");
        stream.typed_job("1", job_type);
        daemon.wait_for_message(AGAIN);
        if job_type == "bad" {
            stream.typed_attempt("1", "good", 1);
            daemon.wait_for_lines(3, "started");
        }
        let expected = ["1 0", "2 0", "1 1"];
        assert_eq!(daemon.wait_for_lines(2, "started"), expected[..if job_type == "good" { 2 } else { 3 }]);
    }
}

/// Starts a drain while a failed job's report is parked. The worker sends the report when the job is redelivered.
fn draining_with_a_kept_failure(deadline: &str) -> (Server, Proxy, Running, String, Gate) {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let id = server.enqueue("q", "bad", json!(null));
    let daemon = Daemon::of(&proxy).args(QUICK).args(["--shutdown-deadline", deadline]).sh(UNTIL_GO).start();
    daemon.wait_for_lines(1, "started");
    let gate = proxy.hold(Call::Take);
    proxy.cut_streams();
    gate.wait_for(1);
    go(&daemon);
    daemon.wait_for_message(KEPT);
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    (server, proxy, daemon, id, gate)
}

#[test]
fn a_drain_waits_for_the_redelivery_that_a_parked_failure_needs() {
    let (server, _proxy, daemon, id, gate) = draining_with_a_kept_failure("10m");
    gate.release();
    assert!(daemon.assert_exit(0).has(ENDED));
    assert_settled(&server, &id, 1);
}

#[test]
fn a_drain_does_not_wait_for_jobs_finished_elsewhere() {
    let (server, _proxy, daemon, id, _gate) = draining_with_a_kept_failure("10m");
    let other = Daemon::of(&server).sh("true").start();
    server.wait_until_done(&id);
    assert!(!daemon.assert_exit(0).has("report dropped"));
    other.sigterm();
    other.assert_exit(0);
}

#[test]
fn an_outcome_dropped_at_the_deadline_is_logged_with_its_id() {
    let (server, _proxy, daemon, id, _gate) = draining_with_a_kept_failure("300ms");
    let finished = daemon.assert_exit(1);
    assert!(finished.event("report dropped")["job"]["id"] == id);
    assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
}
