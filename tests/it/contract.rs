//! The handler's interface: stdin, environment, working directory and exit status.

use serde_json::json;

use crate::support::{Daemon, Finished, RawServer, Server};

/// Starts the daemon that the closure sets up, runs one job that succeeds, and stops the daemon.
fn run(daemon: impl FnOnce(Daemon) -> Daemon) -> Finished {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!({"secret": "s3cr3t"}));
    let running = daemon(Daemon::of(&server)).start();
    server.wait_until_done(&id);
    running.stop()
}

/// Runs one job, and returns the sorted variables that its handler has written to the file `env`.
fn env(daemon: impl FnOnce(Daemon) -> Daemon) -> Vec<String> {
    let finished = run(daemon);
    let mut env: Vec<String> = finished.read("env").split('\0').map(str::to_owned).collect();
    env.pop();
    env.sort();
    env
}

/// Sets a handler that copies its environment from `/proc`, where the variables that the shell adds do not appear. The script
/// does not use `$DIR`, because `settings` may remove that variable.
fn show_env(daemon: Daemon, settings: &str) -> Daemon {
    let path = daemon.dir().join("env");
    daemon.handler(&format!("/bin/cat /proc/$$/environ > {}", path.display()), settings)
}

fn names(env: &[String], prefix: &str) -> Vec<String> {
    let names = env.iter().map(|variable| variable.split_once('=').unwrap().0.to_owned());
    names.filter(|name| name.starts_with(prefix)).collect()
}

#[test]
fn stdin_may_be_the_whole_job_with_unknown_fields() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).handler("cat > $DIR/job; echo >> $DIR/job", "stdin = 'job'").start();
    let job = r#"{ "id":"1","type":"t","queue":"q","priority":1,"payload": {"b":1.50, "a":[ ]},"ready_at":1,"attempts":0,"new":{"x": "\u00e9"} }"#;
    let mut stream = server.take();
    stream.chunk(&format!("{job}\n"));
    assert_eq!(daemon.wait_for_file("job"), format!("{job}\n"));
}

#[test]
fn stdin_may_be_nothing() {
    let finished = run(|daemon| daemon.handler("cat | wc -c > $DIR/count", "stdin = 'none'"));
    assert_eq!(finished.read("count").trim(), "0");
}

const ABOUT_A_JOB: [&str; 8] = [
    "ZIZQ_JOB_ATTEMPTS",
    "ZIZQ_JOB_ID",
    "ZIZQ_JOB_PRIORITY",
    "ZIZQ_JOB_QUEUE",
    "ZIZQ_JOB_READY_AT",
    "ZIZQ_JOB_TYPE",
    "ZIZQ_RESULT_FILE",
    "ZIZQ_WORKER_ID",
];

#[test]
fn the_workers_own_settings_are_not_passed_on() {
    let settings = [
        ("ZIZQ_THREADS", "2"),
        ("ZIZQ_LOG_LEVEL", "debug"),
        ("ZIZQ_RETRY_MIN_WAIT", "2s"),
        ("ZIZQ_JOB_TIMEOUT", "7"),
        ("ZIZQ_TLS_ANYTHING", "key.pem"),
        ("ZIZQ_", "x"),
    ];
    let env = env(|daemon| {
        let daemon = settings.iter().fold(daemon, |daemon, (name, value)| daemon.env(name, value));
        show_env(daemon.env("NOT_ZIZQ_", "stays"), "")
    });
    assert_eq!(names(&env, "ZIZQ"), ABOUT_A_JOB);
    assert!(env.contains(&"NOT_ZIZQ_=stays".to_owned()), "{env:?}");
}

#[test]
fn a_job_is_told_its_retry_limit_and_its_timeout() {
    let server = Server::start();
    let jobs = [
        json!({"queue": "q", "type": "none", "payload": 1}),
        json!({"queue": "q", "type": "both", "payload": 1, "retry_limit": 3}),
    ];
    let ids = server.enqueue_all(jobs);
    let script = "echo $ZIZQ_JOB_TYPE ${ZIZQ_JOB_RETRY_LIMIT-none} ${ZIZQ_JOB_TIMEOUT-none} >> $DIR/seen";
    let running = Daemon::of(&server).handler(script, "[handlers.both]\ntimeout = '1m 30s'").start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(running.stop().read("seen"), "none none none\nboth 3 90\n");
}

