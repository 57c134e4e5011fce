//! [`Metrics`]: the worker's metrics for Prometheus.

mod gauges;
mod labels;
mod maker;
mod series;

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use prometheus::{
    CounterVec, Error, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Registry,
    TextEncoder,
};

use crate::dispatch::{Ended, HandlerStatus, PROCESS_STATES, ProcessStarts};
use crate::job::{Failure, Job, Outcome};
pub(crate) use gauges::{Age, CountedType, Gauges};
use labels::{Names, OTHER};
use maker::Maker;
pub(crate) use series::JobSeries;
use series::SeriesByNames;

/// Maximum number of combinations of a configured queue and a configured job type for which the series are created in advance,
/// before such a job has been started.
const MAX_PAIRS: usize = 100;

/// The values of the label `outcome`.
const OUTCOMES: [&str; 3] = ["succeeded", "failed", "interrupted"];

/// The worker's own error types. All error types chosen by handlers share the label `OTHER`.
const FAILURES: [&str; 12] = [
    "ExitStatus",
    "HandlerError",
    MALFORMED,
    "NoReply",
    "Panic",
    "ProtocolError",
    "Signal",
    "SpawnError",
    "StartError",
    "Timeout",
    "UnknownJobType",
    "WaitError",
];

const MALFORMED: &str = "MalformedJob";

/// Histogram buckets for run times in seconds, from a program that does nothing to one that runs for hours.
const RUN_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0];

/// Histogram buckets for wait times in seconds, from an idle worker to a backlog of a day.
const WAIT_BUCKETS: &[f64] =
    &[0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0, 7200.0, 86400.0];

/// The states of a worker. A worker is in exactly one of these states at any time.
const STATES: [&str; 4] = ["running", "paused", "draining", "killing"];

/// All metrics of one worker. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Metrics(Arc<Counters>);

#[derive(Debug)]
struct Counters {
    registry: Registry,
    /// The queues in the settings.
    configured_queues: Vec<String>,
    queues: Names,
    types: Names,
    series: SeriesByNames,
    jobs: IntCounterVec,
    failures: IntCounterVec,
    oldest_running: GaugeVec,
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
    failed_starts: IntGaugeVec,
}

impl Metrics {
    /// Returns zeroed metrics of a worker that starts now. The worker takes jobs from `queues`, or from all queues if the list is
    /// empty.
    pub(crate) fn new(queues: &[String]) -> Self {
        #[expect(clippy::expect_used, reason = "the names are this file's own")]
        Self::try_new(queues, unix_time().as_secs_f64()).expect("the names fit together, as a test shows")
    }

    fn try_new(queues: &[String], started: f64) -> Result<Self, Error> {
        let made = Maker(Registry::new());
        made.about_the_process(started)?;
        let counters = Counters {
            jobs: made.counters("jobs_total", "Jobs that have ended here", &["queue", "type", "outcome"])?,
            failures: made.counters(
                "job_failures_total",
                "Jobs that have failed, by the error type if it is this worker's own",
                &["type", "kind"],
            )?,
            oldest_running: made.float_gauges(
                "oldest_running_job_seconds",
                "For how long the job that was started first of those that run has been running, or 0",
                &["type"],
            )?,
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
            failed_starts: made.gauges(
                "handler_failed_starts",
                "Starts of a handler that have failed in a row, or 0 if the handler works",
                &["handler"],
            )?,
            configured_queues: queues.to_vec(),
            queues: Names::of(queues),
            types: Names::default(),
            series: SeriesByNames::default(),
            registry: made.0,
        };
        Ok(Self(Arc::new(counters)).with_fixed_series())
    }

    /// Creates the series whose labels are known from the start.
    fn with_fixed_series(self) -> Self {
        self.0.failures.with_label_values(&[OTHER, MALFORMED]);
        for result in ["ok", "failed"] {
            self.0.reloads.with_label_values(&[result]);
        }
        self
    }

