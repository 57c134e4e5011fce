//! The log has three formats. In none of them can a job forge or garble a log line.

use std::fs::{self, File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::{ioctl_fionbio, ioctl_fionread};
use serde_json::{Value, json};

use crate::support::{Daemon, Finished, RawServer, Server, eventually};

/// Runs one job of type `job_type` with the handler `script`, which fails, and stops the worker. Returns the job's id and the
/// stopped worker.
fn run(daemon: Daemon, job_type: &str, script: &str) -> (String, Finished) {
    let server = Server::start();
    let id = server.enqueue("mail", job_type, json!(null));
    let running = daemon.sh(script).args(["--url", &server.url, "--log-level", "debug"]).start();
    server.wait_for_error(&id, 1);
    running.sigterm();
    (id, running.assert_exit(0))
}

const FAILING: &str = "echo to stdout; echo to stderr >&2; exit 3";

/// Reports whether a text is a timestamp like `2026-11-24T02:51:11.323140Z`.
fn is_stamp(text: &str) -> bool {
    let shape: String = text.chars().map(|char| if char.is_ascii_digit() { '0' } else { char }).collect();
    shape == "0000-00-00T00:00:00.000000Z"
}

/// Reports whether an uncoloured line begins with a time and a level, as each event does.
fn is_event(line: &str) -> bool {
    let mut words = line.split_whitespace();
    words.next().is_some_and(is_stamp)
        && words.next().is_some_and(|level| ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level))
}

/// Removes the colour codes from a line of terminal output. Panics if the line has any other escape sequence.
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
    let job = json!({"id": id, "type": "send_email", "queue": "mail", "attempt": 1});
    for (message, line) in [("stdout", "to stdout"), ("stderr", "to stderr")] {
        assert_eq!(finished.event(message)["line"], line);
        assert_eq!(finished.event(message)["job"], job);
    }
    assert_eq!(finished.event("job failed")["job"], job);
    assert_eq!(finished.event("job failed")["error_type"], "ExitStatus");
}

#[test]
fn every_json_line_about_a_job_has_its_id_in_one_place() {
    let (id, finished) = run(Daemon::bare().args(["--log-format", "json"]), "send_email", FAILING);
    let events: Vec<Value> = finished.log.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
    let is_about_it = |event: &&Value| event.to_string().contains(&id);
    let about_it: Vec<&Value> = events.iter().filter(is_about_it).collect();
    assert!(about_it.iter().all(|event| event["job"]["id"] == *id), "{about_it:#?}");
    assert!(events.iter().all(|event| event["span"].is_null()), "{events:#?}");
    let messages: Vec<&str> = about_it.iter().map(|event| event["message"].as_str().unwrap()).collect();
    for message in ["job received", "stdout", "stderr", "job failed"] {
        assert!(messages.contains(&message), "{messages:?}");
    }
}

#[test]
fn errors_have_their_job_even_if_nothing_else_is_logged() {
    let server = Server::start();
    let id = server.enqueue("mail", "t", json!(null));
    let daemon = Daemon::bare().args(["--url", &server.url, "--log-format", "json", "--log-level", "error"]);
    let running = daemon.sh("exit 3").start();
    server.wait_for_error(&id, 1);
    let finished = running.stop();
    assert_eq!(finished.event("job failed")["job"]["id"], id);
    assert!(finished.events().iter().all(|event| event["level"] == "ERROR"));
}

#[test]
fn the_first_line_names_the_version_and_the_worker() {
    let daemon = Daemon::at("http://127.0.0.1:1").args(["--worker-id", "w-1"]).sh("true").start();
    let starting = daemon.wait_for_message("worker starting");
    assert_eq!((&starting["version"], &starting["worker_id"]), (&json!(env!("CARGO_PKG_VERSION")), &json!("w-1")));
    daemon.stop();
}

