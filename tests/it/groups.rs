//! The termination of a job's process group, and of processes that have left the group.

use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::support::{Daemon, Finished, Running, Server, UNTIL_GO, eventually, is_alive, jobs};

/// A time limit far above the duration of an immediate stop, and far below the timeouts that the stop must not wait for.
const AT_ONCE: Duration = Duration::from_secs(15);

/// A script whose three processes survive SIGTERM. It records their pids, and each SIGTERM that the first process receives.
const STUBBORN: &str = "trap 'echo heard >> $DIR/heard' TERM
sh -c 'trap \"\" TERM; sh -c \"echo \\$\\$ >> $DIR/pids; while :; do sleep 0.05; done\" & echo $$ >> $DIR/pids; while :; do sleep 0.05; done' &
echo started >&2
echo $$ >> $DIR/pids
while :; do sleep 0.05; done";

/// Runs one job that fails, and stops the worker. Returns the reported error and the stopped worker.
fn fail(script: &str, settings: &str) -> (Value, Finished) {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).handler(script, settings).start();
    let error = server.wait_for_error(&id, 1);
    (error, running.stop())
}

/// Runs one job that succeeds, and stops the worker.
fn succeed(script: &str, settings: &str) -> Finished {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).handler(script, settings).start();
    server.wait_until_done(&id);
    running.stop()
}

fn seconds(event: &Value) -> f64 {
    event["seconds"].as_f64().unwrap()
}

#[track_caller]
fn assert_dead(pids: &str) {
    let alive: Vec<&str> = pids.lines().filter(|pid| is_alive(pid)).collect();
    assert!(alive.is_empty() && !pids.is_empty(), "{alive:?} of {pids:?} are alive");
}

fn kill(pid: &str) {
    kill_process(Pid::from_raw(pid.trim().parse().unwrap()).unwrap(), Signal::KILL).unwrap();
}

#[test]
fn a_timeout_is_a_failure_with_the_handlers_output() {
    let (error, finished) = fail("echo halfway >&2; exec sleep 1000", "timeout = '1s'\nkill_grace = '10m'");
    assert_eq!(error["error_type"], "Timeout");
    assert_eq!(error["message"], "handle.sh was stopped after its timeout of 1s: halfway");
    assert_eq!(error["backtrace"], "halfway\n");
    let took = seconds(&finished.event("job failed"));
    assert!((1.0..10.0).contains(&took), "{took}");
}

#[test]
fn a_job_that_exits_0_after_its_timeout_has_failed() {
    let script = "trap 'echo bye >&2; exit 0' TERM; while :; do sleep 0.02; done";
    let (error, _) = fail(script, "timeout = '1s'");
    assert_eq!(error["error_type"], "Timeout");
    // Before `bye`, the shell may print that its command was terminated.
    assert!(error["backtrace"].as_str().unwrap().ends_with("bye\n"), "{error}");
}

#[test]
fn a_tree_that_ignores_sigterm_is_killed_after_the_grace() {
    let (error, finished) = fail(STUBBORN, "timeout = '1s'\nkill_grace = '500ms'");
    assert_eq!(error["error_type"], "Timeout");
    assert!(error["backtrace"].as_str().unwrap().starts_with("started\n"), "{error}");
    assert_eq!(finished.read("heard"), "heard\n");
    let took = seconds(&finished.event("job failed"));
    assert!((1.5..10.0).contains(&took), "{took}");
    assert_eq!(finished.read("pids").lines().count(), 3);
    assert_dead(&finished.read("pids"));
}

#[test]
fn a_stopped_handler_is_continued_so_that_it_hears_of_its_end() {
    let script = "trap 'echo heard > $DIR/heard; exit 1' TERM; kill -STOP $$; while :; do sleep 0.02; done";
    let (error, finished) = fail(script, "timeout = '1s'\nkill_grace = '10m'");
    assert_eq!(error["error_type"], "Timeout");
    assert_eq!(finished.read("heard"), "heard\n");
}

