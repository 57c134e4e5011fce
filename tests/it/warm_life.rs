//! The lifetime and number of warm processes, and the reasons for ending them between jobs.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    Daemon, Finished, Server, Warm, assert_none_failed, enqueue_many, eventually, is_alive, replace, wait_until_dead,
    warm_handler,
};

/// Code that records the number of the handler's living processes, including the process that runs the code.
const CROWD: &str = r#"
def lives(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
os.makedirs(DIR + "/alive", exist_ok=True)
open(f"{DIR}/alive/{os.getpid()}", "w").close()
note("crowd", sum(lives(pid) for pid in os.listdir(DIR + "/alive")))
"#;

/// The C source of a warm handler that starts in a millisecond.
const QUICK: &str = r#"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
int main(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, getenv("ZIZQ_SOCKET"), sizeof address.sun_path - 1);
    int server = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(server, (struct sockaddr *)&address, sizeof address)) return 1;
    FILE *jobs = fdopen(server, "r");
    char *line = NULL;
    size_t size = 0;
    while (getline(&line, &size, jobs) > 0) {
        char *id = strstr(line, "\"id\":\"") + 6;
        *strchr(id, '"') = 0;
        dprintf(server, "{\"id\":\"%s\",\"ok\":true}\n", id);
    }
    return 0;
}
"#;

/// Reports whether any process runs this program.
fn is_executed(program: &Path) -> bool {
    let mut processes = fs::read_dir("/proc").unwrap().flatten();
    processes.any(|process| fs::read_link(process.path().join("exe")).is_ok_and(|exe| exe == program))
}

/// Returns the log events of the processes that were ended for this reason.
fn ended(finished: &Finished, reason: &str) -> Vec<Value> {
    finished.all("handler process is ended").into_iter().filter(|event| event["reason"] == reason).collect()
}

fn warnings(finished: &Finished) -> usize {
    let warning = "handler process has reached a limit with its first job: each job has a process of its own";
    finished.all(warning).len()
}

fn alive(warm: &Warm) -> Vec<String> {
    warm.lines("started").into_iter().filter(|pid| is_alive(pid)).collect()
}

#[test]
fn with_max_jobs_of_one_each_job_has_a_process_of_its_own() {
    let warm = Warm::with(CROWD, "max_jobs = 1", |daemon| daemon.threads(2));
    let ids = warm.enqueue_many(20, "");
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.stop();
    let ran = finished.read("ran");
    let mut pids: Vec<&str> = ran.lines().map(|line| line.split_once(' ').unwrap().0).collect();
    pids.sort_unstable();
    pids.dedup();
    assert_eq!(pids.len(), 20);
    assert_eq!((ended(&finished, "max_jobs").len(), warnings(&finished)), (20, 0));
    assert!(finished.read("crowd").lines().all(|crowd| ["1", "2"].contains(&crowd)), "{}", finished.read("crowd"));
}

/// The handler starts quickly, so the worker starts and ends thousands of processes.
#[test]
fn recycling_under_full_load_fails_no_job_and_leaks_nothing() {
    let server = Server::start();
    let daemon = Daemon::of(&server).threads(4);
    let (source, program) = (daemon.file("quick.c", QUICK), daemon.dir().join("quick"));
    assert!(Command::new("cc").arg("-o").args([&program, &source]).status().unwrap().success());
    let settings = "handler = { exec = ['$DIR/quick'], mode = 'warm', max_jobs = 2, idle_timeout = '200ms' }";
    let running = daemon.env("RUST_LOG", "info").handlers(settings).start();
    let run = |count| {
        enqueue_many(&server, count, "").iter().for_each(|id| server.wait_until_done(id));
        eventually("no process", || (!is_executed(&program)).then_some(()));
        running.descriptors()
    };
    let before = run(400);
    let memory = running.resident_kib();
    run(4000);
    eventually("descriptors as before", || (running.descriptors() <= before).then_some(()));
    let grown = running.resident_kib().saturating_sub(memory);
    assert!(grown < 16 * 1024, "{grown} KiB");
    let finished = running.stop();
    let stopped = finished.event("worker stopped");
    assert_eq!((&stopped["succeeded"], &stopped["failed"]), (&json!(4400), &json!(0)));
    let ended = ended(&finished, "max_jobs");
    assert!((2100..=2200).contains(&ended.len()), "{}", ended.len());
    assert!(ended.iter().all(|event| event["jobs"] == 2));
}

#[test]
fn processes_are_recycled_after_up_to_a_quarter_more_jobs() {
    let warm = Warm::with("", "max_jobs = 20", |daemon| daemon.threads(2));
    let ids = warm.enqueue_many(500, "");
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.stop();
    let jobs: Vec<u64> = ended(&finished, "max_jobs").iter().map(|event| event["jobs"].as_u64().unwrap()).collect();
    assert!(jobs.len() >= 18 && jobs.iter().all(|jobs| (20..=25).contains(jobs)), "{jobs:?}");
    assert!(jobs.iter().any(|count| count != &jobs[0]), "no jitter in {jobs:?}");
    assert_none_failed(&finished);
}

#[test]
fn a_process_that_is_too_old_is_ended_when_it_is_idle() {
    let warm = Warm::start("max_age = '1s'");
    let process = warm.succeed("");
    wait_until_dead(&process);
    let busy = warm.succeed("time.sleep(1.5)");
    assert_ne!(busy, process);
    assert_ne!(warm.succeed(""), busy);
    let finished = warm.stop();
    assert!(ended(&finished, "max_age").len() >= 2);
    assert_none_failed(&finished);
    // The first job of the second process took longer than `max_age`, so there is a warning.
    assert_eq!(warnings(&finished), 1);
}

