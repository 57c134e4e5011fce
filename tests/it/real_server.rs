//! End-to-end cases. For each case there are two tests: one against the embedded server, and an ignored one against a real server.
//! `ZIZQ_URL=http://… cargo test -- --ignored real_server` runs the ignored ones. Each case has a queue of its own, so the real
//! server may have other users.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Api, Daemon, Finished, Running, Server};

/// Defines two tests for each case: one against the embedded server, and an ignored one against a real server at `ZIZQ_URL`.
macro_rules! cases {
    ($($case:ident)*) => {
        mod against_embedded {
            $(#[test] fn $case() { super::$case(&super::Server::start()); })*
        }
        mod real_server {
            $(#[test] #[ignore = "needs a Zizq server at ZIZQ_URL"] fn $case() { super::$case(&super::real_server()); })*
        }
    };
}

cases! {
    a_job_that_exits_0_is_acknowledged
    a_job_that_fails_is_reported_with_its_stderr
    a_job_that_dies_of_a_signal_is_reported_with_its_name
    a_job_that_fails_again_has_one_error_for_each_attempt
    urgent_jobs_come_first_and_equals_in_their_order
    jobs_enqueued_in_bulk_are_all_run_once
    a_drain_finishes_taken_jobs_and_gives_the_rest_back
    a_kill_leaves_the_attempts_unchanged
    a_payload_of_a_megabyte_arrives_unchanged
    a_queue_with_an_odd_name_is_found
}

fn real_server() -> Api {
    Api::new(std::env::var("ZIZQ_URL").expect("ZIZQ_URL names the server").trim_end_matches('/'))
}

/// A queue that no other test uses.
struct Queue<'a> {
    server: &'a Api,
    name: String,
}

impl<'a> Queue<'a> {
    fn new(server: &'a Api) -> Self {
        Self { server, name: format!("zizq-worker-test-{:x}", fastrand::u64(..)) }
    }

    fn job(&self, job_type: &str, payload: Value) -> Value {
        json!({"queue": self.name, "type": job_type, "payload": payload})
    }

    fn enqueue(&self, job_type: &str, payload: Value) -> String {
        self.server.enqueue_with(self.job(job_type, payload))
    }

    fn daemon(&self, script: &str) -> Daemon {
        Daemon::of(self.server).args(["--queues", &self.name]).sh(script)
    }
}

impl Drop for Queue<'_> {
    fn drop(&mut self) {
        // Delete leftover jobs, because they would accumulate on a real server.
        let name = self.name.replace(' ', "%20").replace('/', "%2F").replace('ü', "%C3%BC");
        if !std::thread::panicking() {
            self.server.call("DELETE", &format!("/jobs?queue={name}"), None);
        }
    }
}

fn drained(daemon: Running) -> Finished {
    daemon.sigterm();
    daemon.assert_exit(0)
}

fn a_job_that_exits_0_is_acknowledged(server: &Api) {
    let queue = Queue::new(server);
    let id = queue.enqueue("greet", json!({"name": "Ada"}));
    let daemon = queue.daemon("echo \"$ZIZQ_JOB_ID $ZIZQ_JOB_TYPE $ZIZQ_JOB_ATTEMPTS $(cat)\" > $DIR/seen").start();
    server.wait_until_done(&id);
    assert_eq!(drained(daemon).read("seen"), format!("{id} greet 0 {{\"name\":\"Ada\"}}\n"));
}

fn a_job_that_fails_is_reported_with_its_stderr(server: &Api) {
    let queue = Queue::new(server);
    let id = queue.enqueue("t", json!(null));
    let daemon = queue.daemon("echo one >&2; echo two >&2; exit 7").start();
    let error = server.wait_for_error(&id, 1);
    assert_eq!(error["message"], "handle.sh exited with status 7: two");
    assert_eq!((&error["error_type"], &error["backtrace"]), (&json!("ExitStatus"), &json!("one\ntwo\n")));
    let job = server.wait_for_status(&id, "scheduled");
    assert_eq!(job["attempts"], 1);
    drained(daemon);
}

fn a_job_that_dies_of_a_signal_is_reported_with_its_name(server: &Api) {
    let queue = Queue::new(server);
    let id = queue.enqueue("t", json!(null));
    let daemon = queue.daemon("kill -SEGV $$").start();
    let error = server.wait_for_error(&id, 1);
    assert_eq!(error["message"], "handle.sh was killed by signal 11 (SIGSEGV)");
    assert_eq!(error["error_type"], "Signal");
    drained(daemon);
}

