//! The warm handlers in `config/handlers` and `examples`, run both warm and spawned, with their real interpreters.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::handlers::has;
use crate::support::{Admin, Daemon, Finished, Running, Server, eventually, is_alive};

/// A card number with characters that some locales lack. Node's readline treats the last character as a line break.
const CARD: &str = "ä€😀\u{2028}";

struct Example {
    server: Server,
    path: PathBuf,
    /// The error type of a declined card in the handler's language.
    error_type: &'static str,
}

impl Example {
    fn of(path: PathBuf, error_type: &'static str) -> Self {
        Self { server: Server::start(), path, error_type }
    }

    fn start(&self, mode: &str) -> Running {
        let exec = format!("[handler]\nexec = ['{}']\nenv = {{ LC_ALL = 'C' }}", self.path.display());
        let daemon = Daemon::of(&self.server).config(&exec);
        daemon.args(["--mode", mode, "--admin-listen", "127.0.0.1:0"]).start()
    }

    fn charge(&self, card: &str) -> String {
        self.server.enqueue("q", "t", json!({"card": card, "cents": 1200}))
    }

    fn file_name(&self) -> &str {
        self.path.file_name().unwrap().to_str().unwrap()
    }

    fn runs_both_ways(&self) {
        self.runs_spawned();
        self.runs_warm();
        self.ends_by_sigterm_between_jobs();
    }

    fn runs_spawned(&self) {
        let done = self.charge(CARD);
        let running = self.start("spawn");
        self.server.wait_until_done(&done);
        let error = self.server.wait_for_error(&self.charge("0000"), 1);
        assert_eq!(error["error_type"], "ExitStatus");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(" exited with status 1: ") && message.contains("card declined"), "{error}");
        assert_printed(&running.stop());
    }

    fn runs_warm(&self) {
        let running = self.start("warm");
        let done = self.charge(CARD);
        self.server.wait_until_done(&done);
        let error = self.server.wait_for_error(&self.charge("0000"), 1);
        assert_eq!((&error["message"], &error["error_type"]), (&json!("card declined"), &json!(self.error_type)));
        self.server.wait_until_done(&self.charge("4242"));
        let processes = processes(&running);
        assert_eq!((processes.len(), &processes[0]["jobs"]), (1, &json!(3)), "{processes:?}");
        assert_eq!(processes[0]["handler"], self.file_name());
        let finished = running.stop();
        assert_printed(&finished);
        assert!(!finished.has("handler process has ended by itself"), "{:?}", finished.log);
        assert_eq!(finished.all("stderr"), [Value::Null; 0]);
    }

    /// Checks that a process dies of SIGTERM between jobs, that no job fails, and that another process takes over.
    fn ends_by_sigterm_between_jobs(&self) {
        let running = self.start("warm");
        self.server.wait_until_done(&self.charge("4242"));
        let pid = processes(&running)[0]["pid"].as_u64().unwrap();
        running.signal_process(pid.try_into().unwrap(), Signal::TERM);
        eventually("the end of the process", || (!is_alive(&pid.to_string())).then_some(()));
        self.server.wait_until_done(&self.charge("4242"));
        running.stop();
    }
}

fn processes(running: &Running) -> Vec<Value> {
    Admin::of(running).status()["handler_processes"].as_array().unwrap().clone()
}

#[track_caller]
fn assert_printed(finished: &Finished) {
    let printed = finished.all("stdout");
    let line = format!("charged 1200 cents to {CARD}");
    assert!(printed.iter().any(|event| event["line"] == line.as_str()), "{:?}", finished.log);
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config/handlers").join(name)
}

#[test]
fn the_warm_one_in_python() {
    if has("python3") {
        Example::of(script("warm.py"), "ValueError").runs_both_ways();
    }
}

#[test]
fn the_warm_one_in_ruby() {
    if has("ruby") {
        Example::of(script("warm.rb"), "ArgumentError").runs_both_ways();
    }
}

#[test]
fn the_warm_one_in_node() {
    if has("node") {
        Example::of(script("warm.mjs"), "RangeError").runs_both_ways();
    }
}

#[test]
fn the_warm_one_in_php() {
    if has("php") {
        Example::of(script("warm.php"), "DomainException").runs_both_ways();
    }
}

#[test]
fn the_warm_one_in_rust() {
    Example::of(built_example("warm_handler"), "HandleError").runs_both_ways();
}

/// Returns the path of a program in `examples`. Builds the program if it is missing or out of date, because `cargo test` builds
/// the examples only if no single test target is selected.
pub fn built_example(name: &str) -> PathBuf {
    let deps = std::env::current_exe().unwrap();
    let profile = deps.parent().unwrap().parent().unwrap();
    let (root, built) = (Path::new(env!("CARGO_MANIFEST_DIR")), profile.join("examples").join(name));
    let changed = |path: &Path| std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    if changed(&built) < changed(&root.join(format!("examples/{name}.rs"))) {
        build_example(name, root, profile);
    }
    built
}

fn build_example(name: &str, root: &Path, profile: &Path) {
    let mut cargo = Command::new(env!("CARGO"));
    cargo.args(["build", "--offline", "--quiet", "--example", name, "--target-dir"]);
    cargo.arg(Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap()).current_dir(root);
    if profile.ends_with("release") {
        cargo.arg("--release");
    }
    // Remove Cargo's variables, because build scripts that read them would otherwise run now, and again in the next build.
    let of_this_package = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];
    for (name, _) in std::env::vars_os() {
        if of_this_package.iter().any(|prefix| name.to_string_lossy().starts_with(prefix)) {
            cargo.env_remove(name);
        }
    }
    assert!(cargo.status().unwrap().success());
}

/// A script of more than 30 lines is unsuitable as an example.
#[test]
fn each_warm_script_has_at_most_30_lines() {
    for name in ["warm.py", "warm.rb", "warm.mjs", "warm.php"] {
        let lines = std::fs::read_to_string(script(name)).unwrap().lines().count();
        assert!(lines <= 30, "{name}: {lines}");
    }
}
