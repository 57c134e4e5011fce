//! `--check` shows every setting with its origin, and tests everything that can be tested without taking a job.

use serde_json::json;

use crate::support::{Authority, Daemon, Finished, RawServer, Server, unused_address, wait_until_dead};

/// Returns the value and the origin that the output shows for a setting.
fn row(finished: &Finished, name: &str) -> Vec<String> {
    let rows = finished.stdout.lines().filter(|line| line.split_whitespace().next() == Some(name));
    let rows: Vec<&str> = rows.collect();
    let [row] = rows[..] else { panic!("{name} in\n{}", finished.stdout) };
    let columns = row.split("  ").map(str::trim).filter(|column| !column.is_empty());
    columns.skip(1).map(str::to_owned).collect()
}

#[test]
fn every_setting_is_shown_with_its_value_and_where_it_came_from() {
    let server = Server::start();
    let daemon = Daemon::bare()
        .config(
            "[worker]\nqueues = ['mail', 'bills']\nretry_max_wait = 90\n[handler]\nexec = ['true', 'a b']\n\
             [handlers.\"send mail\"]\nexec = ['cat']\ntimeout = '10s'\nenv_clear = true",
        )
        .env("ZIZQ_THREADS", "4")
        .env("ZIZQ_WORKER_ID", "w-1")
        .args(["--url", &server.url, "--fibers", "2", "--check"]);
    let finished = daemon.run().assert_exit(0);
    let file = finished.dir().join("zizq-worker.toml").display().to_string();
    let at = |line: usize| format!("{file}:{line}");
    for (name, value, source) in [
        ("url", server.url.as_str(), "--url"),
        ("worker.queues", "mail, bills", &at(2)),
        ("worker.threads", "4", "ZIZQ_THREADS"),
        ("worker.fibers", "2", "--fibers"),
        ("worker.prefetch", "16", "default"),
        ("worker.retry_max_wait", "1m 30s", &at(3)),
        ("worker.worker_id", "w-1", "ZIZQ_WORKER_ID"),
        ("worker.max_jobs", "no limit", "default"),
        ("log.level", "info", "default"),
        ("admin.listen", "off", "default"),
        ("handler.exec", "/usr/bin/true 'a b'", &at(5)),
        ("handler.kill_grace", "5s", "default"),
    ] {
        assert_eq!(row(&finished, name), [value, source], "{name}");
    }
    for (name, value, source) in [("exec", "/usr/bin/cat", 7), ("timeout", "10s", 8), ("env", "none", 9)] {
        let line = finished.stdout.lines().find(|line| line.starts_with(&format!("handlers.\"send mail\".{name} ")));
        let line = line.unwrap_or_else(|| panic!("{name} in\n{}", finished.stdout));
        assert!(line.contains(value), "{line}");
        assert!(name == "env" || line.ends_with(&at(source)), "{line}");
    }
    assert!(finished.stdout.contains(&format!("server: {} is version 0.6.", server.url)), "{}", finished.stdout);
    assert!(!finished.stdout.contains("warning:"), "{}", finished.stdout);
}

#[test]
fn nothing_is_taken_and_nothing_is_run() {
    let server = Server::start();
    let id = server.enqueue("q", "t", json!(null));
    let finished = Daemon::of(&server).args(["--check"]).sh("echo > $DIR/ran").run().assert_exit(0);
    assert_eq!(server.job(&id).unwrap()["status"], "ready");
    assert_eq!(finished.read("ran"), "");
    assert_eq!(finished.log, [] as [&str; 0]);
}

#[test]
fn check_reports_mistakes_in_settings_like_a_start() {
    let daemon = || Daemon::at("http://127.0.0.1:1").args(["--check"]);
    let finished = daemon().config("worker.threads = 0").args(["--", "true"]).run().assert_exit(78);
    assert!(finished.log[0].contains("threads must be at least 1"), "{:?}", finished.log);
    daemon().args(["--threads", "0", "--", "true"]).run().assert_exit(2);
    daemon().run().assert_exit(2);
    daemon().args(["--", "/does/not/exist"]).run().assert_exit(78);
}

