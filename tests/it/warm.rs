//! Warm handlers at work: one process runs many jobs, and each line of output belongs to the right job.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Daemon, Server, Warm, warm_handler};

#[test]
fn one_process_does_many_jobs_in_their_order() {
    let warm = Warm::start("");
    let ids = warm.enqueue_many(300, "");
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.stop();
    let started = finished.read("started");
    let expected: String = ids.iter().map(|id| format!("{} {id}\n", started.trim())).collect();
    assert_eq!(finished.read("ran"), expected);
    assert_eq!(finished.read("ended"), started);
    assert_eq!(finished.event("worker stopped")["succeeded"], 300);
}

/// The test lasts longer than the interval between checks of idle processes, so that a check occurs during the test.
#[test]
fn the_process_that_was_used_last_is_used_first() {
    let warm = Warm::with("", "", |daemon| daemon.threads(4));
    let ids = warm.enqueue_many(4, "until('go')");
    warm.running.wait_for_lines(4, "ran");
    warm.running.go();
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let (begun, last) = (Instant::now(), warm.succeed(""));
    while begun.elapsed() < Duration::from_millis(2500) {
        assert_eq!(warm.succeed(""), last);
    }
    assert_eq!(warm.stop().read("started").lines().count(), 4);
}

#[test]
fn a_failure_is_told_by_the_reply_and_the_process_goes_on() {
    let warm = Warm::start("");
    let process = warm.succeed("");
    let id = warm
        .enqueue("reply(ok=False, message='bank busy', error_type='BankBusy', backtrace='at the bank', retry_in='5m')");
    let error = warm.server.wait_for_error(&id, 1);
    assert_eq!((&error["message"], &error["error_type"]), (&json!("bank busy"), &json!("BankBusy")));
    assert_eq!(error["backtrace"], "at the bank");
    let job = warm.server.wait_for_status(&id, "scheduled");
    let wait = job["ready_at"].as_i64().unwrap() - error["failed_at"].as_i64().unwrap();
    assert!((wait - 300_000).abs() < 10_000, "{job}");
    assert_eq!(warm.succeed(""), process);
    assert_eq!(warm.stop().read("started").lines().count(), 1);
}

#[test]
fn a_failure_needs_no_more_than_its_id_and_ok() {
    let warm = Warm::start("");
    let error = warm.fail("os.write(2, b'first\\nlast\\n'); reply(ok=False)");
    assert_eq!(error["error_type"], "HandlerError");
    assert_eq!(error["message"], "handle.py replied that the job has failed");
    assert_eq!(error["backtrace"], "first\nlast\n");
    warm.stop();
}

#[test]
fn a_reply_may_say_that_its_job_is_not_tried_again() {
    let warm = Warm::start("");
    let id = warm.enqueue("reply(ok=False, kill=True)");
    warm.server.wait_for_status(&id, "dead");
    warm.stop();
}

#[test]
fn after_its_last_reply_a_process_gets_no_job() {
    let warm = Warm::start("");
    let first = warm.succeed("reply(last=True)");
    assert_ne!(warm.succeed(""), first);
    let finished = warm.stop();
    let ended = finished.event("handler process is ended");
    assert_eq!((&ended["reason"], &ended["jobs"]), (&json!("last"), &json!(1)));
    assert_eq!(finished.read("ended").lines().next(), Some(&*first));
}

#[test]
fn a_job_stays_one_line_for_any_payload() {
    let warm = Warm::start("");
    warm.succeed(
        "# \u{2028}\u{2029}
note('seen', line.count(chr(0x2028).encode()), *(job['payload'].count(chr(end)) for end in (0x2028, 0x2029)))",
    );
    assert_eq!(warm.stop().read("seen"), "0 1 1\n");
}

#[test]
fn a_warm_handler_gets_the_whole_job() {
    let warm = Warm::start("");
    let code = "note('seen', json.dumps({name: job[name] for name in ('type', 'queue', 'priority', 'attempts')}))";
    let job = json!({"queue": "bank", "type": "charge", "priority": 7, "payload": code});
    let id = warm.server.enqueue_with(job);
    warm.server.wait_until_done(&id);
    let seen: Value = serde_json::from_str(&warm.stop().read("seen")).unwrap();
    assert_eq!(seen, json!({"type": "charge", "queue": "bank", "priority": 7, "attempts": 0}));
}

#[test]
fn nothing_of_a_job_is_in_the_process_but_over_its_socket() {
    let warm = Warm::start("");
    let id = warm.enqueue(
        "# s3cr3t
for name in ('environ', 'cmdline'):
    note('seen', open(f'/proc/self/{name}').read().replace(chr(0), ' '))
note('stdin', os.readlink('/proc/self/fd/0'))",
    );
    warm.server.wait_until_done(&id);
    let finished = warm.stop();
    let seen = finished.read("seen");
    assert!(seen.contains("ZIZQ_SOCKET=") && seen.contains("ZIZQ_WORKER_ID="), "{seen}");
    for unwanted in ["s3cr3t", &id, "ZIZQ_JOB_", "ZIZQ_RESULT_FILE"] {
        assert!(!seen.contains(unwanted), "{unwanted} in {seen}");
    }
    assert_eq!(finished.read("stdin"), "/dev/null\n");
}

