//! The worker on a terminal: its changing status line, and the drain when the terminal is closed.

use std::fs;

use rustix::process::Signal;
use serde_json::json;

use crate::support::{Daemon, Running, Server, UNTIL_GO, eventually};

/// The log message after the terminal was closed.
const GONE: &str = "draining: the terminal is gone; finishing what was taken";

/// Starts a worker on a terminal, with one job that runs until the file `go` exists.
fn watched(daemon: Daemon, server: &Server) -> Running {
    server.enqueue("q", "t", json!(null));
    let running = daemon.on_terminal().args(["--url", &server.url]).sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    running
}

/// Waits until the terminal shows this text.
fn wait_for_text(running: &Running, text: &str) {
    eventually(text, || running.screen().contains(text).then_some(()));
}

#[test]
fn a_drain_shows_the_running_jobs_and_the_time_left() {
    let server = Server::start();
    let running = watched(Daemon::bare().args(["--shutdown-deadline", "60s"]), &server);
    assert!(!running.screen().contains("\x1b[K"), "the status line was shown before the drain");
    running.sigint();
    eventually("a time that runs out", || {
        let screen = running.screen();
        let lines = screen.split("\x1b[Kdraining: 1 running, ").skip(1);
        // The last line may be incomplete.
        let left = lines.filter_map(|line| Some(line.split_once("s left; press Ctrl-C again to kill")?.0));
        let left: Vec<u64> = left.map(|seconds| seconds.parse().unwrap()).collect();
        assert!(left.is_sorted_by(|before, after| before >= after) && left.iter().all(|left| *left < 60), "{left:?}");
        (left.first()? > left.last()?).then_some(())
    });
    running.go();
    let screen = running.assert_exit(0).screen;
    let end = screen.rfind("draining: 1 running").unwrap();
    assert!(screen[end..].contains("\r\x1b[K"), "the status line was not removed: {:?}", &screen[end..]);
    let left: Vec<&str> = screen.lines().filter(|line| line.contains("worker stopped")).collect();
    assert_eq!(left.len(), 1, "{screen}");
}

#[test]
fn events_are_written_above_the_line_and_leave_nothing_of_it() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let script = "echo > $DIR/started; until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done; echo printed; sleep 2";
    let daemon = Daemon::bare().on_terminal().env("NO_COLOR", "1").args(["--url", &server.url]);
    let running = daemon.sh(script).start();
    running.wait_for_file("started");
    running.sigint();
    wait_for_text(&running, "draining: 1 running");
    running.go();
    wait_for_text(&running, "line=\"printed\"");
    let screen = running.assert_exit(0).screen;
    let before = &screen[..screen.find("printed").unwrap()];
    let cleared = before.rfind("\r\x1b[K").unwrap();
    assert!(!before[cleared..].contains("draining: 1 running"), "{:?}", &before[cleared..]);
    let after = &screen[screen.find("line=\"printed\"").unwrap()..];
    assert!(after.contains("draining: 1 running"), "the status line was not shown again: {after:?}");
}

#[test]
fn the_line_fits_into_a_narrow_terminal() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let running = Daemon::bare().on_terminal_of(40).args(["--url", &server.url]).sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    running.sigint();
    wait_for_text(&running, "s left; press Ct");
    running.go();
    assert!(!running.assert_exit(0).screen.contains("press Ctrl-C again"));
}

#[test]
fn a_second_ctrl_c_explains_the_third() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let running = Daemon::bare()
        .on_terminal()
        .args(["--url", &server.url])
        .handler("trap '' TERM; echo > $DIR/started; sleep 600 & wait; wait", "kill_grace = '60s'")
        .start();
    running.wait_for_file("started");
    running.sigint();
    wait_for_text(&running, "press Ctrl-C again to kill");
    running.sigint();
    wait_for_text(&running, "killing: 1 running; press Ctrl-C again to skip their grace");
    running.sigint();
    running.assert_exit(1);
}

#[test]
fn only_a_log_on_the_terminal_has_a_live_line() {
    for daemon in [Daemon::bare().on_terminal().args(["--log-format", "json"]), Daemon::bare()] {
        let server = Server::start();
        server.enqueue("q", "t", json!(null));
        let running = daemon.args(["--url", &server.url]).sh(UNTIL_GO).start();
        running.wait_for_lines(1, "started");
        running.sigint();
        eventually("the stop", || running.log().iter().any(|line| line.contains("shutting down")).then_some(()));
        running.go();
        let finished = running.assert_exit(0);
        let all = finished.screen + &finished.log.join("\n");
        assert!(!all.contains("\x1b[K") && !all.contains("press Ctrl-C"), "{all}");
    }
}

