//! [`Metrics`]: what the worker counts, in the form that Prometheus reads.

use std::collections::HashSet;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::core::Collector;
use prometheus::{CounterVec, Error};
use prometheus::{
    GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder,
};

use crate::dispatch::{Ended, HandlerProcess, PROCESS_STATES, ProcessStarts};
use crate::job::{Job, Outcome};

/// What stands for every name that has no label of its own: a label costs memory here and in whatever reads it.
const OTHER: &str = "(other)";

/// How many queues have a label of their own, where no setting names them: the first ones that jobs came from.
const MAX_QUEUES: usize = 100;

/// From a program that does nothing to one that runs for hours, in seconds.
const RUN_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0];

/// From a worker that waits for jobs to jobs that wait for a day, in seconds.
const WAIT_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0];

/// The states of which one holds.
const STATES: [&str; 4] = ["running", "paused", "draining", "killing"];

/// All counters of one worker; clones count together.
#[derive(Clone)]
pub(crate) struct Metrics(Arc<Counters>);

impl fmt::Debug for Metrics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Metrics")
    }
}

struct Counters {
    registry: Registry,
    /// The queues that have a label.
    queues: Mutex<HashSet<String>>,
    jobs: IntCounterVec,
    exits: IntCounterVec,
    run_seconds: HistogramVec,
    wait_seconds: Histogram,
    cpu_seconds: CounterVec,
    peak_memory: IntGaugeVec,
    running: IntGauge,
    waiting: IntGauge,
    loops: IntGauge,
    reports_waiting: IntGauge,
    reports_retried: IntCounter,
    reports_dropped: IntCounter,
    reconnects: IntCounter,
    connected: IntGauge,
    state: IntGaugeVec,
    reloads: IntCounterVec,
    processes: IntGaugeVec,
    process_starts: IntCounterVec,
}

/// What is known at the moment when the metrics are read.
#[derive(Debug, Clone)]
pub(crate) struct Gauges {
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    pub(crate) loops: usize,
    pub(crate) connected: bool,
    pub(crate) state: &'static str,
    pub(crate) processes: Vec<HandlerProcess>,
    pub(crate) process_starts: Vec<ProcessStarts>,
}

impl Metrics {
    /// Counters at zero, of a worker that starts now and takes jobs from these queues, or all.
    pub(crate) fn new(queues: &[String]) -> Self {
        #[expect(clippy::expect_used, reason = "the names are this file's own")]
        Self::try_new(queues, unix_time().as_secs_f64()).expect("the names fit together, as a test shows")
    }

    fn try_new(queues: &[String], started: f64) -> Result<Self, Error> {
        let made = Maker(Registry::new());
        made.constant("build_info", "Always 1; which worker this is", "version", env!("CARGO_PKG_VERSION"), 1.0)?;
        made.constant("start_time_seconds", "When the worker started, in Unix seconds", "", "", started)?;
        let counters = Counters {
            jobs: made.counters("jobs_total", "Jobs that have ended here", &["queue", "type", "outcome"])?,
            exits: made.counters(
                "handler_exits_total",
                "Handlers that have ended, by exit code, or signal",
                &["type", "code"],
            )?,
            run_seconds: made.histograms("handler_seconds", "How long jobs ran", RUN_BUCKETS, &["type"])?,
            wait_seconds: made.histogram(
                "job_wait_seconds",
                "From a job's ready_at to its start here",
                WAIT_BUCKETS,
            )?,
            cpu_seconds: made.floats("handler_cpu_seconds_total", "CPU time that handlers have used", &["type"])?,
            peak_memory: made.gauges(
                "handler_peak_memory_bytes",
                "The most memory that a handler has had resident",
                &["type"],
            )?,
            running: made.gauge("jobs_running", "Jobs that run now")?,
            waiting: made.gauge("jobs_waiting", "Jobs that were taken and wait for a worker loop")?,
            loops: made.gauge("loops", "Worker loops: threads x fibers")?,
            reports_waiting: made.gauge("reports_waiting", "Reports that the server has not accepted yet")?,
            reports_retried: made.counter("reports_retried_total", "Tries to report that failed and are repeated")?,
            reports_dropped: made.counter("reports_dropped_total", "Reports that were given up")?,
            reconnects: made.counter("reconnects_total", "Streams that were lost or could not be opened")?,
            connected: made.gauge("stream_connected", "Whether the take stream is open")?,
            state: made.gauges("state", "1 for the state that the worker is in", &["state"])?,
            reloads: made.counters("reloads_total", "Readings of the configuration while running", &["result"])?,
            processes: made.gauges("handler_processes", "Processes of warm handlers", &["handler", "state"])?,
            process_starts: made.counters(
                "handler_process_starts_total",
                "Processes of warm handlers that were started, by why the one before ended, or demand",
                &["handler", "reason"],
            )?,
            queues: Mutex::new(queues.iter().cloned().collect()),
            registry: made.0,
        };
        for result in ["ok", "failed"] {
            counters.reloads.with_label_values(&[result]);
        }
        Ok(Self(Arc::new(counters)))
    }

