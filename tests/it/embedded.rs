//! The command line flags `--embedded` and `--jobs`, and `--exit-when-idle` with any server.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::Path;

use serde_json::json;

use crate::support::{Api, Daemon, Finished, Server, unused_address};

/// Returns the absolute path of a file in the project.
fn project(path: &str) -> String {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path).to_str().unwrap().to_owned()
}

/// Returns a daemon that runs the embedded server at `address`, and takes jobs from that server.
fn embedded(address: SocketAddr) -> Daemon {
    Daemon::at(&format!("http://{address}")).args(["--embedded"])
}

fn position(finished: &Finished, message: &str) -> usize {
    let found = finished.events().iter().position(|event| event["message"] == message);
    found.unwrap_or_else(|| panic!("no {message:?} in\n{}", finished.log.join("\n")))
}

#[test]
fn the_readmes_first_command_runs_the_demo_jobs_and_exits_0() {
    let daemon = Daemon::bare().args(["--url", &format!("http://{}", unused_address()), "--embedded"]);
    let settings = fs::read_to_string(project("config/demo.toml")).unwrap();
    let settings = daemon.file("demo.toml", &settings.replace("config/", &project("config/")));
    let daemon = daemon.args(["--jobs", &project("config/demo-jobs.ndjson"), "--config", settings.to_str().unwrap()]);
    let finished = daemon.args(["--exit-when-idle", "1s"]).run().assert_exit(0);
    let log = finished.log.join("\n");
    for expected in [
        "nothing in it outlives this process",
        r#"sending mail: {\"to\":\"ada@example.org\""#,
        "card declined for job",
        "handle.sh exited with status 3: card declined",
        "handle.sh was killed by signal 9 (SIGKILL)",
        "charged 1200 cents to 4242",
        "charged 700 cents to 5454",
        "succeeded=5 failed=2",
    ] {
        assert!(log.contains(expected), "no {expected:?} in\n{log}");
    }
}

#[test]
fn jobs_of_a_file_are_enqueued_in_their_order() {
    let daemon = embedded(unused_address()).args(["--exit-when-idle", "500ms"]).sh("echo $ZIZQ_JOB_TYPE >> $DIR/types");
    let jobs = daemon.file(
        "jobs.ndjson",
        r#"{"queue":"q","type":"second","payload":1}

{"queue":"q","type":"third","payload":{"a":[1,2]}}
{"queue":"q","type":"first","payload":null,"priority":1}"#,
    );
    let finished = daemon.args(["--jobs", jobs.to_str().unwrap()]).run().assert_exit(0);
    assert_eq!(finished.read("types"), "first\nsecond\nthird\n");
    assert_eq!(finished.event("jobs enqueued")["count"], 3);
}

#[test]
fn jobs_can_come_from_stdin() {
    let daemon = embedded(unused_address()).args(["--jobs", "-", "--exit-when-idle", "500ms"]).sh("cat > $DIR/payload");
    let jobs = daemon.file("jobs.ndjson", "{\"queue\":\"q\",\"type\":\"t\",\"payload\":{\"n\":1}}\n");
    let finished = daemon.stdin(File::open(jobs).unwrap()).run().assert_exit(0);
    assert_eq!(finished.read("payload"), r#"{"n":1}"#);
}

#[test]
fn a_line_that_is_no_job_ends_the_process_with_its_number() {
    let daemon = embedded(unused_address()).sh("true");
    let jobs = daemon.file("jobs.ndjson", "{\"queue\":\"q\",\"type\":\"t\",\"payload\":1}\n{\"queue\":\"q\"}\n");
    let finished = daemon.args(["--jobs", jobs.to_str().unwrap()]).run().assert_exit(78);
    let complaint = finished.log.last().unwrap();
    assert!(complaint.contains("jobs.ndjson:2: "), "{complaint}");
}

#[test]
fn an_address_that_is_taken_ends_the_process_and_says_so() {
    let server = Server::start();
    let finished = embedded(server.address()).sh("true").run().assert_exit(1);
    let complaint = finished.log.last().unwrap();
    assert!(complaint.contains("cannot listen on") && complaint.contains("choose another --url"), "{complaint}");
}

#[test]
fn the_embedded_server_serves_others_too() {
    let address = unused_address();
    let daemon = embedded(address).sh("cat > $DIR/payload").start();
    daemon.wait_for_message("connected, listening for jobs");
    let api = Api::new(format!("http://{address}"));
    let id = api.enqueue("q", "t", json!("hello"));
    api.wait_until_done(&id);
    daemon.sigterm();
    assert_eq!(daemon.assert_exit(0).read("payload"), "\"hello\"");
}

#[test]
fn an_idle_worker_of_any_server_exits_0() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let finished = Daemon::of(&server).args(["--exit-when-idle", "500ms"]).sh("true").run().assert_exit(0);
    server.wait_until_done(&id);
    assert!(position(&finished, "job completed") < position(&finished, "no job for that long: draining"));
}

#[test]
fn a_worker_with_a_running_job_is_not_idle() {
    let server = Server::start();
    let ids = server.enqueue_all(vec![json!({"queue": "q", "type": "t", "payload": null}); 2]);
    let finished = Daemon::of(&server).args(["--exit-when-idle", "500ms"]).sh("sleep 1.5").run().assert_exit(0);
    ids.iter().for_each(|id| server.wait_until_done(id));
    let events = finished.events();
    let idle = position(&finished, "no job for that long: draining");
    assert_eq!(events[..idle].iter().filter(|event| event["message"] == "job completed").count(), 2);
}

#[test]
fn a_worker_without_a_connection_is_not_idle() {
    let address = unused_address();
    let daemon = Daemon::at(&format!("http://{address}")).args(["--exit-when-idle", "100ms"]);
    let daemon = daemon.args(["--retry-min-wait", "100ms", "--retry-multiplier", "1"]).sh("true").start();
    // After six failed attempts to connect, the worker has been without a job for several times the idle limit.
    daemon.wait_for_messages(6, "server unreachable, reconnecting");
    let _server = Server::at(address);
    let finished = daemon.assert_exit(0);
    assert!(
        position(&finished, "connected, listening for jobs") < position(&finished, "no job for that long: draining")
    );
}
