//! The stop of a worker. The first signal starts a drain, the second signal or the deadline kills the running jobs, and the take
//! stream closes last.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    Call, Daemon, Event, Fault, Proxy, RawServer, Running, Server, UNTIL_GO, is_alive, jobs, unused_address,
};

/// Backoff flags with waits too short to slow a test down.
const QUICK: [&str; 4] = ["--retry-min-wait", "10ms", "--retry-max-wait", "50ms"];

/// A script that runs until SIGKILL. At SIGTERM, the script only writes a line to a file. Its child ignores SIGTERM.
const STUBBORN: &str = "trap 'echo heard >> $DIR/heard' TERM
sh -c 'trap \"\" TERM; echo $$ >> $DIR/pids; while :; do sleep 0.05; done' &
echo $$ >> $DIR/pids
while :; do sleep 0.05; done";

/// A time limit far above the duration of an immediate stop, and far below the timeouts that the stop must not wait for.
const AT_ONCE: Duration = Duration::from_secs(15);

/// Asserts that the job is ready again, without a failed attempt.
#[track_caller]
fn assert_given_back(server: &Server, id: &str) {
    let job = server.wait_for_status(id, "ready");
    assert_eq!(job["attempts"], 0, "{job}");
    assert_eq!(server.errors(id), Vec::<Value>::new());
}

fn drains_on(signal: Signal) {
    let server = Server::start();
    let ids = server.enqueue_all(jobs(5));
    let daemon = Daemon::of(&server).args(["--prefetch", "3"]).sh(UNTIL_GO).start();
    daemon.wait_for_messages(3, "job received");
    daemon.wait_for_lines(1, "started");
    daemon.signal(signal);
    let draining = daemon.wait_for_message("shutting down, waiting for workers to finish");
    assert_eq!((&draining["running"], &draining["waiting"]), (&json!(1), &json!(2)));
    // After each report, the server sends another job. Here the test itself sends the report, because none of this worker's jobs
    // has ended yet.
    assert_eq!(server.call("POST", &format!("/jobs/{}/success", ids[2]), None).0, 204);
    daemon.wait_for_message("job received while draining, it goes back to the server");
    daemon.go();
    let finished = daemon.assert_exit(0);
    assert_eq!(finished.read("started").lines().collect::<Vec<_>>(), ids[..3]);
    ids[..3].iter().for_each(|id| server.wait_until_done(id));
    ids[3..].iter().for_each(|id| assert_given_back(&server, id));
    assert_eq!(finished.event("worker stopped")["succeeded"], 3);
}

#[test]
fn sigterm_finishes_taken_jobs_and_takes_no_more() {
    drains_on(Signal::TERM);
}

#[test]
fn sigint_finishes_taken_jobs_and_takes_no_more() {
    drains_on(Signal::INT);
}

#[test]
fn a_drain_flushes_the_reports_and_only_then_closes_the_stream() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let gates = [proxy.hold(Call::Successes), proxy.hold(Call::Failure)];
    let good = server.enqueue("q", "good", json!(null));
    let bad = server.enqueue("q", "bad", json!(null));
    let daemon = Daemon::of(&proxy).threads(2).sh(&format!("{UNTIL_GO}; [ $ZIZQ_JOB_TYPE = good ]")).start();
    daemon.wait_for_lines(2, "started");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    daemon.go();
    let take = proxy.calls(Call::Take)[0].connection;
    for gate in gates {
        gate.wait_for(1);
        assert!(!proxy.has_closed(take));
        gate.release();
    }
    daemon.assert_exit(0);
    server.wait_until_done(&good);
    server.wait_for_error(&bad, 1);
    proxy.wait_until_closed(take);
    assert_closed_after_reports(&proxy, take, 2);
}

/// Asserts that the given number of reports arrived before the stream was closed.
#[track_caller]
fn assert_closed_after_reports(proxy: &Proxy, take: usize, reports: usize) {
    let events = proxy.events().into_iter();
    let before = events.take_while(|event| !matches!(event, Event::Closed(closed) if *closed == take));
    let calls = before.filter(|event| matches!(event, Event::Request(seen) if seen.call != Some(Call::Take)));
    assert_eq!(calls.count(), reports, "{:#?}", proxy.events());
}

