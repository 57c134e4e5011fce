//! [`Worker`]: the producer, the dispatch queue, the worker loops, and the order in which they stop.

mod activity;
mod controls;
mod history;
mod intake;
mod opening;
mod producer;
mod purpose;
mod search;
mod session;
mod status;
mod streams;
mod worker_loop;

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;

use humantime::format_duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::task::JoinSet;
use tokio_util::task::AbortOnDropHandle;
use tracing::info;

use crate::ack::{AckProcessor, AckQueue, Reporter};
use crate::chain::Chain;
use crate::client::ClientError;
use crate::config::WorkerConfig;
use crate::dispatch::Dispatcher;
use crate::job::Job;
use crate::ledger::{Delivery, Ledger, StreamId};
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;
use activity::{Activity, Counts, Tally, Unfinished};
pub use controls::Controls;
use intake::Intake;
use producer::Producer;
pub use status::{EndedJobs, LastFailure, LoopStatus, RunningJob, Status, Unready};
use worker_loop::WorkerLoop;

/// A job that has been taken from a stream and has no outcome yet.
#[derive(Debug)]
struct Taken {
    job: Job,
    stream: StreamId,
    delivery: Delivery,
    /// The permit for the job's place in the dispatch queue, once the job has one.
    place: Option<OwnedSemaphorePermit>,
    /// The guard that counts the job as unfinished.
    _unfinished: Unfinished,
}

/// The state that the parts of one run share.
#[derive(Debug, Clone)]
struct Run {
    ledger: Arc<Ledger>,
    activity: Arc<Activity>,
    /// The counts of ended jobs in this run.
    tally: Arc<Tally>,
    metrics: Metrics,
    lifecycle: Lifecycle,
    acks: AckQueue,
}

/// A worker: takes jobs from a server, runs them through a [`Dispatcher`], and reports their outcomes.
#[derive(Debug)]
pub struct Worker<D> {
    config: WorkerConfig,
    controls: Controls<D>,
}

/// The summary of a run.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Whether running jobs were killed, by a second signal or by the deadline.
    pub killed: bool,
    /// The number of jobs that succeeded.
    pub succeeded: u64,
    /// The number of jobs that failed.
    pub failed: u64,
    /// The number of interrupted jobs, which the server requeues.
    pub interrupted: u64,
    /// The number of dropped reports, whose jobs run again. A report is dropped if the server refuses it permanently, or if the
    /// worker stops before the server accepts it.
    pub reports_dropped: u64,
    /// Whether the run ended because of a limit such as `max_jobs`, and was not asked to stop.
    pub ended_by_itself: bool,
}

impl Summary {
    /// Reports whether the run is a success. A run that killed running jobs is a failure. A run that dropped reports is a failure
    /// if it ended by itself, but not if it was asked to stop.
    pub fn is_clean(&self) -> bool {
        let left_behind = self.ended_by_itself && self.reports_dropped > 0;
        !(self.killed || left_behind)
    }
}

/// The error that ends a run.
#[derive(Debug)]
pub enum WorkerError {
    /// The server refused the very first take request, so a setting is wrong.
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
    /// Returns a worker that has not started.
    pub fn new(config: WorkerConfig, dispatcher: D) -> Self {
        let intake = Intake::new(&config);
        let activity = Arc::new(Activity::new(config.threads.get(), config.fibers.get()));
        let metrics = Metrics::new(&config.queues);
        Self { config, controls: Controls { dispatcher: Arc::new(dispatcher), intake, activity, metrics } }
    }

    /// Returns the handle to watch and control the worker.
    pub fn controls(&self) -> Controls<D> {
        self.controls.clone()
    }

    /// Runs until `lifecycle` is stopped and everything has ended. A worker can run again with a new lifecycle, because each run
    /// creates its own ledger, queues and tasks. Dropping the future stops everything at once.
    ///
    /// # Errors
    /// When the server refuses the worker's very first request.
    pub async fn run(&self, lifecycle: &Lifecycle) -> Result<Summary, WorkerError> {
        self.config.announce();
        let (acks, run) = self.start_acks(lifecycle);
        // The queue needs no bound, because each queued job holds a permit of its stream, and a stream has only `prefetch` permits.
        let (dispatch_queue, jobs) = async_channel::unbounded();
        let loops = self.start_loops(&jobs, &run);
        let intake = self.controls.intake.clone();
        let producer = Producer::new(&self.config, intake, dispatch_queue, jobs.clone(), run.clone());
        let producer = AbortOnDropHandle::new(tokio::spawn(producer.run()));
        let _watches = self.start_watches(&run);

        lifecycle.reached(Phase::Draining).await;
        let Counts { running, waiting } = self.controls.activity.counts();
        info!(running, waiting, "shutting down, waiting for workers to finish");
        let (summary, producer) = self.tear_down(jobs, loops, acks, producer, run).await;
        let Summary { succeeded, failed, interrupted, reports_dropped, .. } = summary;
        let reason = lifecycle.reason().unwrap_or("asked to stop");
        info!(reason, succeeded, failed, interrupted, reports_dropped, "worker stopped");
        producer.map(|()| summary)
    }

