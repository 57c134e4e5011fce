//! The library runs a worker inside the user's program, without child processes.

use std::fs;
use std::num::NonZeroUsize;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use zizq_worker::{
    Connector, Dispatcher, Ended, Failure, Job, Lifecycle, Outcome, Phase, Summary, Worker, WorkerConfig, WorkerError,
};

use crate::support::{Api, Call, PATIENCE, Proxy, RawServer, Server, eventually, runtime};
use crate::warm_handlers::built_example;

/// A dispatcher that chooses the outcome by the job's type, and records the payloads.
#[derive(Debug, Clone, Default)]
struct Obedient {
    payloads: Arc<Mutex<Vec<String>>>,
    endless: Arc<AtomicUsize>,
}

impl Dispatcher for Obedient {
    async fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> Ended {
        self.payloads.lock().unwrap().push(String::from_utf8(job.payload.to_vec()).unwrap());
        let outcome = match job.job_type.as_str() {
            "succeed" => Outcome::Success,
            "fail" => Outcome::Failure(Failure::new("Oddity", "odd").with_backtrace("here\nthere".to_owned())),
            "panic" => panic!("oh no"),
            "endless" => {
                self.endless.fetch_add(1, Ordering::Relaxed);
                lifecycle.reached(Phase::Killing).await;
                Outcome::Interrupted
            }
            other => panic!("no such type: {other}"),
        };
        outcome.into()
    }
}

fn worker(server: &Api, dispatcher: &Obedient) -> Arc<Worker<Obedient>> {
    let config = WorkerConfig {
        url: server.url.parse().unwrap(),
        fibers: NonZeroUsize::new(2).unwrap(),
        prefetch: NonZeroUsize::new(4).unwrap(),
        ..WorkerConfig::default()
    };
    Arc::new(Worker::new(config, dispatcher.clone()))
}

type Run = JoinHandle<Result<Summary, WorkerError>>;

fn run(worker: &Arc<Worker<Obedient>>, lifecycle: &Lifecycle) -> Run {
    let (worker, lifecycle) = (Arc::clone(worker), lifecycle.clone());
    runtime().spawn(async move { worker.run(&lifecycle).await })
}

/// Starts a worker that runs one endless job. Returns the run and the job's id.
fn run_an_endless_job(server: &Server, lifecycle: &Lifecycle) -> (Run, String) {
    let dispatcher = Obedient::default();
    let running = run(&worker(server, &dispatcher), lifecycle);
    let id = server.enqueue("q", "endless", json!(null));
    eventually("the job's start", || (dispatcher.endless.load(Ordering::Relaxed) == 1).then_some(()));
    (running, id)
}

fn ended(run: Run) -> Result<Summary, WorkerError> {
    runtime().block_on(async { tokio::time::timeout(PATIENCE, run).await }).expect("the run's end").unwrap()
}

