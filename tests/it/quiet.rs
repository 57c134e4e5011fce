//! SIGUSR2 pauses a worker. A paused worker finishes its jobs, takes no more, and withholds none from other
//! workers. SIGCONT resumes the worker.

use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Call, Daemon, Proxy, RawServer, Server, UNTIL_GO, eventually, jobs};

#[test]
fn a_quiet_worker_finishes_its_jobs_and_closes_the_stream() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let ids = server.enqueue_all(jobs(2));
    // The second job waits behind the first.
    let running = Daemon::of(&proxy).args(["--prefetch", "2"]).sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    eventually("both in flight", || (server.count("in_flight") == 2).then_some(()));
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    let later = server.enqueue("q", "t", json!(null));
    let take = proxy.calls(Call::Take)[0].connection;
    assert!(!proxy.has_closed(take), "the stream closed over a running job");
    running.go();
    ids.iter().for_each(|id| server.wait_until_done(id));
    proxy.wait_until_closed(take);
    // The job that arrived during the pause is ready for other workers, without a failed attempt.
    let job = server.wait_for_status(&later, "ready");
    assert_eq!(job["attempts"], 0);
    assert_eq!(running.wait_for_lines(2, "started").len(), 2);

    running.signal(Signal::CONT);
    running.wait_for_message("resumed");
    server.wait_until_done(&later);
    assert_eq!(running.stop().read("started").lines().count(), 3);
}

#[test]
fn an_idle_worker_closes_the_stream_when_it_goes_quiet() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let running = Daemon::of(&proxy).sh("true").start();
    running.wait_for_message("connected, listening for jobs");
    let take = proxy.wait_for_calls(Call::Take, 1)[0].connection;
    running.signal(Signal::USR2);
    proxy.wait_until_closed(take);
    let id = server.enqueue("q", "t", json!(null));
    assert_eq!(server.job(&id).unwrap()["status"], "ready");
    assert_eq!(proxy.calls(Call::Take).len(), 1);
    running.signal(Signal::CONT);
    server.wait_until_done(&id);
    running.stop();
}

#[test]
fn jobs_received_in_the_quiet_start_when_it_is_over() {
    let server = Server::start();
    let running = Daemon::of(&server).threads(2).args(["--prefetch", "2"]);
    let running = running.sh(&format!("[ $ZIZQ_JOB_TYPE = quick ] || {{ {UNTIL_GO}; }}")).start();
    let long = server.enqueue("q", "long", json!(null));
    running.wait_for_lines(1, "started");
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    let quick = server.enqueue("q", "quick", json!(null));
    running.wait_for("the job's arrival", |event| {
        event["message"] == "job received" && event["job"]["id"] == quick.as_str()
    });
    assert_eq!(server.job(&quick).unwrap()["status"], "in_flight");
    running.signal(Signal::CONT);
    server.wait_until_done(&quick);
    assert_eq!(server.job(&long).unwrap()["status"], "in_flight", "the long job was released");
    running.go();
    server.wait_until_done(&long);
    running.stop();
}

#[test]
fn a_redelivery_in_the_quiet_keeps_the_stream_of_another_job() {
    let server = RawServer::start();
    let running = Daemon::at(&server.url()).args(["--prefetch", "2"]).sh(UNTIL_GO).start();
    let mut stream = server.take();
    stream.job("running");
    running.wait_for_lines(1, "started");
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    // The second line is the job's next attempt. A server sends such a line when another client has reported a failure of the job.
    stream.attempt("held", 0).attempt("held", 1);
    running.wait_for_messages(3, "job received");
    assert!(stream.is_open(), "the stream was closed over a running job");
    running.signal(Signal::CONT);
    running.wait_for_message("resumed");
    running.go();
    let mut reported = Vec::new();
    while reported.len() < 2 {
        let report = server.request();
        let body: Value = serde_json::from_str(&report.body).unwrap();
        reported.extend(body["ids"].as_array().unwrap().clone());
        report.answer("204 No Content", "");
    }
    assert_eq!(reported, ["running", "held"]);
    assert!(stream.is_open());
    assert_eq!(running.stop().read("started"), "running\nheld\n");
}

#[test]
fn a_quiet_worker_stops_as_any_other() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    let held = server.enqueue("q", "t", json!(null));
    running.wait_for("the job's arrival", |event| {
        event["message"] == "job received" && event["job"]["id"] == held.as_str()
    });
    running.sigterm();
    running.wait_for_message("shutting down");
    running.go();
    let finished = running.assert_exit(0);
    assert_eq!(finished.event("worker stopped")["succeeded"], 1);
    assert_eq!(server.wait_for_status(&held, "ready")["attempts"], 0);
}

#[test]
fn a_worker_may_be_quiet_before_it_is_connected_and_stop_then() {
    let running = Daemon::at("http://127.0.0.1:1").sh("true").start();
    running.wait_for_message("server unreachable, reconnecting");
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    running.sigterm();
    running.assert_exit(0);
}

#[test]
fn a_quiet_worker_is_not_idle() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).args(["--exit-when-idle", "300ms"]).sh(UNTIL_GO).start();
    running.wait_for_lines(1, "started");
    running.signal(Signal::USR2);
    running.wait_for_message("paused");
    running.go();
    running.wait_for_message("stream closed, everything taken over it has been reported");
    // Sleep for three times the idle limit. There is no event to wait for, because the paused worker must not end.
    std::thread::sleep(Duration::from_secs(1));
    running.signal(Signal::CONT);
    running.wait_for_message("resumed");
    let finished = running.assert_exit(0);
    let messages: Vec<Value> = finished.events().iter().map(|event| event["message"].clone()).collect();
    let position = |wanted: &str| messages.iter().position(|message| message == wanted).unwrap();
    assert!(position("no job for that long: draining") > position("resumed: taking jobs"), "{messages:#?}");
}

#[test]
fn sigusr1_logs_the_workers_status() {
    let server = Server::start();
    let id = server.enqueue("mail", "send_email", json!(null));
    let running = Daemon::of(&server).sh(&format!("echo $$ > $DIR/pid; {UNTIL_GO}")).start();
    let pid: u64 = running.wait_for_file("pid").trim().parse().unwrap();
    running.wait_for_lines(1, "started");
    // The handler can write its pid to the file before the worker has recorded the pid.
    eventually("the job's process", || {
        running.signal(Signal::USR1);
        running.log().iter().any(|line| line.contains(&format!("\"pid\":{pid}"))).then_some(())
    });
    let status = running.wait_for_message("status");
    assert_eq!(
        (&status["state"], &status["running"], &status["connected"]),
        (&json!("running"), &json!(1), &json!(true))
    );
    let job = running.wait_for("its line", |event| event["message"] == "job running" && event["pid"] == pid);
    assert_eq!(job["worker"], "0:0");
    assert_eq!(job["job"], json!({"id": id, "type": "send_email", "queue": "mail", "attempt": 1}));
    running.go();
    running.stop();
}
