//! The admin server reports the worker's true state to its clients.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{
    Admin, Daemon, HungFileSystem, PATIENCE, Proxy, Running, Server, UNTIL_GO, eventually, jobs, unused_address,
    warm_handler,
};

const ADMIN: [&str; 2] = ["--admin-listen", "127.0.0.1:0"];

fn start(server: &Server, script: &str) -> (Running, Admin) {
    let running = Daemon::of(server).args(ADMIN).sh(script).start();
    let admin = Admin::of(&running);
    (running, admin)
}

#[test]
fn a_worker_that_works_is_live_and_ready() {
    let server = Server::start();
    let (_running, admin) = start(&server, "true");
    assert_eq!(admin.call("GET", "/live"), (200, json!({"live": true})));
    assert_eq!(admin.wait_until_ready(true), [] as [&str; 0]);
}

#[test]
fn a_worker_is_live_before_it_is_connected_and_then_ready() {
    let address = unused_address();
    let running = Daemon::at(&format!("http://{address}"))
        .args(ADMIN)
        .args(["--retry-min-wait", "50ms", "--retry-max-wait", "50ms"])
        .sh("true")
        .start();
    let admin = Admin::of(&running);
    assert_eq!(admin.wait_until_ready(false), ["not connected to the server"]);
    assert_eq!(admin.call("GET", "/live").0, 200);
    let mut server = Server::at(address);
    admin.wait_until_ready(true);
    server.stop();
    assert_eq!(admin.wait_until_ready(false), ["not connected to the server"]);
}

#[test]
fn a_stream_that_fell_silent_is_not_ready() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let running = Daemon::of(&proxy)
        .args(ADMIN)
        .args(["--stream-idle-timeout", "4s", "--retry-min-wait", "60s", "--retry-max-wait", "60s"])
        .sh("true")
        .start();
    let admin = Admin::of(&running);
    admin.wait_until_ready(true);
    proxy.stall_streams();
    assert_eq!(admin.wait_until_ready(false), ["not connected to the server"]);
}

#[test]
fn a_draining_worker_is_not_ready_and_then_gone() {
    let server = Server::start();
    server.enqueue("q", "t", json!(null));
    let (running, admin) = start(&server, UNTIL_GO);
    running.wait_for_lines(1, "started");
    running.sigterm();
    assert_eq!(admin.wait_until_ready(false), ["draining"]);
    assert_eq!(admin.status()["state"], "draining");
    running.go();
    running.assert_exit(0);
}

#[test]
fn a_broken_handler_makes_the_worker_not_ready() {
    let server = Server::start();
    let (running, admin) = start(&server, "true");
    admin.wait_until_ready(true);
    let (handler, aside) = (running.dir().join("handle.sh"), running.dir().join("aside"));
    std::fs::rename(&handler, &aside).unwrap();
    let id = server.enqueue("q", "t", json!(null));
    server.wait_for_error(&id, 1);
    assert_eq!(admin.wait_until_ready(false), ["handler handle.sh cannot be started"]);
    std::fs::rename(&aside, &handler).unwrap();
    server.enqueue("q", "t", json!(null));
    admin.wait_until_ready(true);
}

/// Collects the paths of all values in a JSON document, such as `loops[].job.id`. A `*` replaces the names of settings, which
/// depend on the configuration.
fn paths(value: &Value, path: &str, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = if path == "settings" { "*" } else { name };
                paths(value, format!("{path}.{name}").trim_start_matches('.'), found);
            }
        }
        Value::Array(values) => values.iter().for_each(|value| paths(value, &format!("{path}[]"), found)),
        _ => drop(found.insert(path.to_owned())),
    }
}

