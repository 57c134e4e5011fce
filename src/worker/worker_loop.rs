//! [`WorkerLoop`]: pops jobs from the dispatch queue, dispatches them, and queues their outcomes.

use std::any::Any;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tracing::{Instrument, Span, debug, error, error_span, info, warn};

use super::controls::seconds;
use super::history::beginning;
use super::{Run, Taken};
use crate::ack::Urgency;
use crate::config::{JOBS_TARGET, SPAN_TARGET};
use crate::dispatch::{Dispatcher, Ended, Took};
use crate::job::{Failure, Job, Outcome, Report};
use crate::ledger::{Beginning, Delivery};
use crate::lifecycle::Phase;
use crate::process::ResourceUsage;

/// One of the `threads` × `fibers` loops. It runs one job at a time, and queues the outcome before it takes the next job.
pub(super) struct WorkerLoop<D> {
    /// The loop's number.
    pub(super) slot: usize,
    pub(super) name: String,
    /// A quarter of the number of loops. A report is urgent if at most this many jobs are waiting.
    pub(super) reserve: usize,
    pub(super) jobs: async_channel::Receiver<Taken>,
    pub(super) dispatcher: Arc<D>,
    pub(super) run: Run,
}

impl<D: Dispatcher> WorkerLoop<D> {
    /// Runs jobs until the dispatch queue is closed and empty, or the worker is killed.
    pub(super) async fn run(self) {
        info!(worker = self.name, "worker loop started");
        while let Ok(taken) = self.jobs.recv().await {
            // Once the phase is `Killing`, start no more jobs. The server redelivers the waiting jobs after the stream closes.
            if self.run.lifecycle.phase() >= Phase::Killing {
                break;
            }
            let span = job_span(&taken.job);
            self.work(taken).instrument(span).await;
        }
        info!(worker = self.name, "worker loop stopped");
    }

    async fn work(&self, taken: Taken) {
        let Run { ledger, activity, tally, metrics, acks, .. } = &self.run;
        let Taken { job, delivery, place, _unfinished, .. } = taken;
        drop(place);
        if !self.may_begin(&job, delivery) {
            return;
        }
        let _running = activity.start_job(self.slot, &job);
        let is_apart = self.dispatcher.is_counted_apart(&job.job_type);
        let series = metrics.job_started(&job, is_apart, || self.dispatcher.usual_failures(&job.job_type));
        let started = Instant::now();
        let ended = self.dispatch(&job).await;
        let times = Times::of(ended.took, started.elapsed());
        metrics.job_ended(&series, &ended, times.ran);
        let Ended { outcome, usage, .. } = ended;
        log_ended(&outcome, usage, times);
        activity.note_end(&job, &outcome);
        tally.count(&outcome);
        let id = job.id.clone();
        // Free the payload before the wait for a slot in the ack queue.
        drop(job);
        let Some(report) = Report::of(outcome) else { return ledger.interrupt(&id) };
        if let Some(attempt) = ledger.end(&id, &report) {
            acks.report(attempt, report, self.urgency()).await;
        }
    }

    fn urgency(&self) -> Urgency {
        if self.jobs.len() > self.reserve { Urgency::Soon } else { Urgency::Now }
    }

    fn may_begin(&self, job: &Job, delivery: Delivery) -> bool {
        match self.run.ledger.begin(&job.id, delivery) {
            Beginning::Begun { is_last: false } => true,
            Beginning::Begun { is_last: true } => {
                info!("max_jobs have been started: draining");
                self.run.lifecycle.finish_because("max_jobs have been started");
                true
            }
            Beginning::NotOurs => {
                debug!("job not started: its stream was lost, and the server has it again");
                false
            }
            Beginning::NoneLeft => {
                debug!("job not started, because max_jobs have been: it goes back to the server");
                false
            }
        }
    }

    /// Dispatches a job. A panic of the dispatcher fails only the job.
    async fn dispatch(&self, job: &Job) -> Ended {
        let work = AssertUnwindSafe(self.dispatcher.dispatch(job, &self.run.lifecycle));
        let failure = |panic: Box<dyn Any + Send>| Failure::new("Panic", panic_message(&*panic));
        work.catch_unwind().await.unwrap_or_else(|panic| Outcome::Failure(failure(panic)).into())
    }
}

/// The minimum wait to log. Shorter waits before the start of a job are left out of the log.
const NOTABLE_WAIT: Duration = Duration::from_millis(1);

/// The run time of a job, if the job was started, and the wait before its start.
#[derive(Debug, Clone, Copy)]
struct Times {
    ran: Option<Duration>,
    waited: Duration,
}

impl Times {
    fn of(took: Took, dispatch: Duration) -> Self {
        let ran = match took {
            Took::Dispatch => Some(dispatch),
            Took::Run(ran) => Some(ran),
            Took::Nothing => None,
        };
        Self { ran, waited: dispatch.saturating_sub(ran.unwrap_or_default()) }
    }
}

/// Returns the span that names the job in each log line. `attempt` counts from 1, as in the server's list of errors.
fn job_span(job: &Job) -> Span {
    // The span has level error, because a log filter that lets only errors pass would drop a span of a lower level, and the errors
    // would lack the job's id.
    error_span!(
        target: SPAN_TARGET,
        "job",
        id = job.id.as_str(),
        r#type = beginning(&job.job_type),
        queue = beginning(&job.queue),
        attempt = job.attempts.saturating_add(1)
    )
}

fn log_ended(outcome: &Outcome, usage: Option<ResourceUsage>, times: Times) {
    let waited_seconds = Some(times.waited).filter(|waited| *waited >= NOTABLE_WAIT).map(seconds);
    let seconds = times.ran.map(seconds);
    let cpu_seconds = usage.map(|usage| usage.cpu.as_secs_f64());
    let peak_memory_bytes = usage.map(|usage| usage.max_rss);
    match outcome {
        Outcome::Success => {
            info!(target: JOBS_TARGET, seconds, waited_seconds, cpu_seconds, peak_memory_bytes, "job completed");
        }
        Outcome::Failure(failure) => {
            let error_type = failure.error_type.as_deref().unwrap_or_default();
            let error = failure.message.as_str();
            let (retry_at, kill) = (failure.retry_at, failure.kill.then_some(true));
            error!(
                target: JOBS_TARGET,
                seconds, waited_seconds, cpu_seconds, peak_memory_bytes, error_type, error, retry_at, kill, "job failed"
            );
        }
        Outcome::Interrupted => {
            warn!(
                target: JOBS_TARGET,
                seconds,
                waited_seconds,
                cpu_seconds,
                peak_memory_bytes,
                "job interrupted, it goes back to the server"
            );
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the dispatcher panicked: {}", text.unwrap_or("no message"))
}
