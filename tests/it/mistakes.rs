//! A mistake in a setting ends the daemon before it connects, with one line that names the source and the remedy.

use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::net::TcpListener;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;

use crate::support::{Daemon, RawServer};

const PASSING: i32 = 1;
const USAGE: i32 = 2;
const CONFIG: i32 = 78;

/// Asserts that a daemon with a mistake in its settings prints only this line, and exits with this status before it connects.
#[track_caller]
fn refuse(daemon: Daemon, status: i32, line: &str) {
    let server = RawServer::start();
    complains(daemon.env("ZIZQ_URL", server.url()), status, line);
    assert!(!server.has_connection(), "connected in spite of {line}");
}

#[track_caller]
fn complains(daemon: Daemon, status: i32, line: &str) {
    let finished = daemon.run().assert_exit(status);
    let dir = finished.dir().to_str().unwrap();
    let log: Vec<String> = finished.log.iter().map(|found| found.replace(dir, "DIR")).collect();
    assert_eq!(log, [format!("zizq-worker: {line}")]);
    assert_eq!(finished.stdout, "");
}

/// Asserts that the same bad value is refused in the flag, in the variable, and in the file.
#[track_caller]
fn refuse_everywhere(flag: &str, bad: &str, toml: &str, problem: &str) {
    // `refuse` sets the url of its own server, so it cannot test a bad url.
    let refuse = if flag == "--url" { complains } else { refuse };
    let variable = format!("ZIZQ_{}", flag.trim_start_matches('-').to_uppercase().replace('-', "_"));
    let file = format!("# a comment\n\n{toml}\n");
    refuse(Daemon::bare().args([flag, bad]), USAGE, &format!("{flag}: {problem}"));
    refuse(Daemon::bare().env(&variable, bad), USAGE, &format!("{variable}: {problem}"));
    refuse(Daemon::bare().config(&file), CONFIG, &format!("DIR/zizq-worker.toml:3: {problem}"));
}

#[test]
fn url_must_be_http_or_https_with_a_host() {
    for bad in
        ["localhost:7890", "ftp://localhost", "http://", "http://host:", "http://host:99999", "http://h#x", "x y"]
    {
        let problem = format!("url must be http://HOST[:PORT][/PREFIX] or https://… (got {bad:?})");
        refuse_everywhere("--url", bad, &format!("url = {bad:?}"), &problem);
    }
}

#[test]
fn a_password_in_a_url_is_not_printed() {
    for (bad, got) in [
        ("http://user:secret@host", "http://…@host"),
        ("https://user:sec@ret@host:1/q?key=secret", "https://…@host:1/q?…"),
        ("http://user:sec ret@host", "http://…@host"),
        ("http:/user:secret@host", "…@host"),
        ("user:secret@host", "…@host"),
        ("http://host/?secret", "http://host/?…"),
    ] {
        let problem = format!(
            "url must be http://HOST[:PORT][/PREFIX] or https://…, without a user, a password or a query (got {got:?})"
        );
        refuse_everywhere("--url", bad, &format!("url = {bad:?}"), &problem);
    }
    let url = "http://user:secret@host";
    let file = Daemon::bare().config(&format!("url = [{url:?}]"));
    complains(file, CONFIG, "DIR/zizq-worker.toml:1: url must be a string (got [\"http://…@host\"])");
    let line = "unexpected argument 'http://…@host' found; a handler follows --, or is quoted after --exec; see --help";
    complains(Daemon::bare().args([url]), USAGE, line);
    let latin = OsStr::from_bytes(b"http://user:secr\xe9t@host");
    complains(Daemon::bare().env("ZIZQ_URL", latin), USAGE, "ZIZQ_URL: must be valid UTF-8 (got http://…@host)");
    let file = Daemon::bare().config(&format!("worker = {url:?}"));
    let problem = "invalid type: string \"http://…@host\", expected one table, as under a line like [worker]";
    complains(file, CONFIG, &format!("DIR/zizq-worker.toml:1: {problem}"));
}