    /// A job starts that could have since then, in Unix milliseconds.
    pub(crate) fn job_started(&self, ready_at: u64) {
        // The server's clock may be ahead of ours.
        let waited = unix_time().saturating_sub(Duration::from_millis(ready_at));
        self.0.wait_seconds.observe(waited.as_secs_f64());
    }

    /// A job has ended. It is counted under its type if that is `apart`.
    pub(crate) fn job_ended(&self, job: &Job, apart: bool, ended: &Ended, ran: Duration) {
        let label = if apart { job.job_type.as_str() } else { OTHER };
        let outcome = match ended.outcome {
            Outcome::Success => "succeeded",
            Outcome::Failure(_) => "failed",
            Outcome::Interrupted => "interrupted",
        };
        self.0.jobs.with_label_values(&[self.queue_label(&job.queue), label, outcome]).inc();
        self.0.run_seconds.with_label_values(&[label]).observe(ran.as_secs_f64());
        if let Some(exit) = ended.exit {
            let code = exit.code().map(|code| code.to_string());
            self.0.exits.with_label_values(&[label, code.as_deref().unwrap_or("signal")]).inc();
        }
        let Some(usage) = ended.usage else { return };
        self.0.cpu_seconds.with_label_values(&[label]).inc_by(usage.cpu.as_secs_f64());
        let peak = self.0.peak_memory.with_label_values(&[label]);
        peak.set(peak.get().max(i64::try_from(usage.max_rss).unwrap_or(i64::MAX)));
    }

    fn queue_label<'a>(&self, queue: &'a str) -> &'a str {
        let mut known = self.0.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if known.contains(queue) {
            return queue;
        }
        if known.len() >= MAX_QUEUES {
            return OTHER;
        }
        known.insert(queue.to_owned());
        queue
    }

    pub(crate) fn report_waits(&self) {
        self.0.reports_waiting.inc();
    }

    pub(crate) fn report_leaves(&self) {
        self.0.reports_waiting.dec();
    }

    pub(crate) fn report_retried(&self) {
        self.0.reports_retried.inc();
    }

    pub(crate) fn reports_dropped(&self, count: usize) {
        self.0.reports_dropped.inc_by(count as u64);
    }

    pub(crate) fn reconnecting(&self) {
        self.0.reconnects.inc();
    }

    /// The settings have been read again, or could not be.
    pub(crate) fn reloaded(&self, went_well: bool) {
        self.0.reloads.with_label_values(&[if went_well { "ok" } else { "failed" }]).inc();
    }

    /// How many reports wait.
    pub(crate) fn waiting_reports(&self) -> i64 {
        self.0.reports_waiting.get()
    }

    /// Everything in the text format of Prometheus.
    ///
    /// # Errors
    /// When a metric cannot be written in it.
    pub(crate) fn text(&self, now: Gauges) -> Result<String, Error> {
        let counters = &*self.0;
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        counters.running.set(count(now.running));
        counters.waiting.set(count(now.waiting));
        counters.loops.set(count(now.loops));
        counters.connected.set(now.connected.into());
        for state in STATES {
            counters.state.with_label_values(&[state]).set((state == now.state).into());
        }
        self.count_processes(&now);
        TextEncoder::new().encode_to_string(&counters.registry.gather())
    }
}

