//! The path of a job from the start of its process to its report.

use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process, set_child_subreaper};
use serde_json::{Value, json};

use crate::support::{Daemon, Server, eventually};

#[test]
fn a_job_whose_command_exits_0_is_acknowledged_and_gone() {
    let server = Server::start();
    let id = server.enqueue("mail", "send_email", json!({"to": "a@example.org"}));
    let daemon = Daemon::of(&server).sh("exit 0").start();
    server.wait_until_done(&id);
    daemon.sigterm();
    let finished = daemon.assert_exit(0);
    let completed = finished.event("job completed");
    assert_eq!(completed["level"], "INFO");
    assert!(completed["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(completed["job"], json!({"id": id, "type": "send_email", "queue": "mail", "attempt": 1}));
}

#[test]
fn the_payload_comes_on_stdin_byte_for_byte() {
    let server = Server::start();
    let payload = r#"{"b": 1.50, "a":"é \u0000", "n":[ ]}"#;
    let line = format!(r#"{{"queue":"q","type":"t","payload":{payload}}}"#);
    let id = server.store.enqueue_line(&line).unwrap();
    let daemon = Daemon::of(&server).sh("cat > $DIR/payload; echo >> $DIR/payload").start();
    server.wait_until_done(&id);
    assert_eq!(daemon.wait_for_file("payload"), format!("{payload}\n"));
}

#[test]
fn a_large_payload_arrives_whole() {
    let server = Server::start();
    let text = "x".repeat(9_000_000);
    let id = server.enqueue("q", "t", json!(text));
    let daemon = Daemon::of(&server).sh("wc -c > $DIR/count").start();
    server.wait_until_done(&id);
    assert_eq!(daemon.wait_for_file("count").trim(), (text.len() + 2).to_string());
}

#[test]
fn a_command_need_not_read_its_payload() {
    let server = Server::start();
    let ids = [json!("x"), json!("x".repeat(9_000_000))].map(|payload| server.enqueue("q", "t", payload));
    let daemon = Daemon::of(&server).sh("exec <&-; exit 0").start();
    for id in ids {
        server.wait_until_done(&id);
    }
    daemon.sigterm();
    daemon.assert_exit(0);
}

#[test]
fn the_environment_is_inherited_and_tells_of_the_job() {
    let server = Server::start();
    let id = server.enqueue_with(json!({"queue": "a b", "type": "t/ü", "payload": null, "priority": 7}));
    let ready_at = server.job(&id).unwrap()["ready_at"].to_string();
    let daemon = Daemon::of(&server).args(["--worker-id", "w-1"]).env("INHERITED", "yes").sh("env > $DIR/env").start();
    server.wait_until_done(&id);
    daemon.sigterm();
    let env = daemon.assert_exit(0).read("env");
    for expected in [
        format!("ZIZQ_JOB_ID={id}"),
        "ZIZQ_JOB_TYPE=t/ü".into(),
        "ZIZQ_JOB_QUEUE=a b".into(),
        "ZIZQ_JOB_PRIORITY=7".into(),
        "ZIZQ_JOB_ATTEMPTS=0".into(),
        format!("ZIZQ_JOB_READY_AT={ready_at}"),
        "ZIZQ_WORKER_ID=w-1".into(),
        "INHERITED=yes".into(),
    ] {
        assert!(env.lines().any(|line| line == expected), "{expected} is not in\n{env}");
    }
}

#[test]
fn attempts_count_the_failures_before() {
    let server = Server::start();
    let id = server.enqueue_with(json!({"queue": "q", "type": "t", "payload": 1,
        "backoff": {"base_ms": 0, "exponent": 0.0, "jitter_ms": 0}}));
    let daemon =
        Daemon::of(&server).sh("echo $ZIZQ_JOB_ATTEMPTS >> $DIR/attempts; test $ZIZQ_JOB_ATTEMPTS = 1").start();
    server.wait_until_done(&id);
    assert_eq!(daemon.wait_for_file("attempts"), "0\n1\n");
    let failed = daemon.wait_for("the first failure", |event| event["message"] == "job failed");
    assert_eq!(failed["job"]["attempt"], 1);
}

#[test]
fn each_job_has_a_process_group_of_its_own() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&server).sh("echo $$ $(ps -o pgid= -p $$) > $DIR/ids").start();
    server.wait_until_done(&id);
    let ids = daemon.wait_for_file("ids");
    let (pid, group) = ids.trim().split_once(' ').unwrap();
    assert_eq!(pid, group.trim());
}

#[test]
fn there_is_no_shell_and_nothing_of_a_job_in_the_arguments() {
    let server = Server::start();
    let id = server.enqueue("q", "$(touch $DIR/oops)", json!("; touch $DIR/oops"));
    let daemon = Daemon::of(&server);
    let script = daemon.script("handle.sh", r#"printf '%s\n' "$#" "$@" > $DIR/arguments"#);
    let exec = format!("{} 'two words' $HOME ; *", script.display());
    let daemon = daemon.args(["--exec", &exec]).start();
    server.wait_until_done(&id);
    daemon.sigterm();
    let finished = daemon.assert_exit(0);
    assert_eq!(finished.read("arguments"), "4\ntwo words\n$HOME\n;\n*\n");
    assert!(!finished.dir().join("oops").exists());
}

#[test]
fn another_exit_status_is_a_failure_with_the_end_of_stderr() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&server).sh("echo first >&2; echo no such account >&2; echo >&2; exit 3").start();
    let error = server.wait_for_error(&id, 1);
    assert_eq!(error["message"], "handle.sh exited with status 3: no such account");
    assert_eq!(error["error_type"], "ExitStatus");
    assert_eq!(error["backtrace"], "first\nno such account\n\n");
    let failed = daemon.wait_for_message("job failed");
    assert_eq!((&failed["level"], &failed["error"]), (&json!("ERROR"), &error["message"]));
    assert!(failed["seconds"].as_f64().unwrap() > 0.0);
    assert_eq!(failed["job"]["id"], id.as_str());
}

