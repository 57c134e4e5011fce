//! The log in its three forms, and that nothing which a job brings along can forge or garble a line of it.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;

use rustix::io::{ioctl_fionbio, ioctl_fionread};
use serde_json::{Value, json};

use crate::support::{Daemon, Finished, Recorder, Server, eventually};

/// Runs one job of that type, whose handler is that script, and ends.
fn run(daemon: Daemon, job_type: &str, script: &str) -> (String, Finished) {
    let server = Server::start();
    let id = server.enqueue("mail", job_type, json!(null));
    let running = daemon.sh(script).args(["--url", &server.url, "--log-level", "debug"]).start();
    server.wait_for_error(&id, 1);
    running.sigterm();
    (id, running.assert_exit(0))
}

const FAILING: &str = "echo to stdout; echo to stderr >&2; exit 3";

/// `2026-11-24T02:51:11.323140Z` at the start of a line.
fn is_stamp(text: &str) -> bool {
    let shape: String = text.chars().map(|char| if char.is_ascii_digit() { '0' } else { char }).collect();
    shape == "0000-00-00T00:00:00.000000Z"
}

/// Whether a plain line begins as every event does: with its time and level.
fn is_event(line: &str) -> bool {
    let mut words = line.split_whitespace();
    words.next().is_some_and(is_stamp)
        && words.next().is_some_and(|level| ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level))
}

/// A line of a terminal without its colours.
fn without_colours(line: &str) -> String {
    let mut parts = line.split('\u{1b}');
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        let (code, rest) = part.split_once('m').unwrap_or((part, ""));
        assert!(
            code.starts_with('[') && code[1..].chars().all(|char| char.is_ascii_digit() || char == ';'),
            "{line:?}"
        );
        text + rest
    })
}

#[test]
fn the_log_is_pretty_and_coloured_on_a_terminal() {
    let (id, finished) = run(Daemon::bare().on_terminal(), "send_email", FAILING);
    assert!(finished.log.iter().all(|line| line.contains("\u{1b}[") && line.ends_with('\r')), "{:?}", finished.log);
    let plain: Vec<String> = finished.log.iter().map(|line| without_colours(line.trim_end_matches('\r'))).collect();
    assert!(plain.iter().all(|line| is_event(line)), "{plain:#?}");
    let job = format!("job{{id={id:?} type=\"send_email\" queue=\"mail\" attempt=1}}: ");
    for end in ["stdout line=\"to stdout\"", "stderr line=\"to stderr\""] {
        assert!(plain.iter().any(|line| line.ends_with(&format!("{job}{end}"))), "{end} in {plain:#?}");
    }
}

#[test]
fn the_log_is_compact_and_plain_without_a_terminal() {
    let (id, finished) = run(Daemon::bare(), "send_email", FAILING);
    assert!(finished.log.iter().all(|line| is_event(line) && !line.contains('\u{1b}')), "{:#?}", finished.log);
    let job = format!("id={id:?} type=\"send_email\" queue=\"mail\" attempt=1");
    for line in ["INFO job: stdout line=\"to stdout\"", "WARN job: stderr line=\"to stderr\""] {
        assert!(finished.log.iter().any(|found| found.ends_with(&format!("{line} {job}"))), "{:#?}", finished.log);
    }
}

#[test]
fn a_pretty_log_that_was_asked_for_has_no_colours_in_a_file() {
    let (_, finished) = run(Daemon::bare().args(["--log-format", "pretty"]), "send_email", FAILING);
    assert!(finished.log.iter().all(|line| is_event(line) && !line.contains('\u{1b}')), "{:#?}", finished.log);
}

#[test]
fn every_json_line_has_time_level_and_message() {
    let (id, finished) = run(Daemon::bare().args(["--log-format", "json"]), "send_email", FAILING);
    let events: Vec<Value> = finished.log.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().all(|event| is_stamp(event["timestamp"].as_str().unwrap())), "{events:#?}");
    assert!(events.iter().all(|event| event["level"].is_string() && event["message"].is_string()), "{events:#?}");
    let job = json!({"name": "job", "id": id, "type": "send_email", "queue": "mail", "attempt": 1});
    for (message, line) in [("stdout", "to stdout"), ("stderr", "to stderr")] {
        assert_eq!(finished.event(message)["line"], line);
        assert_eq!(finished.event(message)["span"], job);
    }
    assert_eq!(finished.event("job failed")["span"], job);
    assert_eq!(finished.event("job failed")["error_type"], "ExitStatus");
}

