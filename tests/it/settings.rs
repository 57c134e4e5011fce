//! Each setting comes from its flag, else its variable, else the file, else its default. The tests observe the effect of each
//! setting from outside.

use std::ffi::OsString;

use serde_json::{Value, json};
use zizq_worker::Config;
use zizq_worker::cli::Args;
use zizq_worker::config::{DEFAULT_MAX_JOB_SIZE, DEFAULT_SHUTDOWN_DEADLINE, DEFAULT_STREAM_IDLE_TIMEOUT};

use crate::support::{Daemon, Finished, RawServer, Server, eventually, jobs, unused_address};

/// An address on which no server listens.
const NOWHERE: &str = "http://127.0.0.1:1";

/// A setting with a value from each source, and the values that a test observes from outside.
struct Setting {
    flag: &'static str,
    variable: &'static str,
    key: &'static str,
    /// The values on the command line, in the variable, and in the file.
    given: [&'static str; 3],
    /// The values that the test observes: with all three sources, without the flag, and with only the file.
    seen: [&'static str; 3],
    default: Option<&'static str>,
    see: fn(Daemon) -> String,
}

impl Setting {
    #[track_caller]
    fn check(self) {
        let Self { flag, variable, key, given: [by_flag, by_variable, in_file], seen, default, see } = self;
        let file = format!("{key} = {in_file}");
        let everywhere = Daemon::bare().config(&file).env(variable, by_variable).args([flag, by_flag]);
        assert_eq!(see(everywhere), seen[0], "{flag} wins over {variable}");
        assert_eq!(see(Daemon::bare().config(&file).env(variable, by_variable)), seen[1], "{variable} wins over {key}");
        assert_eq!(see(Daemon::bare().config(&file)), seen[2], "{key} wins over the default");
        assert_eq!(see(Daemon::bare().config(&file).env(variable, "")), seen[2], "an empty {variable} is none");
        if let Some(default) = default {
            assert_eq!(see(Daemon::bare()), default, "default of {flag}");
        }
    }
}

/// Returns the settings that the daemon logs at its start. The daemon finds no server.
fn starting(daemon: Daemon) -> Value {
    started(daemon.args(["--url", NOWHERE]))
}

fn started(daemon: Daemon) -> Value {
    let running = daemon.args(["--log-format", "json", "--log-level", "info", "--", "true"]).start();
    running.wait_for_message("worker starting")
}

fn text(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

#[test]
fn url() {
    Setting {
        flag: "--url",
        variable: "ZIZQ_URL",
        key: "url",
        given: ["http://127.0.0.1:1/flag", "http://127.0.0.1:1/variable/", "'http://127.0.0.1:1'"],
        seen: ["http://127.0.0.1:1/flag", "http://127.0.0.1:1/variable", "http://127.0.0.1:1"],
        default: Some("http://localhost:7890"),
        // Use a queue without jobs, because a real server can run at the default address.
        see: |daemon| text(&started(daemon.args(["--queues", "zizq-worker-tests-nothing"]))["url"]),
    }
    .check();
}

#[test]
fn a_path_prefix_of_the_url_is_kept() {
    let server = RawServer::start();
    let daemon = Daemon::bare().args(["--url", &format!("{}/queue/", server.url()), "--", "true"]);
    assert_eq!(server.refuse(daemon, "no").0.lines().next().unwrap(), "GET /queue/jobs/take?prefetch=2 HTTP/1.1");
}

#[test]
fn proxy_variables_have_no_effect() {
    let server = RawServer::start();
    let daemon = ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"]
        .iter()
        .fold(Daemon::bare(), |daemon, name| daemon.env(name, "http://127.0.0.1:1"));
    server.refuse(daemon.args(["--url", &server.url(), "--", "true"]), "no");
    assert!(!server.has_connection());
}

#[test]
fn queues() {
    Setting {
        flag: "--queues",
        variable: "ZIZQ_QUEUES",
        key: "worker.queues",
        given: ["a,b", "c, d", "['e', ' f ']"],
        seen: ["a,b", "c,d", "e,f"],
        default: Some("(all)"),
        see: |daemon| text(&starting(daemon)["queues"]),
    }
    .check();
}

#[test]
fn queues_may_be_repeated_and_are_split_and_trimmed() {
    let daemon = Daemon::bare().args(["--queues", " a , b", "--queue", "c", "-q", "d"]);
    assert_eq!(starting(daemon)["queues"], "a,b,c,d");
    assert_eq!(starting(Daemon::bare().config("worker.queues = ' x, y'"))["queues"], "x,y");
    assert_eq!(starting(Daemon::bare().config("worker.queues = []"))["queues"], "(all)");
    assert_eq!(starting(Daemon::bare().config("worker.queues = ['a']").env("ZIZQ_QUEUES", ""))["queues"], "a");
}

#[test]
fn the_server_is_asked_for_the_queues_by_their_encoded_names() {
    let server = RawServer::start();
    let daemon = Daemon::bare().args(["--url", &server.url(), "-q", "mail & more,größe", "-p", "3", "--", "true"]);
    assert_eq!(
        server.refuse(daemon, "no").0.lines().next().unwrap(),
        "GET /jobs/take?prefetch=3&queue=mail%20%26%20more,gr%C3%B6%C3%9Fe HTTP/1.1"
    );
}

#[test]
fn threads() {
    Setting {
        flag: "--threads",
        variable: "ZIZQ_THREADS",
        key: "worker.threads",
        given: ["2", "3", "4"],
        seen: ["2", "3", "4"],
        default: Some("1"),
        see: |daemon| text(&starting(daemon)["threads"]),
    }
    .check();
}

#[test]
fn fibers() {
    Setting {
        flag: "--fibers",
        variable: "ZIZQ_FIBERS",
        key: "worker.fibers",
        given: ["2", "3", "4"],
        seen: ["2", "3", "4"],
        default: Some("1"),
        see: |daemon| text(&starting(daemon)["fibers"]),
    }
    .check();
}

#[test]
fn prefetch() {
    Setting {
        flag: "--prefetch",
        variable: "ZIZQ_PREFETCH",
        key: "worker.prefetch",
        given: ["7", "8", "9"],
        seen: ["7", "8", "9"],
        default: Some("2"),
        see: |daemon| text(&starting(daemon)["prefetch"]),
    }
    .check();
}

#[test]
fn prefetch_is_two_jobs_for_each_loop_by_default() {
    assert_eq!(starting(Daemon::bare().args(["-t", "3", "-f", "4"]))["prefetch"], 24);
    assert_eq!(starting(Daemon::bare().args(["-t", "3", "-f", "4", "-p", "13"]))["prefetch"], 13);
}

/// Returns the daemon's wait before its nth attempt to reconnect, as one of the `possible` waits in seconds. The wait in the log
/// is up to a quarter longer, because of the jitter.
fn wait(daemon: Daemon, nth: usize, possible: &[f64]) -> String {
    let running = daemon.args(["--url", NOWHERE, "--log-format", "json", "--", "true"]).start();
    let waits = |log: &[String]| -> Vec<f64> {
        let events = log.iter().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let waits = events.filter_map(|event| event["reconnect_in"].as_str().map(str::to_owned));
        waits.map(|wait| wait.trim_end_matches('s').parse().unwrap()).collect()
    };
    running.wait_for("the wait", |_| waits(&running.log()).len() >= nth);
    let found = waits(&running.log())[nth - 1];
    let fits = possible.iter().find(|wait| (**wait..=**wait * 1.25 + 0.01).contains(&found));
    fits.map_or(format!("{found}"), f64::to_string)
}

#[test]
fn retry_min_wait() {
    Setting {
        flag: "--retry-min-wait",
        variable: "ZIZQ_RETRY_MIN_WAIT",
        key: "worker.retry_min_wait",
        given: ["100ms", "0.2", "'400 ms'"],
        seen: ["0.1", "0.2", "0.4"],
        default: Some("1"),
        see: |daemon| wait(daemon, 1, &[0.1, 0.2, 0.4, 1.0]),
    }
    .check();
}

#[test]
fn retry_max_wait() {
    Setting {
        flag: "--retry-max-wait",
        variable: "ZIZQ_RETRY_MAX_WAIT",
        key: "worker.retry_max_wait",
        given: ["1m 40s", "200", "400"],
        seen: ["100", "200", "400"],
        default: Some("30"),
        see: |daemon| {
            let greedy = daemon.args(["--retry-min-wait", "10ms", "--retry-multiplier", "1e6"]);
            wait(greedy, 2, &[30.0, 100.0, 200.0, 400.0])
        },
    }
    .check();
}

#[test]
fn retry_multiplier() {
    Setting {
        flag: "--retry-multiplier",
        variable: "ZIZQ_RETRY_MULTIPLIER",
        key: "worker.retry_multiplier",
        given: ["4", "8.0", "16"],
        seen: ["0.4", "0.8", "1.6"],
        default: Some("0.2"),
        see: |daemon| wait(daemon.args(["--retry-min-wait", "100ms"]), 2, &[0.2, 0.4, 0.8, 1.6]),
    }
    .check();
}

#[test]
fn shutdown_deadline() {
    Setting {
        flag: "--shutdown-deadline",
        variable: "ZIZQ_SHUTDOWN_DEADLINE",
        key: "worker.shutdown_deadline",
        given: ["10ms", "0.02", "0.03"],
        seen: ["10ms", "20ms", "30ms"],
        // The default is too long to wait for. It is checked below.
        default: None,
        see: deadline,
    }
    .check();
    assert_eq!(deadline(Daemon::bare().args(["--shutdown-timeout", "40ms"])), "40ms");
    assert_eq!(resolve(&["--exec", "true"]).worker.shutdown_deadline, DEFAULT_SHUTDOWN_DEADLINE);
}

/// Returns the shutdown deadline that the daemon logs when it kills a job.
fn deadline(daemon: Daemon) -> String {
    let server = Server::start();
    server.enqueue("mail", "endless", json!(null));
    let endless = daemon.sh("echo > $DIR/running; exec sleep 600");
    let running = endless.args(["--url", &server.url, "--log-format", "json"]).start();
    running.wait_for_file("running");
    running.sigterm();
    text(&running.assert_exit(1).event("shutdown deadline reached: killing what still runs")["deadline"])
}

#[test]
fn max_jobs() {
    Setting {
        flag: "--max-jobs",
        variable: "ZIZQ_MAX_JOBS",
        key: "worker.max_jobs",
        given: ["1", "2", "3"],
        seen: ["1", "2", "3"],
        default: Some("5"),
        see: |daemon| {
            let server = Server::start();
            server.enqueue_all(jobs(5));
            let daemon = daemon.args(["--url", &server.url, "--log-format", "json", "--exit-when-idle", "100ms"]);
            let finished = daemon.args(["--", "true"]).run().assert_exit(0);
            text(&finished.event("worker stopped")["succeeded"])
        },
    }
    .check();
}

#[test]
fn max_time() {
    Setting {
        flag: "--max-time",
        variable: "ZIZQ_MAX_TIME",
        key: "worker.max_time",
        given: ["10ms", "0.02", "'30ms'"],
        seen: ["10ms", "20ms", "30ms"],
        default: None,
        see: |daemon| {
            let server = Server::start();
            let finished = daemon.args(["--url", &server.url, "--log-format", "json", "--", "true"]).run();
            text(&finished.assert_exit(0).event("max_time is over: draining")["limit"])
        },
    }
    .check();
    assert_eq!(resolve(&["--exec", "true"]).worker.max_time, None);
}

#[test]
fn admin_listen() {
    let [flag, variable, file] = [(); 3].map(|()| unused_address().to_string());
    let listening = |daemon: Daemon| {
        let running = daemon.args(["--url", NOWHERE, "--log-format", "json", "--", "true"]).start();
        text(&running.wait_for_message("admin server listening")["address"])
    };
    let daemon = || Daemon::bare().config(&format!("admin.listen = '{file}'"));
    assert_eq!(listening(daemon().env("ZIZQ_ADMIN_LISTEN", &variable).args(["--admin-listen", &flag])), flag);
    assert_eq!(listening(daemon().env("ZIZQ_ADMIN_LISTEN", &variable)), variable);
    assert_eq!(listening(daemon()), file);
    assert!(resolve(&["--exec", "true"]).admin.is_none());
}

#[test]
fn exit_when_idle() {
    Setting {
        flag: "--exit-when-idle",
        variable: "ZIZQ_EXIT_WHEN_IDLE",
        key: "worker.exit_when_idle",
        given: ["10ms", "0.02", "'30ms'"],
        seen: ["10ms", "20ms", "30ms"],
        default: None,
        see: |daemon| {
            let server = Server::start();
            let finished = daemon.args(["--url", &server.url, "--log-format", "json", "--", "true"]).run();
            text(&finished.assert_exit(0).event("no job for that long: draining")["limit"])
        },
    }
    .check();
    assert_eq!(resolve(&["--exec", "true"]).worker.exit_when_idle, None);
}

#[test]
fn stream_idle_timeout() {
    Setting {
        flag: "--stream-idle-timeout",
        variable: "ZIZQ_STREAM_IDLE_TIMEOUT",
        key: "worker.stream_idle_timeout",
        given: ["10ms", "0.02", "'30ms'"],
        seen: ["nothing came for 10ms", "nothing came for 20ms", "nothing came for 30ms"],
        // The default is too long to wait for. It is checked below.
        default: None,
        see: |daemon| {
            let server = RawServer::start();
            let running = daemon.args(["--url", &server.url(), "--log-format", "json", "--", "true"]).start();
            let _silent = server.take();
            text(&running.wait_for_message("stream lost, reconnecting")["error"])
        },
    }
    .check();
    let limits = resolve(&["--exec", "true"]).worker.stream_limits;
    assert_eq!(limits.idle_timeout, DEFAULT_STREAM_IDLE_TIMEOUT);
}

#[test]
fn max_job_size() {
    Setting {
        flag: "--max-job-size",
        variable: "ZIZQ_MAX_JOB_SIZE",
        key: "worker.max_job_size",
        given: ["2KiB", "4096", "'8 KiB'"],
        seen: ["up to 2 KiB", "up to 4 KiB", "up to 8 KiB"],
        default: Some("more"),
        see: largest_job,
    }
    .check();
    assert_eq!(resolve(&["--exec", "true"]).worker.stream_limits.max_job_size, DEFAULT_MAX_JOB_SIZE);
}

/// Returns the size of the largest job that the daemon accepts.
fn largest_job(daemon: Daemon) -> String {
    let server = Server::start();
    let payload = |kib: usize| json!({"queue": "q", "type": "t", "payload": "x".repeat(kib * 1024 - 512)});
    let ids = server.enqueue_all([1, 2, 4, 8].map(|kib| payload(2 * kib)));
    let _running = daemon.args(["--url", &server.url, "--log-format", "json"]).sh("cat > /dev/null").start();
    let accepted = |id: &String| {
        let refused = server.errors(id).first().map(|error| error["error_type"] == "MalformedJob");
        if server.job(id).is_none() { Some(true) } else { refused.map(|refused| !refused) }
    };
    let accepted = ids.iter().filter(|id| eventually("the end of a job", || accepted(id))).count();
    ["none", "up to 2 KiB", "up to 4 KiB", "up to 8 KiB", "more"][accepted].to_owned()
}

#[test]
fn worker_id() {
    Setting {
        flag: "--worker-id",
        variable: "ZIZQ_WORKER_ID",
        key: "worker.worker_id",
        given: ["by flag", "by-variable", "'in-file'"],
        seen: ["by flag", "by-variable", "in-file"],
        default: Some("HOSTNAME-PID"),
        see: |daemon| {
            let server = RawServer::start();
            let running = daemon.args(["--url", &server.url(), "--", "true"]).start();
            let default = format!("{}-{}", gethostname::gethostname().display(), running.pid());
            let request = server.request();
            let seen = request.header("worker-id").unwrap().replace(&default, "HOSTNAME-PID");
            request.answer("400 Bad Request", "no");
            running.assert_exit(1);
            seen
        },
    }
    .check();
}

#[test]
fn exec() {
    Setting {
        flag: "--exec",
        variable: "ZIZQ_EXEC",
        key: "handler.exec",
        given: [
            "sh -c 'echo flag > \"$DIR\"/by'",
            "sh -c 'echo variable > \"$DIR\"/by'",
            "['sh', '-c', 'echo file > \"$DIR\"/by']",
        ],
        seen: ["flag\n", "variable\n", "file\n"],
        default: None,
        see: handler,
    }
    .check();
}

#[test]
fn exec_in_the_file_may_be_a_string() {
    assert_eq!(handler(Daemon::bare().config("[handler]\nexec = \"sh -c 'echo string > $DIR/by'\"")), "string\n");
}

#[test]
fn the_words_after_two_dashes_win_over_variable_and_file() {
    let daemon = Daemon::bare().config("handler.exec = 'false'").env("ZIZQ_EXEC", "false");
    let daemon =
        daemon.args(["--exit-when-idle", "60s", "--"]).args(["sh", "-c", "echo \"$0 $1\" > $DIR/by", "a b", "--c"]);
    assert_eq!(handler(daemon), "a b --c\n");
}

/// Returns the text that the daemon's handler writes into the file `by`.
fn handler(daemon: Daemon) -> String {
    let server = Server::start();
    server.enqueue("mail", "who", json!(null));
    daemon.env("ZIZQ_URL", &server.url).start().wait_for_file("by")
}

#[test]
fn a_handler_is_found_on_path_as_a_shell_would() {
    let daemon = Daemon::bare();
    let script = daemon.script("my-handler", "echo found > $DIR/by");
    let path = format!("/nonexistent:{}:/usr/bin:/bin", script.parent().unwrap().display());
    assert_eq!(handler(daemon.env("PATH", &path).args(["--exec", "my-handler"])), "found\n");
}

#[test]
fn a_handler_with_a_slash_is_a_path_from_here() {
    let daemon = Daemon::bare();
    let here = daemon.script("my-handler", "echo here > $DIR/by").parent().unwrap().to_owned();
    assert_eq!(handler(daemon.current_dir(&here).args(["--exec", "./my-handler"])), "here\n");
}

#[test]
fn config() {
    let keeper = Daemon::bare();
    let file = keeper.file("three.toml", "worker.threads = 3");
    let file = file.to_str().unwrap();
    let threads = |daemon: Daemon| starting(daemon)["threads"].clone();
    assert_eq!(threads(Daemon::bare().config("worker.threads = 2").env("ZIZQ_CONFIG", file)), 2);
    assert_eq!(threads(Daemon::bare().env("ZIZQ_CONFIG", file)), 3);
    assert_eq!(threads(Daemon::bare().args(["-c", file])), 3);
    assert_eq!(threads(Daemon::bare().env("ZIZQ_CONFIG", "")), 1);
}

#[test]
fn log_level() {
    Setting {
        flag: "--log-level",
        variable: "ZIZQ_LOG_LEVEL",
        key: "log.level",
        given: ["error", "WARN", "'debug'"],
        seen: ["ERROR", "ERROR WARN", "DEBUG ERROR INFO WARN"],
        default: Some("ERROR INFO WARN"),
        see: |daemon| levels(&failing(daemon.args(["--log-format", "json"]))),
    }
    .check();
}

#[test]
fn rust_log_wins_over_the_log_level() {
    let daemon = || Daemon::bare().args(["--log-format", "json", "--log-level", "info"]);
    assert_eq!(levels(&failing(daemon().env("RUST_LOG", "zizq_worker=error"))), "ERROR");
    assert_eq!(levels(&failing(daemon().env("RUST_LOG", "zizq_worker=debug"))), "DEBUG ERROR INFO WARN");
    assert_eq!(levels(&failing(daemon().env("RUST_LOG", "off"))), "");
    assert_eq!(levels(&failing(daemon().env("RUST_LOG", ""))), "ERROR INFO WARN");
}

/// Returns the levels in a log, in alphabetical order.
fn levels(finished: &Finished) -> String {
    let mut levels: Vec<String> = finished.events().iter().map(|event| text(&event["level"])).collect();
    levels.sort_unstable();
    levels.dedup();
    levels.join(" ")
}

/// Runs a job whose handler prints and fails, because that causes log messages of each level from debug to error.
fn failing(daemon: Daemon) -> Finished {
    let server = Server::start();
    let id = server.enqueue("mail", "fail", json!(null));
    let running = daemon.sh("echo oh no >&2; exit 3").args(["--url", &server.url]).start();
    server.wait_for_error(&id, 1);
    running.sigterm();
    running.assert_exit(0)
}

#[test]
fn log_format() {
    Setting {
        flag: "--log-format",
        variable: "ZIZQ_LOG_FORMAT",
        key: "log.format",
        given: ["json", "compact", "'pretty'"],
        seen: ["json", "compact", "pretty"],
        default: Some("compact"),
        see: |daemon| format_of(&failing(daemon)).to_owned(),
    }
    .check();
}

/// Returns the format of a log. A job's fields precede the message in pretty lines, and follow it in compact ones.
fn format_of(finished: &Finished) -> &'static str {
    let line = finished.log.iter().find(|line| line.contains("job failed")).unwrap();
    match (line.starts_with('{'), line.find("type=").unwrap_or(0) < line.find("job failed").unwrap()) {
        (true, _) => "json",
        (false, true) => "pretty",
        (false, false) => "compact",
    }
}

#[test]
fn short_flags_are_the_long_ones() {
    let short = resolve(&["-q", "a", "-t", "2", "-f", "3", "-p", "20", "--", "true"]).worker;
    let long = resolve(&["--queues=a", "--threads=2", "--fibers=3", "--prefetch=20", "--", "true"]).worker;
    assert_eq!(format!("{short:?}"), format!("{long:?}"));
}

/// Resolves a command line, with the environment of this process.
fn resolve(args: &[&str]) -> Config {
    let argv = ["zizq-worker"].iter().chain(args).map(OsString::from);
    Config::resolve(&Args::try_parse_from(argv).unwrap()).unwrap()
}

#[test]
fn the_version_can_be_asked_for_by_three_flags() {
    for flag in ["-V", "-v", "--version"] {
        let finished = Daemon::bare().args([flag]).run().assert_exit(0);
        assert_eq!(finished.stdout, format!("zizq-worker {}\n", env!("CARGO_PKG_VERSION")), "{flag}");
    }
}

#[test]
fn help_groups_the_flags_and_shows_variables_and_defaults() {
    let help = Daemon::bare().env("ZIZQ_THREADS", "999").args(["--help"]).run().assert_exit(0).stdout;
    for heading in ["Server:", "Handler:", "Worker:", "Retries:", "Operations:", "Logging:", "Trying it out:"] {
        assert!(help.lines().any(|line| line == heading), "{heading} in\n{help}");
    }
    let words = help.split_whitespace().collect::<Vec<_>>().join(" ");
    for (flag, variable, default) in HELP {
        let entry = &words[words.find(flag).unwrap_or_else(|| panic!("{flag} in\n{help}"))..];
        let entry = &entry[..entry[2..].find(" --").map_or(entry.len(), |end| end + 2)];
        assert!(entry.contains(&format!("[env: {variable}]")) && entry.contains(default), "{flag}: {entry}");
    }
    assert!(!help.contains("999"), "the present environment is nobody's help");
}

const HELP: [(&str, &str, &str); 23] = [
    ("--url <URL>", "ZIZQ_URL", "[default: http://localhost:7890]"),
    ("--tls-ca <FILE>", "ZIZQ_TLS_CA", "[default: those that the system trusts]"),
    ("--tls-client-cert <FILE>", "ZIZQ_TLS_CLIENT_CERT", ""),
    ("--tls-client-key <FILE>", "ZIZQ_TLS_CLIENT_KEY", ""),
    ("--stream-idle-timeout <DURATION>", "ZIZQ_STREAM_IDLE_TIMEOUT", "[default: 30s]"),
    ("--max-job-size <SIZE>", "ZIZQ_MAX_JOB_SIZE", "[default: 64.0 MiB]"),
    ("--queues <A,B>", "ZIZQ_QUEUES", "[default: all queues]"),
    ("--threads <N>", "ZIZQ_THREADS", "[default: 1]"),
    ("--fibers <N>", "ZIZQ_FIBERS", "[default: 1]"),
    ("--prefetch <N>", "ZIZQ_PREFETCH", "[default: 2 x threads x fibers]"),
    ("--retry-min-wait <DURATION>", "ZIZQ_RETRY_MIN_WAIT", "[default: 1s]"),
    ("--retry-max-wait <DURATION>", "ZIZQ_RETRY_MAX_WAIT", "[default: 30s]"),
    ("--retry-multiplier <X>", "ZIZQ_RETRY_MULTIPLIER", "[default: 2]"),
    ("--shutdown-deadline <DURATION>", "ZIZQ_SHUTDOWN_DEADLINE", "[default: 30s]"),
    ("--max-jobs <N>", "ZIZQ_MAX_JOBS", "[default: no limit]"),
    ("--max-time <DURATION>", "ZIZQ_MAX_TIME", "[default: no limit]"),
    ("--admin-listen <ADDRESS:PORT>", "ZIZQ_ADMIN_LISTEN", "[default: off]"),
    ("--exit-when-idle <DURATION>", "ZIZQ_EXIT_WHEN_IDLE", "[default: never]"),
    ("--worker-id <ID>", "ZIZQ_WORKER_ID", "[default: HOSTNAME-PID]"),
    ("--exec <CMD>", "ZIZQ_EXEC", ""),
    ("--config <FILE>", "ZIZQ_CONFIG", "[default: none]"),
    ("--log-level <LEVEL>", "ZIZQ_LOG_LEVEL", "[default: info]"),
    ("--log-format <FORMAT>", "ZIZQ_LOG_FORMAT", "[default: pretty on a terminal, else compact]"),
];