#[test]
fn a_silent_failure_has_no_backtrace() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let _daemon = Daemon::of(&server).sh("exit 255").start();
    let error = server.wait_for_error(&id, 1);
    assert_eq!(error["message"], "handle.sh exited with status 255");
    assert_eq!(error["backtrace"], Value::Null);
}

#[test]
fn death_by_a_signal_is_a_failure_that_names_it() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let _daemon = Daemon::of(&server).sh("kill -KILL $$").start();
    let error = server.wait_for_error(&id, 1);
    assert_eq!(error["error_type"], "Signal");
    assert!(error["message"].as_str().unwrap().starts_with("handle.sh was killed by signal 9 (SIGKILL)"), "{error}");
}

#[test]
fn the_end_of_stderr_is_reported_however_busy_the_worker_is() {
    let server = Server::start();
    let daemon = Daemon::of(&server).threads(6).env("RUST_LOG", "warn");
    let daemon = daemon
        .sh("[ $ZIZQ_JOB_TYPE = busy ] && { echo >> $DIR/busy; exec yes; }
        yes 'not the end' | head -c 65000 >&2; echo >&2; echo the end >&2; exit 1")
        .start();
    server.enqueue_all(vec![json!({"queue": "q", "type": "busy", "payload": null}); 4]);
    daemon.wait_for_lines(4, "busy");
    let ids = server.enqueue_all(vec![json!({"queue": "q", "type": "bad", "payload": null}); 6]);
    for id in ids {
        let error = server.wait_for_error(&id, 1);
        assert_eq!(error["message"], "handle.sh exited with status 1: the end");
    }
}

#[test]
fn the_backtrace_is_bounded_and_keeps_both_ends() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let script = "echo beginning >&2; head -c 5000000 /dev/zero | tr '\\0' 'x' >&2; echo >&2; echo end >&2; exit 1";
    let _daemon = Daemon::of(&server).sh(script).start();
    let error = server.wait_for_error(&id, 1);
    let backtrace = error["backtrace"].as_str().unwrap();
    assert!(backtrace.starts_with("beginning\nxxx") && backtrace.ends_with("xxx\nend\n"));
    assert!(backtrace.len() < 33 * 1024, "{}", backtrace.len());
}

