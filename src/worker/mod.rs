//! [`Worker`]: the producer, the dispatch queue, the worker loops, and the order in which they are taken down.

mod activity;
mod producer;

use std::any::Any;
use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;
use tracing::{Instrument, Span, debug, error, info, info_span};

use crate::ack::{AckProcessor, AckQueue, Reporter};
use crate::chain::Chain;
use crate::client::{Client, ClientError};
use crate::config::WorkerConfig;
use crate::dispatch::{Dispatcher, Ended};
use crate::job::{Failure, Job, Outcome};
use crate::ledger::{Delivery, Ledger};
use crate::lifecycle::{Lifecycle, Phase};
use crate::process::Usage;
use activity::{Activity, Counts, Unfinished};
use producer::Producer;

/// A job between the stream and its outcome.
#[derive(Debug)]
struct Taken {
    job: Job,
    delivery: Delivery,
    /// Held for as long as the job keeps the worker busy.
    _unfinished: Unfinished,
}

/// What the parts of one run share.
#[derive(Debug, Clone)]
struct Run {
    client: Arc<Client>,
    ledger: Arc<Ledger>,
    activity: Activity,
    lifecycle: Lifecycle,
    acks: AckQueue,
}

/// Takes jobs from a server, has a [`Dispatcher`] do them, and reports how they ended.
#[derive(Debug)]
pub struct Worker<D> {
    config: WorkerConfig,
    client: Arc<Client>,
    dispatcher: Arc<D>,
}

/// How a run ended, when it ended as it was asked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// Whether running jobs had to be stopped, by a second signal or by the deadline.
    pub killed: bool,
    /// Jobs that succeeded.
    pub succeeded: u64,
    /// Jobs that failed.
    pub failed: u64,
    /// Jobs that were cut short, and go back to the server.
    pub interrupted: u64,
}

/// Why a run could not go on.
#[derive(Debug)]
pub enum WorkerError {
    /// The server refused the very first take request, so a setting must be wrong.
    Refused(ClientError),
}

impl fmt::Display for WorkerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Refused(error) => {
                write!(f, "cannot take jobs from the server, check its url and the queues: {}", Chain(error))
            }
        }
    }
}

impl std::error::Error for WorkerError {}

impl<D: Dispatcher> Worker<D> {
    /// A worker that has not started.
    pub fn new(config: WorkerConfig, dispatcher: D) -> Self {
        let client = Client::new(config.url.clone(), config.worker_id.clone(), &config.tls);
        Self { config, client: Arc::new(client), dispatcher: Arc::new(dispatcher) }
    }

    /// Works until `lifecycle` says stop and everything has been taken down. Each run takes a new lifecycle; all else
    /// is made anew, so that it may be called again. Dropped before its end, it stops everything where it is.
    ///
    /// # Errors
    /// When the server refuses the worker's very first request.
    pub async fn run(&self, lifecycle: &Lifecycle) -> Result<Summary, WorkerError> {
        self.config.announce();
        let (acks, run) = self.start_acks(lifecycle);
        let (dispatch_queue, jobs) = async_channel::bounded(self.config.prefetch.get());
        let loops = self.start_loops(&jobs, &run);
        let producer = AbortOnDropHandle::new(tokio::spawn(self.producer(dispatch_queue, &jobs, &run).run()));
        let _watches = self.start_watches(&run);

        lifecycle.reached(Phase::Draining).await;
        let Run { activity, .. } = run;
        let Counts { running, waiting } = activity.counts(jobs.len());
        info!(running, waiting, "shutting down, waiting for workers to finish");
        let ended = tear_down(jobs, loops, acks, producer, lifecycle).await;
        let summary = activity.summary(ended.killed);
        let Summary { succeeded, failed, interrupted, .. } = summary;
        info!(succeeded, failed, interrupted, "worker stopped");
        ended.producer.map(|()| summary)
    }

    fn start_acks(&self, lifecycle: &Lifecycle) -> (AckProcessor, Run) {
        let capacity = self.config.prefetch.get() * 2;
        // With a small prefetch, more may run over several lost streams than one stream may hold.
        let ledger = Arc::new(Ledger::new(capacity.max(2 * self.config.concurrency().get())));
        let client = Arc::clone(&self.client);
        let reporter = Reporter::new(Arc::clone(&client), Arc::clone(&ledger), self.config.backoff, lifecycle.clone());
        let (processor, acks) = AckProcessor::start(reporter, capacity);
        (processor, Run { client, ledger, activity: Activity::default(), lifecycle: lifecycle.clone(), acks })
    }

    fn producer(
        &self,
        dispatch_queue: async_channel::Sender<Taken>,
        waiting: &async_channel::Receiver<Taken>,
        run: &Run,
    ) -> Producer {
        Producer {
            queues: self.config.queues.clone(),
            prefetch: self.config.prefetch.get(),
            limits: self.config.stream_limits,
            backoff: self.config.backoff,
            dispatch_queue,
            waiting: waiting.clone(),
            run: run.clone(),
        }
    }