#[test]
fn a_stopped_handler_that_hears_nothing_is_killed() {
    let (error, finished) = fail(
        "trap '' TERM; echo $$ > $DIR/pid; while :; do kill -STOP $$; done",
        "timeout = '1s'\nkill_grace = '200ms'",
    );
    assert_eq!(error["error_type"], "Timeout");
    assert_dead(&finished.read("pid"));
}

/// The handler's child does not hold the handler's output open, so only the process group shows that the child is alive.
#[test]
fn a_child_that_outlives_its_leader_has_the_whole_grace() {
    for output in ["log", "null", "inherit"] {
        let script = "sh -c 'trap \"sleep 0.3; echo saved > $DIR/saved; exit\" TERM; echo up > $DIR/up; while :; do sleep 0.02; done' > /dev/null 2>&1 &
until [ -e $DIR/up ]; do sleep 0.01; done; wait";
        let (error, finished) = fail(script, &format!("timeout = '1s'\nkill_grace = '10m'\noutput = '{output}'"));
        assert_eq!(error["error_type"], "Timeout");
        assert_eq!(finished.read("saved"), "saved\n", "{output}");
    }
}

/// The kernel keeps only the first 15 bytes of a program's name, and so cuts the last character of the child's name in half. After
/// SIGTERM, the child runs a busy loop instead of `sleep`: the name of a `sleep` process is valid UTF-8, so that process would
/// show that the group is alive.
#[test]
fn a_child_whose_name_is_not_utf8_has_the_grace_too() {
    let script = "cp /bin/sh $DIR/nightly-importü
$DIR/nightly-importü -c 'trap \"while [ \\$((i += 1)) -lt 300000 ]; do :; done; echo saved > $DIR/saved; exit\" TERM
echo up > $DIR/up; while :; do sleep 0.02; done' > /dev/null 2>&1 &
until [ -e $DIR/up ]; do sleep 0.01; done; wait";
    let (error, finished) = fail(script, "timeout = '1s'\nkill_grace = '10m'");
    assert_eq!(error["error_type"], "Timeout");
    assert_eq!(finished.read("saved"), "saved\n");
}

#[test]
fn the_rest_of_the_group_is_killed_when_the_leader_exits() {
    let script = "trap '' TERM; sleep 1000 & echo $! > $DIR/left
setsid sleep 1000 > /dev/null 2>&1 & echo $! > $DIR/detached
until [ $(ps -o sid= -p $(cat $DIR/detached)) = $(cat $DIR/detached) ]; do sleep 0.01; done";
    let finished = succeed(script, "");
    assert_dead(&finished.read("left"));
    assert!(is_alive(&finished.read("detached")));
    kill(&finished.read("detached"));
}

#[test]
fn the_rest_of_the_group_is_killed_even_without_open_pipes() {
    let script =
        "sleep 1000 < /dev/null > /dev/null 2>&1 & echo $! > $DIR/left; exec < /dev/null > /dev/null 2>&1; sleep 0.1";
    assert_dead(&succeed(script, "").read("left"));
}

#[test]
fn a_grandchild_that_holds_the_pipes_delays_nothing() {
    let script = "echo before; (sh -c 'trap \"\" TERM HUP; sleep 1000' & ) ; echo last >&2";
    let finished = succeed(script, "");
    assert!(seconds(&finished.event("job completed")) < 5.0);
    assert_eq!(finished.event("stderr")["line"], "last");
}

/// The beginning of a script. It starts a process that leads a session of its own and keeps the handler's three pipes open.
const DETACHED: &str = "echo before; setsid sleep 1000 <&0 & echo $! > $DIR/detached
until [ $(ps -o sid= -p $(cat $DIR/detached)) = $(cat $DIR/detached) ]; do sleep 0.01; done";

#[test]
fn a_detached_process_with_the_pipes_delays_nothing() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!("x".repeat(1_000_000)));
    let running = Daemon::of(&server).sh(&format!("{DETACHED}; echo last")).start();
    server.wait_until_done(&id);
    let finished = running.stop();
    let lines: Vec<Value> = finished.all("stdout").iter().map(|event| event["line"].clone()).collect();
    assert_eq!(lines, ["before", "last"]);
    assert!(seconds(&finished.event("job completed")) < 5.0);
    assert!(is_alive(&finished.read("detached")));
    kill(&finished.read("detached"));
}

