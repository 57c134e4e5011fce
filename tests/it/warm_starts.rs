//! Warm handlers whose first process works, while each additional process hangs, dies at once, or cannot be started. No job fails.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, getrlimit, prlimit};
use serde_json::json;

use crate::support::{Admin, Warm, assert_none_failed, eventually, replace, warm_handler};

/// Runs enough jobs for four processes while only the first process works. Asserts that this process runs them all, that
/// `message` is logged, and that the worker is ready.
fn the_first_process_runs_all(warm: &Warm, first: &str, message: &str) {
    let ids = warm.enqueue_many(100, "time.sleep(0.02)");
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    warm.running.wait_for_message(message);
    assert!(ids.iter().all(|id| warm.process_of(id) == first));
    assert_eq!(Admin::of(&warm.running).call("GET", "/ready").0, 200);
}

/// Enqueues jobs until one of them has run in a second process.
fn a_second_process_runs(warm: &Warm) {
    eventually("a second process", || {
        warm.enqueue_many(4, "time.sleep(0.2)");
        (warm.lines("ran").iter().filter_map(|line| line.split(' ').next()).collect::<BTreeSet<_>>().len() > 1)
            .then_some(())
    });
}

fn with_four_loops() -> Warm {
    Warm::with("", "", |daemon| daemon.threads(4).args(["--admin-listen", "127.0.0.1:0"]))
}

#[test]
fn a_broken_file_burns_none_while_a_process_works() {
    let warm = with_four_loops();
    let first = warm.succeed("");
    let path = warm.running.dir().join("handle.py");
    let good = fs::read_to_string(&path).unwrap();
    replace(warm.running.dir(), "handle.py", &warm_handler("sys.exit('broken')"));
    the_first_process_runs_all(&warm, &first, "handler cannot be started, its jobs are slowed down");
    replace(warm.running.dir(), "handle.py", &good);
    a_second_process_runs(&warm);
    assert_none_failed(&warm.stop());
}

#[test]
fn too_few_descriptors_burn_none_while_a_process_works() {
    let warm = with_four_loops();
    let first = warm.succeed("");
    let pid = Pid::from_raw(warm.running.pid().cast_signed());
    // Enough descriptors for a connection to the server, but too few to start a process.
    let few = warm.running.descriptors() as u64 + 3;
    let maximum = getrlimit(Resource::Nofile).maximum;
    let before = prlimit(pid, Resource::Nofile, Rlimit { current: Some(few), maximum }).unwrap();
    let message = "another handler process cannot be started, jobs wait for the present ones";
    the_first_process_runs_all(&warm, &first, message);
    // Two of these jobs, one after the other, take longer than the five seconds that a start waits for descriptors.
    let ids = warm.enqueue_many(4, "time.sleep(3)");
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    prlimit(pid, Resource::Nofile, before).unwrap();
    a_second_process_runs(&warm);
    assert_none_failed(&warm.stop());
}

/// A job that waits for the only process gets that process before any newer job does.
#[test]
fn jobs_that_wait_for_the_only_process_take_turns() {
    let warm = with_four_loops();
    warm.succeed("");
    replace(warm.running.dir(), "handle.py", &warm_handler("sys.exit('broken')"));
    warm.enqueue_many(600, "time.sleep(0.005)").iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.stop();
    assert_none_failed(&finished);
    let completed = finished.all("job completed");
    let waits = completed.iter().filter_map(|line| line["waited_seconds"].as_f64());
    let longest = waits.fold(0.0, f64::max);
    assert!(longest < 1.5, "{longest}");
}

#[test]
fn a_process_that_dies_with_its_first_job_unread_burns_none() {
    let before = "if not is_first():\n    server = connect()\n    sys.exit('no database')";
    let warm = Warm::with(before, "", |daemon| daemon.threads(4));
    warm.succeed("");
    let ids = warm.enqueue_many(150, "time.sleep(0.02)");
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.stop();
    assert_none_failed(&finished);
    assert!(finished.has("handler ends before it has done a job, its jobs are slowed down"));
    assert!(finished.read("started").lines().count() < 30);
}

#[test]
fn no_job_waits_for_a_hanging_start_beside_an_idle_process() {
    let before = "if not is_first(): time.sleep(1000)";
    let warm = Warm::with(before, "start_timeout = '60s'", |daemon| daemon.threads(4));
    warm.succeed("");
    let begun = Instant::now();
    warm.enqueue_many(20, "time.sleep(0.05)").iter().for_each(|id| warm.server.wait_until_done(id));
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    warm.stop();
}

/// The first start fails, and the second one hangs for longer than the test.
#[test]
fn a_reload_ends_the_wait_for_a_start_that_hangs() {
    let warm = Warm::before("if is_first(): sys.exit(1)\ntime.sleep(1000)", "start_timeout = '10m'");
    let id = warm.enqueue("");
    warm.running.wait_for_lines(2, "started");
    let dir = warm.running.dir();
    let config = fs::read_to_string(dir.join("zizq-worker.toml")).unwrap();
    replace(dir, "other.py", &warm_handler(""));
    fs::write(dir.join("zizq-worker.toml"), config.replace("handle.py", "other.py")).unwrap();
    warm.running.signal(Signal::HUP);
    warm.server.wait_until_done(&id);
    assert_none_failed(&warm.stop());
}

#[test]
fn a_process_that_is_slow_to_connect_is_logged() {
    let warm = Warm::before("time.sleep(7)", "start_timeout = '60s'");
    let id = warm.enqueue("");
    let warning = warm.running.wait_for_message("handler process has not connected to ZIZQ_SOCKET yet, its jobs wait");
    assert_eq!((&warning["handler"], &warning["start_timeout"]), (&json!("handle.py"), &json!("1m")));
    assert!(warning["pid"].is_u64(), "{warning}");
    warm.server.wait_until_done(&id);
    let finished = warm.stop();
    assert_none_failed(&finished);
    assert_eq!(finished.all("handler process has not connected to ZIZQ_SOCKET yet, its jobs wait").len(), 1);
}