#[test]
fn a_json_log_stays_json_on_a_terminal() {
    let (_, finished) = run(Daemon::bare().on_terminal().args(["--log-format", "json"]), "send_email", FAILING);
    assert!(finished.log.iter().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{:#?}", finished.log);
}

/// A type, and output, that would look like lines of the log, clear the screen, overwrite, ring, or run backwards.
const HOSTILE_TYPE: &str = "t\n2026-11-24T00:00:00.000000Z  INFO forged\r\u{1b}c\u{7}\u{9b}2J\u{202e}\"";
const HOSTILE_HANDLER: &str = r#"
printf 'ok\r2026-11-24T00:00:00.000000Z  INFO forged \033[2J\007 \302\233 \342\200\256 "} \000 \377\n'
printf '{"level":"INFO","message":"forged"}\n\033[2J\n' >&2
printf '\r\033]0;forged\007' >&2
exit 3"#;

/// What the log says of the hostile job: one line each for receiving it, its four lines of output, and its failure.
#[track_caller]
fn assert_unforged(id: &str, lines: &[String]) {
    for line in lines {
        assert!(is_event(line), "a line of its own: {line:?}");
        assert!(!line.chars().any(|char| char.is_control() || char == '\u{202e}'), "raw in the log: {line:?}");
        assert!(!line.contains("forged") || line.contains(id), "whose is it: {line:?}");
    }
    assert_eq!(lines.iter().filter(|line| line.contains(id)).count(), 6, "{lines:#?}");
}

#[test]
fn a_hostile_job_cannot_forge_a_compact_line() {
    let (id, finished) = run(Daemon::bare(), HOSTILE_TYPE, HOSTILE_HANDLER);
    assert_unforged(&id, &finished.log);
}

#[test]
fn a_hostile_job_cannot_forge_a_pretty_line() {
    let (id, finished) = run(Daemon::bare().on_terminal(), HOSTILE_TYPE, HOSTILE_HANDLER);
    let lines = finished.log.iter().map(|line| without_colours(line.strip_suffix('\r').unwrap()));
    assert_unforged(&id, &lines.collect::<Vec<_>>());
}

#[test]
fn a_hostile_job_cannot_forge_a_json_line() {
    let (id, finished) = run(Daemon::bare().args(["--log-format", "json"]), HOSTILE_TYPE, HOSTILE_HANDLER);
    for line in &finished.log {
        let event: Value = serde_json::from_str(line).unwrap();
        assert!(!line.chars().any(|char| char.is_control() || char == '\u{202e}'), "raw in the log: {line:?}");
        assert!(!line.contains("forged") || event["span"]["id"] == *id || event["id"] == *id, "whose is it: {line:?}");
    }
    assert_eq!(finished.event("job failed")["span"]["type"], HOSTILE_TYPE);
}

const HOSTILE_ANSWER: &str = "no: forged\r\u{1b}[2J\u{9b}2J\n2026-11-24T00:00:00.000000Z  INFO forged";

#[test]
fn what_the_server_says_cannot_forge_a_line_of_the_log() {
    let server = Recorder::answering(503, HOSTILE_ANSWER);
    let running = Daemon::bare().args(["--url", &server.url, "--", "true"]).start();
    let unreachable = |line: &String| line.contains("server unreachable");
    crate::support::eventually("the answer", || running.log().iter().find(|line| unreachable(line)).cloned());
    running.sigterm();
    let log = running.assert_exit(0).log;
    assert!(log.iter().all(|line| is_event(line) && !line.contains(char::is_control)), "{log:#?}");
}

#[test]
fn a_refusal_at_the_start_says_what_the_server_said_in_one_line() {
    let server = Recorder::answering(400, HOSTILE_ANSWER);
    let finished = Daemon::bare().args(["--url", &server.url, "--", "true"]).run().assert_exit(1);
    let (last, log) = finished.log.split_last().unwrap();
    assert!(log.iter().all(|line| is_event(line)), "{log:#?}");
    assert!(last.starts_with("zizq-worker: cannot take jobs from the server, "), "{last}");
    assert!(last.contains("forged") && !last.contains(char::is_control), "{last:?}");
}

/// A named pipe in the test's directory, open for reading.
fn open_fifo(daemon: &Daemon, name: &str) -> File {
    let path = daemon.dir().join(name);
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    // Without a writer, a reader that blocks would wait for one.
    let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path).unwrap();
    ioctl_fionbio(&reader, false).unwrap();
    reader
}

#[test]
fn no_line_is_lost_when_a_handler_makes_stderr_non_blocking() {
    let server = Server::start();
    let daemon = Daemon::of(&server);
    let mut log = open_fifo(&daemon, "log");
    let set_flag = "exec perl -e 'use Fcntl; fcntl(STDERR, F_SETFL, O_NONBLOCK | fcntl(STDERR, F_GETFL, 0)) or die'";
    let setter = daemon.script("set-flag.sh", set_flag);
    let routes = format!("[handlers.flag]\nexec = '{}'\noutput = 'inherit'", setter.display());
    let running = daemon.handler("exec seq 20000", &routes).after("exec 2> $DIR/log").start();
    server.wait_until_done(&server.enqueue("q", "flag", json!(null)));
    let id = server.enqueue("q", "print", json!(null));
    eventually("a pipe that is full", || (ioctl_fionread(&log).unwrap() > 60_000).then_some(()));
    let reading = std::thread::spawn(move || {
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        text
    });
    server.wait_until_done(&id);
    running.stop();
    let events = reading.join().unwrap();
    let events = events.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let lines: Vec<Value> =
        events.filter(|event| event["message"] == "stdout").map(|event| event["line"].clone()).collect();
    assert_eq!(lines.len(), 20_000);
    assert!(lines.iter().zip(1_u64..).all(|(line, number)| line.as_str().unwrap().parse() == Ok(number)));
}