impl Metrics {
    fn count_processes(&self, now: &Gauges) {
        let Counters { processes, process_starts, .. } = &*self.0;
        for ProcessStarts { handler, reason, count } in &now.process_starts {
            let counter = process_starts.with_label_values(&[handler.as_str(), reason]);
            counter.inc_by(count.saturating_sub(counter.get()));
            for state in PROCESS_STATES {
                processes.with_label_values(&[handler.as_str(), state]).set(0);
            }
        }
        for process in &now.processes {
            processes.with_label_values(&[process.handler.as_str(), process.state]).inc();
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the server's times, and Prometheus', are wall times")]
fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Makes metrics under the worker's prefix.
struct Maker(Registry);

impl Maker {
    fn opts(name: &str, help: &str) -> Opts {
        Opts::new(name, help).namespace("zizq_worker")
    }

    fn register<T: Collector + Clone + 'static>(&self, made: Result<T, Error>) -> Result<T, Error> {
        let made = made?;
        self.0.register(Box::new(made.clone()))?;
        Ok(made)
    }

    fn constant(&self, name: &str, help: &str, label: &str, value: &str, number: f64) -> Result<(), Error> {
        let (labels, values): (&[&str], &[&str]) = if label.is_empty() { (&[], &[]) } else { (&[label], &[value]) };
        self.register(GaugeVec::new(Self::opts(name, help), labels))?.with_label_values(values).set(number);
        Ok(())
    }

    fn counter(&self, name: &str, help: &str) -> Result<IntCounter, Error> {
        self.register(IntCounter::with_opts(Self::opts(name, help)))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntCounterVec, Error> {
        self.register(IntCounterVec::new(Self::opts(name, help), labels))
    }

    fn floats(&self, name: &str, help: &str, labels: &[&str]) -> Result<CounterVec, Error> {
        self.register(CounterVec::new(Self::opts(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> Result<IntGauge, Error> {
        self.register(IntGauge::with_opts(Self::opts(name, help)))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> Result<IntGaugeVec, Error> {
        self.register(IntGaugeVec::new(Self::opts(name, help), labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Result<Histogram, Error> {
        let opts = HistogramOpts::from(Self::opts(name, help)).buckets(buckets.to_vec());
        self.register(Histogram::with_opts(opts))
    }

    fn histograms(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> Result<HistogramVec, Error> {
        let opts = HistogramOpts::from(Self::opts(name, help)).buckets(buckets.to_vec());
        self.register(HistogramVec::new(opts, labels))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(queue: &str) -> Job {
        let line = format!(
            r#"{{"id":"a","type":"t","queue":"{queue}","priority":1,"attempts":0,"ready_at":1,"payload":null}}"#
        );
        Job::from_line(&line.into()).unwrap()
    }

    fn text(metrics: &Metrics) -> String {
        let gauges = Gauges {
            running: 1,
            waiting: 2,
            loops: 4,
            connected: true,
            state: "running",
            processes: Vec::new(),
            process_starts: Vec::new(),
        };
        metrics.text(gauges).unwrap()
    }

    #[test]
    fn the_names_fit_together_and_are_there_from_the_start() {
        let text = text(&Metrics::try_new(&[], 1.5).unwrap());
        for line in [
            "zizq_worker_jobs_running 1",
            "zizq_worker_jobs_waiting 2",
            "zizq_worker_loops 4",
            "zizq_worker_start_time_seconds 1.5",
            "zizq_worker_state{state=\"running\"} 1",
            "zizq_worker_state{state=\"draining\"} 0",
            "zizq_worker_reports_dropped_total 0",
            "zizq_worker_reloads_total{result=\"failed\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn names_without_a_label_of_their_own_share_one() {
        let metrics = Metrics::try_new(&["mail".to_owned()], 0.0).unwrap();
        for queue in 0..2 * MAX_QUEUES {
            metrics.job_ended(&job(&queue.to_string()), false, &Outcome::Success.into(), Duration::ZERO);
        }
        metrics.job_ended(&job("mail"), true, &Outcome::Interrupted.into(), Duration::ZERO);
        let text = text(&metrics);
        assert_eq!(text.matches("zizq_worker_jobs_total{").count(), MAX_QUEUES + 1);
        assert!(text.contains(r#"jobs_total{outcome="succeeded",queue="(other)",type="(other)"} 101"#), "{text}");
        assert!(text.contains(r#"jobs_total{outcome="interrupted",queue="mail",type="t"} 1"#), "{text}");
    }
}