#[test]
fn queues_must_be_names_that_the_server_takes() {
    let problem =
        |refused, queue| format!("queues must be names without , * ? [ ] {{ }} \\ (got {refused} in {queue:?})");
    refuse_everywhere("--queues", "mail, b*", "worker.queues = ['mail', 'b*']", &problem('*', "b*"));
    for bad in ["a?", "a[", "a]", "a{", "a}", "a\\"] {
        let refused = bad.chars().last().unwrap();
        refuse(Daemon::bare().args(["-q", bad, "--", "true"]), USAGE, &format!("--queues: {}", problem(refused, bad)));
    }
    refuse(
        Daemon::bare().config("[worker]\nqueues = ['a,b']").args(["--", "true"]),
        CONFIG,
        &format!("DIR/zizq-worker.toml:2: {}", problem(',', "a,b")),
    );
}

/// An empty value, such as an unset shell variable in quotes, does not select all queues.
#[test]
fn a_list_of_queues_has_no_empty_name() {
    let problem = |got: &str| {
        format!("queues must be names, none of them empty; to take from all queues, leave the setting out (got {got})")
    };
    for bad in [",", " ", "a,,b", "a,", ",a"] {
        let problem = problem(&format!("{bad:?}"));
        refuse_everywhere("--queues", bad, &format!("worker.queues = {bad:?}"), &problem);
    }
    let file = || Daemon::bare().config("worker.queues = ['mail']");
    refuse(file().args(["--queues", ""]), USAGE, &format!("--queues: {}", problem("\"\"")));
    refuse(file().env("ZIZQ_QUEUES", ","), USAGE, &format!("ZIZQ_QUEUES: {}", problem("\",\"")));
    refuse(Daemon::bare().args(["-q", "a", "--queue="]), USAGE, &format!("--queues: {}", problem("\"a,\"")));
    for (bad, got) in [("''", "\"\""), ("['']", "[\"\"]"), ("['a', ' ']", "[\"a\", \" \"]")] {
        let line = format!("DIR/zizq-worker.toml:1: {}", problem(got));
        refuse(Daemon::bare().config(&format!("worker.queues = {bad}")), CONFIG, &line);
    }
}

#[test]
fn threads_fibers_and_prefetch_must_be_at_least_1() {
    for name in ["threads", "fibers", "prefetch"] {
        let (flag, toml) = (format!("--{name}"), |value| format!("worker.{name} = {value}"));
        refuse_everywhere(&flag, "0", &toml("0"), &format!("{name} must be at least 1 (got 0)"));
        refuse_everywhere(&flag, "-2", &toml("-2"), &format!("{name} must be at least 1 (got -2)"));
        let problem = format!("{name} must be a whole number, at least 1 (got four)");
        refuse_everywhere(&flag, "four", &toml("'four'"), &problem);
        let problem = format!("{name} must be a whole number, at least 1 (got 1.5)");
        refuse_everywhere(&flag, "1.5", &toml("1.5"), &problem);
    }
}

#[test]
fn there_is_an_end_to_how_many_jobs_run_at_once() {
    let problem = "threads x fibers must be at most 65536 (got 2 x 40000)";
    refuse(Daemon::bare().args(["-t", "2", "-f", "40000", "--", "true"]), USAGE, &format!("--fibers: {problem}"));
    let problem = "prefetch must be at most 131072 (got 131073)";
    refuse_everywhere("--prefetch", "131073", "worker.prefetch = 131073", problem);
}

#[test]
fn durations_must_be_durations_and_longer_than_nothing() {
    for flag in
        ["--retry-min-wait", "--retry-max-wait", "--shutdown-deadline", "--exit-when-idle", "--stream-idle-timeout"]
    {
        let name = flag.trim_start_matches('-').replace('-', "_");
        let toml = |value| format!("worker.{name} = {value}");
        let wanted = "must be a duration like 30s, 500ms or 1m 30s; a bare number is seconds";
        refuse_everywhere(flag, "soon", &toml("'soon'"), &format!("{name} {wanted} (got soon)"));
        refuse_everywhere(flag, "-1", &toml("-1"), &format!("{name} {wanted} (got -1)"));
        refuse_everywhere(flag, "0", &toml("0"), &format!("{name} must be greater than 0s (got 0)"));
        refuse_everywhere(flag, "0ms", &toml("'0ms'"), &format!("{name} must be greater than 0s (got 0ms)"));
        refuse(
            Daemon::bare().config(&toml("true")).args(["--", "true"]),
            CONFIG,
            &format!("DIR/zizq-worker.toml:1: {name} {wanted} (got true)"),
        );
    }
}

