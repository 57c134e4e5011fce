//! Reports: successes in bulk and without delay, failures one by one, and retries until each report is settled.

use serde_json::{Value, json};

use crate::support::{Call, Daemon, Fault, Proxy, RawServer, Server};

const QUICK: [&str; 4] = ["--retry-min-wait", "10ms", "--retry-max-wait", "50ms"];

/// A script that succeeds only for jobs of type `good`.
const BY_TYPE: &str = "echo $ZIZQ_JOB_ID >> $DIR/started; [ $ZIZQ_JOB_TYPE = good ]";

fn jobs(count: usize, job_type: &str) -> Vec<Value> {
    vec![json!({"queue": "q", "type": job_type, "payload": null}); count]
}

#[test]
fn successes_that_wait_for_a_request_leave_in_one() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let gate = proxy.hold(Call::Successes);
    let _daemon = Daemon::of(&proxy).args(["--prefetch", "10"]).sh(BY_TYPE).start();
    let first = server.enqueue("q", "good", json!(null));
    gate.wait_for(1);
    let ids = server.enqueue_all(jobs(5, "good"));
    // The worker has one loop, which queues each success before it takes the next job. So all five successes are queued once
    // this job has failed.
    let bad = server.enqueue("q", "bad", json!(null));
    server.wait_for_error(&bad, 1);
    gate.release();
    ids.iter().for_each(|id| server.wait_until_done(id));
    let reported: Vec<Vec<String>> = proxy.calls(Call::Successes).iter().map(|call| call.ids()).collect();
    assert_eq!(reported, [vec![first], ids]);
}

#[test]
fn a_single_success_waits_for_no_company() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let _daemon = Daemon::of(&proxy).sh("true").start();
    for count in 1..=3 {
        let id = server.enqueue("q", "good", json!(null));
        server.wait_until_done(&id);
        assert_eq!(proxy.calls(Call::Successes).last().unwrap().ids(), [id]);
        assert_eq!(proxy.calls(Call::Successes).len(), count);
    }
}

#[test]
fn each_failure_is_reported_by_itself() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let _daemon = Daemon::of(&proxy).threads(3).sh("echo no >&2; exit 3").start();
    let ids = server.enqueue_all(jobs(5, "bad"));
    ids.iter().for_each(|id| drop(server.wait_for_error(id, 1)));
    let mut paths: Vec<String> = proxy.calls(Call::Failure).into_iter().map(|call| call.path).collect();
    paths.sort();
    assert_eq!(paths, ids.iter().map(|id| format!("/jobs/{id}/failure")).collect::<Vec<_>>());
    let body: Value = serde_json::from_slice(&proxy.calls(Call::Failure)[0].body).unwrap();
    assert_eq!(
        body,
        json!({"message": "handle.sh exited with status 3: no", "error_type": "ExitStatus", "backtrace": "no\n"})
    );
}

#[test]
fn successes_do_not_wait_behind_failures() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let gate = proxy.hold(Call::Failure);
    let _daemon = Daemon::of(&proxy).args(["--prefetch", "20"]).sh(BY_TYPE).start();
    // Twelve jobs fail. The worker reports at most eight failures at the same time.
    server.enqueue_all(jobs(12, "bad"));
    gate.wait_for(8);
    let good = server.enqueue("q", "good", json!(null));
    server.wait_until_done(&good);
    gate.release();
}

#[test]
fn failures_do_not_wait_behind_successes() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let gate = proxy.hold(Call::Successes);
    let _daemon = Daemon::of(&proxy).args(["--prefetch", "10"]).sh(BY_TYPE).start();
    server.enqueue("q", "good", json!(null));
    gate.wait_for(1);
    let bad = server.enqueue("q", "bad", json!(null));
    server.wait_for_error(&bad, 1);
    gate.release();
}

#[test]
fn reports_that_fail_on_the_way_or_with_5xx_are_sent_again() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    for call in [Call::Successes, Call::Failure] {
        proxy.fault_times(1, call, Fault::Answer(503, "")).fault_times(1, call, Fault::Cut);
        proxy.fault_times(1, call, Fault::Answer(500, r#"{"error":"disk full"}"#));
    }
    let daemon = Daemon::of(&proxy).args(QUICK).sh(BY_TYPE).start();
    let good = server.enqueue("q", "good", json!(null));
    let bad = server.enqueue("q", "bad", json!(null));
    server.wait_until_done(&good);
    server.wait_for_error(&bad, 1);
    daemon.wait_for_messages(4, "report failed, trying again");
    assert_eq!((proxy.calls(Call::Successes).len(), proxy.calls(Call::Failure).len()), (4, 4));
    assert_eq!(server.errors(&bad).len(), 1);
    assert_eq!(daemon.wait_for_lines(2, "started"), [good, bad]);
}

#[test]
fn each_report_has_a_backoff_of_its_own() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let daemon = Daemon::of(&proxy).args(["--retry-min-wait", "20ms", "--retry-multiplier", "5"]).sh(BY_TYPE).start();
    for turn in 1..=2 {
        proxy.fault_times(2, Call::Successes, Fault::Answer(503, ""));
        let id = server.enqueue("q", "good", json!(null));
        server.wait_until_done(&id);
        let waits = daemon.wait_for_messages(2 * turn, "report failed, trying again");
        let [first, second] = [&waits[2 * turn - 2], &waits[2 * turn - 1]].map(wait_millis);
        assert!((20.0..=25.0).contains(&first) && (100.0..=125.0).contains(&second), "{first} {second}");
    }
}

