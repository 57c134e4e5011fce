//! The output and the unread input of handlers must never harm the worker.
//! The tests in `logs` check that no output forges a line of the log.

use std::fs::File;
use std::io::Write;
use std::process::Command;

use serde_json::{Value, json};

use crate::support::{Daemon, Finished, Server, eventually, jobs};

/// Runs one job that succeeds, and stops the worker.
fn succeed(payload: Value, script: &str, settings: &str) -> Finished {
    let server = Server::start();
    let id = server.enqueue("q", "t", payload);
    let running = Daemon::of(&server).handler(script, settings).start();
    server.wait_until_done(&id);
    running.stop()
}

const BOTH: &str = "echo to stdout; echo to stderr >&2";

#[test]
fn logged_output_is_an_event_a_line_with_its_job() {
    let finished = succeed(json!(null), BOTH, "output = 'log'");
    let (stdout, stderr) = (finished.event("stdout"), finished.event("stderr"));
    assert_eq!((&stdout["level"], &stdout["line"]), (&json!("INFO"), &json!("to stdout")));
    assert_eq!((&stderr["level"], &stderr["line"]), (&json!("WARN"), &json!("to stderr")));
    assert_eq!((&stdout["job"]["type"], &stdout["job"]["queue"]), (&json!("t"), &json!("q")));
    assert_eq!(finished.stdout, "");
}

#[test]
fn inherited_output_is_the_workers_own() {
    let finished = succeed(json!(null), BOTH, "output = 'inherit'");
    assert_eq!(finished.stdout, "to stdout\n");
    assert!(finished.log.contains(&"to stderr".to_owned()));
    assert!(!finished.has("stdout") && !finished.has("stderr"));
}

#[test]
fn output_may_go_nowhere() {
    let finished = succeed(json!(null), BOTH, "output = 'null'");
    assert_eq!(finished.stdout, "");
    assert!(!finished.log.iter().any(|line| line.contains("to std")), "{:?}", finished.log);
}

#[test]
fn a_failure_without_logged_output_has_no_backtrace() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).handler("echo lost >&2; exit 1", "output = 'null'").start();
    let error = server.wait_for_error(&id, 1);
    assert_eq!((&error["message"], &error["backtrace"]), (&json!("handle.sh exited with status 1"), &Value::Null));
    running.stop();
}

#[test]
fn a_line_is_cut_at_64_kib_and_the_next_one_is_whole() {
    let finished = succeed(json!(null), "head -c 70000 /dev/zero | tr '\\0' x; echo; echo next", "");
    let lines = finished.all("stdout");
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0]["line"], format!("{}… [4464 bytes cut]", "x".repeat(65_536)));
    assert_eq!(lines[1]["line"], "next");
}

#[test]
fn invalid_utf8_is_replaced_in_the_log_and_in_the_report() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).sh(r"printf 'a\377b\303' >&2; exit 1").start();
    let error = server.wait_for_error(&id, 1);
    assert_eq!(error["backtrace"], "a\u{fffd}b\u{fffd}");
    assert_eq!(error["message"], "handle.sh exited with status 1: a\u{fffd}b\u{fffd}");
    assert_eq!(running.stop().event("stderr")["line"], "a\u{fffd}b\u{fffd}");
}

#[test]
fn the_first_4_and_last_28_kib_of_stderr_are_reported() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let print = |count: usize, letter: char| format!("head -c {count} /dev/zero | tr '\\0' {letter} >&2; ");
    let script = [print(4096, 'a'), print(1_234_567, 'b'), print(28 * 1024, 'c'), "exit 1".to_owned()].concat();
    let running = Daemon::of(&server).sh(&script).start();
    let expected = format!("{}\n[1234567 bytes left out]\n{}", "a".repeat(4096), "c".repeat(28 * 1024));
    assert_eq!(server.wait_for_error(&id, 1)["backtrace"], expected);
    running.stop();
}

/// Returns a payload of 10 MB, close to the server's limit.
fn large() -> Value {
    json!("x".repeat(9_900_000))
}

#[test]
fn a_handler_that_never_reads_its_10_mb_ends_as_it_likes() {
    let server = Server::start();
    let ids = ["0", "3"].map(|code| server.enqueue("q", code, large()));
    let running = Daemon::of(&server).sh("echo working; exit $ZIZQ_JOB_TYPE").start();
    server.wait_until_done(&ids[0]);
    assert_eq!(server.wait_for_error(&ids[1], 1)["message"], "handle.sh exited with status 3");
    running.stop();
}

#[test]
fn a_handler_may_print_64_mb_before_it_reads_10_mb() {
    let print = "head -c 64000000 /dev/zero | tr '\\0' x";
    let script = format!("{print}; {print} >&2; wc -c > $DIR/count");
    let finished = succeed(large(), &script, "");
    assert_eq!(finished.read("count").trim(), "9900002");
}

#[test]
fn a_gigabyte_on_stderr_does_not_make_the_worker_grow() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let line = "x".repeat(60_000);
    // Print 100 MB in lines of 60 kB, and then 900 MB without a line break.
    let script = format!("yes {line} | head -c 100000000 >&2; head -c 900000000 /dev/zero >&2; exit 1");
    let running = Daemon::of(&server).without_output().sh(&script).start();
    let error = server.wait_for_error(&id, 1);
    assert!(error["backtrace"].as_str().unwrap().contains("\n[999967232 bytes left out]\n"));
    let peak = running.peak_memory();
    assert!(peak < 32 * 1024, "{peak} KiB");
    println!("peak memory: {peak} KiB");
    running.stop();
}

/// Four jobs print without pause. Another job, the signals and the stop still work.
#[test]
fn endless_output_blocks_no_other_job_and_no_signal() {
    let server = Server::start();
    let settings = "kill_grace = '200ms'\n[handlers.quick]\nexec = 'true'";
    let script = "trap '' TERM; echo $$ >> $DIR/pids; exec cat /dev/zero >&2";
    let running = Daemon::of(&server).without_output().threads(5).handler(script, settings).start();
    server.enqueue_all(jobs(4));
    running.wait_for_lines(4, "pids");
    let quick = server.enqueue("q", "quick", json!(null));
    server.wait_until_done(&quick);
    running.sigterm().wait_for_message("shutting down");
    running.sigterm();
    running.assert_exit(1);
    assert_eq!(server.count("ready"), 4);
}

#[test]
fn five_hundred_handlers_run_at_once() {
    let server = Server::start();
    let daemon = Daemon::of(&server).threads(500);
    let gate = daemon.dir().join("gate");
    assert!(Command::new("mkfifo").arg(&gate).status().unwrap().success());
    let running = daemon.sh("echo up >> $DIR/up; read line < $DIR/gate; echo $line").start();
    let ids = server.enqueue_all(jobs(500));
    running.wait_for_lines(500, "up");
    println!("peak memory: {} KiB", running.peak_memory());
    let mut opened = File::options().write(true).open(&gate).unwrap();
    opened.write_all(&[b'\n'; 500]).unwrap();
    eventually("all are done", || (server.count("in_flight") == 0).then_some(()));
    assert!(ids.iter().all(|id| server.job(id).is_none()));
    let finished = running.stop();
    assert!(!finished.has("job failed"));
}
