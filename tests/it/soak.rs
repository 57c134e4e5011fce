//! Thousands of jobs run under a seeded schedule of faults. At the end all jobs are done, each attempt has run once, and
//! the daemon's memory has not grown.
//!
//! `ZIZQ_SOAK_SECONDS=300 ZIZQ_SOAK_SEED=7 cargo test --release -- --ignored soak --nocapture`

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{BodyFault, Call, Daemon, Fault, Proxy, Restartable, Running, eventually};

const QUICK: [&str; 4] = ["--retry-min-wait", "10ms", "--retry-max-wait", "300ms"];

/// A script that fails as often as the payload says. Jobs of type `slow` run so long that they are still running at the next
/// fault.
const SCRIPT: &str = "echo $ZIZQ_JOB_ID $ZIZQ_JOB_ATTEMPTS >> $DIR/ran
read -r failures
[ $ZIZQ_JOB_TYPE = quick ] || sleep 0.4
[ $ZIZQ_JOB_ATTEMPTS -ge $failures ]";

/// The maximum number of unfinished jobs during the faults.
const BACKLOG: u64 = 200;

/// The allowed growth of memory. It is more than allocators and logs need, and far less than a leak at each job would add.
const MEMORY_KIB: u64 = 24 * 1024;

/// The allowed growth of open descriptors. The connection pool keeps a connection for each concurrent request. A leak
/// of one descriptor per fault would far exceed this number.
const DESCRIPTORS: usize = 24;

#[test]
fn jobs_run_once_through_20_seconds_of_faults() {
    Soak::new(Restartable::embedded(), 20).run();
}

#[test]
#[ignore = "takes ZIZQ_SOAK_SECONDS, or 5 minutes"]
fn soak() {
    Soak::new(Restartable::embedded(), seconds()).run();
}

#[test]
#[ignore = "needs a Zizq server at ZIZQ_URL, and ZIZQ_RESTART_CMD; takes ZIZQ_SOAK_SECONDS, or 5 minutes"]
fn real_server_soak() {
    if let Some(server) = Restartable::real() {
        Soak::new(server, seconds()).run();
    }
}

fn seconds() -> u64 {
    number("ZIZQ_SOAK_SECONDS").unwrap_or(300)
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap())
}

struct Soak {
    server: Restartable,
    proxy: Proxy,
    daemon: Running,
    random: fastrand::Rng,
    time: Duration,
    /// The expected number of failed attempts of each job, by id.
    jobs: BTreeMap<String, u32>,
    /// The number of injections of each fault.
    faults: BTreeMap<&'static str, usize>,
}

impl Soak {
    fn new(server: Restartable, seconds: u64) -> Self {
        let seed = number("ZIZQ_SOAK_SEED").unwrap_or_else(|| fastrand::u64(..));
        eprintln!("soak: seed {seed}, {seconds} seconds");
        let proxy = Proxy::before_address(server.address());
        let daemon = Daemon::bare().args(["--url", &proxy.url, "--queues", &server.queue, "--log-format", "json"]);
        let daemon = daemon.args(QUICK).args(["--stream-idle-timeout", "1500ms"]).threads(4).args(["--fibers", "2"]);
        let daemon = daemon.sh(SCRIPT).start();
        let (random, time) = (fastrand::Rng::with_seed(seed), Duration::from_secs(seconds));
        Self { server, proxy, daemon, random, time, jobs: BTreeMap::new(), faults: BTreeMap::new() }
    }

    fn run(mut self) {
        self.daemon.wait_for_message("connected, listening for jobs");
        let (started, idle) = (Instant::now(), self.daemon.descriptors());
        // After a quarter of the time, every kind of fault has occurred, and the daemon's memory has reached its full size.
        self.lay_faults_until(started + self.time / 4);
        let before = (self.daemon.resident_kib(), idle);
        self.lay_faults_until(started + self.time);
        self.proxy.heal();
        self.wait_until_done();
        let after = (self.daemon.resident_kib(), self.daemon.descriptors());
        let ran = self.check_runs();
        self.check_jobs();
        eprintln!("soak: {} jobs, {ran} attempts, faults {:?}", self.jobs.len(), self.faults);
        eprintln!("soak: {} KiB, {} descriptors; before {} KiB, {}", after.0, after.1, before.0, before.1);
        assert!(after.0 < before.0 + MEMORY_KIB, "memory");
        assert!(after.1 < before.1 + DESCRIPTORS, "descriptors");
        self.daemon.sigterm();
        let finished = self.daemon.assert_exit(0);
        assert!(!finished.has("report dropped"));
        let stopped = finished.event("worker stopped");
        assert_eq!(stopped["succeeded"].as_u64(), Some(self.jobs.len() as u64));
    }

    fn lay_faults_until(&mut self, end: Instant) {
        while Instant::now() < end {
            self.refill();
            let fault = self.lay_fault();
            *self.faults.entry(fault).or_default() += 1;
            std::thread::sleep(Duration::from_millis(self.random.u64(20..400)));
        }
    }

    /// Fills the backlog up with new jobs. Enqueues the jobs directly at the server, not through the proxy.
    fn refill(&mut self) {
        let missing = BACKLOG.saturating_sub(self.server.unfinished());
        let kinds: Vec<(u32, Value)> = (0..missing).map(|_| self.kind()).collect();
        if kinds.is_empty() {
            return;
        }
        let ids = self.server.enqueue_all(kinds.iter().map(|(_, job)| job.clone()));
        self.jobs.extend(ids.into_iter().zip(kinds.into_iter().map(|(failures, _)| failures)));
    }