#[test]
fn a_process_that_is_too_large_is_ended_after_its_job() {
    let warm = Warm::start("max_memory = '60MB'");
    let process = warm.succeed("");
    assert_eq!(warm.succeed(""), process);
    let code = "kept = b'x' * 100_000_000";
    assert_eq!(warm.succeed(code), process);
    let second = warm.succeed(code);
    let third = warm.succeed(code);
    assert!(second != process && second != third);
    warm.succeed("");
    let finished = warm.stop();
    let ended = ended(&finished, "max_memory");
    assert_eq!(ended.iter().map(|event| event["jobs"].as_u64().unwrap()).collect::<Vec<_>>(), [3, 1, 1]);
    assert_eq!(warnings(&finished), 1);
}

#[test]
fn idle_processes_are_ended_down_to_min_processes() {
    let warm = Warm::with("", "idle_timeout = '300ms'\nmin_processes = 1", |daemon| daemon.threads(4));
    let ids = warm.enqueue_many(4, "until('go')");
    warm.running.wait_for_lines(4, "ran");
    warm.running.go();
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let left = eventually("one process", || Some(alive(&warm)).filter(|alive| alive.len() == 1));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(1) {
        assert_eq!(alive(&warm), left);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(warm.succeed(""), left[0]);
    let finished = warm.stop();
    assert_eq!(ended(&finished, "idle_timeout").len(), 3);
}

#[test]
fn without_min_processes_all_idle_ones_are_ended() {
    let warm = Warm::start("idle_timeout = '200ms'");
    let process = warm.succeed("");
    wait_until_dead(&process);
    assert_ne!(warm.succeed(""), process);
    warm.stop();
}

#[test]
fn busy_processes_are_not_idle() {
    let warm = Warm::start("idle_timeout = '100ms'");
    warm.succeed("time.sleep(1.5)");
    assert_none_failed(&warm.stop());
}

#[test]
fn a_reload_ends_every_process_and_jobs_flow_on() {
    let warm = Warm::with(CROWD, "max_processes = 3", |daemon| daemon.threads(4));
    let ids = warm.enqueue_many(1200, "time.sleep(0.005)");
    for reload in 1..=3 {
        let before = warm.running.wait_for_lines(3 * reload, "started");
        let completed = warm.running.wait_for_messages(reload * 50, "job completed").len();
        warm.running.signal(Signal::HUP);
        warm.running.wait_for_messages(reload, "configuration reloaded");
        before.iter().for_each(|pid| wait_until_dead(pid));
        warm.running.wait_for_messages(completed + 50, "job completed");
    }
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.stop();
    assert!(!finished.has("job failed") && !finished.has("job interrupted, it goes back to the server"));
    assert_eq!(finished.read("ran").lines().count(), 1200);
    let crowd = finished.read("crowd");
    assert!(crowd.lines().all(|crowd| crowd.parse::<u32>().unwrap() <= 3), "{crowd}");
    assert!(ended(&finished, "reload").len() >= 9);
}

#[test]
fn a_reload_brings_new_code_and_waits_for_the_job() {
    let warm = Warm::with("", "", |daemon| daemon.threads(2));
    let idle = warm.succeed("");
    let busy = warm.enqueue("until('go')");
    warm.running.wait_for_lines(2, "ran");
    let second = warm.succeed("");
    assert_ne!(second, idle);
    replace(warm.running.dir(), "handle.py", &warm_handler("version = 2"));
    warm.running.signal(Signal::HUP);
    wait_until_dead(&second);
    warm.succeed("note('version', version)");
    warm.running.go();
    warm.server.wait_until_done(&busy);
    wait_until_dead(&idle);
    warm.succeed("note('version', version)");
    assert_eq!(warm.stop().read("version"), "2\n2\n");
}

#[test]
fn jobs_wait_while_all_processes_are_busy() {
    let warm = Warm::with(CROWD, "max_processes = 2", |daemon| daemon.threads(4));
    let ids = warm.enqueue_many(6, "until('go')");
    warm.running.wait_for_messages(4, "job received");
    warm.running.wait_for_lines(2, "ran");
    warm.running.go();
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.stop();
    assert_eq!(finished.read("started").lines().count(), 2);
    assert_eq!(finished.read("ran").lines().count(), 6);
}

#[test]
fn jobs_that_wait_for_a_process_leave_free_loops_to_other_types() {
    let settings = "max_processes = 1\n[handlers.other]\nexec = ['$DIR/handle.sh']\nmode = 'spawn'";
    let warm = Warm::with("", settings, |daemon| {
        daemon.script("handle.sh", "true");
        daemon.threads(3)
    });
    let ids = warm.enqueue_many(2, "until('go')");
    warm.running.wait_for_messages(2, "job received");
    for _ in 0..5 {
        warm.server.wait_until_done(&warm.server.enqueue("q", "other", json!(null)));
    }
    warm.running.go();
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    assert_eq!(warm.stop().read("started").lines().count(), 1);
}

#[test]
fn children_of_a_job_die_with_their_process_and_not_before() {
    let warm = Warm::start("");
    let process = warm.succeed("leave_child()");
    let child = warm.lines("children").remove(0);
    assert_eq!(warm.succeed(""), process);
    assert!(is_alive(&child));
    warm.succeed("reply(last=True)");
    wait_until_dead(&child);
    warm.stop();
}