#[test]
fn some_types_are_warm_and_others_are_spawned() {
    let server = Server::start();
    let daemon = Daemon::of(&server);
    daemon.executable("handle.py", &warm_handler(""));
    daemon.script("handle.sh", "echo ${ZIZQ_SOCKET-none} $ZIZQ_JOB_TYPE >> $DIR/spawned");
    let running = daemon
        .handlers(
            "handler.exec = ['$DIR/handle.sh']
[handlers.one]\nexec = ['$DIR/handle.py']\nmode = 'warm'
[handlers.two]\nexec = ['$DIR/handle.py']\nmode = 'warm'",
        )
        .start();
    for job_type in ["one", "two", "three", "one", "two", "three"] {
        server.wait_until_done(&server.enqueue("q", job_type, json!("")));
    }
    let finished = running.stop();
    assert_eq!(finished.read("spawned"), "none three\nnone three\n");
    let ran = finished.read("ran");
    let pids: Vec<&str> = ran.lines().map(|line| line.split_once(' ').unwrap().0).collect();
    assert!(pids[0] == pids[2] && pids[1] == pids[3] && pids[0] != pids[1], "{ran}");
}

#[test]
fn a_default_mode_holds_for_types_that_name_none() {
    let server = Server::start();
    let daemon = Daemon::of(&server);
    daemon.script("handle.sh", "echo $ZIZQ_JOB_TYPE >> $DIR/spawned");
    let running =
        daemon.warm("", "[handlers.spawned]\nexec = ['$DIR/handle.sh']\nmode = 'spawn'\n[handlers.own]").start();
    for job_type in ["own", "spawned", "any"] {
        server.wait_until_done(&server.enqueue("q", job_type, json!("")));
    }
    let finished = running.stop();
    assert_eq!(finished.read("spawned"), "spawned\n");
    assert_eq!(finished.read("ran").lines().count(), 2);
}

/// The end of a job also ends an incomplete line of its output.
#[test]
fn output_before_a_reply_belongs_to_its_job() {
    let warm = Warm::with("", "", |daemon| daemon.threads(2));
    let code = "text = '{0} begins\\n{0} has no end'.format(job['id']).encode(); os.write(1, text); os.write(2, text)";
    let ids = warm.enqueue_many(100, code);
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.stop();
    for channel in ["stdout", "stderr"] {
        let printed = finished.all(channel);
        assert_eq!(printed.len(), 200, "{channel}");
        for event in printed {
            let (id, text) = event["line"].as_str().unwrap().split_once(' ').unwrap();
            assert_eq!(event["job"]["id"], id, "{event}");
            assert!(["begins", "has no end"].contains(&text), "{event}");
        }
    }
}

#[test]
fn output_is_logged_before_the_end_of_its_job() {
    let warm = Warm::start("");
    let ids = warm.enqueue_many(50, "os.write(1, b'x' * 50_000 + b'\\n' + b'y' * 10_000)");
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let events = warm.stop().events();
    for id in &ids {
        let of_job: Vec<&str> = events
            .iter()
            .filter(|event| event["job"]["id"] == **id)
            .filter_map(|event| event["message"].as_str())
            .filter(|message| ["stdout", "job completed"].contains(message))
            .collect();
        assert_eq!(of_job, ["stdout", "stdout", "job completed"]);
    }
}

#[test]
fn output_between_jobs_belongs_to_the_process() {
    let warm = Warm::start("");
    let process = warm.succeed("reply(); until('go'); os.write(1, b'afterwards\\n')");
    warm.running.wait_for_message("job completed");
    warm.running.go();
    let event = warm.running.wait_for("the line", |event| event["line"] == "afterwards");
    assert_eq!((&event["pid"].to_string(), &event["job"]["id"]), (&process, &Value::Null));
    warm.stop();
}

#[test]
fn a_job_that_prints_without_end_takes_no_memory() {
    let quiet = |daemon: Daemon| daemon.threads(2).env("RUST_LOG", "warn");
    let warm = Warm::with("", "", quiet);
    warm.succeed("");
    let before = warm.running.peak_memory();
    let noisy = warm.enqueue(
        "block = (b'x' * 999 + b'\\n') * 50
for count in range(4_000):
    os.write(1, block)
note('printed')
while not os.path.exists(DIR + '/go'):
    os.write(1, block)",
    );
    warm.running.wait_for_lines(1, "printed");
    let begun = Instant::now();
    for _ in 0..20 {
        warm.succeed("");
    }
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    warm.running.go();
    warm.server.wait_until_done(&noisy);
    let after = warm.running.peak_memory();
    assert!(after < before + 16 * 1024, "{before} KiB before, {after} after");
    warm.stop();
}

#[test]
fn a_large_payload_arrives_whole() {
    let warm = Warm::start("");
    let code = format!("note('seen', len(job['payload']), len(line))\n#{}", "x".repeat(10_000_000));
    warm.succeed(&code);
    warm.succeed(&code);
    let finished = warm.stop();
    assert_eq!(finished.read("started").lines().count(), 1);
    let seen = finished.read("seen");
    assert!(seen.lines().all(|line| line.starts_with(&format!("{} ", code.len()))), "{seen}");
}

#[test]
fn cpu_time_in_the_log_is_that_of_the_job_alone() {
    let warm = Warm::start("");
    warm.succeed("end = time.process_time() + 0.4\nwhile time.process_time() < end: pass");
    warm.succeed("");
    let completed = warm.stop().all("job completed");
    let cpu: Vec<f64> = completed.iter().map(|event| event["cpu_seconds"].as_f64().unwrap()).collect();
    assert!((0.4..5.0).contains(&cpu[0]) && cpu[1] < 0.2, "{cpu:?}");
    assert!(completed[1]["peak_memory_bytes"].as_u64().unwrap() > 1_000_000, "{}", completed[1]);
}
