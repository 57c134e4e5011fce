//! The result file of a handler that fails, and hostile result files, which do no harm.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};

use crate::support::{Daemon, Finished, HungFileSystem, Server, UNTIL_GO, eventually};

/// A failed job: the job on the server, the reported error, and the worker's log and files.
struct Failed {
    job: Value,
    error: Value,
    finished: Finished,
}

/// Runs a handler that executes this script and fails. In the script, the shell function `say` writes its argument to the result
/// file.
fn fail(script: &str, settings: &str) -> Failed {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let script = format!("say() {{ printf '%s' \"$1\" > \"$ZIZQ_RESULT_FILE\"; }}\n{script}\nexit 3");
    let daemon = Daemon::of(&server);
    let temp = daemon.dir().join("tmp");
    std::fs::create_dir(&temp).unwrap();
    let running = daemon.env("TMPDIR", &temp).handler(&script, settings).start();
    let error = server.wait_for_error(&id, 1);
    let job = server.job(&id).unwrap();
    let finished = running.stop();
    assert_eq!(temp.read_dir().unwrap().count(), 0, "something is left in the temporary directory");
    Failed { job, error, finished }
}

fn say(text: &str) -> Failed {
    fail(&format!("say '{text}'"), "")
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_millis() as u64
}

#[test]
fn message_error_type_and_backtrace_replace_the_reports() {
    let failed = fail(
        "echo ours >&2; say '{\"message\":\"no such account\",\"error_type\":\"NoAccount\",\"backtrace\":\"a.py:7\\nb.py:8\"}'",
        "",
    );
    assert_eq!(failed.error["message"], "no such account");
    assert_eq!(failed.error["error_type"], "NoAccount");
    assert_eq!(failed.error["backtrace"], "a.py:7\nb.py:8");
    assert_eq!(failed.job["status"], "scheduled");
}

#[test]
fn each_field_is_optional() {
    let failed = fail("echo ours >&2; say '{\"error_type\":\"NoAccount\"}'", "");
    assert_eq!(failed.error["message"], "handle.sh exited with status 3: ours");
    assert_eq!(failed.error["error_type"], "NoAccount");
    assert_eq!(failed.error["backtrace"], "ours\n");
    let failed = say("{}");
    assert_eq!(
        (&failed.error["message"], &failed.error["error_type"]),
        (&json!("handle.sh exited with status 3"), &json!("ExitStatus"))
    );
    assert!(!failed.finished.has("result file ignored"));
}

#[test]
fn retry_in_is_seconds_or_a_duration_from_now() {
    for (wait, seconds) in [("300", 300.0), ("7200.5", 7200.5), ("\"5m\"", 300.0), ("\"1h 30m\"", 5400.0)] {
        let before = now();
        let failed = say(&format!("{{\"retry_in\":{wait}}}"));
        let (earliest, ready_at) = (before + (seconds * 1000.0) as u64, failed.job["ready_at"].as_u64().unwrap());
        assert!((earliest..earliest + (now() - before) + 1).contains(&ready_at), "{wait}: {}", failed.job);
        assert_eq!(failed.job["status"], "scheduled");
    }
}

#[test]
fn retry_at_is_unix_milliseconds_or_rfc_3339() {
    for time in ["1893456000123", "\"2030-01-01T00:00:00.123Z\"", "\"2030-01-01T02:00:00.123+02:00\""] {
        let failed = say(&format!("{{\"retry_at\":{time}}}"));
        assert_eq!(failed.job["ready_at"], 1_893_456_000_123_u64, "{time}");
    }
}