    fn kind(&mut self) -> (u32, Value) {
        let failures = if self.random.u8(..) < 40 { self.random.u32(1..3) } else { 0 };
        let job_type = if self.random.u8(..) < 25 { "slow" } else { "quick" };
        let mut job = self.server.order(job_type, json!(failures));
        job["backoff"] = json!({"base_ms": 10, "exponent": 0.0, "jitter_ms": 0});
        // Retain the job after its success, for the checks at the end.
        job["retention"] = json!({"completed_ms": 3_600_000});
        (failures, job)
    }

    fn lay_fault(&mut self) -> &'static str {
        let Self { proxy, random, server, .. } = self;
        let times = random.usize(1..5);
        let call = *random.choice(&[Call::Take, Call::Successes, Call::Failure, Call::Job]).unwrap();
        let report = if random.bool() { Call::Successes } else { Call::Failure };
        let lay = |name, call, fault| {
            proxy.fault_times(times, call, fault);
            name
        };
        let fault_on_streams = |name, fault: fn(&Proxy)| {
            fault(proxy);
            name
        };
        match random.u8(0..12) {
            0 => lay("500", call, Fault::Answer(500, r#"{"error":"disk full"}"#)),
            1 => lay("503", call, Fault::Answer(503, "")),
            2 => lay("request cut", call, Fault::Cut),
            3 => lay("request reset", call, Fault::Reset),
            4 => lay("answer swallowed", report, Fault::Swallow),
            5 => lay("answer lost to 502", report, Fault::Lose(502)),
            6 => lay("delay", call, Fault::Delay(Duration::from_millis(random.u64(1..300)))),
            7 => lay("cut after bytes", Call::Take, Fault::Body(BodyFault::CutAfterBytes(random.usize(1..5000)))),
            8 => lay("stalled after jobs", Call::Take, Fault::Body(BodyFault::StallAfterJobs(random.usize(1..20)))),
            9 => fault_on_streams("streams cut", Proxy::cut_streams),
            10 if random.bool() => fault_on_streams("streams stalled", Proxy::stall_streams),
            10 => fault_on_streams("streams reset", Proxy::reset_streams),
            _ => {
                server.restart(Duration::from_millis(random.u64(0..600)));
                "restart"
            }
        }
    }

    fn wait_until_done(&self) {
        let mut last = u64::MAX;
        // Only the time without progress is limited, not the whole wait.
        while last > 0 {
            let left = eventually("progress", || Some(self.server.unfinished()).filter(|left| *left < last));
            last = left;
        }
    }

    /// Checks that each attempt of each job ran exactly once.
    fn check_runs(&self) -> usize {
        let text = fs::read_to_string(self.daemon.dir().join("ran")).unwrap();
        let mut ran = BTreeSet::new();
        let twice: Vec<&str> = text.lines().filter(|line| !ran.insert(*line)).collect();
        assert!(twice.is_empty(), "ran twice: {twice:?}");
        let attempts = |(id, failures): (&String, &u32)| {
            let id = id.clone();
            (0..=*failures).map(move |attempt| format!("{id} {attempt}"))
        };
        let expected: BTreeSet<String> = self.jobs.iter().flat_map(attempts).collect();
        assert!(ran.iter().copied().eq(expected.iter().map(String::as_str)), "attempts are missing or unexpected");
        ran.len()
    }

    /// Checks that each job is done, with as many failed attempts as the payload says.
    fn check_jobs(&self) {
        for (id, failures) in &self.jobs {
            let job = self.server.job(id).unwrap();
            assert_eq!((&job["status"], &job["attempts"]), (&json!("completed"), &json!(failures)), "{job}");
            assert_eq!(self.server.errors(id).len(), *failures as usize, "{job}");
        }
    }
}

/// Kills a worker while all its loops are busy. A second worker must run exactly the interrupted jobs again.
fn only_jobs_that_ran_in_a_killed_worker_run_again(server: &Restartable) {
    let script = "echo $ZIZQ_JOB_ID >> $DIR/ran
[ $ZIZQ_JOB_TYPE = quick ] || until [ -e $DIR/go -o ! -d $DIR ]; do sleep 0.01; done";
    let jobs = (0..200).map(|number| server.order(if number % 50 == 30 { "endless" } else { "quick" }, json!(null)));
    let ids = server.enqueue_all(jobs);
    let daemon = || Daemon::of(server).args(["--queues", &server.queue]).args(QUICK).threads(4).sh(script);
    let first = daemon().start();
    let ends_with_endless = || server.unfinished() == 200 - (181 - 4);
    eventually("four endless jobs", || ends_with_endless().then_some(()));
    first.signal(Signal::KILL);
    fs::write(first.dir().join("go"), "").unwrap();
    let second = daemon().env("DIR", first.dir()).start();
    ids.iter().for_each(|id| server.wait_until_done(id));
    second.sigterm();
    second.assert_exit(0);
    let text = fs::read_to_string(first.dir().join("ran")).unwrap();
    let mut ran: BTreeMap<&str, usize> = BTreeMap::new();
    text.lines().for_each(|id| *ran.entry(id).or_default() += 1);
    assert!(ids.iter().all(|id| ran.contains_key(&**id)));
    let twice: Vec<&str> = ran.iter().filter(|(_, times)| **times > 1).map(|(id, _)| *id).collect();
    assert_eq!(twice, [30, 80, 130, 180].map(|number: usize| &*ids[number]));
}

#[test]
fn only_jobs_of_a_killed_worker_run_again() {
    only_jobs_that_ran_in_a_killed_worker_run_again(&Restartable::embedded());
}

#[test]
#[ignore = "needs a Zizq server at ZIZQ_URL, and ZIZQ_RESTART_CMD"]
fn real_server_only_jobs_of_a_killed_worker_run_again() {
    if let Some(server) = Restartable::real() {
        only_jobs_that_ran_in_a_killed_worker_run_again(&server);
    }
}