#[test]
fn the_size_of_a_job_must_be_a_size_that_a_job_can_have() {
    for bad in ["big", "-1", "0", "1023", "1.5 parsec"] {
        let wanted = "must be a size like 64MiB or 500kB, at least 1KiB; a bare number is bytes";
        let problem = format!("max_job_size {wanted} (got {bad})");
        refuse_everywhere("--max-job-size", bad, &format!("worker.max_job_size = '{bad}'"), &problem);
    }
}

#[test]
fn the_longest_wait_must_not_be_shorter_than_the_first() {
    let problem = "retry_max_wait must be at least retry_min_wait (1s) (got 10ms)";
    refuse_everywhere("--retry-max-wait", "10ms", "worker.retry_max_wait = '10ms'", problem);
    let problem = "retry_min_wait must be at most retry_max_wait (30s unless set) (got 1m)";
    refuse_everywhere("--retry-min-wait", "1m", "worker.retry_min_wait = '1m'", problem);
    let both = Daemon::bare().config("[worker]\nretry_max_wait = '2s'").args(["--retry-min-wait", "3s", "--", "true"]);
    let problem = "retry_max_wait must be at least retry_min_wait (3s) (got 2s)";
    refuse(both, CONFIG, &format!("DIR/zizq-worker.toml:2: {problem}"));
}

#[test]
fn the_multiplier_must_be_a_number_of_at_least_1() {
    let (flag, toml) = ("--retry-multiplier", |value| format!("worker.retry_multiplier = {value}"));
    refuse_everywhere(flag, "0.5", &toml("0.5"), "retry_multiplier must be at least 1 (got 0.5)");
    refuse_everywhere(flag, "-2", &toml("-2"), "retry_multiplier must be at least 1 (got -2)");
    refuse_everywhere(flag, "nan", &toml("nan"), "retry_multiplier must be at least 1 (got NaN)");
    refuse_everywhere(flag, "twice", &toml("'twice'"), "retry_multiplier must be a number (got twice)");
}

#[test]
fn the_worker_id_must_be_a_legal_header_value() {
    for bad in ["two\nlines", "größe", " "] {
        let problem = format!("worker_id must be printable ASCII, and not empty (got {bad:?})");
        refuse_everywhere("--worker-id", bad, &format!("worker.worker_id = {bad:?}"), &problem);
    }
}

#[test]
fn log_level_and_format_must_be_known() {
    let problem = "log_level must be one of error, warn, info, debug, trace (got loud)";
    refuse_everywhere("--log-level", "loud", "log.level = 'loud'", problem);
    for bad in ["info,zizq_worker::jobs=loud", "info,loud"] {
        let problem = format!("log_level must be one of error, warn, info, debug, trace (got {bad})");
        refuse_everywhere("--log-level", bad, &format!("log.level = '{bad}'"), &problem);
    }
    let targets = "zizq_worker::jobs, zizq_worker::output";
    let problem = format!("log_level may have other levels for the targets {targets} (got info,zizq_worker::job=warn)");
    let bad = "info,zizq_worker::job=warn";
    refuse_everywhere("--log-level", bad, &format!("log.level = '{bad}'"), &problem);
    let problem = "log_level must have one level without a target (got info,warn)";
    refuse_everywhere("--log-level", "info,warn", "log.level = 'info,warn'", problem);
    let problem = "log_format must be one of pretty, compact, json (got xml)";
    refuse_everywhere("--log-format", "xml", "log.format = 'xml'", problem);
}

#[test]
fn rust_log_must_be_a_filter() {
    let finished = Daemon::bare().env("RUST_LOG", "zizq_worker=loud").args(["--", "true"]).run().assert_exit(USAGE);
    assert_eq!(finished.log.len(), 1);
    let wanted = "zizq-worker: RUST_LOG: must be a level, or a filter like zizq_worker=debug (got zizq_worker=loud: ";
    assert!(finished.log[0].starts_with(wanted), "{}", finished.log[0]);
}

#[test]
fn a_value_must_be_text() {
    let latin = OsStr::from_bytes(b"gr\xf6\xdfe");
    let line = "must be valid UTF-8 (got gr\u{fffd}\u{fffd}e)";
    refuse(Daemon::bare().env("ZIZQ_QUEUES", latin).args(["--", "true"]), USAGE, &format!("ZIZQ_QUEUES: {line}"));
}

