//! [`Producer`]: keeps a take stream open, and puts what comes over it into the dispatch queue.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::{debug, error, info, warn};

use super::{Run, Taken, WorkerError};
use crate::backoff::{Backoff, Retryable, retry};
use crate::chain::Chain;
use crate::client::ClientError;
use crate::job::{Failure, Job, JobId, Outcome};
use crate::ledger::{Arrival, Attempt, Delivery};
use crate::lifecycle::{Lifecycle, Phase};
use crate::stream::{Received, StreamError, StreamLimits, TakeStream};

pub(super) struct Producer {
    pub(super) queues: Vec<String>,
    pub(super) prefetch: usize,
    pub(super) limits: StreamLimits,
    pub(super) backoff: Backoff,
    pub(super) dispatch_queue: async_channel::Sender<Taken>,
    /// Its other end, for what is not to be started any more.
    pub(super) waiting: async_channel::Receiver<Taken>,
    pub(super) run: Run,
}

/// Why there is no stream, or none any more.
enum Disconnected {
    /// The server refused the very first request: trying again would not help.
    Refused(ClientError),
    /// It cannot be opened now.
    Unreachable(ClientError),
    /// It was open, and was lost.
    Lost(StreamError),
}

impl Retryable for Disconnected {
    fn is_retryable(&self) -> bool {
        !matches!(self, Self::Refused(_))
    }

    fn made_progress(&self) -> bool {
        matches!(self, Self::Lost(_))
    }
}

impl Producer {
    /// Runs until the lifecycle is stopped, through any number of connections. However it ends, it does not leave the
    /// worker running without it.
    pub(super) async fn run(self) -> Result<(), WorkerError> {
        let lifecycle = &self.run.lifecycle;
        let _stop = StopOnDrop(lifecycle.clone());
        let connected_before = AtomicBool::new(false);
        let session = || self.session(&connected_before);
        match retry(&self.backoff, lifecycle, Phase::Killing, session, log_disconnected).await {
            Err(Disconnected::Refused(error)) => Err(WorkerError::Refused(error)),
            Err(Disconnected::Lost(error)) => {
                warn!(error = %Chain(&error), "stream lost while killing, interrupted jobs may run elsewhere before they end here");
                Ok(())
            }
            Err(Disconnected::Unreachable(_)) | Ok(()) => Ok(()),
        }
    }

    /// One connection, from its opening to its end. `Ok` means that it was closed, or is not needed, because the worker
    /// stops.
    async fn session(&self, connected_before: &AtomicBool) -> Result<(), Disconnected> {
        let Run { client, activity, .. } = &self.run;
        if !self.is_needed() {
            return Ok(());
        }
        info!(url = %client.url(), "connecting");
        let opened = tokio::select! {
            biased;
            () = self.not_needed() => return Ok(()),
            opened = client.take(&self.queues, self.prefetch, self.limits) => opened,
        };
        let mut stream =
            opened.map_err(|error| match error.is_retryable() || connected_before.load(Ordering::Relaxed) {
                true => Disconnected::Unreachable(error),
                false => Disconnected::Refused(error),
            })?;
        info!("connected, listening for jobs");
        connected_before.store(true, Ordering::Relaxed);
        activity.set_connected(true);
        let ended = self.follow(&mut stream).await;
        activity.set_connected(false);
        self.drop_waiting();
        stream.close().await;
        ended.map_err(Disconnected::Lost)
    }

    /// The stream is gone, and the server has its jobs again. What stayed in the queue would be in the way of the next
    /// stream: while this one waits for room it hears neither jobs nor silence.
    fn drop_waiting(&self) {
        self.run.ledger.lose_stream();
        while let Ok(Taken { job, .. }) = self.waiting.try_recv() {
            debug!(id = job.id.as_str(), "job not started: its stream was lost, and the server has it again");
        }
    }

    /// While draining, a stream that was lost is opened again for the jobs that are still here: the server hands them
    /// out again, and if that is to this worker they need not run a second time.
    fn is_needed(&self) -> bool {
        match self.run.lifecycle.phase() {
            Phase::Running => true,
            Phase::Draining => !self.run.ledger.is_empty(),
            Phase::Killing | Phase::Forcing | Phase::Stopped => false,
        }
    }

