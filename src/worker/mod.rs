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

use crate::ack::{AckProcessor, AckQueue};
use crate::chain::Chain;
use crate::client::{Client, ClientError};
use crate::config::WorkerConfig;
use crate::dispatch::{Dispatcher, Ended};
use crate::job::{Failure, Job, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use activity::{Activity, Counts, Unfinished};
use producer::Producer;

/// A job between the stream and its outcome.
#[derive(Debug)]
struct Delivery {
    job: Job,
    /// Held for as long as the job keeps the worker busy.
    _unfinished: Unfinished,
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
        let client = Client::new(config.url.clone(), config.worker_id.clone());
        Self { config, client: Arc::new(client), dispatcher: Arc::new(dispatcher) }
    }

    /// Works until `lifecycle` says stop and everything has been taken down. Each run takes a new lifecycle; all else
    /// is made anew, so that it may be called again. Dropped before its end, it stops everything where it is.
    ///
    /// # Errors
    /// When the server refuses the worker's very first request.
    pub async fn run(&self, lifecycle: &Lifecycle) -> Result<Summary, WorkerError> {
        let WorkerConfig { queues, threads, fibers, prefetch, backoff, shutdown_deadline, exit_when_idle, .. } =
            &self.config;
        let shown = if queues.is_empty() { "(all)".to_owned() } else { queues.join(",") };
        info!(url = %self.client.url(), queues = shown, threads = threads.get(), fibers = fibers.get(), prefetch = prefetch.get(), "worker starting");
        self.config.warn();

        let activity = Activity::default();
        let (acks, ack_queue) =
            AckProcessor::start(Arc::clone(&self.client), prefetch.get() * 2, *backoff, lifecycle.clone());
        let (dispatch_queue, jobs) = async_channel::bounded(prefetch.get());
        let loops = self.start_loops(&jobs, &ack_queue, &activity, lifecycle);
        let producer = AbortOnDropHandle::new(tokio::spawn(self.producer(dispatch_queue, &activity, lifecycle).run()));
        let _deadline =
            spawn_watch(lifecycle, async |lifecycle, deadline| lifecycle.enforce(deadline).await, *shutdown_deadline);
        let _idle = exit_when_idle.map(|limit| {
            let activity = activity.clone();
            spawn_watch(
                lifecycle,
                async move |lifecycle, limit| activity.stop_when_idle(&lifecycle, limit).await,
                limit,
            )
        });

        lifecycle.reached(Phase::Draining).await;
        let Counts { running, waiting } = activity.counts(jobs.len());
        info!(running, waiting, "shutting down, waiting for workers to finish");
        drop(ack_queue);
        let ended = tear_down(jobs, loops, acks, producer, lifecycle).await;
        let summary = activity.summary(ended.killed);
        let Summary { succeeded, failed, interrupted, .. } = summary;
        info!(succeeded, failed, interrupted, "worker stopped");
        ended.producer.map(|()| summary)
    }

    fn producer(
        &self,
        dispatch_queue: async_channel::Sender<Delivery>,
        activity: &Activity,
        lifecycle: &Lifecycle,
    ) -> Producer {
        Producer {
            client: Arc::clone(&self.client),
            queues: self.config.queues.clone(),
            prefetch: self.config.prefetch.get(),
            backoff: self.config.backoff,
            dispatch_queue,
            activity: activity.clone(),
            lifecycle: lifecycle.clone(),
        }
    }

    fn start_loops(
        &self,
        jobs: &async_channel::Receiver<Delivery>,
        acks: &AckQueue,
        activity: &Activity,
        lifecycle: &Lifecycle,
    ) -> JoinSet<()> {
        let mut loops = JoinSet::new();
        for thread in 0..self.config.threads.get() {
            for fiber in 0..self.config.fibers.get() {
                let worker_loop = WorkerLoop {
                    name: format!("{thread}:{fiber}"),
                    jobs: jobs.clone(),
                    dispatcher: Arc::clone(&self.dispatcher),
                    acks: acks.clone(),
                    activity: activity.clone(),
                    lifecycle: lifecycle.clone(),
                };
                loops.spawn(worker_loop.run());
            }
        }
        loops
    }
}

fn spawn_watch<F>(
    lifecycle: &Lifecycle,
    watch: impl FnOnce(Lifecycle, Duration) -> F,
    limit: Duration,
) -> AbortOnDropHandle<()>
where
    F: Future<Output = ()> + Send + 'static,
{
    AbortOnDropHandle::new(tokio::spawn(watch(lifecycle.clone(), limit)))
}

struct TornDown {
    killed: bool,
    producer: Result<(), WorkerError>,
}

/// The order of the end: no more jobs, then no more running jobs, then no more reports, and only then no stream. The
/// server hands a job out again as soon as the stream is closed, so nothing of it may still be under way here.
async fn tear_down(
    jobs: async_channel::Receiver<Delivery>,
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
    jobs: async_channel::Receiver<Delivery>,
    dispatcher: Arc<D>,
    acks: AckQueue,
    activity: Activity,
    lifecycle: Lifecycle,
}

impl<D: Dispatcher> WorkerLoop<D> {
    async fn run(self) {
        info!(worker = self.name, "worker loop started");
        while let Ok(delivery) = self.jobs.recv().await {
            // Once killing, what waits here is not started: it goes back to the server with the stream.
            if self.lifecycle.phase() >= Phase::Killing {
                break;
            }
            let span = job_span(&delivery.job);
            self.work(delivery).instrument(span).await;
        }
        info!(worker = self.name, "worker loop stopped");
    }

    async fn work(&self, delivery: Delivery) {
        let _running = self.activity.start_job();
        let started = Instant::now();
        let ended = self.dispatch(&delivery.job).await;
        log_ended(&ended, started.elapsed());
        self.activity.count(&ended.outcome);
        match ended.outcome {
            Outcome::Success => self.acks.success(delivery.job.id.clone()).await,
            Outcome::Failure(failure) => self.acks.failure(delivery.job.id.clone(), failure).await,
            Outcome::Interrupted => {}
        }
    }

    /// A dispatcher that panics has failed its job, not the worker.
    async fn dispatch(&self, job: &Job) -> Ended {
        let work = AssertUnwindSafe(self.dispatcher.dispatch(job, &self.lifecycle));
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

fn log_ended(ended: &Ended, elapsed: Duration) {
    // Microseconds are as fine as anybody wants to read.
    let seconds = elapsed.as_micros() as f64 / 1e6;
    let cpu_seconds = ended.usage.map(|usage| usage.cpu.as_secs_f64());
    let peak_memory_bytes = ended.usage.map(|usage| usage.max_rss);
    match &ended.outcome {
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