#[test]
fn each_field_of_the_status_is_documented() {
    let server = Server::start();
    let daemon = Daemon::of(&server).threads(4).args(ADMIN);
    daemon.executable("warm.py", &warm_handler(""));
    let (gone, _) = (daemon.script("gone.sh", "true"), daemon.script("slow.sh", UNTIL_GO));
    let running = daemon
        .handlers("[handlers.warm]\nexec = ['$DIR/warm.py']\nmode = 'warm'\n[handlers.gone]\nexec = ['$DIR/gone.sh']\n[handler]\nexec = ['$DIR/slow.sh']")
        .start();
    let admin = Admin::of(&running);
    fs::remove_file(gone).unwrap();
    for job_type in ["warm", "gone", "slow"] {
        server.enqueue("q", job_type, json!(null));
    }
    let status = admin.wait_for_status("one of everything", |status| {
        let is_braked = status["handlers"].as_array().unwrap().iter().any(|handler| !handler["brake"].is_null());
        is_braked && status["unready"][0].is_string() && status["succeeded"] == 1 && status["running"] == 1
    });
    assert_eq!(status["format"], 1);
    let mut found = BTreeSet::new();
    paths(&status, "", &mut found);
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/operations.md")).unwrap();
    let (_, section) = text.split_once("\n### Status\n").unwrap();
    let rows = section
        .lines()
        .skip_while(|line| !line.starts_with("| field"))
        .skip(2)
        .take_while(|line| line.starts_with('|'));
    let fields = rows.flat_map(|row| row.split('|').nth(1).unwrap().split('`').skip(1).step_by(2));
    let documented: BTreeSet<String> = fields.map(str::to_owned).collect();
    let (new, old): (Vec<_>, Vec<_>) =
        (found.difference(&documented).collect(), documented.difference(&found).collect());
    // Each of these fields is `null` or an object. If the field is an object in every element of its array, `paths` finds only the
    // paths below the field, and not the path of the field.
    let of_both = ["handlers[].brake", "loops[].job"];
    assert!(new.is_empty() && old.iter().all(|path| of_both.contains(&path.as_str())), "{new:?} {old:?}\n{status:#}");
    let handlers: Vec<_> = status["handlers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|handler| [&handler["type"], &handler["mode"], &handler["handler"]])
        .collect();
    assert_eq!(
        json!(handlers),
        json!([["gone", "spawn", "gone.sh"], ["warm", "warm", "warm.py"], [null, "spawn", "slow.sh"]])
    );
    let starts: Vec<u64> =
        status["handlers"].as_array().unwrap().iter().filter_map(|handler| handler["starts"].as_u64()).collect();
    assert!(starts[0] >= 2 && starts[1..] == [1, 1], "a start that fails is tried again: {starts:?}");
    let failure = &status["last_failures"][0];
    assert_eq!((&failure["type"], &failure["error_type"]), (&json!("gone"), &json!("SpawnError")));
    assert_eq!(
        status["history"]["failed"].as_array().unwrap().iter().filter_map(Value::as_u64).sum::<u64>(),
        status["failed"].as_u64().unwrap()
    );
    running.go();
}

/// Runs a job whose handler file has been removed, and then calls `replace` with the file's directory. Asserts that the worker
/// stays live, but is not ready.
fn break_handler<T>(replace: impl FnOnce(&Path) -> T) {
    let server = Server::start();
    let daemon = Daemon::of(&server).args(ADMIN);
    let bin = daemon.dir().join("bin");
    fs::create_dir(&bin).unwrap();
    daemon.script("bin/handle.sh", "true");
    let running = daemon.handlers("[handler]\nexec = ['$DIR/bin/handle.sh']").start();
    let admin = Admin::of(&running);
    admin.wait_until_ready(true);
    fs::remove_file(bin.join("handle.sh")).unwrap();
    let id = server.enqueue("q", "t", json!(null));
    server.wait_for_error(&id, 1);
    let replaced = replace(&bin);
    // After the failed start, the worker pauses for one second before it checks the file, so poll for longer than one second.
    let until = Instant::now() + Duration::from_secs(3);
    eventually("the end of the pause", || {
        assert_eq!(admin.wait_until_ready(false), ["handler handle.sh cannot be started"]);
        assert_eq!(admin.call("GET", "/live").0, 200);
        (Instant::now() > until).then_some(())
    });
    let _finished = running.stop();
    drop(replaced);
}

#[test]
fn readiness_waits_for_no_writer_of_a_named_pipe() {
    break_handler(|bin| assert!(Command::new("mkfifo").arg(bin.join("handle.sh")).status().unwrap().success()));
}

#[test]
fn readiness_waits_for_no_file_system() {
    break_handler(HungFileSystem::mount);
}

#[test]
fn the_status_names_the_job_of_each_loop() {
    let server = Server::start();
    let id = server.enqueue("mail", "send_email", json!(null));
    let running = Daemon::of(&server).args(ADMIN).threads(2).args(["--fibers", "2", "--worker-id", "w-1"]);
    let running = running.sh(&format!("echo $$ > $DIR/pid; {UNTIL_GO}")).start();
    let admin = Admin::of(&running);
    let pid: u64 = running.wait_for_file("pid").trim().parse().unwrap();
    // The handler can write its pid to the file before the worker has recorded the pid.
    let status = admin.wait_for_status("a running process", |status| {
        status["loops"].as_array().unwrap().iter().any(|status| status["job"]["pid"] == pid)
    });
    let names: Vec<&Value> = status["loops"].as_array().unwrap().iter().map(|status| &status["name"]).collect();
    assert_eq!(names, ["0:0", "0:1", "1:0", "1:1"]);
    let busy: Vec<&Value> =
        status["loops"].as_array().unwrap().iter().map(|status| &status["job"]).filter(|job| !job.is_null()).collect();
    let [job] = busy[..] else { panic!("{status:#}") };
    let expected = json!({"id": id, "type": "send_email", "queue": "mail", "attempt": 1, "pid": pid});
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&job[name], value, "{name}");
    }
    let ran = job["running_seconds"].as_f64().unwrap();
    assert!(ran > 0.0 && ran < status["uptime_seconds"].as_f64().unwrap(), "{status:#}");
    assert_eq!((&status["version"], &status["worker_id"]), (&json!(env!("CARGO_PKG_VERSION")), &json!("w-1")));
    assert_eq!(
        (&status["state"], &status["connected"], &status["waiting"]),
        (&json!("running"), &json!(true), &json!(0))
    );
    running.go();
    let status = admin.wait_for_status("the job's end", |status| status["succeeded"] == 1);
    assert!(status["loops"].as_array().unwrap().iter().all(|status| status["job"].is_null()), "{status:#}");
}