/// Runs a job that succeeds and one that fails, and returns the messages that are logged at `level`.
fn messages_at(level: &str) -> Vec<String> {
    let server = Server::start();
    let good = server.enqueue("q", "good", json!(null));
    let bad = server.enqueue("q", "bad", json!(null));
    let daemon = Daemon::bare().args(["--url", &server.url, "--log-format", "json", "--log-level", level]);
    let running = daemon.sh("echo out; [ $ZIZQ_JOB_TYPE = good ]").start();
    server.wait_until_done(&good);
    server.wait_for_error(&bad, 1);
    let finished = running.stop();
    finished.events().iter().map(|event| event["message"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn successes_can_be_turned_down_without_losing_the_rest() {
    let has = |messages: &[String], message: &str| messages.iter().any(|found| found == message);
    let all = messages_at("info");
    let [rest, silent] = ["info,zizq_worker::jobs=warn", "zizq_worker::output=error,info"].map(messages_at);
    for message in ["worker starting", "stdout", "job completed", "job failed", "worker stopped"] {
        assert!(has(&all, message), "{message}: {all:?}");
        assert_eq!(has(&rest, message), message != "job completed", "{message}: {rest:?}");
        assert_eq!(has(&silent, message), message != "stdout", "{message}: {silent:?}");
    }
}

/// Returns the value of `JOURNAL_STREAM` for a file: its device and inode numbers.
fn stream_of(path: &Path) -> String {
    let file = fs::metadata(path).unwrap();
    format!("{}:{}", file.dev(), file.ino())
}

/// Runs a job that fails, with the log in a file, and returns the file's lines. If `is_journal`, `JOURNAL_STREAM` names that
/// file, just as the variable names the journal under systemd.
fn lines_in_the_journal(format: &str, is_journal: bool) -> Vec<String> {
    let server = Server::start();
    let daemon = Daemon::bare().args(["--url", &server.url, "--log-format", format, "--log-level", "debug"]);
    let log = daemon.file("log", "");
    let stream = if is_journal { stream_of(&log) } else { "1:1".to_owned() };
    let id = server.enqueue("mail", "t", json!(null));
    let running = daemon.sh(FAILING).env("JOURNAL_STREAM", stream).after("exec 2> $DIR/log").start();
    server.wait_for_error(&id, 1);
    let finished = running.stop();
    finished.read("log").lines().map(str::to_owned).collect()
}

#[test]
fn lines_in_the_journal_carry_their_priority() {
    for format in ["compact", "json", "pretty"] {
        let lines = lines_in_the_journal(format, true);
        for line in &lines {
            let levels = [("ERROR", "<3>"), ("WARN", "<4>"), ("INFO", "<6>"), ("DEBUG", "<7>")];
            let first = levels.iter().find(|(level, _)| line.split(['"', ' ']).any(|word| word == *level));
            let (_, priority) = first.unwrap_or_else(|| panic!("no level: {line}"));
            assert!(line.starts_with(priority) && !line[3..].starts_with('<'), "{line}");
        }
        for wanted in ["<3>", "<4>", "<6>", "<7>"] {
            assert!(lines.iter().any(|line| line.starts_with(wanted)), "{wanted}: {lines:#?}");
        }
    }
}

#[test]
fn lines_elsewhere_carry_no_priority() {
    let lines = lines_in_the_journal("compact", false);
    assert!(!lines.is_empty() && lines.iter().all(|line| is_event(line)), "{lines:#?}");
}

#[test]
fn a_mistake_is_an_error_in_the_journal() {
    for args in [["--threads", "none"], ["--no-such-flag", "x"]] {
        let daemon = Daemon::bare().args(args);
        let stream = stream_of(&daemon.file("log", ""));
        let running = daemon.env("JOURNAL_STREAM", stream).after("exec 2> $DIR/log").start();
        let text = running.finish().read("log");
        assert!(text.starts_with("<3>zizq-worker: ") && text.lines().count() == 1, "{text}");
    }
}

#[test]
fn a_json_log_stays_json_on_a_terminal() {
    let (_, finished) = run(Daemon::bare().on_terminal().args(["--log-format", "json"]), "send_email", FAILING);
    assert!(finished.log.iter().all(|line| serde_json::from_str::<Value>(line).is_ok()), "{:#?}", finished.log);
}

/// A job type that, if logged unescaped, would forge a log line, clear the screen, overwrite text, ring the bell, and reverse the
/// line.
const HOSTILE_TYPE: &str = "t\n2026-11-24T00:00:00.000000Z  INFO forged\r\u{1b}c\u{7}\u{9b}2J\u{202e}\"";
const HOSTILE_HANDLER: &str = r#"
printf 'ok\r2026-11-24T00:00:00.000000Z  INFO forged \033[2J\007 \302\233 \342\200\256 "} \000 \377\n'
printf '{"level":"INFO","message":"forged"}\n\033[2J\n' >&2
printf '\r\033]0;forged\007' >&2
exit 3"#;

/// Checks that the log has six lines about the hostile job: one for its arrival, four for its output, and one for its failure.
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
        assert!(!line.contains("forged") || event["job"]["id"] == *id, "whose is it: {line:?}");
    }
    assert_eq!(finished.event("job failed")["job"]["type"], HOSTILE_TYPE);
}

#[test]
fn no_filter_takes_the_job_out_of_a_line() {
    for filter in ["info,zizq_worker::jobs=off", "zizq_worker::output=info"] {
        let daemon = Daemon::bare().args(["--log-format", "json"]).env("RUST_LOG", filter);
        let (id, finished) = run(daemon, "t", "echo hello; exit 3");
        assert_eq!(finished.event("stdout")["job"]["id"], *id, "{filter}");
        assert!(!finished.has("job failed"), "{filter}");
    }
}

const HOSTILE_ANSWER: &str = "no: forged\r\u{1b}[2J\u{9b}2J\n2026-11-24T00:00:00.000000Z  INFO forged";

#[test]
fn text_of_the_server_cannot_forge_a_line_of_the_log() {
    let server = RawServer::start();
    let running = Daemon::bare().args(["--url", &server.url(), "--", "true"]).start();
    server.request().answer("503 Service Unavailable", HOSTILE_ANSWER);
    let unreachable = |line: &String| line.contains("server unreachable");
    crate::support::eventually("the answer", || running.log().iter().find(|line| unreachable(line)).cloned());
    running.sigterm();
    let log = running.assert_exit(0).log;
    assert!(log.iter().all(|line| is_event(line) && !line.contains(char::is_control)), "{log:#?}");
}

#[test]
fn a_refusal_at_the_start_logs_the_servers_answer_in_one_line() {
    let server = RawServer::start();
    let daemon = Daemon::bare().args(["--url", &server.url(), "--", "true"]);
    let (_, finished) = server.refuse(daemon, HOSTILE_ANSWER);
    let (last, log) = finished.log.split_last().unwrap();
    assert!(log.iter().all(|line| is_event(line)), "{log:#?}");
    assert!(last.starts_with("zizq-worker: cannot take jobs from the server, "), "{last}");
    assert!(last.contains("forged") && !last.contains(char::is_control), "{last:?}");
}

/// Creates a named pipe in the test's directory, and opens it for reading.
fn open_fifo(daemon: &Daemon, name: &str) -> File {
    let path = daemon.dir().join(name);
    assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
    // Open without blocking, because a blocking open waits for a writer.
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