fn a_job_that_fails_again_has_one_error_for_each_attempt(server: &Api) {
    let queue = Queue::new(server);
    let mut job = queue.job("t", json!(null));
    job["backoff"] = json!({"base_ms": 1, "exponent": 0.0, "jitter_ms": 0});
    job["retry_limit"] = json!(1);
    let id = server.enqueue_with(job);
    let daemon = queue.daemon("echo \"attempt $ZIZQ_JOB_ATTEMPTS\" >&2; exit 1").start();
    server.wait_for_status(&id, "dead");
    let messages: Vec<Value> = server.errors(&id).iter().map(|error| error["message"].clone()).collect();
    let expected = [0, 1].map(|attempt| format!("handle.sh exited with status 1: attempt {attempt}"));
    assert_eq!(messages, expected);
    drained(daemon);
}

fn urgent_jobs_come_first_and_equals_in_their_order(server: &Api) {
    let queue = Queue::new(server);
    let ids = server.enqueue_all([500, 3, 70, 3, 0].map(|priority| {
        let mut job = queue.job("t", json!(null));
        job["priority"] = json!(priority);
        job
    }));
    let daemon = queue.daemon("echo $ZIZQ_JOB_ID >> $DIR/order").start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    let order: Vec<&str> = [4, 1, 3, 2, 0].map(|index: usize| ids[index].as_str()).to_vec();
    assert_eq!(drained(daemon).read("order").lines().collect::<Vec<_>>(), order);
}

fn jobs_enqueued_in_bulk_are_all_run_once(server: &Api) {
    let queue = Queue::new(server);
    let ids = server.enqueue_all((0..100).map(|number| queue.job("t", json!(number))));
    let daemon = queue.daemon("echo $ZIZQ_JOB_ID >> $DIR/ids").threads(4).args(["--fibers", "2"]).start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    let finished = drained(daemon);
    let seen = finished.read("ids");
    let mut seen: Vec<&str> = seen.lines().collect();
    seen.sort_unstable();
    assert_eq!(seen, ids);
}

/// A script that runs until the test's directory has a file `go`.
const UNTIL_GO: &str = "echo $ZIZQ_JOB_ID >> $DIR/started; until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done";

fn a_drain_finishes_taken_jobs_and_gives_the_rest_back(server: &Api) {
    let queue = Queue::new(server);
    let ids = server.enqueue_all((0..4).map(|number| queue.job("t", json!(number))));
    let daemon = queue.daemon(UNTIL_GO).args(["--prefetch", "2"]).start();
    daemon.wait_for_lines(1, "started");
    daemon.wait_for_messages(2, "job received");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    fs::write(daemon.dir().join("go"), "").unwrap();
    let finished = daemon.assert_exit(0);
    assert_eq!(finished.read("started").lines().collect::<Vec<_>>(), ids[..2]);
    ids[..2].iter().for_each(|id| server.wait_until_done(id));
    for id in &ids[2..] {
        assert_eq!(server.wait_for_status(id, "ready")["attempts"], 0);
    }
}

fn a_kill_leaves_the_attempts_unchanged(server: &Api) {
    let queue = Queue::new(server);
    let id = queue.enqueue("t", json!(null));
    let daemon = queue.daemon(UNTIL_GO).start();
    daemon.wait_for_lines(1, "started");
    daemon.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    daemon.sigterm();
    daemon.assert_exit(1);
    assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
    assert_eq!(server.errors(&id), Vec::<Value>::new());
    // The next worker gets the job.
    let daemon = queue.daemon("echo $ZIZQ_JOB_ATTEMPTS > $DIR/attempts").start();
    server.wait_until_done(&id);
    assert_eq!(drained(daemon).read("attempts"), "0\n");
}

fn a_payload_of_a_megabyte_arrives_unchanged(server: &Api) {
    let queue = Queue::new(server);
    let text: String = ('a'..='z').chain(['ß', '"', '\\', '\n']).cycle().take(1024 * 1024).collect();
    let id = queue.enqueue("t", json!({ "text": text }));
    let daemon = queue.daemon("cat > $DIR/payload").start();
    server.wait_until_done(&id);
    let payload: Value = serde_json::from_str(&drained(daemon).read("payload")).unwrap();
    assert!(payload == json!({ "text": text }), "the payload has changed");
}

fn a_queue_with_an_odd_name_is_found(server: &Api) {
    let mut queue = Queue::new(server);
    queue.name.push_str(" a/ü");
    let id = queue.enqueue("t", json!(null));
    let daemon = queue.daemon("echo \"$ZIZQ_JOB_QUEUE\" > $DIR/queue").start();
    server.wait_until_done(&id);
    assert_eq!(drained(daemon).read("queue"), format!("{}\n", queue.name));
}