fn wait_millis(event: &Value) -> f64 {
    event["retry_in"].as_str().unwrap().strip_suffix("ms").unwrap().parse().unwrap()
}

#[test]
fn a_report_whose_answer_was_lost_is_sent_again() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(1, Call::Successes, Fault::Swallow).fault_times(1, Call::Failure, Fault::Swallow);
    let daemon = Daemon::of(&proxy).args(QUICK).sh(BY_TYPE).start();
    let good = server.enqueue("q", "good", json!(null));
    let bad = server.enqueue("q", "bad", json!(null));
    let handled = daemon.wait_for_message("success was already handled, or its job was handed out again");
    assert_eq!((&handled["job"]["id"], &handled["level"]), (&json!(good), &json!("DEBUG")));
    let handled = daemon.wait_for_message("failure was already handled, or its job was handed out again");
    assert_eq!((&handled["job"]["id"], &handled["level"]), (&json!(bad), &json!("DEBUG")));
    assert_eq!(server.errors(&bad).len(), 1);
    daemon.sigterm();
    assert!(!daemon.assert_exit(0).has("report dropped"));
}

#[test]
fn only_ids_that_were_not_found_count_as_handled() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let gate = proxy.hold(Call::Successes);
    let daemon = Daemon::of(&proxy).args(["--prefetch", "10"]).sh(BY_TYPE).start();
    server.enqueue("q", "good", json!(null));
    gate.wait_for(1);
    let ids = server.enqueue_all(jobs(3, "good"));
    daemon.wait_for_messages(4, "job completed");
    let (status, _) = server.call("POST", &format!("/jobs/{}/success", ids[1]), None);
    assert_eq!(status, 204);
    gate.release();
    ids.iter().for_each(|id| server.wait_until_done(id));
    daemon.sigterm();
    let handled = daemon.assert_exit(0).all("success was already handled, or its job was handed out again");
    assert_eq!(handled.iter().map(|event| event["job"]["id"].as_str().unwrap()).collect::<Vec<_>>(), [&ids[1]]);
}

#[test]
fn any_other_4xx_is_logged_and_the_report_is_dropped() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    proxy.fault_times(1, Call::Successes, Fault::Answer(400, r#"{"error":"odd ids"}"#));
    proxy.fault_times(1, Call::Failure, Fault::Answer(422, "odd failure"));
    let daemon = Daemon::of(&proxy).args(QUICK).sh(BY_TYPE).start();
    let good = server.enqueue("q", "good", json!(null));
    let bad = server.enqueue("q", "bad", json!(null));
    let dropped = daemon.wait_for_messages(2, "report dropped");
    for (id, said) in [(&good, "odd ids"), (&bad, "odd failure")] {
        let event = dropped.iter().find(|event| event["job"]["id"] == **id).unwrap();
        assert!(event["error"].as_str().unwrap().contains(said), "{event}");
        assert_eq!(event["level"], "ERROR");
    }
    // Both jobs run again after their stream is closed.
    server.wait_until_done(&good);
    server.wait_for_error(&bad, 1);
    assert_eq!((proxy.calls(Call::Successes).len(), proxy.calls(Call::Failure).len()), (2, 2));
    daemon.sigterm();
    daemon.assert_exit(0);
}

/// The server ignores the prefetch and answers no report. The ack queue holds 2 × prefetch outcomes, and the loop holds one more.
#[test]
fn a_full_ack_queue_holds_back_the_loops() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(["--prefetch", "2"]).sh("echo $ZIZQ_JOB_ID >> $DIR/started").start();
    let mut stream = server.take();
    stream.job("1");
    let held = server.request();
    for number in 2..=8 {
        stream.job(&number.to_string());
    }
    // The loop holds the outcome of job 5 and waits for a slot in the ack queue. Jobs 6 and 7 wait in the dispatch queue, and the
    // producer has job 8.
    daemon.wait_for_messages(5, "job completed");
    daemon.wait_for_messages(8, "job received");
    assert_eq!(daemon.wait_for_lines(5, "started"), ["1", "2", "3", "4", "5"]);
    let mut reported = Vec::new();
    let mut next = held;
    loop {
        let body: Value = serde_json::from_str(&next.body).unwrap();
        reported.extend(body["ids"].as_array().unwrap().iter().map(|id| id.as_str().unwrap().to_owned()));
        next.answer("204 No Content", "");
        if reported.len() == 8 {
            break;
        }
        next = server.request();
    }
    assert_eq!(reported, ["1", "2", "3", "4", "5", "6", "7", "8"]);
    daemon.wait_for_lines(8, "started");
}