#[test]
fn reports_are_tried_again_while_draining_too() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(3, Call::Successes, Fault::Answer(503, ""));
    let id = server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&proxy).args(["--retry-min-wait", "20ms"]).sh(UNTIL_GO).start();
    daemon.wait_for_lines(1, "started");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    daemon.go();
    daemon.assert_exit(0);
    server.wait_until_done(&id);
}

#[test]
fn a_second_signal_kills_the_group_before_the_stream_closes() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).sh(STUBBORN).start();
    let mut stream = server.take();
    stream.job("1").job("2");
    let pids = daemon.wait_for_lines(2, "pids");
    daemon.wait_for_messages(2, "job received");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    let killed = Instant::now();
    daemon.sigint();
    daemon.wait_for_file("heard");
    assert!(pids.iter().all(|pid| is_alive(pid)) && stream.is_open());
    stream.wait_until_closed();
    assert!(!pids.iter().any(|pid| is_alive(pid)), "the stream closed before {pids:?} were dead");
    assert!(killed.elapsed() >= Duration::from_secs(5), "{:?}", killed.elapsed());
    let finished = daemon.assert_exit(1);
    assert_eq!(finished.read("pids").lines().count(), 2, "a waiting job was started");
    assert!(server.is_quiet(), "a killed job was reported");
}

#[test]
fn a_killed_job_goes_back_with_its_attempts_unchanged() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let ids = server.enqueue_all(jobs(2));
    let daemon = Daemon::of(&proxy).sh(UNTIL_GO).start();
    daemon.wait_for_lines(1, "started");
    daemon.wait_for_messages(2, "job received");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    daemon.sigterm();
    let finished = daemon.assert_exit(1);
    ids.iter().for_each(|id| assert_given_back(&server, id));
    assert_eq!(finished.all("job interrupted, it goes back to the server").len(), 1);
    assert_eq!(proxy.calls(Call::Successes).len() + proxy.calls(Call::Failure).len(), 0);
    assert!(!finished.has("job failed"));
}

/// The handler's shell dies of SIGTERM at once, but the shell's child takes longer.
#[test]
fn children_of_a_killed_handler_have_the_five_seconds_too() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let script = "sh -c 'trap \"sleep 0.3; echo saved > $DIR/saved; exit\" TERM
echo up > $DIR/up; while :; do sleep 0.02; done'
echo not reached >&2";
    let daemon = Daemon::of(&server).sh(script).start();
    daemon.wait_for_file("up");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    daemon.sigterm();
    assert_eq!(daemon.assert_exit(1).read("saved"), "saved\n");
    assert_given_back(&server, &id);
}

#[test]
fn handlers_that_print_without_pause_do_not_delay_a_stop() {
    let server = Server::start();
    let ids = server.enqueue_all(jobs(4));
    // The worker reads the output, but this log level keeps the output out of the log, and so out of this test's memory.
    let daemon = Daemon::of(&server).threads(4).env("RUST_LOG", "warn,zizq_worker::lifecycle=info");
    let daemon = daemon.sh("echo >> $DIR/started; exec yes").start();
    daemon.wait_for_lines(4, "started");
    daemon.sigterm().wait_for_message("draining");
    daemon.sigterm();
    daemon.assert_exit(1);
    ids.iter().for_each(|id| assert_given_back(&server, id));
}

#[test]
fn a_job_that_exits_0_when_terminated_has_not_succeeded() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&server).sh("trap 'exit 0' TERM; echo up > $DIR/up; while :; do sleep 0.02; done").start();
    daemon.wait_for_file("up");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    daemon.sigterm();
    daemon.assert_exit(1);
    assert_given_back(&server, &id);
}

#[test]
fn the_deadline_kills_like_a_second_signal() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&server).args(["--shutdown-deadline", "200ms"]).sh(UNTIL_GO).start();
    daemon.wait_for_lines(1, "started");
    daemon.sigterm();
    let finished = daemon.assert_exit(1);
    assert_given_back(&server, &id);
    assert!(finished.has("shutdown deadline reached: killing what still runs"));
    assert!(finished.has("job interrupted, it goes back to the server"));
}

