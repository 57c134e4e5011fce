//! Recovery: once a fault is over, jobs are taken, finished and reported again.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    Admin, BodyFault, Call, Daemon, Fault, Proxy, RawServer, Running, Server, UNTIL_GO, eventually, jobs,
};

const QUICK: [&str; 4] = ["--retry-min-wait", "10ms", "--retry-max-wait", "50ms"];

/// Backoff flags with a second wait that is longer than any test.
const STEEP: [&str; 6] = ["--retry-min-wait", "100ms", "--retry-max-wait", "1h", "--retry-multiplier", "10000"];

/// A script that records its start, and fails only for jobs of type `bad`.
const BY_TYPE: &str = "echo $ZIZQ_JOB_ID >> $DIR/started; [ $ZIZQ_JOB_TYPE != bad ]";

fn job(job_type: &str) -> Value {
    json!({"queue": "q", "type": job_type, "payload": null})
}

fn urgent() -> Value {
    json!({"queue": "q", "type": "urgent", "payload": null, "priority": 0})
}

/// Returns a script that runs until the file `go` exists, and then fails only for jobs of type `bad`.
fn until_go() -> String {
    format!("{UNTIL_GO}; [ $ZIZQ_JOB_TYPE != bad ]")
}

/// Starts a run that drains after one job, and lets the job fail while no stream can be opened. Then enqueues `others` jobs of
/// higher priority, which are delivered first, and allows streams again.
fn draining_with_a_parked_failure(others: usize) -> (Server, Proxy, Running, String) {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let id = server.enqueue_with(job("bad"));
    let running = Daemon::of(&proxy).args(["--max-jobs", "1"]).sh(&until_go()).start();
    running.wait_for_lines(1, "started");
    let gate = proxy.hold(Call::Take);
    proxy.cut_streams();
    server.wait_for_status(&id, "ready");
    running.go();
    running.wait_for_message("failure parked until its job is redelivered");
    server.enqueue_all(vec![urgent(); others]);
    gate.release();
    proxy.heal();
    (server, proxy, running, id)
}

#[test]
fn a_drain_finds_its_job_behind_others_that_are_more_urgent() {
    let (server, _proxy, running, id) = draining_with_a_parked_failure(100);
    server.wait_for_error(&id, 1);
    let finished = running.assert_exit(0);
    assert_eq!(finished.read("started"), format!("{id}\n"));
    eventually("the others are ready", || (server.count("ready") == 100).then_some(()));
    // The search takes eight rounds. If the worker waited before each round, and not only before the first, the search would take
    // more than a minute.
    let rounds = finished.all("opening a stream for jobs that are here, and whose stream was lost");
    let prefetch: Vec<u64> = rounds.iter().map(|round| round["prefetch"].as_u64().unwrap()).collect();
    assert_eq!(prefetch, [1, 2, 4, 8, 16, 32, 64, 128]);
    let moment = |event: &Value| {
        time::OffsetDateTime::parse(
            event["timestamp"].as_str().unwrap(),
            &time::format_description::well_known::Rfc3339,
        )
        .unwrap()
    };
    let took = moment(&rounds[7]) - moment(&rounds[0]);
    assert!(took < Duration::from_secs(20), "{took}");
}

/// A stream that searches for a job withholds as many jobs from other workers as its prefetch allows, so the prefetch is limited.
#[test]
fn a_search_holds_at_most_512_jobs_and_rests_after_as_many() {
    let server = RawServer::start();
    let args = ["--retry-min-wait", "300ms", "--retry-max-wait", "300ms"];
    let running = Daemon::at(&server.url()).args(args).sh(&until_go()).start();
    let mut stream = server.take();
    stream.typed_job("mine", "bad");
    running.wait_for_lines(1, "started");
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    stream.end();
    running.wait_for_message("stream lost while its last jobs were finished");
    running.go();
    running.wait_for_message("failure parked until its job is redelivered");
    let (mut rounds, mut full) = (Vec::new(), Vec::new());
    while full.len() < 3 {
        let request = server.request();
        if request.line().starts_with("GET /jobs/mine") {
            request.answer("200 OK", r#"{"status":"ready","attempts":0}"#);
            continue;
        }
        let prefetch: usize = request.line().split(['=', ' ', '&']).nth(2).unwrap().parse().unwrap();
        rounds.push(prefetch);
        if prefetch == 512 {
            full.push(Instant::now());
        }
        let mut stream = request.open();
        for number in 0..prefetch {
            stream.job(&format!("other{number}"));
        }
        stream.wait_until_closed();
    }
    assert_eq!(rounds, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 512, 512]);
    assert!(full[2] - full[0] >= Duration::from_millis(600), "{:?}", full[2] - full[0]);
}

