//! Bounded runs, which end after a number of jobs, after a time, or after a time without jobs.

use std::time::Duration;

use serde_json::json;

use crate::support::{Daemon, Server, UNTIL_GO, eventually, jobs};

/// Enqueues `count` jobs, and runs a daemon with the bounds that the closure sets. Returns the server and the last event of the
/// log.
fn run(count: usize, daemon: impl FnOnce(Daemon) -> Daemon) -> (Server, serde_json::Value) {
    let server = Server::start();
    server.enqueue_all(jobs(count));
    let finished = daemon(Daemon::of(&server).sh("echo >> $DIR/ran")).run().assert_exit(0);
    let last = finished.events().pop().unwrap();
    assert_eq!(last["message"], "worker stopped", "{last}");
    assert_eq!(last["succeeded"], finished.read("ran").lines().count());
    (server, last)
}

#[test]
fn max_jobs_starts_exactly_that_many() {
    for (threads, prefetch) in [("1", "1"), ("1", "20"), ("4", "4"), ("4", "50"), ("16", "16")] {
        let (server, last) =
            run(50, |daemon| daemon.args(["--max-jobs", "7", "--threads", threads, "--prefetch", prefetch]));
        assert_eq!((&last["succeeded"], &last["failed"], &last["interrupted"]), (&json!(7), &json!(0), &json!(0)));
        assert_eq!(last["reason"], "max_jobs have been started");
        eventually("the others are ready", || (server.count("ready") == 43).then_some(()));
        let (_, rest) = server.call("GET", "/jobs?limit=50", None);
        assert!(rest["jobs"].as_array().unwrap().iter().all(|job| job["attempts"] == 0), "{rest}");
    }
}

#[test]
fn max_jobs_counts_failures_as_well() {
    let server = Server::start();
    server.enqueue_all(jobs(5));
    let finished = Daemon::of(&server).args(["--max-jobs", "3"]).sh("exit 1").run().assert_exit(0);
    assert_eq!(finished.event("worker stopped")["failed"], 3);
    assert_eq!(server.count("ready"), 2);
}

#[test]
fn the_last_of_max_jobs_is_finished_and_reported() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).args(["--max-jobs", "1"]).sh(UNTIL_GO).start();
    running.wait_for_message("max_jobs have been started: draining");
    assert_eq!(server.job(&id).unwrap()["status"], "in_flight");
    running.go();
    running.assert_exit(0);
    assert!(server.job(&id).is_none());
}

#[test]
fn a_run_that_ends_by_itself_has_no_deadline() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let script = format!("trap 'echo >> $DIR/told' USR1; {UNTIL_GO}");
    let daemon = Daemon::of(&server).args(["--max-jobs", "1", "--shutdown-deadline", "300ms"]);
    let running = daemon.handler(&script, "drain_signal = 'USR1'").start();
    running.wait_for_message("max_jobs have been started: draining");
    // Sleep for three times the shutdown deadline. There is no event to wait for, because the worker must send no drain signal.
    std::thread::sleep(Duration::from_secs(1));
    assert!(!running.dir().join("told").exists(), "the drain signal was sent without a deadline");
    running.sigterm();
    running.wait_for_lines(1, "told");
    let finished = running.assert_exit(1);
    assert!(finished.has("shutdown deadline reached: killing what still runs"));
    assert_eq!(finished.event("worker stopped")["reason"], "max_jobs have been started");
}

#[test]
fn the_last_of_max_jobs_fails_if_it_cannot_be_started() {
    let server = Server::start();
    let running = Daemon::of(&server).args(["--max-jobs", "1"]).sh("true").start();
    running.wait_for_message("connected, listening for jobs");
    std::fs::write(running.dir().join("handle.sh"), "\u{7f}no program").unwrap();
    let id = server.enqueue("q", "t", json!(null));
    let finished = running.assert_exit(0);
    assert_eq!(server.errors(&id)[0]["error_type"], "SpawnError");
    assert_eq!(finished.event("worker stopped")["failed"], 1);
}

#[test]
fn no_more_is_asked_for_than_may_be_started() {
    let server = crate::support::RawServer::start();
    let _running = Daemon::at(&server.url()).threads(8).args(["--max-jobs", "3", "--", "true"]).start();
    assert_eq!(server.request().line(), "GET /jobs/take?prefetch=3 HTTP/1.1");
}

#[test]
fn max_time_lets_running_jobs_finish() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).args(["--max-time", "300ms"]).sh(UNTIL_GO).start();
    running.wait_for_message("max_time is over: draining");
    assert_eq!(server.job(&id).unwrap()["status"], "in_flight");
    running.go();
    let finished = running.assert_exit(0);
    assert!(server.job(&id).is_none());
    assert_eq!(finished.event("worker stopped")["reason"], "max_time of 300ms is over");
}

#[test]
fn max_time_ends_a_worker_that_has_no_server() {
    let finished = Daemon::at("http://127.0.0.1:1").args(["--max-time", "200ms", "--", "true"]).run().assert_exit(0);
    assert_eq!(finished.event("worker stopped")["succeeded"], 0);
}

#[test]
fn whichever_bound_is_reached_first_ends_the_run() {
    let all = ["--max-jobs", "3", "--max-time", "60s", "--exit-when-idle", "200ms"];
    assert_eq!(run(9, |daemon| daemon.args(all)).1["reason"], "max_jobs have been started");
    assert_eq!(run(2, |daemon| daemon.args(all)).1["reason"], "idle for 200ms (exit_when_idle)");
    let short = ["--max-jobs", "3", "--max-time", "200ms", "--exit-when-idle", "60s"];
    assert_eq!(run(2, |daemon| daemon.args(short)).1["reason"], "max_time of 200ms is over");
}

#[test]
fn the_last_line_names_the_signal_that_stopped_it() {
    let server = Server::start();
    let running = Daemon::of(&server).sh("true").start();
    running.wait_for_message("connected, listening for jobs");
    running.sigint();
    assert_eq!(running.assert_exit(0).event("worker stopped")["reason"], "SIGINT");
}
