//! Warm handlers that die, hang, break the protocol or cannot be started. Such a fault fails no job
//! except the one that it hits.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Warm, assert_none_failed, eventually, is_alive, replace, wait_until_dead, warm_handler};

/// Runs three jobs: one that succeeds, one that fails, and another that succeeds. Returns the error of the failed job. Checks that
/// the process is dead before the failure is reported, and that the next job gets another process.
#[track_caller]
fn fail_between(warm: &Warm, code: &str) -> Value {
    let before = warm.succeed("");
    let id = warm.enqueue(code);
    let error = warm.server.wait_for_error(&id, 1);
    assert!(!is_alive(&before), "{code}: {before} is alive");
    assert_eq!(warm.process_of(&id), before, "{code}");
    assert_ne!(warm.succeed(""), before, "{code}");
    error
}

#[test]
fn a_process_that_dies_in_a_job_costs_that_job_an_attempt() {
    let warm = Warm::start("success_exit_codes = [0, 99]\nkill_exit_codes = [100]");
    let error = fail_between(&warm, "os.kill(os.getpid(), signal.SIGKILL)");
    assert_eq!(error["error_type"], "Signal");
    assert!(error["message"].as_str().unwrap().starts_with("handle.py was killed by signal 9 (SIGKILL)"), "{error}");
    let error = fail_between(&warm, "os.write(2, b'no such account\\n'); os._exit(3)");
    assert_eq!(error["error_type"], "ExitStatus");
    assert_eq!(error["message"], "handle.py exited with status 3: no such account");
    assert_eq!(error["backtrace"], "no such account\n");
    // An exit without a reply is a failure whatever the exit status, because a warm handler must reply.
    for (code, dead) in [(99, 0), (100, 1)] {
        assert_eq!(fail_between(&warm, &format!("os._exit({code})"))["error_type"], "ExitStatus");
        assert_eq!(warm.server.count("dead"), dead, "{code}");
    }
    let error = fail_between(&warm, "os._exit(0)");
    assert_eq!(error["error_type"], "NoReply");
    assert_eq!(error["message"], "handle.py exited with status 0 without a reply");
    assert_eq!((warm.server.count("scheduled"), warm.server.count("dead")), (4, 1));
    warm.stop();
}

#[test]
fn an_exception_in_a_job_is_its_failure() {
    let warm = Warm::start("");
    let error = fail_between(&warm, "raise ValueError('no card')");
    assert_eq!(error["message"], "handle.py exited with status 1: ValueError: no card");
    assert!(error["backtrace"].as_str().unwrap().starts_with("Traceback"), "{error}");
    warm.stop();
}

#[test]
fn a_process_that_dies_between_jobs_harms_none() {
    let warm = Warm::start("");
    for _ in 0..10 {
        let process = warm.succeed("");
        warm.running.signal_process(process.parse().unwrap(), Signal::KILL);
        assert_ne!(warm.succeed(""), process);
    }
    let finished = warm.stop();
    assert_none_failed(&finished);
    assert_eq!(finished.read("ran").lines().count(), 20);
}

/// The job is sent to a process that SIGSTOP has stopped, so the job waits unread in the socket.
#[test]
fn a_job_that_its_process_never_read_goes_to_another() {
    let warm = Warm::start("");
    for size in [10, 5_000_000] {
        let process = warm.succeed("");
        let pid = process.parse().unwrap();
        warm.running.signal_process(pid, Signal::STOP);
        let received = warm.running.wait_for_messages(1, "job received").len();
        let id = warm.enqueue(&format!("#{}", "x".repeat(size)));
        warm.running.wait_for_messages(received + 1, "job received");
        warm.running.signal_process(pid, Signal::KILL);
        warm.server.wait_until_done(&id);
        assert_ne!(warm.process_of(&id), process);
    }
    assert_none_failed(&warm.stop());
}

#[test]
fn a_process_that_exits_between_jobs_harms_none() {
    let warm = Warm::start("");
    let process = warm.succeed("reply(); os._exit(1)");
    wait_until_dead(&process);
    assert_ne!(warm.succeed(""), process);
    assert_none_failed(&warm.stop());
}