/// Starts a worker and begins a drain, while the report of one job waits for its next try, and another job runs.
fn one_reported_in_vain_and_one_running(server: &Server, proxy: &Proxy) -> (Running, Vec<String>) {
    proxy.fault(Call::Successes, Fault::Answer(503, ""));
    let script = format!("[ $ZIZQ_JOB_TYPE = quick ] || {{ {UNTIL_GO}; }}");
    let daemon = Daemon::of(proxy).args(["--retry-min-wait", "10m", "--retry-max-wait", "10m"]).sh(&script).start();
    let quick = server.enqueue("q", "quick", json!(null));
    daemon.wait_for_message("report failed, trying again");
    let slow = server.enqueue("q", "slow", json!(null));
    daemon.wait_for_lines(1, "started");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    (daemon, vec![quick, slow])
}

#[test]
fn a_kill_gives_finished_results_one_last_try() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let (daemon, ids) = one_reported_in_vain_and_one_running(&server, &proxy);
    proxy.heal();
    daemon.sigterm();
    daemon.assert_exit(1);
    server.wait_until_done(&ids[0]);
    assert_given_back(&server, &ids[1]);
    let take = proxy.calls(Call::Take)[0].connection;
    proxy.wait_until_closed(take);
    assert_closed_after_reports(&proxy, take, 2);
}

#[test]
fn the_last_try_is_the_last_even_if_it_fails() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let (daemon, ids) = one_reported_in_vain_and_one_running(&server, &proxy);
    daemon.sigterm();
    let finished = daemon.assert_exit(1);
    assert!(finished.event("report dropped")["job"]["id"] == ids[0]);
    assert_eq!(proxy.calls(Call::Successes).len(), 2);
    ids.iter().for_each(|id| assert_given_back(&server, id));
}

#[test]
fn the_last_tries_end_if_the_server_does_not_answer() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let gates = [proxy.hold(Call::Failure), proxy.hold(Call::Successes)];
    let daemon = Daemon::of(&proxy).args(["--prefetch", "30"]).sh("[ $ZIZQ_JOB_TYPE = good ]").start();
    // The worker reports up to eight failures at once, so 24 failures need three rounds.
    let bad = vec![json!({"queue": "q", "type": "bad", "payload": null}); 24];
    let good = vec![json!({"queue": "q", "type": "good", "payload": null}); 2];
    let ids = server.enqueue_all([good, bad].concat());
    daemon.wait_for_messages(24, "job failed");
    gates.iter().for_each(|gate| gate.wait_for(1));
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    let killed = Instant::now();
    daemon.sigterm();
    daemon.assert_exit(1);
    assert!(killed.elapsed() < AT_ONCE, "{:?}", killed.elapsed());
    ids.iter().for_each(|id| assert_given_back(&server, id));
}

#[test]
fn a_signal_while_idle_is_obeyed_at_once() {
    let server = Server::start();
    let daemon = Daemon::of(&server).sh("true").start();
    daemon.wait_for_message("connected, listening for jobs");
    let asked = Instant::now();
    daemon.sigterm();
    daemon.assert_exit(0);
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
}

#[test]
fn a_signal_while_waiting_to_reconnect_is_obeyed_at_once() {
    let daemon = Daemon::at(&format!("http://{}", unused_address()));
    let daemon = daemon.args(["--retry-min-wait", "10m", "--retry-max-wait", "10m"]).sh("true").start();
    daemon.wait_for_message("server unreachable, reconnecting");
    daemon.sigint();
    assert_eq!(daemon.assert_exit(0).all("connecting").len(), 1);
}

#[test]
fn a_signal_while_a_server_does_not_answer_is_obeyed_at_once() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).sh("true").start();
    let _unanswered = server.request();
    let asked = Instant::now();
    daemon.sigterm();
    daemon.assert_exit(0);
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
}

/// The C source of a replacement for the C library's name lookup. The lookup hangs, as with an unresponsive name server.
const SLOW_LOOKUP: &str = "#include <unistd.h>
int getaddrinfo(const char *node, const char *service, const void *hints, void **result) { sleep(600); return -3; }";

#[test]
#[cfg_attr(target_env = "musl", ignore = "nothing is preloaded into a static program")]
fn a_signal_during_the_lookup_of_the_server_is_obeyed() {
    let daemon = Daemon::at("http://server.example.org:7890").preload(SLOW_LOOKUP).sh("true").start();
    daemon.wait_for_message("connecting");
    let asked = Instant::now();
    daemon.sigterm();
    daemon.assert_exit(0);
    assert!(asked.elapsed() < AT_ONCE, "{:?}", asked.elapsed());
}

