//! Tests that the example handlers in `config/handlers` work, and that the docs show these files.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::support::{Daemon, Finished, RawServer, Server, unused_address};

/// Reports whether a program is installed. If it is not, panics in CI, and prints a message elsewhere.
pub fn has(program: &str) -> bool {
    let mut version = Command::new(program);
    version.arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let found = version.status().is_ok_and(|status| status.success());
    if !found {
        assert!(std::env::var_os("CI").is_none(), "{program} is needed in CI");
        eprintln!("skipped: {program} is not installed");
    }
    found
}

/// An example handler, and a server for its jobs.
struct Example {
    server: Server,
    path: String,
}

impl Example {
    fn of(name: &str) -> Self {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("config/handlers").join(name);
        Self { server: Server::start(), path: path.to_str().unwrap().to_owned() }
    }

    fn daemon(&self) -> Daemon {
        Daemon::of(&self.server).config(&format!("[handler]\nexec = ['{}']\nkill_exit_codes = [100]", self.path))
    }

    fn succeed(&self, payload: Value) -> Finished {
        let id = self.server.enqueue("q", "t", payload);
        let running = self.daemon().start();
        self.server.wait_until_done(&id);
        running.stop()
    }

    /// Runs a job that fails. Returns the job as the server then shows it, and the reported error.
    fn fail(&self, payload: Value) -> (Value, Value) {
        let id = self.server.enqueue("q", "t", payload);
        let running = self.daemon().start();
        let error = self.server.wait_for_error(&id, 1);
        running.stop();
        (self.server.job(&id).unwrap(), error)
    }
}

/// Returns the milliseconds from a failure to the retry.
fn wait(job: &Value, error: &Value) -> i64 {
    job["ready_at"].as_i64().unwrap() - error["failed_at"].as_i64().unwrap()
}

#[test]
fn the_docs_show_them_as_they_are() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let docs =
        ["handlers.md", "warm-handlers.md"].map(|page| fs::read_to_string(root.join("docs").join(page)).unwrap());
    let docs = docs.concat();
    for entry in fs::read_dir(root.join("config/handlers")).unwrap() {
        let path = entry.unwrap().path();
        let (name, text) = (path.file_name().unwrap().to_str().unwrap(), fs::read_to_string(&path).unwrap());
        let is_shown = docs.contains(&format!("\n{text}```\n"));
        let is_linked = docs.contains(&format!("(../config/handlers/{name})"));
        // The docs show only one of the warm handlers, `warm.py`. The others do the same in other languages.
        assert!(is_linked && (is_shown || (name.starts_with("warm.") && name != "warm.py")), "{name}");
    }
}

#[test]
fn the_one_in_sh() {
    if !has("curl") {
        return;
    }
    let example = Example::of("retry.sh");
    let site = RawServer::start();
    let url = site.url();
    let answering = std::thread::spawn(move || site.request().answer("200 OK", "hello"));
    example.succeed(json!(url));
    answering.join().unwrap();

    let (job, error) = example.fail(json!(format!("http://{}/", unused_address())));
    assert_eq!(error["error_type"], "SiteBusy");
    assert!(error["message"].as_str().unwrap().starts_with("retry.sh exited with status 1: curl: "), "{error}");
    assert!((wait(&job, &error) - 300_000).abs() < 10_000, "{job}");

    let (job, error) = example.fail(json!("--help"));
    assert_eq!(
        (&job["status"], &error["message"]),
        (&json!("dead"), &json!("retry.sh exited with status 100: not an address: --help"))
    );
}

#[test]
fn the_one_in_python() {
    if !has("python3") {
        return;
    }
    let example = Example::of("retry.py");
    let finished = example.succeed(json!({"card": "4242", "cents": 1200}));
    assert_eq!(finished.event("stdout")["line"], "charged 1200 cents to 4242");

    let (job, error) = example.fail(json!({"card": "0000", "cents": 1}));
    assert_eq!((&error["error_type"], &error["message"]), (&json!("BankBusy"), &json!("the bank is busy")));
    assert!(error["backtrace"].as_str().unwrap().starts_with("Traceback"), "{error}");
    assert!((wait(&job, &error) - 90_000).abs() < 10_000, "{job}");

    let (job, error) = example.fail(json!({"card": "4242"}));
    assert_eq!((&job["status"], &error["error_type"]), (&json!("dead"), &json!("KeyError")));
}

#[test]
fn the_one_in_node() {
    if !has("node") {
        return;
    }
    let example = Example::of("retry.mjs");
    let finished = example.succeed(json!({"to": "ann@example.org", "not_before": "2020-01-31T08:00:00Z"}));
    assert_eq!(finished.event("stdout")["line"], "attempt 1: sent to ann@example.org");

    let (job, error) = example.fail(json!({"to": "ann@example.org", "not_before": "2030-01-31T08:00:00Z"}));
    assert_eq!((&job["ready_at"], &error["error_type"]), (&json!(1_896_076_800_000_u64), &json!("TooEarly")));

    let (job, error) = example.fail(json!({}));
    assert_eq!((&job["status"], &error["message"]), (&json!("dead"), &json!("not an address: undefined")));
}