    /// Waits until no stream need be opened any more.
    async fn not_needed(&self) {
        self.run.lifecycle.reached(Phase::Draining).await;
        if self.is_needed() {
            self.run.lifecycle.reached(Phase::Killing).await;
        }
    }

    /// Takes what comes, until the worker has stopped: only then may the stream be closed.
    async fn follow(&self, stream: &mut TakeStream) -> Result<(), StreamError> {
        loop {
            tokio::select! {
                biased;
                () = self.run.lifecycle.reached(Phase::Stopped) => return Ok(()),
                received = stream.next() => match received? {
                    Received::Job(job) => self.receive(job).await,
                    Received::Malformed { id, reason } => self.refuse(id, &reason).await,
                },
            }
        }
    }

    /// Finds out what a job that has come needs: to be started, or to be reported, or nothing.
    async fn receive(&self, job: Job) {
        let Run { ledger, acks, .. } = &self.run;
        let attempt = Attempt { id: job.id.clone(), attempts: Some(job.attempts) };
        match ledger.arrive(&attempt) {
            (Arrival::New, delivery) => self.push(job, delivery).await,
            (Arrival::UnderWay, _) => info!(id = job.id.as_str(), "job received again while it is here, not started"),
            (Arrival::Ended(outcome), _) => {
                info!(id = job.id.as_str(), "job received again after it ended here, reported");
                self.unless_stopped(acks.report_again(attempt, outcome)).await;
            }
        }
    }

    /// Waits for room in the dispatch queue, or for the drain: then the job goes back with the stream.
    async fn push(&self, job: Job, delivery: Delivery) {
        let Run { ledger, activity, lifecycle, .. } = &self.run;
        debug!(id = job.id.as_str(), r#type = job.job_type, waiting = self.dispatch_queue.len(), "job received");
        let id = job.id.clone();
        let taken = Taken { job, delivery, _unfinished: activity.take_job() };
        let pushed = tokio::select! {
            biased;
            () = lifecycle.reached(Phase::Draining) => false,
            pushed = self.dispatch_queue.send(taken) => pushed.is_ok(),
        };
        if !pushed {
            debug!(id = id.as_str(), "job received while draining, it goes back to the server");
            ledger.give_back(&id, delivery);
        }
    }

    /// Reports what is no job, but has an id, as failed: it would come again and again.
    async fn refuse(&self, id: JobId, reason: &str) {
        error!(id = id.as_str(), reason, "malformed job, reported as failed");
        let attempt = Attempt { id, attempts: None };
        let failure =
            Outcome::Failure(Failure::new("MalformedJob", format!("the worker cannot read this job: {reason}")));
        let outcome = match self.run.ledger.arrive(&attempt) {
            (Arrival::New, _) => failure,
            (Arrival::Ended(outcome), _) => outcome,
            (Arrival::UnderWay, _) => return,
        };
        if let Some(attempt) = self.run.ledger.end(&attempt.id, &outcome) {
            self.unless_stopped(self.run.acks.report(attempt, outcome)).await;
        }
    }

    async fn unless_stopped(&self, work: impl Future<Output = ()>) {
        tokio::select! {
            () = self.run.lifecycle.reached(Phase::Stopped) => {}
            () = work => {}
        }
    }
}

fn log_disconnected(disconnected: &Disconnected, wait: Duration) {
    let reconnect_in = format!("{:.2}s", wait.as_secs_f64());
    match disconnected {
        Disconnected::Unreachable(error @ ClientError::Refused { status, .. }) if status.is_client_error() => {
            error!(error = %Chain(error), reconnect_in, "server refuses the worker, reconnecting");
        }
        // Neither a network nor a restart makes such a line, and it may come again and again.
        Disconnected::Lost(error @ StreamError::NotAJob(_)) => {
            error!(error = %Chain(error), reconnect_in, "stream lost, reconnecting");
        }
        Disconnected::Lost(StreamError::Ended) => warn!(reconnect_in, "server ended the stream, reconnecting"),
        Disconnected::Lost(error) => warn!(error = %Chain(error), reconnect_in, "stream lost, reconnecting"),
        Disconnected::Unreachable(error) | Disconnected::Refused(error) => {
            warn!(error = %Chain(error), reconnect_in, "server unreachable, reconnecting");
        }
    }
}

/// Nobody would take jobs any more: the worker must not wait for signals for ever.
struct StopOnDrop(Lifecycle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop();
    }
}
