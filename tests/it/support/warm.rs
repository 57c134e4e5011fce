//! A warm handler in Python that runs the code in each job's payload.

use std::fs;
use std::path::Path;

use serde_json::{Value, json};

use super::{Api, Daemon, Finished, Running, Server, eventually, is_alive};

/// The first part of the handler's source. It defines functions for the code in the jobs, and for the code that runs before the
/// handler connects to the worker.
const PRELUDE: &str = r#"#!/usr/bin/env -S python3 -S
import json, os, signal, socket, sys, time
DIR = os.environ["DIR"]

def note(name, *words):
    with open(f"{DIR}/{name}", "a") as file:
        file.write(" ".join(map(str, words)) + "\n")

def until(name):
    while not os.path.exists(f"{DIR}/{name}"):
        time.sleep(0.01)

def is_first():
    try:
        os.close(os.open(f"{DIR}/first", os.O_CREAT | os.O_EXCL))
        return True
    except FileExistsError:
        return False

def ignore_term():
    signal.signal(signal.SIGTERM, lambda *_: note("heard", os.getpid()))

def leave_child():
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
        os._exit(0)
    note("children", pid)

def connect():
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ["ZIZQ_SOCKET"])
    return server

def send(text):
    wire.write(text.encode())
    wire.flush()

def reply(**fields):
    global replied
    replied = True
    send(json.dumps({"id": job["id"], "ok": True, **fields}) + "\n")

note("started", os.getpid())
"#;

const LOOP: &str = r#"
server = connect()
wire = server.makefile("rwb")
for line in wire:
    job, replied = json.loads(line), False
    note("ran", os.getpid(), job["id"])
    exec(job["payload"] or "", globals())
    if not replied:
        reply()
note("ended", os.getpid())
"#;

/// Returns the source of a handler that runs the Python code `before`, and then connects to the worker.
pub fn handler(before: &str) -> String {
    format!("{PRELUDE}\n{before}\n{LOOP}")
}

impl Daemon {
    /// Sets a warm handler with these settings. Each process runs the Python code `before`, and then connects to the worker.
    pub fn warm(self, before: &str, settings: &str) -> Self {
        self.executable("handle.py", &handler(before));
        self.handlers(&format!("[handler]\nexec = ['$DIR/handle.py']\nmode = 'warm'\n{settings}"))
    }
}

/// A worker with a warm handler, and its server.
pub struct Warm {
    pub server: Server,
    pub running: Running,
}

impl Warm {
    /// Starts a worker whose warm handler has these settings.
    pub fn start(settings: &str) -> Self {
        Self::with("", settings, |daemon| daemon)
    }

    /// Starts a worker whose handler runs the Python code `before`, and then connects to the worker.
    pub fn before(before: &str, settings: &str) -> Self {
        Self::with(before, settings, |daemon| daemon)
    }

    pub fn with(before: &str, settings: &str, prepare: impl FnOnce(Daemon) -> Daemon) -> Self {
        let server = Server::start();
        let running = prepare(Daemon::of(&server).warm(before, settings)).start();
        Self { server, running }
    }

    /// Enqueues a job that runs this code in the handler.
    pub fn enqueue(&self, code: &str) -> String {
        self.server.enqueue("q", "t", json!(code))
    }

    pub fn enqueue_many(&self, count: usize, code: &str) -> Vec<String> {
        enqueue_many(&self.server, count, code)
    }

    /// Runs a job that succeeds. Returns the pid of the process that ran the job.
    pub fn succeed(&self, code: &str) -> String {
        let id = self.enqueue(code);
        self.server.wait_until_done(&id);
        self.process_of(&id)
    }

    /// Runs a job that fails. Returns the error of its first attempt.
    pub fn fail(&self, code: &str) -> Value {
        let id = self.enqueue(code);
        self.server.wait_for_error(&id, 1)
    }

    /// Waits until the job has started, and returns the pid of the process that runs or ran its latest attempt.
    pub fn process_of(&self, id: &str) -> String {
        eventually(&format!("a process with job {id}"), || {
            let ran = self.lines("ran");
            let of_job = ran.iter().rev().filter_map(|line| line.split_once(' ')).find(|(_, ran)| *ran == id);
            of_job.map(|(pid, _)| pid.to_owned())
        })
    }

    /// Returns the lines that handlers have written so far to a file in the test's directory.
    pub fn lines(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.running.dir().join(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Creates a file, which releases handler code that waits for this file with the Python function `until`.
    pub fn allow(&self, name: &str) {
        fs::write(self.running.dir().join(name), "").unwrap();
    }

    /// Stops the worker, and asserts that its warm processes, and the children recorded with `leave_child`, are dead.
    pub fn stop(self) -> Finished {
        let finished = self.running.stop();
        assert_dead(&finished);
        finished
    }

    /// Waits until a draining worker has exited, and asserts that its warm processes, and the children recorded with `leave_child`,
    /// are dead.
    pub fn stop_after_drain(self) -> Finished {
        let finished = self.running.assert_exit(0);
        assert_dead(&finished);
        finished
    }
}

pub fn enqueue_many(server: &Api, count: usize, code: &str) -> Vec<String> {
    server.enqueue_all(vec![json!({"queue": "q", "type": "t", "payload": code}); count])
}

/// Asserts that all warm processes of a worker, and all children that these processes recorded with `leave_child`, are dead.
#[track_caller]
pub fn assert_dead(finished: &Finished) {
    let pids = finished.read("started") + &finished.read("children");
    let alive: Vec<&str> = pids.lines().filter(|pid| is_alive(pid)).collect();
    assert!(alive.is_empty() && !pids.is_empty(), "{alive:?} of {pids:?} are alive");
}

/// Asserts that no job has failed.
#[track_caller]
pub fn assert_none_failed(finished: &Finished) {
    let failed = finished.all("job failed");
    assert!(failed.is_empty(), "{failed:#?}");
}

/// Waits until a process is dead or a zombie.
pub fn wait_until_dead(pid: &str) {
    eventually(&format!("the end of process {pid}"), || (!is_alive(pid)).then_some(()));
}

/// Replaces a file atomically with an executable file, as a deploy does.
pub fn replace(dir: &Path, name: &str, text: &str) {
    use std::os::unix::fs::PermissionsExt;
    let next = dir.join(format!("{name}.next"));
    fs::write(&next, text).unwrap();
    fs::set_permissions(&next, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&next, dir.join(name)).unwrap();
}
