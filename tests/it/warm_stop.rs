//! The stop of a worker with warm processes in each state.

use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use tempfile::TempDir;
use zizq_worker::handler::{Mode, PoolSettings};
use zizq_worker::{ExecDispatcher, Handler, Handlers, Lifecycle, Program, Worker, WorkerConfig};

use crate::support::{
    Daemon, Finished, RawServer, Server, Warm, assert_dead, eventually, is_alive, replace, runtime, wait_until_dead,
    warm_handler,
};

/// A time limit far above the duration of an immediate stop, and far below the timeouts that must not be waited for.
const AT_ONCE: Duration = Duration::from_secs(15);

/// A state in which a drain finds a warm process. The process and its child ignore SIGTERM.
struct State {
    name: &'static str,
    /// Code that runs before the process connects.
    before: &'static str,
    code: &'static str,
    /// Whether the job has ended in this state.
    is_done: bool,
}

const STATES: [State; 4] = [
    State {
        name: "starting",
        before: "ignore_term(); leave_child(); note('reached'); until('go')",
        code: "",
        is_done: false,
    },
    State {
        name: "idle",
        before: "",
        code: "ignore_term(); leave_child(); reply(); note('reached')\nwhile True: time.sleep(0.05)",
        is_done: true,
    },
    State {
        name: "busy",
        before: "",
        code: "ignore_term(); leave_child(); note('reached'); until('go')",
        is_done: false,
    },
    State {
        name: "ending",
        before: "",
        code: "ignore_term(); leave_child(); reply(last=True); note('reached')\nwhile True: time.sleep(0.05)",
        is_done: true,
    },
];

/// Starts a worker, brings a process to this state, and starts a drain. Returns the worker and the job's id.
fn draining(state: &State, settings: &str) -> (Warm, String) {
    let warm = Warm::before(state.before, settings);
    let id = warm.enqueue(state.code);
    warm.running.wait_for_lines(1, "reached");
    if state.is_done {
        warm.server.wait_until_done(&id);
    }
    warm.running.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    (warm, id)
}

/// Asserts that the worker and all processes end. Asserts that the job, unless it is done, is ready again without a failed attempt.
#[track_caller]
fn assert_given_back(warm: Warm, state: &State, id: &str) -> Finished {
    let Warm { server, running } = warm;
    let finished = running.finish();
    assert_dead(&finished);
    assert!(!finished.has("job failed"), "{}", state.name);
    if !state.is_done {
        let job = server.wait_for_status(id, "ready");
        assert_eq!((&job["attempts"], server.errors(id)), (&0.into(), Vec::<Value>::new()), "{}", state.name);
    }
    finished
}

#[test]
fn a_drain_waits_for_jobs_and_ends_every_process() {
    for state in &STATES {
        let (warm, id) = draining(state, "kill_grace = '300ms'");
        warm.running.go();
        warm.server.wait_until_done(&id);
        let finished = warm.running.assert_exit(0);
        assert_dead(&finished);
        assert_eq!(finished.event("worker stopped")["succeeded"], 1, "{}", state.name);
    }
}

#[test]
fn a_second_signal_ends_every_process_after_its_grace() {
    for state in &STATES {
        let (warm, id) = draining(state, "kill_grace = '1s'");
        warm.running.sigterm();
        let finished = assert_given_back(warm, state, &id);
        // A process that has not connected gets SIGKILL at once.
        let heard = usize::from(state.name != "starting");
        assert_eq!(finished.read("heard").lines().count(), heard, "{}", state.name);
    }
}

#[test]
fn a_third_signal_ends_every_process_at_once() {
    for state in &STATES {
        let (warm, id) = draining(state, "kill_grace = '10m'");
        let begun = Instant::now();
        warm.running.sigterm().wait_for_message("killing: stopping running jobs");
        warm.running.sigterm();
        assert_given_back(warm, state, &id);
        assert!(begun.elapsed() < AT_ONCE, "{}: {:?}", state.name, begun.elapsed());
    }
}

#[test]
fn a_drain_closes_the_sockets_of_idle_processes() {
    let warm = Warm::with("ignore_term()", "kill_grace = '10m'", |daemon| daemon.threads(2));
    let ids = warm.enqueue_many(2, "until('go')");
    warm.running.wait_for_lines(2, "ran");
    warm.running.go();
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.stop();
    assert_eq!(finished.read("ended").lines().count(), 2);
    assert_eq!(finished.read("heard"), "");
}

#[test]
fn an_idle_process_that_stays_gets_sigterm_after_the_grace() {
    let warm = Warm::start("kill_grace = '1s'");
    let code = "signal.signal(signal.SIGTERM, lambda *_: (note('heard'), os._exit(0)))";
    warm.succeed(&format!("{code}; reply(); note('reached')\nwhile True: time.sleep(0.05)"));
    warm.running.wait_for_lines(1, "reached");
    let begun = Instant::now();
    assert_eq!(warm.stop().read("heard"), "\n");
    assert!((Duration::from_secs(1)..AT_ONCE).contains(&begun.elapsed()), "{:?}", begun.elapsed());
}