/// A stream that redelivers the running job stays open until the job ends. With a prefetch above 1, the stream could withhold other
/// jobs from other workers until then.
#[test]
fn a_search_for_a_running_job_holds_no_other_job() {
    let server = RawServer::start();
    let running = Daemon::at(&server.url()).args(QUICK).sh(UNTIL_GO).start();
    let mut stream = server.take();
    stream.job("mine");
    running.wait_for_lines(1, "started");
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    stream.end();
    for round in 0..6 {
        let request = std::iter::repeat_with(|| server.request()).find_map(|request| {
            let is_look = request.line().starts_with("GET /jobs/mine");
            if is_look {
                request.answer("200 OK", r#"{"status":"ready","attempts":0}"#);
                return None;
            }
            Some(request)
        });
        let request = request.unwrap();
        assert!(request.line().contains("prefetch=1 "), "{}", request.line());
        let mut stream = request.open();
        stream.job(&format!("other{round}"));
        stream.wait_until_closed();
    }
}

#[test]
fn a_drain_leaves_a_failure_to_the_worker_that_runs_its_job() {
    for bound in [["--max-jobs", "1"], ["--exit-when-idle", "500ms"]] {
        leave_to_the_other_worker(bound);
    }
}

fn leave_to_the_other_worker(bound: [&str; 2]) {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let id = server.enqueue_with(job("bad"));
    let first = Daemon::of(&proxy).args(QUICK).args(bound).sh(&until_go()).start();
    first.wait_for_lines(1, "started");
    let gate = proxy.hold(Call::Take);
    proxy.cut_streams();
    server.wait_for_status(&id, "ready");
    let second = Daemon::of(&server).sh(&until_go()).start();
    second.wait_for_lines(1, "started");
    first.go();
    first.wait_for_message("failure parked until its job is redelivered");
    gate.release();
    first.assert_exit(0);
    assert_eq!(server.job(&id).unwrap()["status"], "in_flight");
    second.go();
    server.wait_for_error(&id, 1);
    second.stop();
}

#[test]
fn a_parked_outcome_ends_no_later_than_the_deadline() {
    let (server, proxy, running, id) = {
        let server = Server::start();
        let proxy = Proxy::before(&server);
        let id = server.enqueue_with(job("bad"));
        let daemon = Daemon::of(&proxy).args(QUICK).args(["--max-jobs", "1", "--shutdown-deadline", "500ms"]);
        let running = daemon.sh(&until_go()).start();
        running.wait_for_lines(1, "started");
        (server, proxy, running, id)
    };
    let _gate = proxy.hold(Call::Take);
    proxy.cut_streams();
    server.wait_for_status(&id, "ready");
    running.go();
    let finished = running.assert_exit(1);
    assert!(finished.event("report dropped")["job"]["id"] == id);
    assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
}

#[test]
fn a_404_that_is_not_the_servers_settles_no_failure() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    // Set up two faults, one for each job in flight, because the default prefetch is 2.
    proxy.fault_times(2, Call::Failure, Fault::Answer(404, "<html>no backend</html>"));
    let running = Daemon::of(&proxy).args(QUICK).sh(BY_TYPE).start();
    let ids = server.enqueue_all(vec![job("bad"); 6]);
    ids.iter().for_each(|id| drop(server.wait_for_error(id, 1)));
    assert_eq!(running.stop().read("started").lines().count(), 6);
}

#[test]
fn a_404_to_everything_settles_nothing() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    for call in [Call::Failure, Call::Job, Call::Successes] {
        proxy.fault(call, Fault::Answer(404, ""));
    }
    let running = Daemon::of(&proxy).args(QUICK).sh(BY_TYPE).start();
    let (good, bad) = (server.enqueue_with(job("good")), server.enqueue_with(job("bad")));
    let failed = running.wait_for_messages(4, "report failed, trying again");
    assert!(failed[0]["error"].as_str().unwrap().contains("is no Zizq server's"), "{}", failed[0]);
    proxy.heal();
    server.wait_until_done(&good);
    server.wait_for_error(&bad, 1);
    assert!(!running.stop().has("report dropped"));
}