#[test]
fn no_color_keeps_colours_off_a_terminal() {
    let server = Server::start();
    for (value, coloured) in [("1", false), ("", true)] {
        let running = Daemon::bare().on_terminal().env("NO_COLOR", value);
        let running = running.args(["--url", &server.url, "--exit-when-idle", "10ms", "--", "true"]);
        let screen = running.run().assert_exit(0).screen;
        assert_eq!(screen.contains("\x1b[3"), coloured, "{screen:?}");
    }
}

#[test]
fn a_worker_drains_when_its_terminal_is_closed() {
    let server = Server::start();
    let ids = server.enqueue_all([1, 2].map(|number| json!({"queue": "q", "type": "t", "payload": number})));
    let script = format!("{UNTIL_GO}; seq 20000");
    let daemon = Daemon::bare().on_controlling_terminal().args(["--url", &server.url, "--prefetch", "1"]);
    let mut running = daemon.sh(&script).start();
    running.wait_for_lines(1, "started");
    wait_for_text(&running, "connected, listening for jobs");
    running.hang_up();
    running.go();
    running.assert_exit(0);
    server.wait_until_done(&ids[0]);
    assert_eq!(server.job(&ids[1]).unwrap()["status"], "ready", "the job was taken after the terminal was closed");
}

#[test]
fn a_worker_whose_log_is_elsewhere_drains_too() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let mut running = Daemon::of(&server).in_session_of([]).config("").sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    running.hang_up();
    running.wait_for_message(GONE);
    running.go();
    let stopped = running.assert_exit(0).event("worker stopped");
    assert_eq!((&stopped["reason"], &stopped["succeeded"]), (&json!("the terminal is gone"), &json!(1)));
}

/// When the shell dies, the kernel sends SIGHUP to the worker before it closes the terminal.
#[test]
fn a_worker_drains_when_its_shell_is_killed() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let daemon = Daemon::of(&server).in_session_of(["sh", "-c", "\"$@\" & wait", "sh"]);
    let running = daemon.sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    running.signal(Signal::KILL);
    running.wait_for_message(GONE);
    running.go();
    let finished = running.finish();
    assert_eq!(finished.event("worker stopped")["succeeded"], 1);
}

/// A shell with job control forwards SIGHUP to the worker. The shell of this test does so twice.
#[test]
fn a_hang_up_that_a_shell_passes_on_drains_and_never_kills() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let shell = "set -m; \"$@\" & trap \"kill -HUP $!; kill -HUP $!\" HUP; wait; wait";
    let mut running = Daemon::of(&server).in_session_of(["bash", "-c", shell, "bash"]).sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    running.hang_up();
    running.wait_for_message(GONE);
    running.go();
    let finished = running.finish();
    assert_eq!(finished.event("worker stopped")["succeeded"], 1);
    assert_eq!(finished.all(GONE).len(), 1);
}

/// Like zsh, and like bash with `huponexit`, the shell of this test sends SIGHUP before the terminal is closed.
#[test]
fn a_worker_drains_when_its_shell_ends_after_sighup() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let shell = "set -m; \"$@\" & until [ -e $DIR/started ]; do sleep 0.01; done; kill -HUP $!
until [ -e $DIR/end ]; do sleep 0.01; done";
    let running = Daemon::of(&server).in_session_of(["bash", "-c", shell, "bash"]).sh(UNTIL_GO).start();
    running.wait_for_message("configuration reloaded");
    assert!(!running.log().iter().any(|line| line.contains(GONE)));
    fs::write(running.dir().join("end"), "").unwrap();
    running.wait_for_message(GONE);
    running.go();
    assert_eq!(running.assert_exit(0).event("worker stopped")["succeeded"], 1);
}

#[test]
fn sighup_reloads_while_the_terminal_is_there() {
    let server = Server::start();
    let running = Daemon::of(&server).in_session_of([]).sh("true").start();
    running.wait_for_message("connected, listening for jobs");
    running.signal(Signal::HUP).wait_for_message("configuration reloaded");
    assert!(!running.stop().has(GONE));
}

#[test]
fn nohup_keeps_a_worker_beyond_its_terminal() {
    let server = Server::start();
    let mut running = Daemon::of(&server).in_session_of(["nohup"]).sh("true").start();
    running.wait_for_message("connected, listening for jobs");
    running.hang_up();
    let id = server.enqueue("q", "t", json!(null));
    server.wait_until_done(&id);
    assert!(!running.log().iter().any(|line| line.contains("configuration reloaded")));
    running.signal(Signal::HUP).wait_for_message("configuration reloaded");
    let finished = running.stop();
    assert!(!finished.has(GONE));
    assert_eq!(finished.all("configuration reloaded").len(), 1);
}