#[test]
fn a_timeout_ends_the_whole_group() {
    let warm = Warm::start("timeout = '1s'\nkill_grace = '300ms'");
    let error = fail_between(&warm, "leave_child(); time.sleep(1000)");
    assert_eq!(error["error_type"], "Timeout");
    assert_eq!(error["message"], "handle.py was stopped after its timeout of 1s");
    assert!(warm.lines("children").iter().all(|pid| !is_alive(pid)));
    let stubborn = [
        "os.kill(os.getpid(), signal.SIGSTOP)",
        "ignore_term()\nwhile True: time.sleep(1)",
        "ignore_term()\nwhile True: os.kill(os.getpid(), signal.SIGSTOP)",
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(0)); time.sleep(1000)",
        "signal.signal(signal.SIGTERM, lambda *_: (reply(), os._exit(0))); time.sleep(1000)",
    ];
    for code in stubborn {
        assert_eq!(fail_between(&warm, code)["error_type"], "Timeout", "{code}");
    }
    assert_eq!(warm.lines("heard").len(), 2);
    warm.stop();
}

#[test]
fn the_timeout_counts_for_each_job_anew() {
    let warm = Warm::start("timeout = '1s'");
    let process = warm.succeed("");
    for _ in 0..4 {
        assert_eq!(warm.succeed("time.sleep(0.4)"), process);
    }
    warm.stop();
}

/// Pieces of code that send an invalid reply, each with a part of the expected error message.
const NONSENSE: [(&str, &str); 12] = [
    ("send(2 * (json.dumps({'id': job['id'], 'ok': True}) + '\\n'))", "more than one reply"),
    ("send(json.dumps({'id': job['id'], 'ok': True}) + '\\nmore'); time.sleep(1000)", "more than one reply: more"),
    ("reply(id='other')", "replied for another job"),
    ("send('x' * (2 << 20) + '\\n'); time.sleep(1000)", "more than 1048576 bytes"),
    ("send('x' * (2 << 20)); time.sleep(1000)", "more than 1048576 bytes"),
    ("send('hello\\n'); time.sleep(1000)", "its reply is invalid"),
    ("send('\\n'); time.sleep(1000)", "its reply is invalid"),
    ("send('[]\\n')", "its reply is invalid"),
    ("send('{}\\n')", "no id"),
    ("reply(ok=None)", "no ok"),
    ("reply(ok='yes')", "its reply is invalid"),
    ("server.shutdown(socket.SHUT_RDWR); time.sleep(1000)", "closed its connection without a reply"),
];

