//! The worker as process 1 of a container without an init, or as a subreaper. It reaps orphans without losing the exit status of
//! a handler.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::support::{Daemon, Server, eventually, jobs};

/// Counts the zombies among the children of `parent`.
fn zombies_below(parent: u32) -> usize {
    let stats = fs::read_dir("/proc").unwrap().flatten();
    let stats = stats.filter_map(|entry| fs::read_to_string(entry.path().join("stat")).ok());
    let is_zombie = |stat: &String| {
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        fields.next() == Some("Z") && fields.next() == Some(&parent.to_string())
    };
    stats.filter(is_zombie).count()
}

/// Waits for the worker, which is the child of `pid` in a pid namespace. Returns the worker's pid outside that namespace.
fn inside(pid: u32) -> u32 {
    eventually("the worker in its namespace", || {
        let children = fs::read_dir("/proc").unwrap().flatten();
        let is_child = |path: &Path| {
            let stat = fs::read_to_string(path.join("stat")).unwrap_or_default();
            let parent =
                stat.rsplit(')').next().unwrap_or_default().split_whitespace().nth(1).unwrap_or_default().to_owned();
            parent == pid.to_string()
        };
        children
            .map(|entry| entry.path())
            .find(|path| is_child(path))
            .and_then(|path| path.file_name()?.to_str()?.parse().ok())
    })
}

#[test]
fn processes_that_left_their_group_are_reaped() {
    let server = Server::start();
    // Each handler leaves a process in a session of its own. That process ends long after the handler.
    let script = "setsid sh -c 'echo > $DIR/$ZIZQ_JOB_ID; sleep 0.3; echo >> $DIR/left' > /dev/null 2>&1 < /dev/null &\n\
        until [ -e $DIR/$ZIZQ_JOB_ID ]; do sleep 0.01; done; exit $(cat)";
    let running = Daemon::of(&server).threads(8).sh(script).in_pid_namespace().start();
    let statuses = [0, 0, 0, 3];
    let ids: Vec<(String, i32)> = (0..200)
        .map(|number| statuses[number % statuses.len()])
        .map(|status| (server.enqueue("q", "t", json!(status)), status))
        .collect();
    for (id, status) in &ids {
        match status {
            0 => server.wait_until_done(id),
            _ => assert_eq!(server.wait_for_error(id, 1)["message"], "handle.sh exited with status 3"),
        }
    }
    running.wait_for_lines(200, "left");
    let worker = inside(running.pid());
    assert_eq!(
        fs::read_to_string(format!("/proc/{worker}/status"))
            .unwrap()
            .lines()
            .filter(|line| line.starts_with("NSpid:") && line.ends_with("\t1"))
            .count(),
        1
    );
    eventually("no zombie is left", || (zombies_below(worker) == 0).then_some(()));
    running.signal_process(worker, rustix::process::Signal::TERM);
    let finished = running.assert_exit(0);
    let stopped = finished.event("worker stopped");
    assert_eq!((&stopped["succeeded"], &stopped["failed"]), (&json!(150), &json!(50)));
}

#[test]
fn a_subreaper_reaps_processes_that_left_their_group() {
    let server = Server::start();
    let script = "setsid sh -c 'echo > $DIR/$ZIZQ_JOB_ID; sleep 0.2; echo >> $DIR/left' > /dev/null 2>&1 < /dev/null &\n\
        until [ -e $DIR/$ZIZQ_JOB_ID ]; do sleep 0.01; done";
    // A process stays a subreaper after an exec.
    let become_subreaper = format!(
        "exec perl -e 'syscall({}, {}, 1) == 0 or die; exec @ARGV' \"$@\"",
        libc::SYS_prctl,
        libc::PR_SET_CHILD_SUBREAPER
    );
    let ids = server.enqueue_all(jobs(20));
    let running = Daemon::of(&server).threads(4).sh(script).after(&become_subreaper).start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    running.wait_for_lines(20, "left");
    eventually("no zombie is left", || (zombies_below(running.pid()) == 0).then_some(()));
    running.stop();
}

/// A script for process 1 of a pid namespace. It starts the worker, waits only for the worker, and leaves all orphans as zombies.
const LAZY_INIT: &str = "exec perl -e 'my $worker = fork; exec @ARGV if !$worker; waitpid($worker, 0)' \"$@\"";

#[test]
fn leftovers_that_process_1_does_not_reap_cost_a_job_little() {
    let server = Server::start();
    server.enqueue_all(jobs(20));
    let script = "sleep 1000 > /dev/null 2>&1 < /dev/null & exit 0";
    let running = Daemon::of(&server).sh(script).after(LAZY_INIT).in_pid_namespace().start();
    let ended = running.wait_for_messages(20, "job completed");
    let seconds = ended.iter().map(|event| event["seconds"].as_f64().unwrap());
    let least = seconds.fold(f64::INFINITY, f64::min);
    println!("{least} s for a job with a leftover");
    assert!(least < 0.05, "{least} s");
}

#[test]
fn a_worker_that_is_not_process_1_does_not_reap_orphans() {
    let server = Server::start();
    let ids = server.enqueue_all(jobs(4));
    let running = Daemon::of(&server).sh("setsid true & exit 0").start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    eventually("no zombie", || (zombies_below(running.pid()) == 0).then_some(()));
    running.stop();
}
