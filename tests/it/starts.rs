//! Handlers whose starts fail: briefly, for a long time, with only one of the jobs, or because a resource is exhausted.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use serde_json::{Value, json};

use crate::support::{Admin, Daemon, RawServer, Running, Server, UNTIL_GO, eventually, jobs};

/// Replaces the handler's script atomically, as a careful deployment does.
fn deploy(daemon: &Running, script: &str) {
    let (new, path) = (daemon.dir().join("new"), daemon.dir().join("handle.sh"));
    fs::write(&new, script).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(new, path).unwrap();
}

/// Sleeps for a period in which there is no event that the test could wait for.
fn meanwhile(milliseconds: u64) {
    std::thread::sleep(Duration::from_millis(milliseconds));
}

fn errors(server: &Server, ids: &[String]) -> Vec<Value> {
    ids.iter().flat_map(|id| server.errors(id)).collect()
}

const GOOD: &str = "#!/bin/sh\necho $ZIZQ_JOB_ID >> $DIR/ran\n";

#[test]
fn a_handler_that_is_missing_for_a_moment_fails_no_job() {
    let server = Server::start();
    let running = Daemon::of(&server).threads(4).sh("true").start();
    running.wait_for_message("connected, listening for jobs");
    fs::remove_file(running.dir().join("handle.sh")).unwrap();
    let ids = server.enqueue_all(jobs(12));
    running.wait_for_messages(8, "job received");
    meanwhile(700);
    assert_eq!(server.count("in_flight"), 8);
    deploy(&running, GOOD);
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(running.wait_for_lines(12, "ran").len(), 12);
    let finished = running.stop();
    assert!(!finished.has("job failed") && !finished.has("handler cannot be started, its jobs are slowed down"));
}

/// The C source of a replacement for `clone`. While the file `errno` in the test's directory contains a number, the replacement
/// records each call and fails with that error.
const FAULTY_CLONE: &str = r#"#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
static FILE *open_file(const char *name, const char *mode) {
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", getenv("DIR"), name);
    return fopen(path, mode);
}
int clone(int (*run)(void *), void *stack, int flags, void *argument, ...) {
    int number = 0;
    FILE *fault = open_file("errno", "re");
    if (fault) {
        if (fscanf(fault, "%d", &number) != 1) number = 0;
        fclose(fault);
    }
    if (number) {
        FILE *refused = open_file("refused", "ae");
        fprintf(refused, "%d\n", number);
        fclose(refused);
        errno = number;
        return -1;
    }
    va_list rest;
    va_start(rest, argument);
    int *pidfd = va_arg(rest, int *);
    va_end(rest);
    int (*clone)(int (*)(void *), void *, int, void *, ...) = dlsym(RTLD_NEXT, "clone");
    return clone(run, stack, flags, argument, pidfd);
}"#;

#[test]
#[cfg_attr(target_env = "musl", ignore = "nothing is preloaded into a static program")]
fn a_shortage_for_a_moment_fails_no_job() {
    let server = Server::start();
    let running = Daemon::of(&server).preload(FAULTY_CLONE).sh("true").start();
    let shortages = [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE, Errno::TXTBSY];
    for (number, errno) in shortages.into_iter().enumerate() {
        let fault = running.dir().join("errno");
        fs::write(&fault, errno.raw_os_error().to_string()).unwrap();
        let id = server.enqueue("q", "t", json!(null));
        running.wait_for_lines(2 * (number + 1), "refused");
        assert_eq!(server.job(&id).unwrap()["status"], "in_flight");
        fs::remove_file(fault).unwrap();
        server.wait_until_done(&id);
    }
    let finished = running.stop();
    assert!(!finished.has("job failed") && !finished.has("handler cannot be started, its jobs are slowed down"));
}

#[test]
fn a_handler_that_may_not_be_run_for_a_moment_fails_no_job() {
    let server = Server::start();
    let running = Daemon::of(&server).sh("true").start();
    running.wait_for_message("connected, listening for jobs");
    let path = running.dir().join("handle.sh");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let id = server.enqueue("q", "t", json!(null));
    running.wait_for_message("job received");
    meanwhile(300);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    server.wait_until_done(&id);
    assert!(!running.stop().has("job failed"));
}

#[test]
fn a_handler_that_is_still_being_written_fails_no_job() {
    let server = Server::start();
    let daemon = Daemon::of(&server);
    let path = daemon.dir().join("handle");
    fs::copy("/bin/true", &path).unwrap();
    let running = daemon.args(["--exec", path.to_str().unwrap()]).start();
    running.wait_for_message("connected, listening for jobs");
    let writing = fs::File::options().append(true).open(&path).unwrap();
    let id = server.enqueue("q", "t", json!(null));
    running.wait_for_message("job received");
    meanwhile(300);
    assert_eq!(server.errors(&id), Vec::<Value>::new());
    drop(writing);
    server.wait_until_done(&id);
    running.stop();
}

