//! [`Producer`]: keeps a take stream open, and puts what comes over it into the dispatch queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tracing::{debug, error, info, warn};

use super::activity::Activity;
use super::{Delivery, WorkerError};
use crate::backoff::{Backoff, Retryable, retry};
use crate::chain::Chain;
use crate::client::{Client, ClientError};
use crate::job::Job;
use crate::lifecycle::{Lifecycle, Phase};
use crate::stream::{StreamError, TakeStream};

pub(super) struct Producer {
    pub(super) client: Arc<Client>,
    pub(super) queues: Vec<String>,
    pub(super) prefetch: usize,
    pub(super) backoff: Backoff,
    pub(super) dispatch_queue: async_channel::Sender<Delivery>,
    pub(super) activity: Activity,
    pub(super) lifecycle: Lifecycle,
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
        let _stop = StopOnDrop(self.lifecycle.clone());
        let connected_before = AtomicBool::new(false);
        let session = || self.session(&connected_before);
        match retry(&self.backoff, &self.lifecycle, Phase::Draining, session, log_disconnected).await {
            Err(Disconnected::Refused(error)) => Err(WorkerError::Refused(error)),
            Err(Disconnected::Lost(error)) => {
                warn!(error = %Chain(&error), "stream lost while draining, unfinished jobs may run elsewhere too");
                Ok(())
            }
            Err(Disconnected::Unreachable(_)) | Ok(()) => Ok(()),
        }
    }

    /// One connection, from its opening to its end. `Ok` means that it was closed because the worker has stopped.
    async fn session(&self, connected_before: &AtomicBool) -> Result<(), Disconnected> {
        // A drain cuts the wait before this short.
        if self.lifecycle.phase() >= Phase::Draining {
            return Ok(());
        }
        info!(url = %self.client.url(), "connecting");
        let opened = tokio::select! {
            biased;
            () = self.lifecycle.reached(Phase::Draining) => return Ok(()),
            opened = self.client.take(&self.queues, self.prefetch) => opened,
        };
        let mut stream =
            opened.map_err(|error| match error.is_retryable() || connected_before.load(Ordering::Relaxed) {
                true => Disconnected::Unreachable(error),
                false => Disconnected::Refused(error),
            })?;
        info!("connected, listening for jobs");
        connected_before.store(true, Ordering::Relaxed);
        self.activity.set_connected(true);
        let ended = self.follow(&mut stream).await;
        self.activity.set_connected(false);
        stream.close().await;
        ended.map_err(Disconnected::Lost)
    }

    /// Takes jobs until the worker drains, and then holds the stream open until it has stopped.
    async fn follow(&self, stream: &mut TakeStream) -> Result<(), StreamError> {
        loop {
            tokio::select! {
                biased;
                () = self.lifecycle.reached(Phase::Draining) => break,
                job = stream.next() => self.push(job?).await,
            }
        }
        tokio::select! {
            () = self.lifecycle.reached(Phase::Stopped) => Ok(()),
            lost = give_back(stream) => lost,
        }
    }

    /// Waits for room in the dispatch queue, or for the drain: then the job goes back with the stream.
    async fn push(&self, job: Job) {
        debug!(id = job.id.as_str(), r#type = job.job_type, waiting = self.dispatch_queue.len(), "job received");
        let delivery = Delivery { job, _unfinished: self.activity.take_job() };
        tokio::select! {
            biased;
            () = self.lifecycle.reached(Phase::Draining) => {}
            _ = self.dispatch_queue.send(delivery) => {}
        }
    }
}

/// Reads on, so that the end of the stream is noticed, but starts nothing: what comes now goes back when it closes.
async fn give_back(stream: &mut TakeStream) -> Result<(), StreamError> {
    loop {
        let job = stream.next().await?;
        debug!(id = job.id.as_str(), "job received while draining, it goes back to the server");
    }
}

fn log_disconnected(disconnected: &Disconnected, wait: Duration) {
    let reconnect_in = format!("{:.2}s", wait.as_secs_f64());
    match disconnected {
        Disconnected::Unreachable(error @ ClientError::Refused { status, .. }) if status.is_client_error() => {
            error!(error = %Chain(error), reconnect_in, "server refuses the worker, reconnecting");
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