#[test]
fn kill_leaves_the_job_dead() {
    assert_eq!(say(r#"{"kill":true}"#).job["status"], "dead");
    assert_eq!(say(r#"{"kill":false}"#).job["status"], "scheduled");
    assert_eq!(fail("say '{\"kill\":false}'", "kill_exit_codes = [3]").job["status"], "dead");
}

#[test]
fn a_killed_handlers_result_file_counts() {
    let failed = fail("say '{\"message\":\"in the middle\"}'; kill -KILL $$", "");
    assert_eq!((&failed.error["message"], &failed.error["error_type"]), (&json!("in the middle"), &json!("Signal")));
    let failed = fail("say '{\"message\":\"in the middle\"}'; sleep 1000", "timeout = '1s'");
    assert_eq!((&failed.error["message"], &failed.error["error_type"]), (&json!("in the middle"), &json!("Timeout")));
}

#[test]
fn a_success_does_not_read_the_result_file() {
    for text in [r#"{"kill":true}"#, "nonsense"] {
        let server = Server::start();
        let id = server.enqueue("q", "t", json!(null));
        let running = Daemon::of(&server).sh(&format!("echo '{text}' > $ZIZQ_RESULT_FILE")).start();
        server.wait_until_done(&id);
        assert!(!running.stop().has("result file ignored"));
    }
}

#[test]
fn the_result_file_is_absent_in_a_private_directory() {
    let script = "stat -c %a \"$(dirname \"$ZIZQ_RESULT_FILE\")\" > $DIR/mode; ls -A \"$(dirname \"$ZIZQ_RESULT_FILE\")\" > $DIR/there";
    let finished = fail(script, "").finished;
    assert_eq!(finished.read("mode"), "700\n");
    assert_eq!(finished.read("there"), "");
}

#[test]
fn the_file_is_removed_after_a_success_and_after_a_failure() {
    let server = Server::start();
    let ids = ["0", "1"].map(|code| server.enqueue("q", code, json!(null)));
    let script = "echo {} > $ZIZQ_RESULT_FILE; echo $ZIZQ_RESULT_FILE >> $DIR/paths; exit $ZIZQ_JOB_TYPE";
    let running = Daemon::of(&server).sh(script).start();
    server.wait_until_done(&ids[0]);
    server.wait_for_error(&ids[1], 1);
    let paths = running.wait_for_lines(2, "paths");
    assert_ne!(paths[0], paths[1]);
    let directory = std::path::Path::new(&paths[0]).parent().unwrap().to_owned();
    assert_eq!(directory.read_dir().unwrap().count(), 0);
    running.stop();
    assert!(!directory.exists());
}

#[test]
fn the_directory_is_gone_after_a_kill_too() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let script = format!("echo $ZIZQ_RESULT_FILE > $DIR/path; echo {{}} > $ZIZQ_RESULT_FILE; {UNTIL_GO}");
    let running = Daemon::of(&server).sh(&script).start();
    running.wait_for_lines(1, "started");
    running.sigterm().wait_for_message("shutting down");
    running.sigterm();
    let path = running.assert_exit(1).read("path");
    assert!(!std::path::Path::new(path.trim()).parent().unwrap().exists());
}

/// Asserts that the result file is ignored with a warning, and that the failure is reported as if there were no result file.
#[track_caller]
fn assert_ignored(script: &str, reason: &str) {
    let failed = fail(script, "");
    let warning = failed.finished.event("result file ignored");
    assert_eq!(warning["level"], "WARN");
    assert!(warning["reason"].as_str().unwrap().contains(reason), "{script}: {warning}");
    assert_eq!(warning["job"]["id"], failed.job["id"]);
    assert_eq!(failed.error["message"], "handle.sh exited with status 3");
    assert_eq!(failed.error["error_type"], "ExitStatus");
    assert_eq!((&failed.job["status"], &failed.job["attempts"]), (&json!("scheduled"), &json!(1)));
}

#[test]
fn a_result_of_the_wrong_shape_is_ignored_with_a_warning() {
    assert_ignored("say ''", "EOF");
    assert_ignored("say 'retry later'", "expected value");
    assert_ignored(r#"say '{"kill":true'"#, "EOF");
    assert_ignored(r#"say '{"kill":true,"retry_after":3}'"#, "unknown field `retry_after`");
    assert_ignored(r#"say '{"kill":true,"retry_in":"soon"}'"#, "retry_in must be seconds");
    assert_ignored(r#"say '{"retry_at":99999999999999999999}'"#, "retry_at must be Unix milliseconds");
    assert_ignored(r#"say '{"message":["a"]}'"#, "invalid type");
    assert_ignored(r"printf '{\042message\042:\042\377\042}' > $ZIZQ_RESULT_FILE", "invalid unicode");
}

#[test]
fn a_result_file_of_more_than_1_mib_is_ignored() {
    let file = |size: usize| {
        format!(
            "{{ printf '{{\"message\":\"big\"}}'; head -c {} /dev/zero | tr '\\0' ' '; }} > $ZIZQ_RESULT_FILE",
            size - 17
        )
    };
    assert_ignored(&file(1024 * 1024 + 1), "larger than 1048576 bytes");
    assert_eq!(fail(&file(1024 * 1024), "").error["message"], "big");
    assert_ignored("truncate -s 100G $ZIZQ_RESULT_FILE", "larger than 1048576 bytes");
}

#[test]
fn a_result_file_that_is_not_regular_is_ignored_without_delay() {
    assert_ignored("mkfifo $ZIZQ_RESULT_FILE", "not a regular file");
    assert_ignored("mkdir -p $ZIZQ_RESULT_FILE/a/b; echo > $ZIZQ_RESULT_FILE/a/file", "not a regular file");
    assert_ignored("echo '{\"kill\":true}' > $DIR/real; ln -s $DIR/real $ZIZQ_RESULT_FILE", "cannot be opened");
    assert_ignored("ln -s /dev/zero $ZIZQ_RESULT_FILE", "cannot be opened");
    assert_ignored("ln -s $ZIZQ_RESULT_FILE $ZIZQ_RESULT_FILE", "cannot be opened");
}

/// The handler creates a directory at the path of the result file. The directory is too deep for a removal by recursion, and for a
/// removal that keeps a descriptor open for each level.
#[test]
fn a_directory_of_any_depth_is_removed() {
    if !crate::handlers::has("python3") {
        return;
    }
    let server = Server::start();
    let temp_dir = tempfile::tempdir().unwrap();
    let dig = r#"import os
os.mkdir(os.environ["ZIZQ_RESULT_FILE"]); os.chdir(os.environ["ZIZQ_RESULT_FILE"])
for level in range(15000): os.mkdir("a"); os.chdir("a")
os.mkdir("b")
os.chmod(".", 0)"#;
    let daemon = Daemon::of(&server).env("TMPDIR", temp_dir.path()).sh(&format!("python3 -c '{dig}'")).start();
    let id = server.enqueue("q", "t", json!(null));
    server.wait_until_done(&id);
    let results = std::fs::read_dir(temp_dir.path()).unwrap().next().unwrap().unwrap().path();
    // The files are removed after the report.
    eventually("no file", || (std::fs::read_dir(&results).unwrap().count() == 0).then_some(()));
    daemon.stop();
    assert_eq!(std::fs::read_dir(temp_dir.path()).unwrap().count(), 0);
}

#[test]
fn files_that_hang_hold_up_neither_reports_nor_the_exit() {
    let server = Server::start();
    let script =
        format!("mkdir $ZIZQ_RESULT_FILE; echo $ZIZQ_RESULT_FILE > $DIR/path; {UNTIL_GO}; exit $ZIZQ_JOB_TYPE");
    let running = Daemon::of(&server).sh(&script).start();
    let failing = server.enqueue("q", "1", json!(null));
    running.wait_for_lines(1, "started");
    let Some(mounted) = HungFileSystem::mount(std::path::Path::new(running.wait_for_file("path").trim())) else {
        return;
    };
    running.go();
    assert_eq!(server.wait_for_error(&failing, 1)["message"], "handle.sh exited with status 1");
    let next = server.enqueue("q", "0", json!(null));
    server.wait_until_done(&next);
    let finished = running.stop();
    assert!(finished.event("result file ignored")["reason"].as_str().unwrap().contains("cannot be read in time"));
    assert!(finished.has("files of handlers are left behind"));
    drop(mounted);
    std::fs::remove_dir_all(std::path::Path::new(finished.read("path").trim()).parent().unwrap()).unwrap();
}

#[test]
fn an_unreadable_result_file_is_ignored() {
    // Root can read a file with any mode.
    let readable = std::process::Command::new("id").arg("-u").output().is_ok_and(|id| id.stdout == b"0\n");
    if readable {
        assert_eq!(fail("say '{\"message\":\"read\"}'; chmod 0 $ZIZQ_RESULT_FILE", "").error["message"], "read");
    } else {
        assert_ignored("say '{}'; chmod 0 $ZIZQ_RESULT_FILE", "cannot be opened");
    }
}

#[test]
fn removing_a_link_leaves_its_target_alone() {
    let failed = fail("mkdir $DIR/dir; echo > $DIR/dir/file; ln -s $DIR/dir $ZIZQ_RESULT_FILE", "");
    assert!(failed.finished.dir().join("dir/file").exists());
}

#[test]
fn a_worker_without_a_temporary_directory_takes_no_job() {
    let server = Server::start();
    let finished = Daemon::of(&server).env("TMPDIR", "/nonexistent").sh("true").run().assert_exit(78);
    assert!(
        finished.log.last().unwrap().contains("TMPDIR: cannot make a directory for result files in /nonexistent"),
        "{:?}",
        finished.log
    );
}