    fn start_acks(&self, lifecycle: &Lifecycle) -> (AckProcessor, Run) {
        let capacity = self.config.prefetch.get() * 2;
        let max_kept = max_kept(capacity, self.config.concurrency().get());
        let ledger = Arc::new(Ledger::new(max_kept, self.config.max_jobs.map(NonZeroU64::get)));
        let activity = Arc::clone(&self.controls.activity);
        let (metrics, lifecycle) = (self.controls.metrics.clone(), lifecycle.clone());
        let reporter = Reporter::new(Arc::clone(&ledger), self.config.backoff, lifecycle.clone(), metrics.clone());
        let (processor, acks) = AckProcessor::start(reporter, capacity, metrics.clone());
        (processor, Run { ledger, activity, tally: Arc::default(), metrics, lifecycle, acks })
    }

    fn start_loops(&self, jobs: &async_channel::Receiver<Taken>, run: &Run) -> JoinSet<()> {
        let mut loops = JoinSet::new();
        for (slot, name) in self.controls.activity.loop_names().enumerate() {
            let worker_loop = WorkerLoop {
                slot,
                name: name.to_owned(),
                reserve: self.config.concurrency().get().div_ceil(4),
                jobs: jobs.clone(),
                dispatcher: Arc::clone(&self.controls.dispatcher),
                run: run.clone(),
            };
            loops.spawn(worker_loop.run());
        }
        loops
    }

    /// Stops everything in order: first new jobs, then running jobs and processes, then reports, then the stream. The stream
    /// closes last, because the server requeues the jobs of a closed stream, and two runs of one job must not overlap.
    async fn tear_down(
        &self,
        jobs: async_channel::Receiver<Taken>,
        loops: JoinSet<()>,
        acks: AckProcessor,
        producer: AbortOnDropHandle<Result<(), WorkerError>>,
        run: Run,
    ) -> (Summary, Result<(), WorkerError>) {
        let Run { lifecycle, tally, .. } = &run;
        jobs.close();
        loops.join_all().await;
        self.controls.dispatcher.finish(lifecycle).await;
        let reports_dropped = acks.finish(self.config.shutdown_deadline).await as u64;
        let (killed, ended_by_itself) = (lifecycle.phase() >= Phase::Killing, !lifecycle.is_awaited());
        let summary = Summary { killed, ended_by_itself, reports_dropped, ..tally.summary() };
        lifecycle.stopped();
        let producer = producer.await.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()));
        (summary, producer)
    }

    /// Starts the tasks that end a run without a signal: the deadline of a drain, `max_time`, and `exit_when_idle`.
    fn start_watches(&self, run: &Run) -> Vec<AbortOnDropHandle<()>> {
        let Run { activity, ledger, lifecycle, .. } = run.clone();
        let (deadline, draining) = (self.config.shutdown_deadline, lifecycle.clone());
        let mut watches = vec![tokio::spawn(async move { draining.enforce(deadline).await })];
        if let Some(limit) = self.config.max_time {
            let lifecycle = lifecycle.clone();
            watches.push(tokio::spawn(async move {
                tokio::time::sleep(limit).await;
                info!(?limit, "max_time is over: draining");
                lifecycle.finish_because(format!("max_time of {} is over", format_duration(limit)));
            }));
        }
        if let Some(limit) = self.config.exit_when_idle {
            watches.push(tokio::spawn(async move { activity.stop_when_idle(&lifecycle, &ledger, limit).await }));
        }
        watches.into_iter().map(AbortOnDropHandle::new).collect()
    }
}

/// The smallest value that `max_kept` returns. It is enough for the jobs of several lost streams with a small prefetch, and costs
/// little memory, because a parked failure takes at most about 32 KiB.
const MIN_KEPT: usize = 100;

/// Returns the maximum number of parked and settled jobs that the ledger keeps.
fn max_kept(ack_capacity: usize, concurrency: usize) -> usize {
    ack_capacity.max(2 * concurrency).max(MIN_KEPT)
}