#[test]
fn a_job_that_waits_for_its_handler_goes_back_in_a_drain() {
    let server = Server::start();
    let running = Daemon::of(&server).sh("true").start();
    running.wait_for_message("connected, listening for jobs");
    fs::remove_file(running.dir().join("handle.sh")).unwrap();
    let id = server.enqueue("q", "t", json!(null));
    running.wait_for_message("job received");
    let finished = running.stop();
    assert!(finished.has("job interrupted, it goes back to the server"));
    assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
}

#[test]
fn a_missing_handler_fails_its_job_after_five_seconds() {
    let server = Server::start();
    let daemon = Daemon::of(&server).threads(4);
    fs::create_dir(daemon.dir().join("cwd")).unwrap();
    daemon.script("script.sh", "true");
    let handlers = "[handlers.other]\nexec = 'true'\n[handlers.homeless]\nexec = 'true'\ncwd = '$DIR/cwd'
[handlers.script]\nexec = '$DIR/script.sh'";
    let running = daemon.handler("true", handlers).start();
    running.wait_for_message("connected, listening for jobs");
    fs::remove_file(running.dir().join("handle.sh")).unwrap();
    fs::remove_dir(running.dir().join("cwd")).unwrap();
    fs::write(running.dir().join("script.sh"), "#!/no/such/shell\n").unwrap();
    let id = server.enqueue("q", "t", json!(null));
    let hinted = ["homeless", "script"].map(|job_type| server.enqueue("q", job_type, json!(null)));
    let other = server.enqueue("q", "other", json!(null));
    server.wait_until_done(&other);
    let error = server.wait_for_error(&id, 1);
    assert_eq!(error["error_type"], "SpawnError");
    assert_eq!(error["message"], "handle.sh could not be started: No such file or directory (os error 2)");
    let hints = hinted.map(|id| server.wait_for_error(&id, 1)["message"].as_str().unwrap().to_owned());
    assert!(hints[0].ends_with("/cwd is missing)"), "{hints:?}");
    assert!(hints[1].ends_with("(the file is there; what its #! line names is not)"), "{hints:?}");
    let finished = running.stop();
    let failed = finished.event("job failed");
    assert_eq!(failed["seconds"], json!(null), "it has not run");
    let took = failed["waited_seconds"].as_f64().unwrap();
    assert!((5.0..20.0).contains(&took), "{took}");
    assert_eq!(finished.all("handler cannot be started, its jobs are slowed down").len(), 3);
}

