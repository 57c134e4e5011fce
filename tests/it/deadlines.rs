//! At its start, the worker warns of a handler's time limit that is longer than the shutdown deadline, and names both.

use serde_json::Value;

use crate::support::{Daemon, Server};

/// Returns the warnings that a worker with these handlers logs.
fn warnings(handlers: &str) -> Vec<Value> {
    let server = Server::start();
    let toml = format!("worker.shutdown_deadline = '10s'\n{handlers}");
    let running = Daemon::of(&server).config(&toml).start();
    running.wait_for_message("connected, listening for jobs");
    running.stop().events().into_iter().filter(|event| event["level"] == "WARN").collect()
}

#[test]
fn a_timeout_above_the_shutdown_deadline_is_warned_of() {
    let found = warnings("[handler]\nexec = 'true'\ntimeout = '10s'\n[handlers.\"a b\"]\ntimeout = '11s'");
    let [warning] = &found[..] else { panic!("{found:#?}") };
    assert!(
        warning["message"].as_str().unwrap().starts_with("timeout is longer than the shutdown deadline"),
        "{warning}"
    );
    assert_eq!((&warning["handler"], &warning["timeout"]), (&"handlers.\"a b\"".into(), &"11s".into()));
    assert_eq!(warning["shutdown_deadline"], "10s");
}

#[test]
fn a_kill_grace_above_the_shutdown_deadline_is_warned_of() {
    let found = warnings("[handler]\nexec = 'true'\nkill_grace = '1m'");
    let [warning] = &found[..] else { panic!("{found:#?}") };
    assert!(warning["message"].as_str().unwrap().starts_with("kill_grace is longer than the shutdown deadline"));
    assert_eq!((&warning["handler"], &warning["kill_grace"]), (&"handler".into(), &"1m".into()));
}

#[test]
fn deadlines_that_fit_and_those_that_do_not_exist_are_not() {
    assert_eq!(warnings("[handler]\nexec = 'true'\ntimeout = '10s'\nkill_grace = '10s'"), [] as [Value; 0]);
    assert_eq!(warnings("[handler]\nexec = 'true'"), [] as [Value; 0]);
}