    fn start_loops(&self, jobs: &async_channel::Receiver<Taken>, run: &Run) -> JoinSet<()> {
        let mut loops = JoinSet::new();
        for thread in 0..self.config.threads.get() {
            for fiber in 0..self.config.fibers.get() {
                let worker_loop = WorkerLoop {
                    name: format!("{thread}:{fiber}"),
                    jobs: jobs.clone(),
                    dispatcher: Arc::clone(&self.dispatcher),
                    run: run.clone(),
                };
                loops.spawn(worker_loop.run());
            }
        }
        loops
    }

    /// What ends a run by itself: the deadline of a drain, and idleness.
    fn start_watches(&self, run: &Run) -> Vec<AbortOnDropHandle<()>> {
        let Run { activity, lifecycle, .. } = run.clone();
        let (deadline, draining) = (self.config.shutdown_deadline, lifecycle.clone());
        let mut watches = vec![tokio::spawn(async move { draining.enforce(deadline).await })];
        if let Some(limit) = self.config.exit_when_idle {
            watches.push(tokio::spawn(async move { activity.stop_when_idle(&lifecycle, limit).await }));
        }
        watches.into_iter().map(AbortOnDropHandle::new).collect()
    }
}

struct TornDown {
    killed: bool,
    producer: Result<(), WorkerError>,
}

/// The order of the end: no more jobs, then no more running jobs, then no more reports, and only then no stream. The
/// server hands a job out again as soon as the stream is closed, so nothing of it may still be under way here.
async fn tear_down(
    jobs: async_channel::Receiver<Taken>,
    loops: JoinSet<()>,
    acks: AckProcessor,
    producer: AbortOnDropHandle<Result<(), WorkerError>>,
    lifecycle: &Lifecycle,
) -> TornDown {
    jobs.close();
    loops.join_all().await;
    acks.finish().await;
    let killed = lifecycle.phase() >= Phase::Killing;
    lifecycle.raise(Phase::Stopped);
    let producer = producer.await.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()));
    TornDown { killed, producer }
}

/// One of the threads × fibers loops: it runs one job at a time, and hands its outcome on before it takes the next.
struct WorkerLoop<D> {
    name: String,
    jobs: async_channel::Receiver<Taken>,
    dispatcher: Arc<D>,
    run: Run,
}

impl<D: Dispatcher> WorkerLoop<D> {
    async fn run(self) {
        info!(worker = self.name, "worker loop started");
        while let Ok(taken) = self.jobs.recv().await {
            // Once killing, what waits here is not started: it goes back to the server with the stream.
            if self.run.lifecycle.phase() >= Phase::Killing {
                break;
            }
            let span = job_span(&taken.job);
            self.work(taken).instrument(span).await;
        }
        info!(worker = self.name, "worker loop stopped");
    }

    async fn work(&self, taken: Taken) {
        let Run { ledger, activity, acks, .. } = &self.run;
        let Taken { job, delivery, _unfinished } = taken;
        if !ledger.begin(&job.id, delivery) {
            debug!("job not started: its stream was lost, and the server has it again");
            return;
        }
        let _running = activity.start_job();
        let started = Instant::now();
        let Ended { outcome, usage, .. } = self.dispatch(&job).await;
        log_ended(&outcome, usage, started.elapsed());
        activity.count(&outcome);
        // Its payload is not held while the report waits for a place.
        let id = job.id;
        if let Some(attempt) = ledger.end(&id, &outcome) {
            acks.report(attempt, outcome).await;
        }
    }

    /// A dispatcher that panics has failed its job, not the worker.
    async fn dispatch(&self, job: &Job) -> Ended {
        let work = AssertUnwindSafe(self.dispatcher.dispatch(job, &self.run.lifecycle));
        let failure = |panic: Box<dyn Any + Send>| Failure::new("Panic", panic_message(&*panic));
        work.catch_unwind().await.unwrap_or_else(|panic| Outcome::Failure(failure(panic)).into())
    }
}

/// `attempt` counts from 1, as in the server's list of errors.
fn job_span(job: &Job) -> Span {
    info_span!(
        "job",
        id = job.id.as_str(),
        r#type = job.job_type,
        queue = job.queue,
        attempt = job.attempts.saturating_add(1)
    )
}

fn log_ended(outcome: &Outcome, usage: Option<Usage>, elapsed: Duration) {
    // Microseconds are as fine as anybody wants to read.
    let seconds = elapsed.as_micros() as f64 / 1e6;
    let cpu_seconds = usage.map(|usage| usage.cpu.as_secs_f64());
    let peak_memory_bytes = usage.map(|usage| usage.max_rss);
    match outcome {
        Outcome::Success => debug!(seconds, cpu_seconds, peak_memory_bytes, "job completed"),
        Outcome::Failure(failure) => {
            let error_type = failure.error_type.as_deref().unwrap_or_default();
            error!(seconds, cpu_seconds, peak_memory_bytes, error_type, error = failure.message, "job failed");
        }
        Outcome::Interrupted => {
            info!(seconds, cpu_seconds, peak_memory_bytes, "job interrupted, it goes back to the server");
        }
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("the dispatcher panicked: {}", text.unwrap_or("no message"))
}