/// Until the worker installs its signal handlers, a signal has its default action, and kills the worker. The test also accepts
/// that outcome.
#[test]
fn a_signal_during_start_up_is_obeyed_at_once() {
    let server = RawServer::start();
    for delay in (0..20).map(Duration::from_millis) {
        let daemon = Daemon::at(&server.url()).sh("true").start();
        std::thread::sleep(delay);
        let asked = Instant::now();
        daemon.sigterm();
        daemon.finish().assert_obeyed();
        assert!(asked.elapsed() < AT_ONCE, "after {delay:?}: {:?}", asked.elapsed());
    }
}

#[test]
fn a_signal_while_jobs_are_read_from_stdin_is_obeyed() {
    let (stdin, _held_open) = std::io::pipe().unwrap();
    let daemon = Daemon::at(&format!("http://{}", unused_address())).args(["--embedded", "--jobs", "-"]);
    let daemon = daemon.stdin(stdin).sh("true").start();
    daemon.wait_for_blocked_read();
    daemon.sigterm();
    daemon.finish().assert_obeyed();
}

#[test]
fn a_stop_finishes_the_dispatch_queue_and_nothing_more() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(["--prefetch", "2"]).sh(UNTIL_GO).start();
    let mut stream = server.take();
    for number in 1..=5 {
        stream.job(&number.to_string());
    }
    daemon.wait_for_messages(4, "job received");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    daemon.go();
    let mut reported = Vec::new();
    while reported.len() < 3 {
        let report = server.request();
        let body: Value = serde_json::from_str(&report.body).unwrap();
        reported.extend(body["ids"].as_array().unwrap().clone());
        report.answer("204 No Content", "");
    }
    stream.wait_until_closed();
    let finished = daemon.assert_exit(0);
    assert_eq!(finished.read("started"), "1\n2\n3\n");
    assert_eq!(reported, ["1", "2", "3"]);
}

#[test]
fn each_worker_loop_logs_its_start_and_its_end() {
    let server = Server::start();
    let daemon = Daemon::of(&server).args(["--threads", "2", "--fibers", "2"]).sh("true").start();
    daemon.wait_for_messages(4, "worker loop started");
    daemon.sigterm();
    let finished = daemon.assert_exit(0);
    for message in ["worker loop started", "worker loop stopped"] {
        let events = finished.all(message);
        let mut names: Vec<&str> = events.iter().map(|event| event["worker"].as_str().unwrap()).collect();
        names.sort_unstable();
        assert_eq!(names, ["0:0", "0:1", "1:0", "1:1"]);
    }
}

/// The running job is redelivered over the new stream, and then reported.
#[test]
fn a_stream_lost_while_draining_is_opened_again_for_its_jobs() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let [running, waiting] = [0, 1].map(|_| server.enqueue("q", "t", json!(null)));
    let daemon = Daemon::of(&proxy).args(QUICK).sh(UNTIL_GO).start();
    daemon.wait_for_messages(2, "job received");
    daemon.wait_for_lines(1, "started");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    proxy.cut_streams();
    daemon.wait_for_message("job received again while it is here, not started");
    daemon.go();
    let finished = daemon.assert_exit(0);
    assert_eq!(finished.read("started"), format!("{running}\n"));
    server.wait_until_done(&running);
    assert_given_back(&server, &waiting);
    assert_eq!(proxy.calls(Call::Take).len(), 2);
}

#[test]
fn a_stream_lost_while_draining_stays_closed_without_jobs() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let gate = proxy.hold(Call::Successes);
    let id = server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&proxy).args(["--retry-min-wait", "1h", "--retry-max-wait", "1h"]).sh("true").start();
    gate.wait_for(1);
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    // Another client completes the job on the server. Once the worker's own report is answered, no job needs a stream.
    let (status, _) = server.call("POST", &format!("/jobs/{id}/success"), None);
    assert_eq!(status, 204);
    proxy.cut_streams();
    daemon.wait_for_message("stream lost while its last jobs were finished");
    gate.release();
    daemon.assert_exit(0);
    assert_eq!(proxy.calls(Call::Take).len(), 1);
}