#[test]
fn a_page_with_status_200_settles_nothing() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    for call in [Call::Failure, Call::Successes] {
        proxy.fault_times(2, call, Fault::Answer(200, "<html>please log in</html>"));
    }
    let running = Daemon::of(&proxy).args(QUICK).sh(BY_TYPE).start();
    let (good, bad) = (server.enqueue_with(job("good")), server.enqueue_with(job("bad")));
    server.wait_until_done(&good);
    server.wait_for_error(&bad, 1);
    assert_eq!(running.stop().read("started").lines().count(), 2);
}

#[test]
fn refusals_that_pass_are_tried_again() {
    for status in [401, 403, 407, 408, 421, 425, 429] {
        let server = Server::start();
        let proxy = Proxy::before(&server);
        for call in [Call::Failure, Call::Successes] {
            proxy.fault_times(2, call, Fault::Answer(status, r#"{"error":"not now"}"#));
        }
        let ids = server.enqueue_all((0..6).map(|number| job(if number % 2 == 0 { "bad" } else { "good" })));
        let running = Daemon::of(&proxy).args(QUICK).sh(BY_TYPE).start();
        ids.iter().step_by(2).for_each(|id| drop(server.wait_for_error(id, 1)));
        ids.iter().skip(1).step_by(2).for_each(|id| server.wait_until_done(id));
        assert_eq!(running.stop().read("started").lines().count(), 6, "{status}");
    }
}

#[test]
fn a_wait_that_the_answer_asks_for_is_kept() {
    let server = RawServer::start();
    let _running = Daemon::at(&server.url()).args(QUICK).sh("true").start();
    let mut stream = server.take();
    stream.job("1");
    server.request().answer("429 Too Many Requests\r\nretry-after: 2", "");
    let asked = Instant::now();
    server.request().answer("204 No Content", "");
    assert!(asked.elapsed() >= Duration::from_secs(2), "{:?}", asked.elapsed());
}

#[test]
fn dropped_reports_cost_no_place_of_the_prefetch() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(3, Call::Successes, Fault::Answer(400, r#"{"error":"odd"}"#));
    proxy.fault_times(3, Call::Failure, Fault::Answer(413, "<html>"));
    let long = server.enqueue_with(job("long"));
    let script = format!("[ $ZIZQ_JOB_TYPE != long ] || {{ {UNTIL_GO}; exit 0; }}; {BY_TYPE}");
    let running = Daemon::of(&proxy).args(QUICK).threads(2).args(["--prefetch", "3"]).sh(&script).start();
    running.wait_for_lines(1, "started");
    let ids = server.enqueue_all((0..20).map(|number| job(if number % 2 == 0 { "bad" } else { "good" })));
    // The worker drops three reports of failures, one for each refused request. It may drop only two reports of successes: after a
    // refused bulk request for two jobs, it drops no report, but sends the two reports again in separate requests.
    running.wait_for_messages(5, "report dropped");
    // A job whose report was dropped runs again when its stream closes, but the long job keeps the stream open. The jobs whose
    // reports were dropped fill the prefetch of this stream, so the remaining jobs need another stream.
    running.wait_for_message("opening another stream: the server still holds jobs whose reports were dropped");
    eventually("all others", || {
        let is_done = |id: &&String| server.job(id).is_none_or(|job| job["attempts"] == 1);
        (ids.iter().filter(is_done).count() >= 14).then_some(())
    });
    assert_eq!(server.job(&long).unwrap()["status"], "in_flight", "the long job was released");
    running.go();
    server.wait_until_done(&long);
    ids.iter().skip(1).step_by(2).for_each(|id| server.wait_until_done(id));
    ids.iter().step_by(2).for_each(|id| drop(server.wait_for_error(id, 1)));
    let finished = running.stop();
    assert_eq!(finished.read("started").lines().filter(|line| *line == long).count(), 1);
}

/// Each new stream first redelivers the job whose report is refused.
#[test]
fn a_report_that_is_always_refused_does_not_stop_the_others() {
    let server = RawServer::start();
    let running = Daemon::at(&server.url()).sh(BY_TYPE).start();
    let mut stream = server.take();
    stream.typed_job("poison", "bad");
    let mut done = 0;
    let began = Instant::now();
    while done < 20 {
        let request = server.request();
        if request.line().contains("/jobs/take") {
            stream = request.open();
            stream.typed_job("poison", "bad").typed_job(&format!("good{done}"), "good");
        } else if request.line().contains("/poison/failure") {
            request.answer("413 Content Too Large", "");
            stream.typed_job(&format!("good{done}"), "good");
        } else if request.line().starts_with("GET") {
            request.answer("200 OK", r#"{"status":"in_flight","attempts":0}"#);
        } else {
            done += 1;
            request.answer("204 No Content", "");
            stream.typed_job(&format!("good{done}"), "good");
        }
    }
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    drop(running);
}

#[test]
fn a_json_object_of_another_server_settles_nothing() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    for call in [Call::Successes, Call::Failure] {
        proxy.fault_times(2, call, Fault::Answer(200, r#"{"message":"please log in"}"#));
    }
    let ids = server.enqueue_all((0..10).map(|number| job(if number % 2 == 0 { "bad" } else { "good" })));
    let running = Daemon::of(&proxy).args(QUICK).sh(BY_TYPE).start();
    ids.iter().step_by(2).for_each(|id| drop(server.wait_for_error(id, 1)));
    ids.iter().skip(1).step_by(2).for_each(|id| server.wait_until_done(id));
    running.stop();
}

#[test]
fn a_worker_with_reports_that_wait_is_not_idle() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault(Call::Successes, Fault::Answer(503, ""));
    let ids = server.enqueue_all(jobs(20));
    let running = Daemon::of(&proxy).args(QUICK).args(["--exit-when-idle", "200ms"]).sh("true").start();
    // Twelve retries take more than twice the idle limit of 200 ms.
    let failed = running.wait_for_messages(2, "report failed, trying again").len();
    running.wait_for_messages(failed + 12, "report failed, trying again");
    proxy.heal();
    running.assert_exit(0);
    ids.iter().for_each(|id| server.wait_until_done(id));
}

#[test]
fn one_bad_id_costs_no_other_success_its_report() {
    let server = RawServer::start();
    let running = Daemon::at(&server.url()).args(QUICK).args(["--prefetch", "20"]).sh("true").start();
    let mut stream = server.take();
    stream.job("first");
    let gate = server.request();
    for id in ["1", "2", "odd", "4", "5"] {
        stream.job(id);
    }
    running.wait_for_messages(6, "job completed");
    gate.answer("204 No Content", "");
    let mut reported = HashSet::new();
    while reported.len() < 4 {
        let request = server.request();
        if request.body.contains("odd") {
            request.answer("400 Bad Request", r#"{"error":"odd id"}"#);
        } else {
            let body: Value = serde_json::from_str(&request.body).unwrap();
            reported.extend(body["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()));
            request.answer("204 No Content", "");
        }
    }
    assert_eq!(reported, ["1", "2", "4", "5"].map(str::to_owned).into());
}

#[test]
fn a_bounded_run_that_leaves_a_job_behind_does_not_exit_0() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(1, Call::Successes, Fault::Answer(400, r#"{"error":"odd"}"#));
    server.enqueue_with(job("good"));
    let finished = Daemon::of(&proxy).args(QUICK).args(["--max-jobs", "1"]).sh("true").start().assert_exit(1);
    assert_eq!(finished.event("worker stopped")["reports_dropped"], 1);
    eventually("the job is ready", || (server.count("ready") == 1).then_some(()));
}

#[test]
fn a_paused_worker_keeps_its_job_when_the_stream_is_lost() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let id = server.enqueue_with(job("t"));
    let running = Daemon::of(&proxy).args(QUICK).sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    let later = server.enqueue_with(job("t"));
    proxy.cut_streams();
    running.wait_for_message("job received again while it is here, not started");
    // The stream that was opened to search for the running job holds no other job.
    assert_eq!(server.wait_for_status(&later, "ready")["attempts"], 0);
    let other = Daemon::of(&server).args(QUICK).sh("echo $ZIZQ_JOB_ID >> $DIR/started").start();
    server.wait_until_done(&later);
    assert_eq!(server.job(&id).unwrap()["status"], "in_flight");
    running.go();
    server.wait_until_done(&id);
    assert_eq!(other.stop().read("started"), format!("{later}\n"));
    running.stop();
}

#[test]
fn reports_leave_soon_after_the_server_is_back() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    for call in [Call::Successes, Call::Failure] {
        proxy.fault(call, Fault::Answer(503, ""));
    }
    let running = Daemon::of(&proxy).args(STEEP).args(["--prefetch", "4"]).sh(BY_TYPE).start();
    let ids = server.enqueue_all((0..4).map(|number| job(if number % 2 == 0 { "bad" } else { "good" })));
    // Wait until a retry is at least 15 minutes away. Then the reports can arrive before the test's time limit only if the server's
    // recovery triggers them.
    running.wait_for("a long wait", |event| {
        let wait = event["retry_in"].as_str().and_then(|wait| wait.strip_suffix('s')?.parse::<f64>().ok());
        wait.is_some_and(|wait| wait >= 900.0)
    });
    proxy.heal();
    ids.iter().step_by(2).for_each(|id| drop(server.wait_for_error(id, 1)));
    ids.iter().skip(1).step_by(2).for_each(|id| server.wait_until_done(id));
    running.stop();
}

#[test]
fn failures_that_always_fail_block_no_other_failure() {
    let server = RawServer::start();
    let _running = Daemon::at(&server.url()).args(QUICK).args(["--prefetch", "30"]).sh("exit 1").start();
    let mut stream = server.take();
    for number in 1..=9 {
        stream.job(&format!("poison{number}"));
    }
    stream.job("good");
    for request in std::iter::repeat_with(|| server.request()).take(1000) {
        if request.line().contains("/good/failure") {
            return request.answer("204 No Content", "");
        }
        // Answer that the job is in flight, so that the worker sends the failure again.
        if request.line().starts_with("GET") {
            request.answer("200 OK", r#"{"status":"in_flight","attempts":0}"#);
        } else {
            request.answer("500 Internal Server Error", "");
        }
    }
    panic!("the failure of the good job is not among a thousand requests");
}

#[test]
fn more_prefetch_makes_the_ack_queue_longer() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let toml = |prefetch: u8| {
        format!(
            "url = '{}'\nworker.prefetch = {prefetch}\n[handler]\nexec = ['/bin/true']\n[log]\nlevel = 'debug'",
            proxy.url
        )
    };
    let daemon = Daemon::bare().args(["--log-format", "json"]);
    let running = daemon.handlers(&toml(2)).start();
    running.wait_for_message("connected, listening for jobs");
    std::fs::write(running.dir().join("zizq-worker.toml"), toml(20)).unwrap();
    running.signal(Signal::HUP);
    running.wait_for_messages(2, "connected, listening for jobs");
    let gate = proxy.hold(Call::Successes);
    let ids = server.enqueue_all(jobs(15));
    // With the prefetch from before the reload, the ack queue could hold only four outcomes.
    running.wait_for_messages(15, "job completed");
    gate.release();
    ids.iter().for_each(|id| server.wait_until_done(id));
    running.stop();
}

#[test]
fn failures_with_slow_answers_share_a_connection() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault(Call::Failure, Fault::Body(BodyFault::Drip));
    let running = Daemon::of(&proxy).args(QUICK).args(["--admin-listen", "127.0.0.1:0"]).sh("exit 1").start();
    let admin = Admin::of(&running);
    for _ in 0..10 {
        let id = server.enqueue("q", "t", json!(null));
        server.wait_for_error(&id, 1);
        admin.wait_for_metric("reports_waiting", "0");
    }
    running.stop();
    let connections: HashSet<usize> = proxy.calls(Call::Failure).iter().map(|call| call.connection).collect();
    assert_eq!(connections.len(), 1);
}

#[test]
fn a_first_request_that_is_refused_for_now_is_tried_again() {
    for status in ["408 Request Timeout", "425 Too Early", "429 Too Many Requests"] {
        let server = RawServer::start();
        let running = Daemon::at(&server.url()).args(QUICK).sh("true").start();
        server.request().answer(status, r#"{"error":"not now"}"#);
        server.take();
        running.wait_for_message("connected, listening for jobs");
    }
}