#[test]
fn a_detached_process_with_the_pipes_delays_no_timeout() {
    let (error, finished) = fail(&format!("{DETACHED}; exec sleep 1000"), "timeout = '1s'\nkill_grace = '10m'");
    assert_eq!(error["error_type"], "Timeout");
    assert!(is_alive(&finished.read("detached")));
    kill(&finished.read("detached"));
}

#[test]
fn a_leader_that_has_left_its_group_does_not_escape() {
    let script = "exec perl -e 'my $child = fork; if (!$child) { setpgrp(0, 0); sleep 1000; exit }
open my $pid, q(>), qq($ENV{DIR}/child); print $pid $child; close $pid;
select(undef, undef, undef, 0.01) until setpgrp(0, $child); sleep 1000'";
    let (error, finished) = fail(script, "timeout = '1s'\nkill_grace = '100ms'");
    assert_eq!(error["error_type"], "Timeout");
    // The child leads a group of its own, so the worker has not killed it.
    kill(&finished.read("child"));
}

#[test]
fn a_leader_that_has_left_its_group_has_the_grace_too() {
    let script = "exec perl -e 'my $child = fork; if (!$child) { setpgrp(0, 0); sleep 1000; exit }
$SIG{TERM} = sub { open my $heard, q(>>), qq($ENV{DIR}/heard); print $heard qq(heard\\n); close $heard; kill KILL => $child; exit 1 };
select(undef, undef, undef, 0.01) until setpgrp(0, $child); sleep 1000'";
    let (error, finished) = fail(script, "timeout = '1s'\nkill_grace = '10m'");
    assert_eq!(error["error_type"], "Timeout");
    assert_eq!(finished.read("heard"), "heard\n");
}

/// The log message about processes that survive SIGKILL.
const STILL_THERE: &str = "killed processes of the job are still there";

/// Returns a script that becomes root, and sleeps for `seconds`. The worker has no permission to signal a process of root.
fn as_root(seconds: u32) -> String {
    format!("echo $$ > $DIR/pid; exec $DIR/setpriv --reuid=0 sleep {seconds}")
}

#[test]
fn a_leader_that_cannot_be_stopped_is_logged_and_not_said_to_be() {
    let server = Server::start();
    let daemon = Daemon::of(&server).handler(&as_root(8), "timeout = '500ms'\nkill_grace = '100ms'");
    if !daemon.has_way_to_root() {
        return;
    }
    let id = server.enqueue("q", "t", json!(null));
    let running = daemon.without_rights().start();
    let message = server.wait_for_error(&id, 1)["message"].clone();
    assert_eq!(message, "handle.sh could not be stopped after its timeout of 500ms, because it is another user's");
    let event = running.stop().event(STILL_THERE);
    assert!(event["error"].as_str().unwrap().contains("not permitted"), "{event}");
}

#[test]
fn a_process_of_another_user_is_not_taken_for_gone() {
    let server = Server::start();
    let script =
        "$DIR/setpriv --reuid=0 sleep 8 > /dev/null 2>&1 & until [ $(ps -o comm= -p $!) = sleep ]; do sleep 0.01; done";
    let daemon = Daemon::of(&server).sh(script);
    if !daemon.has_way_to_root() {
        return;
    }
    let id = server.enqueue("q", "t", json!(null));
    let running = daemon.without_rights().start();
    server.wait_until_done(&id);
    assert!(running.stop().has(STILL_THERE));
}

