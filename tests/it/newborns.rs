//! Signals to a child between its start and its exec, while it still uses the worker's memory.

use std::fs;
use std::os::unix::process::ExitStatusExt;

use rustix::process::{Pid, Signal, WaitOptions, kill_process, kill_process_group, waitpid};
use serde_json::json;

use crate::support::{Daemon, Server, eventually, jobs};

fn pid_of(running: &crate::support::Running) -> Pid {
    Pid::from_raw(running.pid().try_into().unwrap()).unwrap()
}

/// A starting job is in the worker's process group until it creates its own, so Ctrl-Z reaches the job as well. The signal must
/// not stop the job, because `fg` continues only the worker's group and not the job's.
#[test]
fn a_terminal_that_stops_the_worker_stops_no_job() {
    let server = Server::start();
    server.enqueue_all(jobs(600));
    let running = Daemon::of(&server).in_a_group_of_its_own().args(["--", "true"]).start();
    let worker = pid_of(&running);
    eventually("all jobs done", || {
        kill_process_group(worker, Signal::TSTP).unwrap();
        waitpid(Some(worker), WaitOptions::UNTRACED).unwrap().unwrap().1.stopped().then_some(())?;
        kill_process_group(worker, Signal::CONT).unwrap();
        (server.count("ready,in_flight") == 0).then_some(())
    });
    running.stop();
}

/// A child has the worker's signal handlers until it resets them, and shares the worker's memory until its exec. A signal handler
/// that ran in the child would therefore deliver the signal to the worker.
#[test]
fn a_signal_to_a_job_at_its_start_spares_the_worker() {
    let server = Server::start();
    server.enqueue_all((0..300).map(|_| json!({"queue": "q", "type": "t", "payload": null, "retry_limit": 0})));
    let running = Daemon::of(&server).args(["--", "true"]).start();
    let children = format!("/proc/{0}/task/{0}/children", running.pid());
    let mut hits = 0;
    eventually("all jobs ended", || {
        for _ in 0..200 {
            let children = fs::read_to_string(&children).unwrap();
            for child in children.split_whitespace().filter_map(|child| Pid::from_raw(child.parse().ok()?)) {
                hits += usize::from(kill_process(child, Signal::TERM).is_ok());
            }
        }
        (server.count("ready,in_flight") == 0).then_some(())
    });
    assert!(hits > 0);
    assert!(!running.log().iter().any(|line| line.contains("draining")));
    let finished = running.stop();
    assert_eq!(finished.status.into_raw(), 0);
}

/// The drain signal here is SIGHUP. Before its exec, a child discards SIGHUP, because a terminal can send this signal to the
/// worker's whole group. So the worker must send the drain signal after the exec.
#[test]
fn a_drain_signal_right_after_a_start_is_not_lost() {
    for _ in 0..20 {
        let server = Server::start();
        let toml = "[handler]\nexec = ['sleep', '600']\ndrain_signal = 'HUP'";
        let running = Daemon::of(&server).config(toml).start();
        let children = format!("/proc/{0}/task/{0}/children", running.pid());
        running.wait_for_message("connected, listening for jobs");
        let id = std::thread::scope(|scope| {
            let enqueuing = scope.spawn(|| server.enqueue("q", "t", json!(null)));
            while fs::read_to_string(&children).unwrap().is_empty() {}
            running.sigterm();
            enqueuing.join().unwrap()
        });
        let finished = running.assert_exit(0);
        assert!(finished.has("job interrupted, it goes back to the server"));
        assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
    }
}