#[test]
fn nonsense_costs_its_process_and_its_job() {
    let warm = Warm::start("kill_grace = '300ms'");
    for (code, problem) in NONSENSE {
        let error = fail_between(&warm, code);
        assert_eq!(error["error_type"], "ProtocolError", "{code}: {error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.starts_with("handle.py broke the protocol: ") && message.contains(problem), "{code}: {error}");
    }
    warm.stop();
}

#[test]
fn half_a_reply_and_then_death_is_its_death() {
    let warm = Warm::start("");
    let half = "send(json.dumps({'id': job['id'], 'ok': True})[:-1])";
    assert_eq!(fail_between(&warm, &format!("{half}; os._exit(3)"))["error_type"], "ExitStatus");
    assert_eq!(fail_between(&warm, &format!("{half}; os._exit(0)"))["error_type"], "NoReply");
    // The end of the stream does not complete a line.
    assert_eq!(fail_between(&warm, &format!("{half}; send('}}'); os._exit(0)"))["error_type"], "NoReply");
    warm.stop();
}

#[test]
fn a_reply_just_before_death_counts() {
    let warm = Warm::start("");
    for _ in 0..10 {
        let process = warm.succeed("reply(); os.kill(os.getpid(), signal.SIGKILL)");
        wait_until_dead(&process);
    }
    assert_none_failed(&warm.stop());
}

#[test]
fn a_process_that_talks_without_a_job_is_ended() {
    for code in ["reply(); time.sleep(0.1); send('more')", "reply(); server.shutdown(socket.SHUT_RDWR)"] {
        let warm = Warm::start("kill_grace = '300ms'");
        let process = warm.succeed(&format!("{code}; time.sleep(1000)"));
        wait_until_dead(&process);
        assert_ne!(warm.succeed(""), process);
        let finished = warm.stop();
        assert!(!finished.has("job failed"), "{code}");
        assert_eq!(finished.event("handler process is ended")["reason"], "hang-up", "{code}");
    }
}

#[test]
fn a_process_connects_once() {
    let warm = Warm::start("");
    let process = warm.succeed("");
    let code = "try: connect()\nexcept OSError as error: note('refused', type(error).__name__)";
    assert_eq!(warm.succeed(code), process);
    assert_eq!(warm.stop().read("refused").lines().count(), 1);
}

/// The process waits for jobs on the second connection, which the worker does not use.
#[test]
fn a_process_that_connects_twice_costs_no_job() {
    let warm = Warm::before("if is_first(): spare = connect()", "kill_grace = '300ms'");
    warm.succeed("");
    let finished = warm.stop();
    assert_none_failed(&finished);
    assert_eq!(finished.read("started").lines().count(), 2);
}

#[test]
fn the_timeout_holds_for_a_process_that_never_reads() {
    let warm = Warm::before("if is_first(): server = connect(); time.sleep(1000)", "timeout = '2s'");
    let payload = format!("#{}", "x".repeat(10_000_000));
    assert_eq!(warm.fail(&payload)["error_type"], "Timeout");
    warm.succeed(&payload);
    warm.stop();
}

/// Returns code that runs `code` only if the test's directory has no file `good`.
fn bad(code: &str) -> String {
    format!("if not os.path.exists(DIR + '/good'): {code}")
}

/// Asserts that a broken handler fails at most `few` of a thousand jobs, and that the others succeed once the
/// handler is repaired. Returns the first error.
fn burns_at_most(few: u64, before: &str, code: &str, error_type: &str, log: &str) -> Value {
    let warm = Warm::with(before, "", |daemon| daemon.threads(4));
    let ids = warm.enqueue_many(1000, code);
    let failed = warm.running.wait_for_messages(4, "job failed");
    let allowed = Instant::now();
    warm.allow("good");
    eventually("all others done", || (warm.server.count("ready,in_flight") == 0).then_some(()));
    let burnt = warm.server.count("scheduled");
    assert!(burnt <= few, "{burnt} attempts were burnt, recovery took {:?}", allowed.elapsed());
    let errors: Vec<Value> = ids.iter().flat_map(|id| warm.server.errors(id)).collect();
    assert!(errors.iter().all(|error| error["error_type"] == error_type), "{errors:?}");
    let finished = warm.stop();
    assert_eq!(finished.all("job completed").len(), 1000 - errors.len());
    assert_eq!(finished.all(&format!("handler {log}, its jobs are slowed down")).len(), 1);
    assert!(finished.has("handler can be started again"));
    assert!(failed.len() < 10);
    errors[0].clone()
}

#[test]
fn a_handler_that_never_connects_burns_few_attempts() {
    let before = bad("sys.exit('no module named bank')");
    let error = burns_at_most(5, &before, "", "StartError", "cannot be started");
    let message = "handle.py exited with status 1 before it connected to ZIZQ_SOCKET: no module named bank";
    assert_eq!(error["message"], message);
}

#[test]
fn a_crash_loop_burns_few_attempts() {
    let error = burns_at_most(8, "", &bad("os._exit(7)"), "ExitStatus", "ends before it has done a job");
    assert_eq!(error["message"], "handle.py exited with status 7");
}

#[test]
fn a_reload_does_not_interrupt_a_start() {
    let warm = Warm::with("time.sleep(1)", "", |daemon| daemon);
    warm.enqueue_many(1, "");
    for _ in 0..8 {
        std::thread::sleep(Duration::from_millis(250));
        warm.running.signal(Signal::HUP);
    }
    eventually("the job done", || (warm.server.count("ready,in_flight") == 0).then_some(()));
    let finished = warm.stop();
    assert_eq!(finished.all("handler process started").len(), 1);
}

/// Each worker loop starts a process before the first process crashes.
#[test]
fn processes_that_crash_at_once_count_once_for_the_pause() {
    let warm = Warm::with("", "", |daemon| daemon.threads(8));
    warm.enqueue_many(
        100,
        "note('up')\nwhile open(DIR + '/up').read().count('\\n') < 8: time.sleep(0.01)\nos._exit(1)",
    );
    warm.running.wait_for_messages(8, "job failed");
    let begun = Instant::now();
    warm.running.wait_for_messages(10, "job failed");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
}

#[test]
fn a_handler_that_hangs_before_it_connects_is_killed() {
    // The timeout is long enough for a working process to connect on a busy machine.
    let settings = "start_timeout = '4s'\nkill_grace = '10m'";
    let warm = Warm::before(&bad("leave_child(); ignore_term(); time.sleep(1000)"), settings);
    let id = warm.enqueue("");
    let error = warm.server.wait_for_error(&id, 1);
    assert_eq!(error["error_type"], "StartError");
    assert_eq!(error["message"], "handle.py did not connect to ZIZQ_SOCKET within 4s");
    let hung = warm.lines("started").into_iter().chain(warm.lines("children"));
    assert!(hung.into_iter().all(|pid| !is_alive(&pid)));
    warm.allow("good");
    warm.succeed("");
    warm.stop();
}

/// A job fails only if two starts in a row have failed.
#[test]
fn one_start_that_fails_burns_no_attempt() {
    let warm = Warm::before("if is_first(): sys.exit(1)", "");
    warm.succeed("");
    let finished = warm.stop();
    assert_none_failed(&finished);
    assert_eq!(finished.read("started").lines().count(), 2);
}

#[test]
fn a_poison_job_ends_by_its_retry_limit() {
    let warm = Warm::with("", "", |daemon| daemon.threads(2));
    warm.succeed("");
    let backoff = json!({"base_ms": 0, "exponent": 0.0, "jitter_ms": 0});
    let code = "os.kill(os.getpid(), signal.SIGSEGV)";
    let poison = json!({"queue": "q", "type": "t", "payload": code, "retry_limit": 2, "backoff": backoff});
    let id = warm.server.enqueue_with(poison);
    let others = warm.enqueue_many(200, "");
    others.iter().for_each(|id| warm.server.wait_until_done(id));
    warm.server.wait_for_status(&id, "dead");
    assert_eq!(warm.server.errors(&id).len(), 3);
    assert_eq!(warm.stop().all("job failed").len(), 3);
}

#[test]
fn a_file_that_is_broken_for_a_while_under_load_burns_few() {
    let warm = Warm::with("", "max_jobs = 10", |daemon| daemon.threads(4));
    let ids = warm.enqueue_many(1500, "time.sleep(0.002)");
    warm.running.wait_for_messages(100, "job completed");
    let path = warm.running.dir().join("handle.py");
    let good = fs::read_to_string(&path).unwrap();
    replace(warm.running.dir(), "handle.py", &warm_handler("sys.exit('broken')"));
    warm.running.wait_for_message("handler cannot be started");
    replace(warm.running.dir(), "handle.py", &good);
    eventually("all others done", || (warm.server.count("ready,in_flight") == 0).then_some(()));
    let failed: Vec<&String> = ids.iter().filter(|id| warm.server.job(id).is_some()).collect();
    assert!(failed.len() <= 5, "{}", failed.len());
    for id in failed {
        assert_eq!(warm.server.errors(id)[0]["error_type"], "StartError");
    }
    warm.stop();
}

#[test]
fn a_file_that_is_missing_for_a_moment_burns_none() {
    let warm = Warm::start("");
    let process = warm.succeed("");
    let (path, away) = (warm.running.dir().join("handle.py"), warm.running.dir().join("away"));
    fs::rename(&path, &away).unwrap();
    warm.running.signal_process(process.parse().unwrap(), Signal::KILL);
    let id = warm.enqueue("");
    std::thread::sleep(Duration::from_millis(300));
    fs::rename(&away, &path).unwrap();
    warm.server.wait_until_done(&id);
    assert_none_failed(&warm.stop());
}