#[test]
fn a_dispatcher_of_ones_own_decides_how_jobs_end() {
    let server = Server::start();
    let dispatcher = Obedient::default();
    let lifecycle = Lifecycle::new();
    let running = run(&worker(&server, &dispatcher), &lifecycle);
    let good = server.enqueue("q", "succeed", json!({"n": 1}));
    server.wait_until_done(&good);
    let bad = server.enqueue("q", "fail", json!(2));
    let error = server.wait_for_error(&bad, 1);
    assert_eq!(error["message"], "odd");
    assert_eq!((&error["error_type"], &error["backtrace"]), (&json!("Oddity"), &json!("here\nthere")));
    lifecycle.stop();
    assert_eq!(
        ended(running).unwrap(),
        Summary { killed: false, succeeded: 1, failed: 1, interrupted: 0, ..Summary::default() }
    );
    assert_eq!(*dispatcher.payloads.lock().unwrap(), [r#"{"n":1}"#, "2"]);
}

#[test]
fn a_worker_goes_over_connections_that_the_program_supplies() {
    let server = Server::start();
    let address = server.url.trim_start_matches("http://").to_owned();
    let made = Arc::new(AtomicUsize::default());
    let counted = Arc::clone(&made);
    let connector = Connector::new(move |url| {
        assert_eq!(url.host(), "nowhere.invalid");
        counted.fetch_add(1, Ordering::Relaxed);
        TcpStream::connect(address.clone())
    });
    let config = WorkerConfig { url: "http://nowhere.invalid".parse().unwrap(), connector, ..WorkerConfig::default() };
    let lifecycle = Lifecycle::new();
    let running = run(&Arc::new(Worker::new(config, Obedient::default())), &lifecycle);
    // The request for the server's version opens the connection for reports. Wait for this connection, because a report during the
    // version request would open a third connection.
    eventually("both connections", || (made.load(Ordering::Relaxed) == 2).then_some(()));
    let id = server.enqueue("q", "succeed", json!(null));
    server.wait_until_done(&id);
    lifecycle.stop();
    assert_eq!(ended(running).unwrap().succeeded, 1);
    // One connection is for the stream, the other for the reports.
    assert_eq!(made.load(Ordering::Relaxed), 2);
}

#[test]
fn a_worker_can_run_again() {
    let server = Server::start();
    let worker = worker(&server, &Obedient::default());
    for _ in 0..3 {
        let lifecycle = Lifecycle::new();
        let running = run(&worker, &lifecycle);
        let id = server.enqueue("q", "succeed", json!(null));
        server.wait_until_done(&id);
        lifecycle.stop();
        assert_eq!(ended(running).unwrap().succeeded, 1);
    }
}

#[test]
fn two_workers_run_at_once_in_one_process() {
    let server = Server::start();
    let (first, second) = (Lifecycle::new(), Lifecycle::new());
    let worker = worker(&server, &Obedient::default());
    let runs = [run(&worker, &first), run(&worker, &second)];
    server.enqueue_all(vec![json!({"queue": "q", "type": "succeed", "payload": null}); 50]);
    eventually("all jobs done", || (server.count("ready,in_flight") == 0).then_some(()));
    first.stop();
    let id = server.enqueue("q", "succeed", json!(null));
    server.wait_until_done(&id);
    second.stop();
    assert_eq!(runs.map(|run| ended(run).unwrap().succeeded).iter().sum::<u64>(), 51);
}

#[test]
fn a_run_can_be_stopped_from_another_thread() {
    let server = Server::start();
    let lifecycle = Lifecycle::new();
    let running = run(&worker(&server, &Obedient::default()), &lifecycle);
    std::thread::spawn(move || lifecycle.stop()).join().unwrap();
    assert!(!ended(running).unwrap().killed);
}

#[test]
fn a_run_can_be_killed_from_another_thread() {
    let (server, lifecycle) = (Server::start(), Lifecycle::new());
    let (running, id) = run_an_endless_job(&server, &lifecycle);
    std::thread::spawn(move || lifecycle.kill()).join().unwrap();
    assert_eq!(
        ended(running).unwrap(),
        Summary { killed: true, succeeded: 0, failed: 0, interrupted: 1, ..Summary::default() }
    );
    assert_eq!(server.wait_for_status(&id, "ready")["attempts"], 0);
}

#[test]
fn a_run_stopped_before_its_start_takes_nothing() {
    let server = Server::start();
    let proxy = Proxy::before(&server);
    let lifecycle = Lifecycle::new();
    lifecycle.stop();
    assert_eq!(ended(run(&worker(&proxy, &Obedient::default()), &lifecycle)).unwrap().succeeded, 0);
    assert_eq!(proxy.calls(Call::Take).len(), 0);
}

#[test]
fn a_dispatcher_that_panics_fails_its_job_and_nothing_else() {
    let server = Server::start();
    let lifecycle = Lifecycle::new();
    let running = run(&worker(&server, &Obedient::default()), &lifecycle);
    // Enqueue more jobs than the worker has loops, so that the test fails if a panic ends a loop.
    let bad = server.enqueue_all(vec![json!({"queue": "q", "type": "panic", "payload": null}); 5]);
    for id in &bad {
        let error = server.wait_for_error(id, 1);
        assert_eq!(
            (&error["error_type"], &error["message"]),
            (&json!("Panic"), &json!("the dispatcher panicked: oh no"))
        );
    }
    let good = server.enqueue("q", "succeed", json!(null));
    server.wait_until_done(&good);
    lifecycle.stop();
    assert_eq!(
        ended(running).unwrap(),
        Summary { killed: false, succeeded: 1, failed: 5, interrupted: 0, ..Summary::default() }
    );
}

#[test]
fn a_refusal_of_the_first_request_is_the_error_of_the_run() {
    let server = RawServer::start();
    let running = run(&worker(&Api::new(server.url()), &Obedient::default()), &Lifecycle::new());
    server.request().answer("403 Forbidden", r#"{"error":"who are you?"}"#);
    let error = ended(running).unwrap_err().to_string();
    assert!(error.ends_with("403 Forbidden: who are you?"), "{error}");
}

#[test]
fn a_run_that_is_dropped_gives_its_jobs_back() {
    let (server, lifecycle) = (Server::start(), Lifecycle::new());
    let (running, id) = run_an_endless_job(&server, &lifecycle);
    running.abort();
    let job: Value = server.wait_for_status(&id, "ready");
    assert_eq!(job["attempts"], 0);
}

#[test]
fn the_example_runs_its_own_jobs_and_those_of_a_server() {
    let run = |argument: Option<&str>| {
        let output = Command::new(built_example("library_worker")).args(argument).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(run(None), "sent to ann@example.org\n1 succeeded, 2 failed\n");
    let server = Server::start();
    let id = server.enqueue("mail", "send_email", json!({"to": "bob@example.org"}));
    assert_eq!(run(Some(&server.url)), "sent to bob@example.org\n1 succeeded, 0 failed\n");
    server.wait_until_done(&id);
}

/// Each Rust block in `docs/library.md` is part of the example program, or of a doc comment that the doc tests compile.
#[test]
fn the_page_shows_code_that_compiles() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap();
    let tested =
        read("examples/library_worker.rs") + &read("src/client/connector.rs").replace("/// ", "").replace("///", "");
    let page = read("docs/library.md");
    let blocks: Vec<&str> = page.split("```rust\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(blocks.len() >= 3, "{blocks:?}");
    for block in blocks {
        assert!(tested.contains(block), "not in the example:\n{block}");
    }
}