#[test]
fn a_handler_that_the_system_would_not_start_is_found() {
    let server = Server::start();
    for (text, problem) in [
        ("#!/does/not/exist\n", "names \"/does/not/exist\" in its first line, which does not exist"),
        ("#!/bin/sh\r\necho\r\n", "names \"/bin/sh\\r\" in its first line, which does not exist"),
        ("echo\n", "is no program, and its first line names none (like #!/bin/sh)"),
    ] {
        let daemon = Daemon::of(&server);
        let path = daemon.script("handler", "");
        std::fs::write(&path, text).unwrap();
        let finished = daemon.args(["--check", "--exec", path.to_str().unwrap()]).run().assert_exit(78);
        let line = format!("zizq-worker: --exec: handler cannot be run: {} {problem}", path.display());
        assert_eq!(finished.log, [line]);
    }
}

#[test]
fn a_server_that_is_not_there_is_exit_status_1() {
    let address = unused_address();
    let daemon = Daemon::at(&format!("http://{address}")).args(["--check", "--", "true"]);
    let finished = daemon.run().assert_exit(1);
    let line = finished.log.last().unwrap();
    assert!(
        line.starts_with(&format!("zizq-worker: cannot ask the server at http://{address}: cannot connect")),
        "{line}"
    );
    assert!(finished.stdout.contains("handlers: their files can be run"), "{}", finished.stdout);
}

#[test]
fn a_server_that_is_not_zizq_is_exit_status_1() {
    let server = RawServer::start();
    let running = Daemon::at(&server.url()).args(["--check", "--", "true"]).start();
    server.answer_next("404 Not Found", "<html>");
    let finished = running.assert_exit(1);
    assert!(finished.log[0].contains("404"), "{:?}", finished.log);
}