    /// Records the start of a job. Returns the series that count the job's end, and creates these series unless they exist.
    pub(crate) fn job_started(
        &self,
        job: &Job,
        is_apart: bool,
        usual_failures: impl FnOnce() -> &'static [&'static str],
    ) -> Arc<JobSeries> {
        // Saturate, because the server's clock can be ahead of this machine's.
        let waited = unix_time().saturating_sub(Duration::from_millis(job.ready_at));
        self.0.wait_seconds.observe(waited.as_secs_f64());
        self.0.series.get(&job.queue, &job.job_type).unwrap_or_else(|| self.find_series(job, is_apart, usual_failures))
    }

    /// Finds the series of a job whose queue or type is seen for the first time, or has no label of its own. Creates the series
    /// unless they exist.
    fn find_series(
        &self,
        job: &Job,
        is_apart: bool,
        usual_failures: impl FnOnce() -> &'static [&'static str],
    ) -> Arc<JobSeries> {
        let (job_type, is_new) = self.type_label(&job.job_type, is_apart);
        if is_new {
            self.make_type(job_type, usual_failures());
        }
        let queue = self.0.queues.label(&job.queue).0;
        self.0.series.get(queue, job_type).unwrap_or_else(|| {
            let series = Arc::new(self.make_series(queue, job_type));
            self.0.series.insert(queue, job_type, &series);
            series
        })
    }

    fn make_series(&self, queue: &str, job_type: &str) -> JobSeries {
        let [succeeded, failed, interrupted] = self.make_pair(queue, job_type);
        JobSeries {
            type_label: job_type.to_owned(),
            succeeded,
            failed,
            interrupted,
            run_seconds: self.0.run_seconds.with_label_values(&[job_type]),
            cpu_seconds: self.0.cpu_seconds.with_label_values(&[job_type]),
            good_exits: OnceLock::new(),
            peak_memory: OnceLock::new(),
        }
    }

    /// Counts an ended job. `ran` is the job's run time, if the job was started.
    pub(crate) fn job_ended(&self, series: &JobSeries, ended: &Ended, ran: Option<Duration>) {
        let label = series.type_label.as_str();
        match &ended.outcome {
            Outcome::Success => series.succeeded.inc(),
            Outcome::Failure(failure) => {
                self.0.failures.with_label_values(&[label, kind(failure)]).inc();
                series.failed.inc();
            }
            Outcome::Interrupted => series.interrupted.inc(),
        }
        if let Some(ran) = ran {
            series.run_seconds.observe(ran.as_secs_f64());
        }
        let exits = |code: &str| self.0.exits.with_label_values(&[label, code]);
        match ended.exit.map(|exit| exit.code()) {
            Some(Some(0)) => series.good_exits.get_or_init(|| exits("0")).inc(),
            Some(Some(code)) => exits(&code.to_string()).inc(),
            Some(None) => exits("signal").inc(),
            None => {}
        }
        let Some(usage) = ended.usage else { return };
        series.cpu_seconds.inc_by(usage.cpu.as_secs_f64());
        let peak = series.peak_memory.get_or_init(|| self.0.peak_memory.with_label_values(&[label]));
        peak.set(peak.get().max(i64::try_from(usage.max_rss).unwrap_or(i64::MAX)));
    }

    /// Counts a malformed line of the stream, which is reported as a failure.
    pub(crate) fn job_malformed(&self) {
        self.0.jobs.with_label_values(&[OTHER, OTHER, "failed"]).inc();
        self.0.failures.with_label_values(&[OTHER, MALFORMED]).inc();
    }

    /// Returns the label of a job type, and whether the label is new.
    fn type_label<'a>(&self, job_type: &'a str, is_apart: bool) -> (&'a str, bool) {
        if is_apart { (job_type, false) } else { self.0.types.label(job_type) }
    }

    /// Creates the series of a job type with the value 0. Prometheus's `increase()` would miss the first job if the series began
    /// with the value 1.
    fn make_type(&self, label: &str, failures: &[&str]) {
        let Counters { failures: counters, run_seconds, cpu_seconds, .. } = &*self.0;
        for kind in failures.iter().chain(&[OTHER]) {
            counters.with_label_values(&[label, kind]);
        }
        run_seconds.with_label_values(&[label]);
        cpu_seconds.with_label_values(&[label]);
    }

    fn make_pair(&self, queue: &str, job_type: &str) -> [IntCounter; 3] {
        OUTCOMES.map(|outcome| self.0.jobs.with_label_values(&[queue, job_type, outcome]))
    }

    fn make_configured(&self, types: &[CountedType]) {
        for CountedType { name, failures } in types {
            self.make_type(name, failures);
        }
        let pairs = types.iter().flat_map(|of| self.0.configured_queues.iter().map(move |queue| (queue, &of.name)));
        for (queue, name) in pairs.take(MAX_PAIRS) {
            self.make_pair(queue, name);
        }
    }

    /// Sets the age of the oldest running job of each type, or 0 for a type without a running job.
    fn set_ages(&self, now: &Gauges) {
        let oldest = &self.0.oldest_running;
        let seen = self.0.types.known().clone();
        for name in now.types.iter().map(|of| &of.name).chain(&seen) {
            oldest.with_label_values(&[name.as_str()]).set(0.0);
        }
        oldest.with_label_values(&[OTHER]).set(0.0);
        for Age { job_type, is_apart, seconds } in &now.running_jobs {
            let gauge = oldest.with_label_values(&[self.type_label(job_type, *is_apart).0]);
            gauge.set(gauge.get().max(*seconds));
        }
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

    /// Counts a reload.
    pub(crate) fn reloaded(&self, went_well: bool) {
        self.0.reloads.with_label_values(&[if went_well { "ok" } else { "failed" }]).inc();
    }

    /// Returns the number of reports that the server has not accepted yet.
    pub(crate) fn waiting_reports(&self) -> i64 {
        self.0.reports_waiting.get()
    }

    /// Returns all metrics in the text format of Prometheus.
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
        self.make_configured(&now.types);
        self.set_ages(&now);
        self.count_processes(&now);
        TextEncoder::new().encode_to_string(&counters.registry.gather())
    }

    fn count_processes(&self, now: &Gauges) {
        let Counters { processes, process_starts, failed_starts, .. } = &*self.0;
        failed_starts.reset();
        for HandlerStatus { handler, brake, .. } in &now.handlers {
            let failures = brake.as_ref().map_or(0, |brake| brake.failures);
            let gauge = failed_starts.with_label_values(&[handler.as_str()]);
            // Take the maximum, because several handlers may share a program, and the label is the program's name.
            gauge.set(gauge.get().max(i64::try_from(failures).unwrap_or(i64::MAX)));
        }
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

/// Returns the value of the label `kind` for a failure.
fn kind(failure: &Failure) -> &'static str {
    let error_type = failure.error_type.as_deref().filter(|_| !failure.is_named_by_handler);
    FAILURES.into_iter().find(|known| error_type == Some(known)).unwrap_or(OTHER)
}