#[test]
fn the_status_shows_settings_with_origins_but_no_secrets() {
    let server = Server::start();
    let running = Daemon::of(&server)
        .args(ADMIN)
        .env("SECRET_OF_OURS", "hunter1")
        .handlers("[worker]\nthreads = 3\n[handler]\nexec = ['/bin/echo', 'hunter2']\nenv = { PASSWORD = 'hunter3' }")
        .start();
    let status = Admin::of(&running).status();
    let file = running.dir().join("zizq-worker.toml");
    let expected = json!({"value": "3", "source": format!("{}:2", file.display())});
    assert_eq!(status["settings"]["worker.threads"], expected);
    assert_eq!(status["settings"]["url"], json!({"value": server.url, "source": "--url"}));
    assert_eq!(status["settings"]["worker.fibers"], json!({"value": "1", "source": "default"}));
    assert_eq!(status["settings"]["handler.exec"]["value"], "/bin/echo");
    assert!(!status.to_string().contains("hunter"), "{status:#}");
}

#[test]
fn the_metrics_count_by_queue_type_and_outcome() {
    let server = Server::start();
    let running = Daemon::of(&server)
        .args(ADMIN)
        .handlers("[handler]\nexec = ['sh', '-c', 'kill -9 $$']\n[handlers.good]\nexec = ['true']\n[handlers.bad]\nexec = ['sh', '-c', 'exit 3']")
        .start();
    let admin = Admin::of(&running);
    let good = ["mail", "bills"].map(|queue| server.enqueue(queue, "good", json!(null)));
    let bad = server.enqueue("mail", "bad", json!(null));
    let others = ["one", "two"].map(|job_type| server.enqueue("mail", job_type, json!(null)));
    good.iter().for_each(|id| server.wait_until_done(id));
    others.iter().chain([&bad]).for_each(|id| drop(server.wait_for_error(id, 1)));
    for (metric, value) in [
        (r#"jobs_total{outcome="succeeded",queue="mail",type="good"}"#, "1"),
        (r#"jobs_total{outcome="succeeded",queue="bills",type="good"}"#, "1"),
        (r#"jobs_total{outcome="failed",queue="mail",type="bad"}"#, "1"),
        (r#"jobs_total{outcome="failed",queue="mail",type="one"}"#, "1"),
        (r#"jobs_total{outcome="failed",queue="mail",type="two"}"#, "1"),
        (r#"jobs_total{outcome="succeeded",queue="mail",type="bad"}"#, "0"),
        (r#"job_failures_total{kind="ExitStatus",type="bad"}"#, "1"),
        (r#"job_failures_total{kind="Signal",type="one"}"#, "1"),
        (r#"handler_exits_total{code="0",type="good"}"#, "2"),
        (r#"handler_exits_total{code="3",type="bad"}"#, "1"),
        (r#"handler_exits_total{code="signal",type="one"}"#, "1"),
        (r#"handler_seconds_count{type="good"}"#, "2"),
        ("job_wait_seconds_count", "5"),
        ("jobs_running", "0"),
        ("jobs_waiting", "0"),
        ("loops", "1"),
        ("reports_waiting", "0"),
        ("stream_connected", "1"),
        (r#"state{state="running"}"#, "1"),
        (&format!(r#"build_info{{version="{}"}}"#, env!("CARGO_PKG_VERSION")), "1"),
    ] {
        admin.wait_for_metric(metric, value);
    }
    let text = admin.metrics();
    let number = |name: &str| -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(&format!("zizq_worker_{name} "))).unwrap();
        line.parse().unwrap()
    };
    assert!(number(r#"handler_cpu_seconds_total{type="good"}"#) > 0.0);
    assert!(number(r#"handler_peak_memory_bytes{type="good"}"#) > 100_000.0);
    assert!(number("start_time_seconds") > 1.7e9);
}

#[test]
fn each_cause_of_a_failure_is_counted_apart() {
    let server = Server::start();
    let running = Daemon::of(&server).args(ADMIN).handlers(
        "[handlers.slow]\nexec = ['sleep', '1000']\ntimeout = '10ms'\nkill_grace = '10ms'
[handlers.named]\nexec = ['sh', '-c', 'echo \"{\\\"error_type\\\": \\\"BankBusy\\\"}\" > $ZIZQ_RESULT_FILE; exit 1']
[handlers.lazy]\nmode = 'warm'\nexec = ['true']",
    );
    let running = running.start();
    let admin = Admin::of(&running);
    let types = ["slow", "named", "lazy", "unheard-of"];
    types.iter().for_each(|of| drop(server.wait_for_error(&server.enqueue("q", of, json!(null)), 1)));
    for (kind, job_type) in
        [("Timeout", "slow"), ("(other)", "named"), ("StartError", "lazy"), ("UnknownJobType", "unheard-of")]
    {
        admin.wait_for_metric(&format!(r#"job_failures_total{{kind="{kind}",type="{job_type}"}}"#), "1");
    }
    // The histogram of run times does not count a job whose process was never started.
    let text = admin.metrics();
    assert!(text.contains(r#"zizq_worker_handler_seconds_count{type="slow"} 1"#), "{text}");
    assert!(text.contains(r#"zizq_worker_handler_seconds_count{type="unheard-of"} 0"#), "{text}");
}

#[test]
fn the_series_of_configured_types_begin_with_0() {
    let server = Server::start();
    let running = Daemon::of(&server)
        .args(ADMIN)
        .handlers("[worker]\nqueues = ['mail', 'bills']\n[handlers.send]\nexec = ['true']\n[handlers.warm]\nmode = 'warm'\nexec = ['true']")
        .start();
    let text = Admin::of(&running).metrics();
    for line in [
        r#"jobs_total{outcome="failed",queue="mail",type="send"}"#,
        r#"jobs_total{outcome="succeeded",queue="bills",type="warm"}"#,
        r#"job_failures_total{kind="ExitStatus",type="send"}"#,
        r#"job_failures_total{kind="Signal",type="send"}"#,
        r#"job_failures_total{kind="Timeout",type="send"}"#,
        r#"job_failures_total{kind="SpawnError",type="send"}"#,
        r#"job_failures_total{kind="(other)",type="send"}"#,
        r#"job_failures_total{kind="ProtocolError",type="warm"}"#,
        r#"job_failures_total{kind="MalformedJob",type="(other)"}"#,
        r#"handler_seconds_count{type="send"}"#,
        r#"oldest_running_job_seconds{type="send"}"#,
    ] {
        let line = format!("zizq_worker_{line} 0");
        assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    }
}

#[test]
fn the_oldest_running_job_of_a_type_has_an_age() {
    let server = Server::start();
    server.enqueue("q", "slow", json!(null));
    let (running, admin) = start(&server, UNTIL_GO);
    running.wait_for_lines(1, "started");
    let age = || -> f64 {
        let text = admin.metrics();
        let name = r#"zizq_worker_oldest_running_job_seconds{type="slow"} "#;
        text.lines().find_map(|line| line.strip_prefix(name)).unwrap().parse().unwrap()
    };
    let first = age();
    assert!(first > 0.0);
    eventually("a greater age", || (age() > first).then_some(()));
    running.go();
    admin.wait_for_metric(r#"oldest_running_job_seconds{type="slow"}"#, "0");
}

#[test]
fn the_process_of_the_worker_has_its_usual_metrics() {
    let server = Server::start();
    let (running, admin) = start(&server, "true");
    let text = admin.metrics();
    let number = |name: &str| -> f64 {
        let value = text.lines().find_map(|line| line.strip_prefix(&format!("process_{name} ")));
        value.unwrap_or_else(|| panic!("{name} in\n{text}")).parse().unwrap()
    };
    for name in ["cpu_seconds_total", "max_fds", "virtual_memory_bytes", "start_time_seconds", "threads"] {
        assert!(number(name) >= 0.0);
    }
    assert!(number("resident_memory_bytes") > 1e6);
    assert!((5.0..1000.0).contains(&number("open_fds")), "{}", running.descriptors());
}

#[test]
fn the_metrics_count_reports_and_reconnects_that_went_wrong() {
    let mut server = Server::start();
    let running = Daemon::of(&server)
        .args(ADMIN)
        .args(["--retry-min-wait", "50ms", "--retry-max-wait", "50ms"])
        .sh(UNTIL_GO)
        .start();
    let admin = Admin::of(&running);
    server.enqueue("q", "t", json!(null));
    running.wait_for_lines(1, "started");
    admin.wait_for_metric("jobs_running", "1");
    server.stop();
    admin.wait_for_metric("stream_connected", "0");
    running.go();
    admin.wait_for_metric("reports_waiting", "1");
    let counts = |name: &str| {
        let text = admin.metrics();
        let value =
            text.lines().find_map(|line| line.strip_prefix(&format!("zizq_worker_{name} "))).unwrap().to_owned();
        value.parse::<u64>().unwrap()
    };
    eventually("a retried report", || (counts("reports_retried_total") > 0).then_some(()));
    eventually("a reconnect", || (counts("reconnects_total") > 0).then_some(()));
    assert_eq!(counts("reports_dropped_total"), 0);
    server.resume();
    admin.wait_for_metric("stream_connected", "1");
    admin.wait_for_metric("reports_waiting", "0");
}

#[test]
fn the_admin_server_refuses_unknown_requests() {
    let server = Server::start();
    let (_running, admin) = start(&server, "true");
    assert_eq!(admin.call("GET", "/page.js").0, 404);
    assert_eq!(admin.call("GET", "/live/").0, 404);
    assert_eq!(admin.call("POST", "/live").0, 405);
    assert_eq!(admin.call("HEAD", "/live").0, 200);
}

#[test]
fn clients_of_the_admin_server_that_say_nothing_cost_no_job() {
    let server = Server::start();
    let (running, admin) = start(&server, "true");
    let address = admin.url().trim_start_matches("http://").to_owned();
    let silent: Vec<TcpStream> = (0..200).map(|_| TcpStream::connect(&address).unwrap()).collect();
    let ids = server.enqueue_all(jobs(20));
    ids.iter().for_each(|id| server.wait_until_done(id));
    assert!(running.descriptors() < 120, "those that wait cost no descriptors: {}", running.descriptors());
    // The last connection is served once the earlier ones have timed out.
    let mut last = silent.last().unwrap();
    last.set_read_timeout(Some(PATIENCE)).unwrap();
    last.write_all(b"GET /live HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    last.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
    running.stop();
}

#[test]
fn an_address_that_is_taken_ends_the_daemon_before_it_connects() {
    let (server, taken) = (Server::start(), std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let address = taken.local_addr().unwrap().to_string();
    let finished = Daemon::of(&server).args(["--admin-listen", &address, "--", "true"]).run().assert_exit(1);
    let line = finished.log.last().unwrap();
    assert!(line.starts_with(&format!("zizq-worker: --admin-listen: cannot listen on {address}: ")), "{line}");
    assert!(!finished.has("connecting"));
}

#[test]
fn a_paused_worker_is_not_ready_and_says_so() {
    let server = Server::start();
    let (running, admin) = start(&server, "true");
    admin.wait_until_ready(true);
    running.signal(Signal::USR2);
    eventually("both reasons", || {
        (admin.wait_until_ready(false) == ["paused, waiting for SIGCONT", "not connected to the server"]).then_some(())
    });
    assert_eq!(admin.status()["state"], "paused");
    running.signal(Signal::CONT);
    admin.wait_until_ready(true);
}

#[test]
fn an_address_that_may_appear_later_is_exit_status_1() {
    // This address is reserved for documentation (RFC 5737), so no machine has it.
    let address = "192.0.2.1:9290";
    let finished =
        Daemon::at("http://127.0.0.1:1").args(["--admin-listen", address, "--", "true"]).run().assert_exit(1);
    let line = finished.log.last().unwrap();
    assert!(line.contains(&format!("cannot listen on {address}: Cannot assign requested address")), "{line}");
}