#[test]
fn a_version_that_does_not_fit_is_a_warning() {
    for (version, problem) in [("0.5.9", "it is older"), ("1.6.0", "its major version is another")] {
        let server = RawServer::start();
        let running = Daemon::at(&server.url()).args(["--check", "--", "true"]).start();
        server.answer_next("200 OK", &format!(r#"{{"version":"{version}"}}"#));
        let finished = running.assert_exit(0);
        let warning = finished.stdout.lines().last().unwrap();
        assert!(
            warning.starts_with(&format!("warning: the server is {version}")) && warning.contains(problem),
            "{warning}"
        );
    }
}

#[test]
fn a_server_that_is_not_trusted_is_exit_status_1() {
    let (server, authority) = (Server::start(), Authority::new());
    let (port, _stop) = server.with_tls(authority.issue(&["localhost"]).server(&["http/1.1"], None));
    let daemon = Daemon::at(&format!("https://localhost:{port}"));
    let ca = daemon.file("ca.pem", &Authority::new().pem());
    let finished = daemon.args(["--tls-ca", ca.to_str().unwrap(), "--check", "--", "true"]).run().assert_exit(1);
    assert!(finished.log[0].contains("certificate"), "{:?}", finished.log);
}

#[test]
fn the_embedded_server_need_not_be_asked() {
    let finished = Daemon::bare().args(["--embedded", "--check", "--", "true"]).run().assert_exit(0);
    assert!(finished.stdout.ends_with("server: the embedded one\n"), "{}", finished.stdout);
}

#[test]
fn a_check_of_the_embedded_server_tries_its_port_and_jobs() {
    let server = Server::start();
    let daemon = || Daemon::bare().args(["--embedded", "--url", &server.url, "--check"]);
    let finished = daemon().args(["--", "true"]).run().assert_exit(0);
    assert!(finished.stdout.contains("warning: --embedded: cannot listen on"), "{}", finished.stdout);
    let url = format!("http://{}", unused_address());
    let daemon = Daemon::bare().args(["--embedded", "--url", &url, "--check", "--offline"]);
    let jobs = daemon.file("jobs.ndjson", "{\"queue\":\"q\",\"type\":\"t\",\"payload\":1}\n{}\n");
    let finished = daemon.args(["--jobs", jobs.to_str().unwrap(), "--", "true"]).run().assert_exit(78);
    assert!(finished.log.last().unwrap().contains("jobs.ndjson:2: "), "{:?}", finished.log);
}

/// A warm handler is in a process group of its own, so Ctrl-C does not reach the handler. The interrupted check must kill the
/// handler.
#[test]
fn an_interrupted_check_leaves_no_handler_behind() {
    let server = Server::start();
    let script = "echo $$ >> $DIR/started; trap '' TERM; while :; do sleep 0.1; done";
    let daemon = Daemon::of(&server).args(["--mode", "warm", "--check"]).sh(script);
    let temp = daemon.dir().join("temp");
    std::fs::create_dir(&temp).unwrap();
    let running = daemon.env("TMPDIR", &temp).start();
    let handler = running.wait_for_lines(1, "started").remove(0);
    running.sigint();
    let finished = running.assert_exit(1);
    assert!(finished.log.last().unwrap().contains("the check was interrupted"), "{:?}", finished.log);
    wait_until_dead(&handler);
    assert_eq!(std::fs::read_dir(finished.dir().join("temp")).unwrap().count(), 0);
}

/// Settings that cause four of the warnings that the worker logs at its start.
const DOUBTFUL: &str = "worker = { threads = 4, prefetch = 1, shutdown_deadline = '10s' }\n[handler]\nexec = ['true']\n\
     timeout = '11s'\nkill_grace = '12s'\nmode = 'warm'\nmax_processes = 2";

#[test]
fn an_offline_check_says_all_that_a_start_warns_of() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let daemon =
        Daemon::at("http://127.0.0.1:1").config(DOUBTFUL).env("ZIZQ_TREADS", "4").env("ZIZQ_ADMIN_LISTEN", &address);
    let finished = daemon.args(["--check", "--offline"]).run().assert_exit(0);
    let warnings: Vec<&str> = finished.stdout.lines().filter_map(|line| line.strip_prefix("warning: ")).collect();
    for wanted in [
        "variable is no setting and has no effect",
        "prefetch is below threads x fibers",
        "timeout is longer than the shutdown deadline",
        "kill_grace is longer than the shutdown deadline",
        "max_processes is below threads x fibers",
        &format!("ZIZQ_ADMIN_LISTEN: cannot listen on {address}: Address already in use"),
    ] {
        assert!(warnings.iter().any(|warning| warning.starts_with(wanted)), "{wanted} in {warnings:#?}");
    }
    assert_eq!(warnings.len(), 6, "{warnings:#?}");
    assert!(warnings[0].ends_with("(ZIZQ_TREADS; the nearest setting is ZIZQ_THREADS)"), "{warnings:#?}");
    assert!(finished.stdout.ends_with("server: not asked\n"), "{}", finished.stdout);
}

#[test]
fn a_job_type_with_a_star_is_a_warning() {
    let daemon = Daemon::at("http://127.0.0.1:1").args(["--check", "--offline"]);
    let finished = daemon.config("[handlers.'img.*']\nexec = ['true']").run().assert_exit(0);
    let warnings: Vec<&str> = finished.stdout.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert_eq!(warnings.len(), 1, "{warnings:#?}");
    assert!(warnings[0].starts_with("warning: a job type is not a pattern: ") && warnings[0].contains("img.*"));
}

#[test]
fn settings_of_warm_handlers_for_spawned_ones_are_a_warning() {
    let warnings = |file: &str| {
        let finished = Daemon::bare().args(["--check", "--offline"]).config(file).run().assert_exit(0);
        let warnings = finished.stdout.lines().filter(|line| line.starts_with("warning: settings of warm handlers "));
        warnings.map(|line| line.rsplit_once(" (").unwrap().1.to_owned()).collect::<Vec<_>>()
    };
    let spawned = "[handler]\nexec = ['true']\nmax_memory = '10MiB'\nmax_age = '1h'\nstart_timeout = '1m'\n";
    assert_eq!(warnings(spawned), ["handler: max_age, max_memory)"]);
    assert_eq!(warnings(&format!("{spawned}[handlers.w]\nmode = 'warm'")), [""; 0]);
    let route = "[handler]\nexec = ['true']\nmode = 'warm'\nmax_jobs = 10\n[handlers.s]\nmode = 'spawn'\n";
    assert_eq!(warnings(route), [""; 0]);
    assert_eq!(warnings(&format!("{route}max_processes = 1")), ["handlers.s: max_processes)"]);
}

/// A file that cannot be read, not even by root.
const UNREADABLE: &str = "/proc/sys/vm/drop_caches";

#[test]
fn an_offline_check_need_not_read_the_files_of_secrets() {
    let file = format!("[handler]\nexec = ['true']\nenv = {{ TOKEN = {{ file = '{UNREADABLE}' }} }}");
    let check = |args: &[&str]| {
        let daemon = Daemon::at("http://127.0.0.1:1").config(&file);
        args.iter().fold(daemon, |daemon, arg| daemon.args([*arg])).run()
    };
    let finished = check(&["--check", "--offline"]).assert_exit(0);
    let warning = finished.stdout.lines().find(|line| line.starts_with("warning: this check may not read the file "));
    let end = format!("(handler.env.TOKEN: cannot read {UNREADABLE}: Permission denied (os error 13))");
    assert!(warning.is_some_and(|line| line.ends_with(&end)), "{}", finished.stdout);
    for args in [&["--check"][..], &[]] {
        let finished = check(args).assert_exit(78);
        assert!(finished.log[0].contains(&format!("env.TOKEN: cannot read {UNREADABLE}")), "{:?}", finished.log);
    }
    // Even an offline check rejects a missing file.
    let missing = file.replace(UNREADABLE, "/does/not/exist");
    Daemon::bare().args(["--check", "--offline"]).config(&missing).run().assert_exit(78);
}

#[test]
fn two_servers_at_one_address_are_a_warning() {
    let address = unused_address().to_string();
    let daemon = Daemon::bare().args(["--embedded", "--url", &format!("http://{address}"), "--admin-listen", &address]);
    let finished = daemon.args(["--check", "--", "true"]).run().assert_exit(0);
    let warning = finished.stdout.lines().find(|line| line.starts_with("warning: --embedded: cannot listen on "));
    assert!(warning.is_some_and(|line| line.contains("Address already in use")), "{}", finished.stdout);
}

#[test]
fn a_low_limit_of_open_files_is_a_warning() {
    let mut command = std::process::Command::new("sh");
    command.args(["-c", "ulimit -n 64; exec \"$0\" --threads 500 --check --offline --log-level error -- true"]);
    let ended = command.arg(env!("CARGO_BIN_EXE_zizq-worker")).output().unwrap();
    let stdout = String::from_utf8_lossy(&ended.stdout);
    assert!(ended.status.success() && stdout.contains("\nwarning: limit of open files is too low "), "{stdout}");
    assert!(ended.stderr.is_empty(), "{}", String::from_utf8_lossy(&ended.stderr));
}

#[test]
fn a_full_check_says_the_same_warnings() {
    let server = Server::start();
    let file = DOUBTFUL.replace("mode = 'warm'\nmax_processes = 2", "");
    let finished = Daemon::of(&server).config(&file).env("ZIZQ_TREADS", "4").args(["--check"]).run().assert_exit(0);
    assert_eq!(finished.stdout.lines().filter(|line| line.starts_with("warning: ")).count(), 4, "{}", finished.stdout);
}

#[test]
fn an_offline_check_starts_nothing_and_asks_nothing() {
    let server = RawServer::start();
    let daemon = Daemon::at(&server.url()).args(["--mode", "warm", "--check", "--offline"]).sh("echo > $DIR/ran");
    let finished = daemon.run().assert_exit(0);
    assert!(server.is_quiet());
    assert_eq!(finished.read("ran"), "");
}

#[test]
fn an_offline_check_finds_mistakes() {
    let daemon = || Daemon::bare().args(["--check", "--offline"]);
    daemon().config("worker.threads = 0").args(["--", "true"]).run().assert_exit(78);
    daemon().args(["--", "/does/not/exist"]).run().assert_exit(78);
    daemon().args(["--threads", "0", "--", "true"]).run().assert_exit(2);
    daemon().env("TMPDIR", "/does/not/exist").args(["--", "true"]).run().assert_exit(78);
    Daemon::bare().args(["--offline", "--", "true"]).run().assert_exit(2);
}

#[test]
fn a_reader_that_has_gone_is_no_problem() {
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_zizq-worker"));
    let ended = command.args(["--check", "--offline", "--", "true"]).stdout(writer).output().unwrap();
    assert_eq!((ended.status.code(), String::from_utf8_lossy(&ended.stderr).as_ref()), (Some(0), ""));
}

#[test]
fn the_files_of_secrets_are_shown_and_their_contents_are_not() {
    let daemon = Daemon::bare();
    let path = daemon.file("token", "s3cret\n").display().to_string();
    let daemon = daemon.handlers("[handler]\nexec = ['true']\nenv = { TOKEN = { file = '$DIR/token' } }");
    let finished = daemon.args(["--check", "--offline"]).run().assert_exit(0);
    assert!(finished.stdout.contains(&format!("TOKEN (from {path})")), "{}", finished.stdout);
    assert!(!finished.stdout.contains("s3cret"), "{}", finished.stdout);
}