/// Sends two or three signals to stop a worker whose job survives SIGKILL. Returns the time from the last signal to the exit, or
/// `None` if the test cannot start a process as root.
fn kill_with_survivor(signals: usize) -> Option<Duration> {
    let server = Server::start();
    let daemon = Daemon::of(&server).handler(&as_root(200), "kill_grace = '0s'");
    if !daemon.has_way_to_root() {
        return None;
    }
    let id = server.enqueue("q", "t", json!(null));
    let running = daemon.without_rights().start();
    let pid = running.wait_for_file("pid");
    let name = std::path::Path::new("/proc").join(pid.trim()).join("comm");
    eventually("a sleep", || std::fs::read_to_string(&name).unwrap().starts_with("sleep").then_some(()));
    for phase in ["shutting down", "killing: ", "killing running jobs without grace"].into_iter().take(signals) {
        running.sigterm().wait_for_message(phase);
    }
    let killed = Instant::now();
    let finished = running.assert_exit(1);
    let took = killed.elapsed();
    assert!(is_alive(&pid));
    kill(&pid);
    assert!(finished.has(STILL_THERE) && finished.has("process outlives the worker: its job may run twice"));
    assert!(finished.has("job interrupted, it goes back to the server"));
    assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
    Some(took)
}

#[test]
fn a_process_that_survives_sigkill_does_not_block_the_exit() {
    let Some(took) = kill_with_survivor(2) else { return };
    assert!((15.0..30.0).contains(&took.as_secs_f64()), "{took:?}");
}

#[test]
fn a_third_signal_shortens_the_wait_for_a_sigkill_survivor() {
    let Some(took) = kill_with_survivor(3) else { return };
    assert!((5.0..14.0).contains(&took.as_secs_f64()), "{took:?}");
}

/// Starts a worker with `count` running jobs that ignore SIGTERM, and begins a drain. Returns the worker and the pids of the
/// jobs' processes.
fn stubborn(server: &Server, count: usize, kill_grace: &str) -> (Running, Vec<String>) {
    server.enqueue_all(jobs(count));
    let settings = format!("kill_grace = '{kill_grace}'");
    let running = Daemon::of(server).threads(count).handler(STUBBORN, &settings).start();
    let pids = running.wait_for_lines(3 * count, "pids");
    running.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    (running, pids)
}

#[test]
fn a_second_signal_ends_all_groups_before_the_worker_exits() {
    let server = Server::start();
    let (running, pids) = stubborn(&server, 6, "2s");
    let killed = Instant::now();
    running.sigterm();
    let finished = running.assert_exit(1);
    // If the worker ended the jobs one after another, their grace periods would add up to twelve seconds.
    assert!((2.0..10.0).contains(&killed.elapsed().as_secs_f64()), "{:?}", killed.elapsed());
    assert_eq!(finished.read("heard").lines().count(), 6);
    assert_dead(&pids.join("\n"));
    assert_eq!(finished.all("job interrupted, it goes back to the server").len(), 6);
}

#[test]
fn a_third_signal_skips_the_grace() {
    let server = Server::start();
    let (running, pids) = stubborn(&server, 2, "10m");
    running.sigterm().wait_for_lines(2, "heard");
    assert!(pids.iter().all(|pid| is_alive(pid)));
    let forced = Instant::now();
    running.sigterm();
    let finished = running.assert_exit(1);
    assert!(forced.elapsed() < AT_ONCE, "{:?}", forced.elapsed());
    assert_dead(&pids.join("\n"));
    assert!(finished.has("killing running jobs without grace"));
    assert_eq!(server.count("ready"), 2);
}

#[test]
fn a_grace_of_nothing_kills_at_once() {
    let server = Server::start();
    let (running, pids) = stubborn(&server, 1, "0s");
    running.sigterm();
    running.assert_exit(1);
    assert_dead(&pids.join("\n"));
}

#[test]
fn a_third_signal_skips_the_grace_of_a_timeout_too() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).handler(STUBBORN, "timeout = '1s'\nkill_grace = '10m'").start();
    running.wait_for_file("heard");
    for phase in ["shutting down", "killing: ", "killing running jobs without grace"] {
        running.sigterm().wait_for_message(phase);
    }
    assert_dead(&running.assert_exit(1).read("pids"));
}

#[test]
fn the_drain_signal_goes_to_the_leaders_alone() {
    let server = Server::start();
    let ids = server.enqueue_all(jobs(2));
    let script = "trap 'echo $ZIZQ_JOB_ID >> $DIR/saved; kill $child; exit 0' USR1
sh -c 'trap \"echo wrong > $DIR/wrong\" USR1; echo up >> $DIR/up; while :; do sleep 0.02; done' & child=$!
while :; do sleep 0.02; done";
    let running = Daemon::of(&server).threads(2).handler(script, "drain_signal = 'USR1'").start();
    running.wait_for_lines(2, "up");
    let finished = running.stop();
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(finished.read("saved").lines().count(), 2);
    assert_eq!(finished.read("wrong"), "");
}