/// The message gives the line number of each wrong type, unknown key and syntax error.
#[test]
fn a_mistake_in_the_file_is_shown_with_its_line() {
    for (toml, problem) in [
        ("[worker]\nthreadz = 3", "2: unknown key `threadz`, the nearest is `threads`"),
        ("[worker]\nretry-min-wait = 3", "2: unknown key `retry-min-wait`, the nearest is `retry_min_wait`"),
        ("[worker]\nexec = 'x'", "2: unknown key `exec`, it is a key of [handler]"),
        ("[worker]\nurl = 'x'", "2: unknown key `url`, it is a key of the top level"),
        ("[tls]\ntls_ca = 'x'", "2: unknown key `tls_ca`, it is `ca` of [tls]"),
        ("\n\nmax_jobs = 1", "3: unknown key `max_jobs`, it is a key of [worker] and of [handler]"),
        ("theads = 1", "1: unknown key `theads`, the nearest is `threads` of [worker]"),
        ("[logs]", "1: unknown key `logs`, the nearest is `log`"),
        (
            "verbose = 1",
            "1: unknown key `verbose`, expected one of `url`, `tls`, `worker`, `handler`, `handlers`, `log`, `admin`",
        ),
        ("[tls]\nverify = false", "2: unknown key `verify`, expected one of `ca`, `client_cert`, `client_key`"),
        ("[tls]\nca = 3", "2: tls_ca must be a string (got 3)"),
        ("[log]\nfile = 'x'", "2: unknown key `file`, expected `level` or `format`"),
        (
            "[handler]\ncommand = 'x'",
            "2: unknown key `command`, expected one of `exec`, `mode`, `stdin`, `output`, `env_clear`, `pass_env`, `env`, `cwd`, `success_exit_codes`, `kill_exit_codes`, `timeout`, `kill_grace`, `drain_signal`, `min_processes`, `max_processes`, `start_timeout`, `max_jobs`, `max_age`, `max_memory`, `idle_timeout`",
        ),
        ("worker = 3", "1: invalid type: integer `3`, expected one table, as under a line like [worker]"),
        ("\n[[worker]]", "2: invalid type: sequence, expected one table, as under a line like [worker]"),
        ("log = ['debug']", "1: invalid type: sequence, expected one table, as under a line like [worker]"),
        (
            "[handlers]\nexec = ['true']",
            "2: invalid type: sequence, expected a table for each job type, as under a line like [handlers.TYPE]; [handler] is the table of all others",
        ),
        (
            "[[handlers]]",
            "1: invalid type: sequence, expected a table for each job type, as under a line like [handlers.TYPE]; [handler] is the table of all others",
        ),
        ("\n[worker\n", "2: unclosed table, expected `]`"),
        ("url = localhost", "1: string values must be quoted, expected literal string"),
        ("[worker]\nthreads = 1\nthreads = 2", "3: duplicate key"),
        ("url = 3", "1: url must be a string (got 3)"),
        ("[worker]\nqueues = 3", "2: queues must be a list of strings (got 3)"),
        ("[worker]\nqueues = [\n'a',\n3]", "2: queues must be a list of strings (got [\"a\", 3])"),
        ("[worker]\nworker_id = 3", "2: worker_id must be a string (got 3)"),
        ("[log]\nlevel = 3", "2: log_level must be a string (got 3)"),
        ("[log]\nformat = true", "2: log_format must be a string (got true)"),
        ("[handler]\nexec = 3", "2: exec must be a string or a list of strings (got 3)"),
        ("[handler]\nexec = ['sh', 3]", "2: exec must be a string or a list of strings (got [\"sh\", 3])"),
    ] {
        let refuse = if toml.starts_with("url") { complains } else { refuse };
        refuse(Daemon::bare().config(toml), CONFIG, &format!("DIR/zizq-worker.toml:{problem}"));
    }
}

#[test]
fn the_file_must_be_readable() {
    let missing = "cannot read the configuration file DIR/none.toml: No such file or directory (os error 2)";
    let daemon = Daemon::bare();
    let path = daemon.dir().join("none.toml");
    refuse(daemon.args(["--config", path.to_str().unwrap()]), CONFIG, &format!("--config: {missing}"));
    let daemon = Daemon::bare();
    let path = daemon.dir().join("none.toml");
    refuse(daemon.env("ZIZQ_CONFIG", path), CONFIG, &format!("ZIZQ_CONFIG: {missing}"));
    let directory = "--config: cannot read the configuration file /: Is a directory (os error 21)";
    refuse(Daemon::bare().args(["-c", "/"]), CONFIG, directory);
    if !rustix::process::geteuid().is_root() {
        let daemon = Daemon::bare().config("");
        fs::set_permissions(daemon.dir().join("zizq-worker.toml"), Permissions::from_mode(0o000)).unwrap();
        let line = "cannot read the configuration file DIR/zizq-worker.toml: Permission denied (os error 13)";
        refuse(daemon, CONFIG, &format!("--config: {line}"));
    }
}