#[test]
fn output_lines_are_logged_with_their_job() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&server).sh("echo hello; printf 'no newline' >&2").start();
    server.wait_until_done(&id);
    for (message, level, line) in [("stdout", "INFO", "hello"), ("stderr", "WARN", "no newline")] {
        let event = daemon.wait_for(line, |event| event["message"] == message);
        assert_eq!((&event["level"], &event["line"]), (&json!(level), &json!(line)));
        assert_eq!(event["job"]["id"], id.as_str());
    }
}

#[test]
fn threads_times_fibers_jobs_run_at_once() {
    let server = Server::start();
    let jobs = (0..6).map(|n| json!({"queue": "q", "type": "t", "payload": n}));
    let ids = server.enqueue_all(jobs);
    let wait = "echo >> $DIR/started; while [ ! -e $DIR/go ]; do sleep 0.01; done";
    let daemon = Daemon::of(&server).args(["--threads", "3", "--fibers", "2"]).sh(wait).start();
    eventually("six jobs at once", || {
        let started = std::fs::read_to_string(daemon.dir().join("started")).unwrap_or_default();
        (started.lines().count() == 6).then_some(())
    });
    std::fs::write(daemon.dir().join("go"), "").unwrap();
    for id in ids {
        server.wait_until_done(&id);
    }
}

/// A parent process that never reaps its children, and the directory of the file `worker`, which contains the pid of the daemon
/// that the parent started. Dropping a `Negligent` kills the parent and the daemon.
struct Negligent(Child, tempfile::TempDir);

impl Drop for Negligent {
    fn drop(&mut self) {
        let worker = std::fs::read_to_string(self.1.path().join("worker")).unwrap_or_default();
        if let Some(worker) = worker.trim().parse().ok().and_then(Pid::from_raw) {
            let _ = kill_process(worker, Signal::KILL);
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a daemon below a subreaper that never reaps an orphan, as in a container without an init.
#[expect(unsafe_code, reason = "nothing else makes another process a subreaper")]
fn start_below_a_process_that_does_not_reap(server: &Server, script: &str) -> Negligent {
    let dir = tempfile::tempdir().unwrap();
    let mut command = Command::new("sh");
    command.args(["-c", r#""$@" & exec sleep 600"#, "sh", env!("CARGO_BIN_EXE_zizq-worker")]);
    command.args(["--url", &server.url, "--", "sh", "-c", script]).env("DIR", dir.path());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    // SAFETY: between fork and exec, the closure makes one system call and allocates no memory.
    unsafe { command.pre_exec(|| Ok(set_child_subreaper(Pid::from_raw(1))?)) };
    Negligent(command.spawn().unwrap(), dir)
}

#[test]
fn the_next_job_does_not_wait_until_leftovers_are_reaped() {
    let server = Server::start();
    server.enqueue_all(vec![json!({"queue": "q", "type": "t", "payload": null}); 20]);
    // If each job waited five seconds for its leftover process to be reaped, the test would exceed its time limit.
    let _daemon = start_below_a_process_that_does_not_reap(&server, "echo $PPID > $DIR/worker; sleep 600 & exit 0");
    eventually("all jobs done", || (server.count("ready,in_flight") == 0).then_some(()));
}

#[test]
fn a_command_starts_with_no_signal_held_back() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).sh("grep SigBlk /proc/self/status > $DIR/status").start();
    server.wait_until_done(&id);
    assert_eq!(running.wait_for_file("status"), "SigBlk:\t0000000000000000\n");
}