#[test]
fn death_by_the_drain_signal_is_an_interruption() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).handler("echo up > $DIR/up; exec sleep 1000", "drain_signal = 'SIGUSR1'").start();
    running.wait_for_file("up");
    let finished = running.stop();
    assert!(finished.has("job interrupted, it goes back to the server"));
    assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
    assert_eq!(server.errors(&id), Vec::<Value>::new());
}

#[test]
fn a_handler_started_in_a_drain_gets_no_drain_signal() {
    let server = Server::start();
    let ids = server.enqueue_all(jobs(2));
    let script = format!("trap 'echo told >> $DIR/told' USR1; {UNTIL_GO}");
    let running = Daemon::of(&server).handler(&script, "drain_signal = 'USR1'").start();
    running.wait_for_messages(2, "job received");
    running.wait_for_lines(1, "started");
    running.sigterm().wait_for_lines(1, "told");
    running.go();
    let finished = running.assert_exit(0);
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert_eq!((finished.read("told").as_str(), finished.read("started").lines().count()), ("told\n", 2));
}

#[test]
fn a_result_file_after_the_drain_signal_counts() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let script = r#"trap 'echo "{\"retry_in\":\"1h\",\"message\":\"saved\"}" > $ZIZQ_RESULT_FILE; exit 1' USR1; echo up > $DIR/up; while :; do sleep 0.02; done"#;
    let running = Daemon::of(&server).handler(script, "drain_signal = 'usr1'").start();
    running.wait_for_file("up");
    running.stop();
    assert_eq!(server.errors(&id)[0]["message"], "saved");
}

#[test]
fn without_a_drain_signal_a_drain_tells_handlers_nothing() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).sh(&format!("trap 'echo > $DIR/told' TERM INT HUP USR1; {UNTIL_GO}")).start();
    running.wait_for_lines(1, "started");
    running.sigterm().wait_for_message("shutting down");
    running.go();
    let finished = running.assert_exit(0);
    server.wait_until_done(&id);
    assert_eq!(finished.read("told"), "");
}

fn descriptors(running: &Running) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", running.pid())).unwrap().count()
}

fn children(running: &Running) -> String {
    let pid = running.pid().to_string();
    let shown = std::process::Command::new("ps").args(["-o", "pid=,stat=,args=", "--ppid", &pid]).output().unwrap();
    String::from_utf8(shown.stdout).unwrap()
}

/// The jobs end in six ways: with success, a failure, a signal, a timeout, a leftover process, and unread input.
#[test]
fn no_job_leaves_a_descriptor_or_a_zombie_in_the_worker() {
    let server = Server::start();
    let running = Daemon::of(&server).threads(4).handler(
        "case $ZIZQ_JOB_TYPE in 0) ;; 1) exit 1 ;; 2) kill -KILL $$ ;; 3) exec sleep 1000 ;; 4) sleep 1000 & ;; 5) exec <&- ;; esac",
        "[handlers.3]\ntimeout = '200ms'",
    );
    let running = running.start();
    let round = || {
        let kinds = (0..24).map(
            |n| json!({"queue": "q", "type": (n % 6).to_string(), "payload": "x".repeat(n * 10_000), "retry_limit": 0}),
        );
        let ids = server.enqueue_all(kinds);
        let ended = |id: &String| server.job(id).is_none_or(|job| job["status"] == "dead");
        eventually("all jobs ended", || ids.iter().all(ended).then_some(()));
        eventually("no child is left", || children(&running).is_empty().then_some(()));
        descriptors(&running)
    };
    let after_one = round();
    let after_three = [round(), round()];
    // The number of connections to the server varies, so allow four more descriptors.
    assert!(after_three[1] <= after_one + 4, "{after_one} and then {after_three:?}");
    running.stop();
}