#[test]
fn there_must_be_one_handler() {
    let line = "the command line: no handler given; say what to run with --exec \"CMD ARGS\", -- CMD ARGS, ZIZQ_EXEC, \
                or exec in the file's [handler] or [handlers.TYPE]";
    refuse(Daemon::bare(), USAGE, line);
    refuse(Daemon::bare().env("ZIZQ_EXEC", ""), USAGE, line);
    refuse(Daemon::bare().args(["--"]), USAGE, line);
    let line = "the command after --: give the handler once: with --exec or after --, not both";
    refuse(Daemon::bare().args(["--exec", "true", "--", "true"]), USAGE, line);
    refuse_everywhere("--exec", " ", "handler.exec = []", "exec must name a command (got nothing)");
    let line = "exec has a quote or a backslash without its other half (got sh -c 'oops)";
    refuse_everywhere("--exec", "sh -c 'oops", "handler.exec = \"sh -c 'oops\"", line);
}

#[test]
fn no_setting_of_a_handler_has_a_zero_byte() {
    for (toml, problem) in [
        ("exec = ['true', \"a\\u0000b\"]", "2: exec must not have a zero byte"),
        ("exec = \"true a\\u0000b\"", "2: exec must not have a zero byte"),
        ("exec = 'true'\ncwd = \"/\\u0000\"", "3: cwd must be a directory that exists (got /\\u{0})"),
        ("exec = 'true'\nenv.A = \"\\u0000\"", "3: env.A must not have a zero byte"),
    ] {
        for check in [&[][..], &["--check"]] {
            let daemon = check.iter().fold(Daemon::bare(), |daemon, flag| daemon.args([flag]));
            let daemon = daemon.config(&format!("[handler]\n{toml}"));
            refuse(daemon, CONFIG, &format!("DIR/zizq-worker.toml:{problem}"));
        }
    }
}

/// If a handler cannot be run, the fault is in the handler's file and not in the setting. So the exit status is 78, and not 2, even
/// if the handler is set on the command line.
#[test]
fn a_handler_that_cannot_be_run_is_found_before_the_first_job() {
    let daemon = || {
        let daemon = Daemon::bare();
        daemon.file("plain", "text");
        fs::create_dir(daemon.dir().join("directory")).unwrap();
        let dir = daemon.dir().to_owned();
        daemon.current_dir(&dir)
    };
    for (exec, problem) in [
        ("./none --flag", "./none does not exist"),
        ("./plain", "./plain is not executable; try chmod +x ./plain"),
        ("./directory", "./directory is a directory; name an executable file"),
        ("no-such-command", "no-such-command is not on PATH"),
        ("plain", "plain is not on PATH; if you mean the file here, write ./plain"),
    ] {
        let problem = format!("handler cannot be run: {problem}");
        refuse(daemon().args(["--exec", exec]), CONFIG, &format!("--exec: {problem}"));
        refuse(daemon().env("ZIZQ_EXEC", exec), CONFIG, &format!("ZIZQ_EXEC: {problem}"));
        let file = daemon().config(&format!("[handler]\nexec = '{exec}'"));
        refuse(file, CONFIG, &format!("DIR/zizq-worker.toml:2: {problem}"));
        let word = exec.split(' ').next().unwrap();
        refuse(daemon().args(["--", word]), CONFIG, &format!("the command after --: {problem}"));
    }
}