#[test]
fn a_drain_runs_all_taken_jobs_with_few_processes() {
    let warm = Warm::with("", "max_processes = 1", |daemon| daemon.threads(3).args(["--prefetch", "5"]));
    let ids = warm.enqueue_many(5, "until('go')");
    warm.running.wait_for_messages(5, "job received");
    warm.running.wait_for_lines(1, "ran");
    warm.running.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    warm.running.go();
    ids.iter().for_each(|id| warm.server.wait_until_done(id));
    let finished = warm.running.assert_exit(0);
    assert_eq!(finished.read("started").lines().count(), 1);
}

#[test]
fn only_a_busy_process_gets_the_drain_signal() {
    let warm = Warm::with("", "drain_signal = 'USR1'\nkill_grace = '10m'", |daemon| daemon.threads(2));
    let ids = ["until('both')", "until('both'); until('go')"].map(|code| {
        warm.enqueue(&format!("signal.signal(signal.SIGUSR1, lambda *_: note('told', os.getpid())); {code}"))
    });
    warm.running.wait_for_lines(2, "ran");
    warm.allow("both");
    warm.server.wait_until_done(&ids[0]);
    let busy = warm.process_of(&ids[1]);
    warm.running.sigterm();
    assert_eq!(warm.running.wait_for_lines(1, "told"), [busy]);
    warm.running.go();
    warm.server.wait_until_done(&ids[1]);
    assert_eq!(warm.stop_after_drain().read("told").lines().count(), 1);
}

#[test]
fn a_job_that_dies_of_the_drain_signal_is_interrupted() {
    let warm = Warm::start("drain_signal = 'USR1'");
    let id = warm.enqueue("note('reached'); until('go')");
    warm.running.wait_for_lines(1, "reached");
    warm.running.sigterm();
    let job = warm.server.wait_for_status(&id, "ready");
    assert_eq!((&job["attempts"], warm.server.errors(&id)), (&0.into(), Vec::<Value>::new()));
    warm.running.assert_exit(0);
}

#[test]
fn the_stream_closes_after_every_process_is_dead() {
    let server = RawServer::start();
    let code = "ignore_term(); leave_child(); note('reached'); until('go')";
    let running = Daemon::at(&server.url()).warm("", "kill_grace = '1s'").start();
    let mut stream = server.take();
    let job = serde_json::json!({"id": "1", "type": "t", "queue": "q", "priority": 1, "ready_at": 1, "attempts": 0, "payload": code});
    stream.chunk(&format!("{job}\n"));
    running.wait_for_lines(1, "reached");
    running.sigterm().wait_for_message("shutting down, waiting for workers to finish");
    running.sigterm().wait_for_lines(1, "heard");
    assert!(stream.is_open());
    stream.wait_until_closed();
    let pids = running.wait_for_file("started") + &running.wait_for_file("children");
    assert!(!pids.lines().any(is_alive), "the stream closed before {pids:?} were dead");
    running.assert_exit(1);
    assert!(server.is_quiet(), "a killed job was reported");
}

#[test]
fn warm_handlers_of_a_killed_worker_end_by_themselves() {
    let warm = Warm::with("", "", |daemon| daemon.threads(2));
    let ids = [warm.enqueue("until('both')"), warm.enqueue("until('both'); until('go')")];
    warm.running.wait_for_lines(2, "ran");
    warm.allow("both");
    warm.server.wait_until_done(&ids[0]);
    let [idle, busy] = ids.map(|id| warm.process_of(&id));
    warm.running.signal(Signal::KILL);
    wait_until_dead(&idle);
    assert!(is_alive(&busy), "the running job was cut short");
    warm.running.go();
    wait_until_dead(&busy);
    assert_eq!(warm.lines("ended")[0], idle);
}

/// The test embeds a worker and drops it. No process is left, and the job is ready again on the server.
#[test]
fn a_worker_dropped_in_a_warm_job_leaves_no_process() {
    let (server, dir) = (Server::start(), TempDir::new().unwrap());
    let script = dir.path().join("handle.py");
    replace(dir.path(), "handle.py", &warm_handler(""));
    let program = Program::find(script.into_os_string(), Vec::new(), None).unwrap();
    let path = std::env::var_os("PATH").unwrap();
    let env = vec![("DIR".into(), dir.path().as_os_str().to_owned()), ("PATH".into(), path)];
    let handler = Handler { mode: Mode::Warm(PoolSettings::default()), env, ..Handler::new(program) };
    let handlers = Handlers { default: Some(handler), ..Handlers::default() };
    let config = WorkerConfig { url: server.url.parse().unwrap(), ..WorkerConfig::default() };
    let lines = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap_or_default();

    let running = runtime().spawn({
        let temp_dir = dir.path().to_owned();
        async move {
            let dispatcher = ExecDispatcher::new(handlers, 1, "w".to_owned(), &temp_dir).unwrap();
            Worker::new(config, dispatcher).run(&Lifecycle::new()).await
        }
    });
    let id = server.enqueue("q", "t", json!("ignore_term(); leave_child(); note('reached'); until('go')"));
    eventually("a busy process", || (!lines("reached").is_empty()).then_some(()));
    running.abort();
    assert!(runtime().block_on(running).unwrap_err().is_cancelled());
    for pid in (lines("started") + &lines("children")).lines() {
        wait_until_dead(pid);
    }
    server.wait_for_status(&id, "ready");
}
