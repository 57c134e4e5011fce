//! Process starts that hang in `execve`, as on a network file system with a dead server. In these tests, a lease on the handler's
//! file causes the hang.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Instant;

use serde_json::json;

use crate::support::{Admin, Daemon, Lease, Running, Server, UNTIL_GO, eventually};

/// Starts a worker with the handler `hung.sh` for jobs of type `hung`, and another handler for jobs of type `other`.
fn start(server: &Server, settings: &str) -> Running {
    let daemon = Daemon::of(server).threads(4).args(["--admin-listen", "127.0.0.1:0"]);
    write(&daemon.dir().join("hung.sh"));
    let handlers = format!("[handlers.hung]\nexec = '$DIR/hung.sh'\n{settings}\n[handlers.other]\nexec = 'true'");
    let running = daemon.handler("true", &handlers).start();
    running.wait_for_message("connected, listening for jobs");
    running
}

fn write(path: &Path) {
    fs::write(path, "#!/bin/sh\necho $ZIZQ_JOB_ID >> $DIR/ran\n").unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// Runs a job whose handler is first missing, and then hangs in `execve`. Returns the job's id and the lease on the handler.
fn hang_after_a_fault(running: &Running, server: &Server) -> (String, Lease) {
    let (path, aside) = (running.dir().join("hung.sh"), running.dir().join("aside"));
    fs::remove_file(&path).unwrap();
    let id = server.enqueue("q", "hung", json!(null));
    eventually("a job that waits for its handler", || (server.job(&id)?["status"] == "in_flight").then_some(()));
    running.wait_for("the job", |event| event["message"] == "job received" && event["job"]["id"] == id.as_str());
    // During this sleep, the first start and some retries fail.
    std::thread::sleep(std::time::Duration::from_millis(300));
    write(&aside);
    let lease = Lease::on(&aside);
    fs::rename(&aside, &path).unwrap();
    lease.wait_until_awaited();
    (id, lease)
}

#[test]
fn a_retried_start_that_hangs_leaves_the_worker_alive() {
    let server = Server::start();
    let running = start(&server, "");
    let admin = Admin::of(&running);
    let (id, _lease) = hang_after_a_fault(&running, &server);
    let hung = Instant::now();
    server.wait_until_done(&server.enqueue("q", "other", json!(null)));
    assert_eq!(admin.call("GET", "/live").0, 200);
    running.sigterm();
    running.wait_for_message("draining");
    running.sigterm();
    let finished = running.assert_exit(1);
    assert!(hung.elapsed() < Lease::longest(), "{:?}", hung.elapsed());
    assert_eq!(finished.read("ran"), "");
    assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
}

#[test]
fn a_timeout_ends_a_retried_start_that_hangs() {
    let server = Server::start();
    let running = start(&server, "timeout = '1s'");
    let (id, lease) = hang_after_a_fault(&running, &server);
    let hung = Instant::now();
    let error = server.wait_for_error(&id, 1);
    assert!(hung.elapsed() < Lease::longest(), "{:?}", hung.elapsed());
    assert_eq!((&error["error_type"], running.dir().join("ran").exists()), (&json!("Timeout"), false));
    drop(lease);
    running.stop();
}

#[test]
fn a_retried_start_that_hung_runs_its_job_once_for_all_reloads() {
    let server = Server::start();
    let running = start(&server, "");
    let (id, lease) = hang_after_a_fault(&running, &server);
    running.signal(rustix::process::Signal::HUP);
    drop(lease);
    server.wait_until_done(&id);
    assert_eq!(running.wait_for_lines(1, "ran"), [id]);
    let finished = running.stop();
    assert_eq!(finished.read("ran").lines().count(), 1);
    assert!(!finished.has("job failed"));
}

#[test]
fn a_start_that_hangs_holds_no_other_jobs_pipe() {
    let server = Server::start();
    let daemon = Daemon::of(&server).threads(2);
    let hung = daemon.dir().join("hung.sh");
    write(&hung);
    let reads = format!("{UNTIL_GO}; cat > $DIR/read; echo >> $DIR/ended");
    let running = daemon.handler(&reads, "[handlers.hung]\nexec = '$DIR/hung.sh'").start();
    // The payload exceeds the capacity of a pipe, so the worker is still writing to stdin when the other job starts.
    let large = server.enqueue("q", "large", json!("x".repeat(300_000)));
    running.wait_for_lines(1, "started");
    let lease = Lease::on(&hung);
    let id = server.enqueue("q", "hung", json!(null));
    lease.wait_until_awaited();
    let begun = Instant::now();
    running.go();
    server.wait_until_done(&large);
    assert!(begun.elapsed() < Lease::longest() / 2, "{:?}", begun.elapsed());
    assert_eq!(fs::metadata(running.dir().join("read")).unwrap().len(), 300_002);
    assert!(!running.dir().join("ran").exists());
    drop(lease);
    server.wait_until_done(&id);
    running.stop();
}