#[test]
fn a_command_line_that_does_not_parse_takes_one_line_too() {
    for (args, line) in [
        (vec!["--thread", "2"], "unexpected argument '--thread' found; tip: a similar argument exists: '--threads'"),
        (vec!["handle.sh"], "unexpected argument 'handle.sh' found; a handler follows --, or is quoted after --exec"),
        (vec!["--offline"], "the following required arguments were not provided: --check"),
        (vec!["--threads"], "a value is required for '--threads <N>' but none was supplied"),
        (vec!["-t", "1", "-t", "2"], "the argument '--threads <N>' cannot be used multiple times"),
    ] {
        let daemon = args.into_iter().fold(Daemon::bare(), |daemon, arg| daemon.args([arg]));
        refuse(daemon, USAGE, &format!("{line}; see --help"));
    }
    let finished = Daemon::bare().args(["--forged\nline\u{1b}[31m\r"]).run().assert_exit(USAGE);
    assert!(finished.log.len() == 1 && !finished.log[0].contains(char::is_control), "{:?}", finished.log);
}

#[test]
fn jobs_need_the_embedded_server() {
    let line = "--jobs: only the embedded server takes jobs from a file; add --embedded";
    refuse(Daemon::bare().args(["--jobs", "jobs.ndjson", "--", "true"]), USAGE, line);
}

#[test]
fn jobs_must_be_jobs() {
    let embedded = |jobs: &str| {
        let daemon = Daemon::bare().args(["--embedded", "--url", "http://127.0.0.1:1"]);
        let path = daemon.file("jobs.ndjson", jobs);
        daemon.args(["--jobs", path.to_str().unwrap(), "--", "true"])
    };
    let good = r#"{"queue":"a","type":"t","payload":1}"#;
    for (line, problem) in [
        (r#"{"queue":"a","type":"","payload":1}"#, "type must not be empty"),
        ("nonsense", "invalid JSON: expected ident at line 1 column 2"),
    ] {
        let line_3 = format!("--jobs: DIR/jobs.ndjson:3: {problem}");
        complains(embedded(&format!("{good}\n\n{line}\n")), CONFIG, &line_3);
    }
    let line = "--jobs: cannot read none.ndjson: No such file or directory (os error 2)";
    complains(Daemon::bare().args(["--embedded", "--jobs", "none.ndjson", "--", "true"]), CONFIG, line);
}

#[test]
fn jobs_may_come_from_stdin() {
    let daemon = Daemon::bare().args(["--embedded", "--url", "http://127.0.0.1:1", "--jobs", "-", "--", "true"]);
    let jobs = File::open(daemon.file("jobs", "\n{\"queue\":\"a,b\",\"type\":\"t\",\"payload\":1}\n")).unwrap();
    let line = "--jobs: stdin:2: queue must not contain ','";
    complains(daemon.stdin(jobs), CONFIG, line);
}

#[test]
fn the_embedded_server_needs_an_address_of_its_own() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", taken.local_addr().unwrap());
    let line = format!(
        "--embedded: cannot listen on {url}: Address already in use (os error 98); another server may be there, choose another --url"
    );
    complains(Daemon::bare().args(["--embedded", "--url", &url, "--", "true"]), PASSING, &line);
    let line = "--embedded: the embedded server speaks plain http; change url";
    complains(Daemon::bare().args(["--embedded", "--url", "https://localhost", "--", "true"]), USAGE, line);
    let line = "--embedded: the embedded server has no path prefix; take /prefix off url";
    complains(Daemon::bare().args(["--embedded", "--url", "http://localhost/prefix", "--", "true"]), USAGE, line);
}

#[test]
fn a_prefetch_that_leaves_loops_idle_is_warned_of() {
    let run = |prefetch: &str| {
        let server = RawServer::start();
        let daemon = Daemon::bare().args(["--url", &server.url(), "--log-format", "json", "-t", "2", "-f", "2"]);
        server.refuse(daemon.args(["-p", prefetch, "--", "true"]), "no").1
    };
    let low = run("3");
    let warning = low.events().into_iter().find(|event| event["level"] == "WARN").unwrap();
    assert!(warning["message"].as_str().unwrap().starts_with("prefetch is below threads x fibers: "), "{warning}");
    assert_eq!((&warning["prefetch"], &warning["concurrency"], &warning["idle"]), (&3.into(), &4.into(), &1.into()));
    assert!(run("4").events().iter().all(|event| event["level"] == "INFO"));
}