/// The jobs arrive together. After each failed start, the worker pauses the starts of the other jobs: for one second, then two,
/// then four.
#[test]
fn the_wait_for_a_broken_handler_is_no_run_time() {
    let server = Server::start();
    let daemon = Daemon::of(&server).threads(8).args(["--prefetch", "8", "--admin-listen", "127.0.0.1:0"]);
    let running = daemon.sh("true").start();
    let admin = Admin::of(&running);
    running.wait_for_message("connected, listening for jobs");
    deploy(&running, "\0\0 not a program");
    server.enqueue_all(jobs(8));
    running.wait_for_messages(2, "job failed");
    deploy(&running, GOOD);
    let completed = running.wait_for("a job that waited", |event| event["message"] == "job completed");
    let waited = completed["waited_seconds"].as_f64().unwrap_or_else(|| panic!("{completed}"));
    assert!(waited > 1.0, "{completed}");
    // At least six of the eight jobs complete, some perhaps at a retry. Their runs are recorded in the histogram of run times.
    // Failed starts are not recorded there.
    eventually("the time of all runs", || {
        let completed = running.log().iter().filter(|line| line.contains(r#""message":"job completed""#)).count();
        let text = admin.metrics();
        let sum = |name: &str| -> f64 {
            let name = format!("zizq_worker_handler_seconds_{name}{{type=\"t\"}} ");
            text.lines().find_map(|line| line.strip_prefix(&name)).unwrap().parse().unwrap()
        };
        (completed >= 6 && sum("count") as usize >= 6).then_some(())
    });
    let finished = running.stop();
    assert!(finished.all("job failed").iter().all(|failed| failed["seconds"].is_null()), "{:?}", finished.log);
}

/// The starts of the broken handler fail with ENOEXEC. This error is not temporary, so the first job fails at once. After that, the
/// worker delays the starts of the other jobs.
#[test]
fn a_broken_handler_is_slowed_down_until_it_is_mended() {
    let server = Server::start();
    let running = Daemon::of(&server).threads(4).args(["--prefetch", "8"]).sh("echo $ZIZQ_JOB_ID >> $DIR/ran").start();
    let first = server.enqueue_all(jobs(8));
    first.iter().for_each(|id| server.wait_until_done(id));
    deploy(&running, "\0\0 not a program");
    let broken = Instant::now();
    let ids = server.enqueue_all(jobs(60));
    let failed = eventually("a second failure", || Some(errors(&server, &ids)).filter(|errors| errors.len() >= 2));
    // One job fails at once and one a second later. Without the pause, a job would fail at once in each of the four loops.
    assert!(broken.elapsed() >= Duration::from_millis(900), "{:?}", broken.elapsed());
    assert!(failed.iter().all(|error| error["error_type"] == "SpawnError"), "{failed:?}");
    assert!(failed[0]["message"].as_str().unwrap().contains("Exec format error"), "{failed:?}");
    deploy(&running, GOOD);
    let mended = Instant::now();
    running.wait_for_lines(8 + 60 - failed.len() - 1, "ran");
    // The current pause lasts at most two seconds, and no other pause follows.
    assert!(mended.elapsed() < Duration::from_secs(15), "{:?}", mended.elapsed());
    running.wait_for_message("handler can be started again");
    let finished = running.stop();
    assert_eq!(finished.all("handler cannot be started, its jobs are slowed down").len(), 1);
    assert_eq!(finished.all("handler can be started again").len(), 1);
    assert!(finished.all("job failed").len() <= 3);
}

#[test]
fn a_job_too_large_for_any_process_slows_down_no_other() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).sh("true").start();
    let mut stream = server.take();
    let long = "x".repeat(140 * 1024);
    let job = |id: &str, job_type: &str| {
        format!(
            "{{\"id\":\"{id}\",\"type\":\"{job_type}\",\"queue\":\"q\",\"priority\":1,\"payload\":1,\"ready_at\":1,\"attempts\":0}}\n"
        )
    };
    for (id, job_type) in [("1", long.as_str()), ("2", &long), ("3", "a\\u0000b")] {
        stream.chunk(&job(id, job_type));
        let report = server.request();
        assert!(report.line().contains(&format!("/jobs/{id}/failure")), "{}", report.line());
        assert!(
            report.body.contains(r#""error_type":"SpawnError""#)
                && report.body.contains("handle.sh could not be started")
        );
        report.answer("204 No Content", "");
    }
    stream.chunk(&job("4", "t"));
    let report = server.request();
    assert!(report.line().contains("/jobs/success"), "{}", report.line());
    report.answer("204 No Content", "");
    assert!(!daemon.stop().has("handler cannot be started, its jobs are slowed down"));
}

#[test]
fn a_low_soft_limit_of_open_files_is_raised() {
    let server = Server::start();
    let ids = server.enqueue_all(jobs(40));
    let running = Daemon::of(&server).threads(40).sh(UNTIL_GO).after("ulimit -S -n 64").start();
    running.wait_for_lines(40, "started");
    running.go();
    ids.iter().for_each(|id| server.wait_until_done(id));
    let finished = running.stop();
    assert!(!finished.has("job failed"));
    assert!(!finished.log.iter().any(|line| line.contains("limit of open files")));
}

#[test]
fn a_handler_has_the_soft_limit_that_the_worker_was_given() {
    let server = Server::start();
    let ids = server.enqueue_all(jobs(2));
    let script = "echo $(ulimit -S -n) $(ulimit -H -n) >> $DIR/limits";
    let running = Daemon::of(&server).threads(40).sh(script).after("ulimit -S -n 64; ulimit -H -n 5000").start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(running.stop().read("limits"), "64 5000\n".repeat(2));
}

#[test]
fn a_low_hard_limit_of_open_files_is_warned_of() {
    let server = Server::start();
    let ids = server.enqueue_all(jobs(60));
    let running = Daemon::of(&server).threads(40).sh("sleep 0.1").after("ulimit -n 64").start();
    let warning = running.wait_for_message("limit of open files is too low for that many jobs at once");
    assert!(warning["message"].as_str().unwrap().contains("ulimit -n, LimitNOFILE="));
    assert_eq!((&warning["level"], &warning["limit"], &warning["needed"]), (&json!("WARN"), &json!(64), &json!(344)));
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert!(!running.stop().has("job failed"));
}

#[test]
fn an_ignored_sigchld_that_was_handed_down_does_no_harm() {
    let server = Server::start();
    let ids = ["0", "3"].map(|code| server.enqueue("q", code, json!(null)));
    // Use Perl, because not every shell can ignore SIGCHLD.
    let ignore = r#"exec perl -e '$SIG{CHLD} = "IGNORE"; exec @ARGV' "$@""#;
    let running = Daemon::of(&server).sh("/bin/true; exit $ZIZQ_JOB_TYPE").after(ignore).start();
    server.wait_until_done(&ids[0]);
    assert_eq!(server.wait_for_error(&ids[1], 1)["message"], "handle.sh exited with status 3");
    assert!(running.stop().event("job completed")["cpu_seconds"].is_number());
}

#[test]
fn a_handler_inherits_no_open_file_of_the_worker() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&server).sh("exec ls -l /proc/self/fd > $DIR/open").after("exec 9</dev/null");
    let running = daemon.start();
    server.wait_until_done(&id);
    let open = running.stop().read("open");
    // The four open files are the three standard streams, and the directory that `ls` lists.
    assert_eq!(open.lines().filter(|line| line.contains("->")).count(), 4, "{open}");
}