#[expect(clippy::disallowed_methods, reason = "the server's times, and Prometheus', are wall times")]
fn unix_time() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::labels::{MAX_NAME_LENGTH, MAX_NAMES};
    use super::*;

    fn job(queue: &str, job_type: &str) -> Job {
        let line = format!(
            r#"{{"id":"a","type":"{job_type}","queue":"{queue}","priority":1,"attempts":0,"ready_at":1,"payload":null}}"#
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
            types: vec![CountedType { name: "configured".to_owned(), failures: &["Signal"] }],
            running_jobs: [("t", 1.0), ("t", 3.0), ("t", 2.0)]
                .map(|(name, seconds)| Age { job_type: name.to_owned(), is_apart: true, seconds })
                .to_vec(),
            processes: Vec::new(),
            process_starts: Vec::new(),
            handlers: Vec::new(),
        };
        metrics.text(gauges).unwrap()
    }

    #[test]
    fn the_names_fit_together_and_are_there_from_the_start() {
        let text = text(&Metrics::try_new(&["mail".to_owned()], 1.5).unwrap());
        for line in [
            "zizq_worker_jobs_running 1",
            "zizq_worker_jobs_waiting 2",
            "zizq_worker_loops 4",
            "zizq_worker_start_time_seconds 1.5",
            "zizq_worker_state{state=\"running\"} 1",
            "zizq_worker_state{state=\"draining\"} 0",
            "zizq_worker_reports_dropped_total 0",
            "zizq_worker_reloads_total{result=\"failed\"} 0",
            "zizq_worker_jobs_total{outcome=\"failed\",queue=\"mail\",type=\"configured\"} 0",
            "zizq_worker_job_failures_total{kind=\"Signal\",type=\"configured\"} 0",
            "zizq_worker_job_failures_total{kind=\"(other)\",type=\"configured\"} 0",
            "zizq_worker_job_failures_total{kind=\"MalformedJob\",type=\"(other)\"} 0",
            "zizq_worker_handler_seconds_count{type=\"configured\"} 0",
            "zizq_worker_oldest_running_job_seconds{type=\"configured\"} 0",
            "zizq_worker_oldest_running_job_seconds{type=\"t\"} 3",
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    fn count(metrics: &Metrics, queue: &str, job_type: &str, is_apart: bool, outcome: Outcome) {
        let job = job(queue, job_type);
        let series = metrics.job_started(&job, is_apart, || &["Signal"]);
        metrics.job_ended(&series, &outcome.into(), Some(Duration::ZERO));
    }

    #[test]
    fn queues_beyond_the_first_hundred_share_a_label() {
        let metrics = Metrics::try_new(&["mail".to_owned()], 0.0).unwrap();
        for queue in 0..2 * MAX_NAMES {
            count(&metrics, &queue.to_string(), "t", true, Outcome::Success);
        }
        count(&metrics, "mail", "t", true, Outcome::Interrupted);
        let text = text(&metrics);
        let lines =
            text.lines().filter(|line| line.starts_with("zizq_worker_jobs_total{") && line.contains(r#"type="t""#));
        assert_eq!(lines.count(), OUTCOMES.len() * (MAX_NAMES + 1));
        assert!(text.contains(r#"jobs_total{outcome="succeeded",queue="(other)",type="t"} 101"#), "{text}");
        assert!(text.contains(r#"jobs_total{outcome="failed",queue="0",type="t"} 0"#), "{text}");
        assert!(text.contains(r#"jobs_total{outcome="interrupted",queue="mail",type="t"} 1"#), "{text}");
    }

    #[test]
    fn types_beyond_the_first_hundred_share_a_label() {
        let metrics = Metrics::try_new(&[], 0.0).unwrap();
        count(&metrics, "q", &"x".repeat(MAX_NAME_LENGTH + 1), false, Outcome::Success);
        for number in 0..2 * MAX_NAMES {
            count(&metrics, "q", &number.to_string(), false, Outcome::Success);
        }
        count(&metrics, "q", "configured", true, Outcome::Success);
        let text = text(&metrics);
        assert_eq!(text.matches("zizq_worker_handler_seconds_count{").count(), MAX_NAMES + 2);
        assert!(text.contains(r#"jobs_total{outcome="succeeded",queue="q",type="(other)"} 101"#), "{text}");
        assert!(text.contains(r#"jobs_total{outcome="succeeded",queue="q",type="99"} 1"#), "{text}");
        assert!(text.contains(r#"jobs_total{outcome="succeeded",queue="q",type="configured"} 1"#), "{text}");
        assert!(text.contains(r#"job_failures_total{kind="Signal",type="99"} 0"#), "{text}");
    }

    #[test]
    fn failures_that_handlers_name_share_a_kind() {
        let metrics = Metrics::try_new(&[], 0.0).unwrap();
        let named = |error_type| Failure { is_named_by_handler: true, ..Failure::new(error_type, "no") };
        for failure in [named("BankBusy"), named("Timeout"), Failure::new("Timeout", "no"), Failure::new("Odd", "no")] {
            count(&metrics, "q", "t", true, Outcome::Failure(failure));
        }
        metrics.job_malformed();
        let text = text(&metrics);
        assert!(text.contains(r#"job_failures_total{kind="(other)",type="t"} 3"#), "{text}");
        assert!(text.contains(r#"job_failures_total{kind="Timeout",type="t"} 1"#), "{text}");
        assert!(text.contains(r#"job_failures_total{kind="MalformedJob",type="(other)"} 1"#), "{text}");
        assert!(text.contains(r#"jobs_total{outcome="failed",queue="(other)",type="(other)"} 1"#), "{text}");
    }
}
