//! `config/zizq-worker.toml` and the fault table in `docs/reliability.md` agree with the code.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;
use zizq_worker::cli::Args;
use zizq_worker::config::{
    DEFAULT_FIBERS, DEFAULT_MAX_JOB_SIZE, DEFAULT_RETRY_MAX_WAIT, DEFAULT_RETRY_MIN_WAIT, DEFAULT_RETRY_MULTIPLIER,
    DEFAULT_SHUTDOWN_DEADLINE, DEFAULT_STREAM_IDLE_TIMEOUT, DEFAULT_THREADS, DEFAULT_URL, LogFormat, LogLevels, Reload,
};
use zizq_worker::handler::{DEFAULT_KILL_GRACE, Stdin};
use zizq_worker::{Backoff, Config, Output};

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/zizq-worker.toml")
}

fn text() -> String {
    fs::read_to_string(path()).unwrap()
}

/// Resolves the settings from a configuration file and from the flags in `args`.
fn load(file: &Path, args: &[&str]) -> Config {
    let argv =
        ["zizq-worker", "--config", file.to_str().unwrap()].into_iter().chain(args.iter().copied()).map(OsString::from);
    Config::resolve(&Args::try_parse_from(argv).unwrap()).unwrap()
}

/// Reports whether a line is a commented-out setting or table header, such as `#key = value` or `#[table]`. A line of prose has a
/// space after `#`.
fn is_commented_setting(line: &str) -> bool {
    line.starts_with('#') && (line.contains(" = ") || line.starts_with("#[")) && !line.starts_with("# ")
}

fn uncommented() -> String {
    let lines = text()
        .lines()
        .map(|line| if is_commented_setting(line) { &line[1..] } else { line }.to_owned())
        .collect::<Vec<_>>();
    lines.join("\n")
}

/// A non-default value for each worker setting that a reload can change.
const RELOADED: &str = "
url = 'http://other.example.org:1'
[worker]
queues = ['other']
prefetch = 99
stream_idle_timeout = '99s'
max_job_size = '99MiB'
threads = 7
";

#[test]
fn a_reload_takes_over_the_settings_as_declared() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("zizq-worker.toml");
    fs::write(&file, RELOADED).unwrap();
    let (running, mut reloaded) = (load(&path(), &["--", "true"]), load(&file, &["--", "true"]));
    let before = running.settings();
    reloaded.take_over(&running.worker);
    for now in reloaded.settings().iter().filter(|now| now.name.starts_with("worker.") || now.name == "url") {
        let before = before.iter().find(|setting| setting.name == now.name).unwrap();
        let is_changed = now.value != before.value;
        let name = &now.name;
        assert_eq!(is_changed, now.reload != Reload::Restart, "{name} after a reload: see RELOADED, Config::take_over");
    }
}

#[test]
fn every_value_in_the_example_is_the_default() {
    let Config { worker, log, .. } = load(&path(), &["--", "true"]);
    // Read the url from the file's text, because `ZIZQ_URL` overrides the setting when the tests use a real server.
    assert_eq!(text().parse::<toml::Table>().unwrap()["url"].as_str(), Some(DEFAULT_URL));
    assert_eq!(worker.queues, [""; 0]);
    assert_eq!((worker.threads, worker.fibers), (DEFAULT_THREADS, DEFAULT_FIBERS));
    let backoff = Backoff::try_new(DEFAULT_RETRY_MIN_WAIT, DEFAULT_RETRY_MAX_WAIT, DEFAULT_RETRY_MULTIPLIER);
    assert_eq!(worker.backoff, backoff.unwrap());
    assert_eq!(worker.shutdown_deadline, DEFAULT_SHUTDOWN_DEADLINE);
    assert_eq!(worker.stream_limits.idle_timeout, DEFAULT_STREAM_IDLE_TIMEOUT);
    assert_eq!(worker.stream_limits.max_job_size, DEFAULT_MAX_JOB_SIZE);
    assert_eq!(log.level, LogLevels::default());
    assert_eq!((log.format, worker.exit_when_idle), (None, None));
}

#[test]
fn commented_out_settings_are_accepted_when_uncommented() {
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("zizq-worker.toml");
    // Drop the TLS settings, because the files that they name do not exist here, and because the url is http.
    let without_tls: Vec<String> =
        uncommented().lines().filter(|line| !line.contains("/etc/zizq/")).map(str::to_owned).collect();
    fs::write(&file, without_tls.join("\n")).unwrap();
    let Config { worker, handlers, log, .. } = load(&file, &[]);
    let handler = handlers.default.unwrap();
    assert_eq!(handler.program.file_name(), "cat");
    assert_eq!((handler.stdin, handler.output), (Stdin::Payload, Output::Log));
    assert_eq!(handler.kill_grace, DEFAULT_KILL_GRACE);
    assert!(handlers.routes.contains_key("send_email"));
    assert_eq!(worker.prefetch.get(), 2 * DEFAULT_THREADS.get() * DEFAULT_FIBERS.get());
    assert_eq!(worker.exit_when_idle, Some(Duration::from_secs(600)));
    assert_eq!(worker.worker_id.to_string(), "mailer-1");
    assert_eq!(log.format, Some(LogFormat::Compact));
}

/// Each test name in the fault table is the beginning of an existing test's name.
#[test]
fn the_tests_that_the_fault_table_names_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let page = fs::read_to_string(root.join("docs/reliability.md")).unwrap();
    let names: Vec<(&str, &str)> = page.split('`').filter_map(|text| text.split_once("::")).collect();
    assert!(names.len() > 15, "{names:?}");
    for (file, name) in names {
        let tests = fs::read_to_string(root.join(format!("tests/it/{file}.rs"))).unwrap();
        assert!(
            tests.contains(&format!("#[test]\nfn {}", name.trim_end_matches('…'))) || name == "soak",
            "{file}::{name}"
        );
    }
}