#[test]
fn a_file_without_a_handler_is_shown_with_the_line_for_one() {
    let shipped = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/config/zizq-worker.toml")).unwrap();
    let line = shipped.lines().position(|line| line.starts_with("#exec = ")).unwrap() + 1;
    let rest = "the command to run for each job, or give it with --exec or ZIZQ_EXEC";
    let add = "exec = [\"CMD\", \"ARG\"] below";
    for (file, line, advice) in [
        (shipped.as_str(), line, "take the # off this line and name".to_owned()),
        ("\n[handler]\nstdin = 'job'\n", 2, format!("add {add} this line for")),
        ("url = 'http://127.0.0.1:1'\n", 1, format!("add [handler], and {add} it, for")),
        ("", 1, format!("add [handler], and {add} it, for")),
    ] {
        complains(
            Daemon::bare().config(file),
            CONFIG,
            &format!("DIR/zizq-worker.toml:{line}: no handler given; {advice} {rest}"),
        );
    }
}

#[test]
fn a_filter_that_would_silence_the_worker_is_a_mistake() {
    for (filter, suggested) in
        [("loud", "loud,info"), ("hyper=debug", "hyper=debug,info"), ("zizq-worker=debug", "zizq-worker=debug,info")]
    {
        let problem = format!("the worker would log nothing; add a level, like {suggested}");
        let line = format!("RUST_LOG: must be a level, or a filter like zizq_worker=debug (got {filter}: {problem})");
        refuse(Daemon::bare().env("RUST_LOG", filter).args(["--", "true"]), USAGE, &line);
    }
    for good in ["off", "debug", "zizq_worker::ack=debug", "zizq_worker=off", "myapp=debug,info"] {
        Daemon::bare().env("RUST_LOG", good).args(["--check", "--offline", "--", "true"]).run().assert_exit(0);
    }
}

#[test]
fn an_unknown_variable_is_warned_of_and_stops_nothing() {
    let server = RawServer::start();
    let daemon = Daemon::bare().args(["--url", &server.url(), "--log-format", "json", "--", "true"]);
    let daemon =
        ["ZIZQ_JOB_ID", "ZIZQ_RESULT_FILE", "ZIZQ_SOCKET"].iter().fold(daemon, |daemon, name| daemon.env(name, "x"));
    let daemon = daemon.env("ZIZQ_TREADS", "4").env("ZIZQ_XYLOPHONE", "s3cret").env("ZIZQ_EMPTY", "");
    let (_, finished) = server.refuse(daemon, "no");
    let warnings: Vec<_> = finished.events().into_iter().filter(|event| event["level"] == "WARN").collect();
    let [one, other] = &warnings[..] else { panic!("{warnings:#?}") };
    assert!(one["message"].as_str().unwrap().starts_with("variable is no setting and has no effect"), "{one}");
    assert_eq!((&one["variable"], &one["nearest"]), (&"ZIZQ_TREADS".into(), &"ZIZQ_THREADS".into()));
    assert_eq!((&other["variable"], other.get("nearest")), (&"ZIZQ_XYLOPHONE".into(), None));
    assert!(!finished.log.concat().contains("s3cret"));
}

#[test]
fn a_secret_in_a_file_must_be_readable_and_short() {
    let refused = |daemon: Daemon, problem: &str| {
        let daemon = daemon.handlers("[handler]\nexec = ['true']\nenv = { TOKEN = { file = '$DIR/token' } }");
        refuse(daemon, CONFIG, &format!("DIR/zizq-worker.toml:3: env.TOKEN: {problem}"));
    };
    refused(Daemon::bare(), "cannot read DIR/token: No such file or directory (os error 2)");
    let daemon = Daemon::bare();
    fs::create_dir(daemon.dir().join("token")).unwrap();
    refused(daemon, "cannot read DIR/token: it is not a regular file");
    for (contents, problem) in [("x".repeat(65 * 1024), "has more than 64 KiB"), ("a\0b".to_owned(), "has a zero byte")]
    {
        let daemon = Daemon::bare();
        daemon.file("token", &contents);
        refused(daemon, &format!("DIR/token {problem}"));
    }
    for bad in ["3", "{ path = 's3cret' }", "{ file = 3 }", "{ file = 's3cret', other = 1 }"] {
        let daemon = Daemon::bare().config(&format!("[handler]\nexec = ['true']\nenv = {{ TOKEN = {bad} }}"));
        let kind = if bad == "3" { "integer" } else { "table" };
        let problem = format!("env.TOKEN must be a string, or {{ file = \"PATH\" }} (got a value of type {kind})");
        refuse(daemon, CONFIG, &format!("DIR/zizq-worker.toml:3: {problem}"));
    }
}