#[test]
fn env_adds_and_replaces_but_cannot_set_job_variables() {
    let settings = "env = { NEW = 'a b=$HOME', OLD = 'new', ZIZQ_JOB_TYPE = 'forged', ZIZQ_JOB_TIMEOUT = '9', ZIZQ_TOKEN = 'mine' }";
    let env = env(|daemon| show_env(daemon.env("OLD", "old"), settings));
    for expected in ["NEW=a b=$HOME", "OLD=new", "ZIZQ_JOB_TYPE=t", "ZIZQ_TOKEN=mine"] {
        assert!(env.iter().any(|variable| variable == expected), "{expected}: {env:?}");
    }
    for unexpected in ["OLD=old", "ZIZQ_JOB_TIMEOUT=9"] {
        assert!(!env.iter().any(|variable| variable == unexpected), "{unexpected}: {env:?}");
    }
}

#[test]
fn env_clear_removes_all_but_the_variables_of_pass_env() {
    let nothing = env(|daemon| show_env(daemon.env("A", "a"), "env_clear = true"));
    assert_eq!(names(&nothing, ""), ABOUT_A_JOB);
    let settings = "env_clear = true\npass_env = ['A', 'MISSING']\nenv = { C = 'c' }";
    let some = env(|daemon| show_env(daemon.env("A", "a").env("B", "b"), settings));
    assert_eq!(some[..2], ["A=a", "C=c"]);
    assert_eq!(names(&some[2..], ""), ABOUT_A_JOB);
}

#[test]
fn cwd_is_where_it_runs() {
    assert_eq!(run(|daemon| daemon.handler("pwd > $DIR/pwd", "cwd = '/'")).read("pwd"), "/\n");
}

/// The worker runs the file that it found at its own start, not a file of the same name in the handler's `cwd`.
#[test]
fn a_relative_command_is_found_from_the_workers_directory() {
    let finished = run(|daemon| {
        daemon.script("here.sh", "pwd > $DIR/pwd");
        let dir = daemon.dir().to_owned();
        daemon.current_dir(&dir).config("[handler]\nexec = './here.sh'\ncwd = '/'")
    });
    assert_eq!(finished.read("pwd"), "/\n");
}

#[test]
fn the_payload_is_in_no_argument_and_no_variable() {
    let script = "tr '\\0' '\\n' < /proc/$$/environ > $DIR/seen; tr '\\0' '\\n' < /proc/$$/cmdline >> $DIR/seen; cat > $DIR/stdin";
    for stdin in ["payload", "job"] {
        let finished = run(|daemon| daemon.handler(script, &format!("stdin = '{stdin}'")));
        assert!(finished.read("seen").contains("ZIZQ_JOB_ID"));
        assert!(!finished.read("seen").contains("s3cr3t"));
        assert!(finished.read("stdin").contains("s3cr3t"));
    }
}

#[test]
fn exit_codes_may_mean_success_or_the_jobs_death() {
    let server = Server::start();
    let ids = ["0", "99", "1", "100"].map(|code| server.enqueue("q", code, json!(null)));
    let settings = "success_exit_codes = [0, 99]\nkill_exit_codes = [100]";
    let running = Daemon::of(&server).handler("exit $ZIZQ_JOB_TYPE", settings).start();
    ids[..2].iter().for_each(|id| server.wait_until_done(id));
    assert_eq!(server.wait_for_error(&ids[2], 1)["message"], "handle.sh exited with status 1");
    server.wait_for_status(&ids[2], "scheduled");
    server.wait_for_status(&ids[3], "dead");
    assert_eq!(server.errors(&ids[3])[0]["message"], "handle.sh exited with status 100");
    running.stop();
}

#[test]
fn by_default_only_0_is_a_success_and_nothing_kills() {
    let server = Server::start();
    let ids = ["99", "100", "255"].map(|code| server.enqueue("q", code, json!(null)));
    let running = Daemon::of(&server).sh("exit $ZIZQ_JOB_TYPE").start();
    for id in &ids {
        assert_eq!(server.wait_for_error(id, 1)["error_type"], "ExitStatus");
        server.wait_for_status(id, "scheduled");
    }
    running.stop();
}

#[test]
fn the_log_has_the_resource_usage_of_a_job() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let script = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done
head -c 60000000 /dev/zero | tail -c 60000000 > /dev/null; sleep 0.3";
    let running = Daemon::of(&server).sh(script).start();
    server.wait_until_done(&id);
    let completed = running.stop().event("job completed");
    let number = |name: &str| completed[name].as_f64().unwrap();
    assert!(number("seconds") > 0.3 + number("cpu_seconds") / 4.0, "{completed}");
    assert!((0.01..30.0).contains(&number("cpu_seconds")), "{completed}");
    assert!((60e6..200e6).contains(&number("peak_memory_bytes")), "{completed}");
}

#[test]
fn the_log_has_the_resource_usage_of_a_failed_job() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let running = Daemon::of(&server).sh("exit 1").start();
    server.wait_for_error(&id, 1);
    let failed = running.stop().event("job failed");
    assert!(failed["cpu_seconds"].is_number() && failed["peak_memory_bytes"].as_u64().unwrap() > 100_000, "{failed}");
}
