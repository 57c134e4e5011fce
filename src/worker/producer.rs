//! [`Producer`]: keeps a take stream open, and puts what comes over it into the dispatch queue.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, Semaphore};
use tracing::{debug, error, info, warn};

use super::intake::{Intake, Tap};
use super::session::{Left, Session, shut};
use super::{Run, Taken, WorkerError};
use crate::backoff::{Backoff, Retryable, retry_sooner};
use crate::chain::Chain;
use crate::client::{Client, ClientError};
use crate::lifecycle::{Lifecycle, Phase};
use crate::stream::{StreamError, TakeStream};
use crate::version::misfit;

pub(super) struct Producer {
    pub(super) intake: Intake,
    pub(super) backoff: Backoff,
    pub(super) dispatch_queue: async_channel::Sender<Taken>,
    /// Its other end, for what is not to be started any more.
    pub(super) waiting: async_channel::Receiver<Taken>,
    pub(super) run: Run,
    /// The version of the server at the last connection.
    pub(super) seen_version: Mutex<Option<String>>,
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
        let first = self.intake.tap();
        let session = || self.session(&first, &connected_before);
        let before_wait = |disconnected: &Disconnected, wait| {
            self.run.metrics.reconnecting();
            log_disconnected(disconnected, wait);
        };
        let other_settings = || async { self.intake.changed().await };
        match retry_sooner(&self.backoff, lifecycle, Phase::Killing, session, before_wait, other_settings).await {
            Err(Disconnected::Refused(error)) => Err(WorkerError::Refused(error)),
            Err(Disconnected::Lost(error)) => {
                warn!(error = %Chain(&error), "stream lost while killing, interrupted jobs may run elsewhere before they end here");
                Ok(())
            }
            Err(Disconnected::Unreachable(_)) | Ok(()) => Ok(()),
        }
    }

    /// One stream after another, until one is lost. `Ok` means that none is needed any more, because the worker stops.
    async fn session(&self, first: &Arc<Tap>, connected_before: &AtomicBool) -> Result<(), Disconnected> {
        while let Some(tap) = self.next_tap().await {
            // The stream before is closed or lost, so nothing is left that its server alone must hear of.
            self.run.link.move_to(Arc::clone(&tap.client));
            info!(url = %tap.client.url(), "connecting");
            let opened = tokio::select! {
                biased;
                () = self.not_needed() => return Ok(()),
                () = shut(&self.run, &self.intake, &tap) => continue,
                opened = tap.client.take(&tap.queues, tap.prefetch, tap.limits) => opened,
            };
            // What a reload has brought may be mended by the next one.
            let may_pass = connected_before.load(Ordering::Relaxed) || !Arc::ptr_eq(&tap, first);
            let stream = opened.map_err(|error| match error.is_retryable() || may_pass {
                true => Disconnected::Unreachable(error),
                false => Disconnected::Refused(error),
            })?;
            info!("connected, listening for jobs");
            connected_before.store(true, Ordering::Relaxed);
            match self.follow(tap, stream).await.map_err(Disconnected::Lost)? {
                Left::Stopped => return Ok(()),
                Left::Shut => info!("stream closed, everything taken over it has been reported"),
            }
        }
        Ok(())
    }

    async fn follow(&self, tap: Arc<Tap>, stream: TakeStream) -> Result<Left, StreamError> {
        let Self { intake, dispatch_queue, run, .. } = self;
        let (client, places) = (Arc::clone(&tap.client), Arc::new(Semaphore::new(tap.prefetch)));
        let mut session = Session { run, intake, dispatch_queue, tap, stream, places };
        run.activity.set_connected(true);
        let ended = tokio::select! {
            biased;
            ended = session.follow() => ended,
            never = self.warn_of_version(&client) => match never {},
        };
        run.activity.set_connected(false);
        self.drop_waiting();
        session.stream.close().await;
        ended
    }

    /// Warns once of each version of the server that does not fit.
    async fn warn_of_version(&self, client: &Client) -> Infallible {
        match client.version().await {
            Ok(version) => {
                debug!(version, "server version");
                let is_new = self.seen_version.lock().await.replace(version.clone()).is_none_or(|seen| seen != version);
                if let Some(misfit) = misfit(&version).filter(|_| is_new) {
                    warn!(version, misfit, "the server's version does not fit this worker's");
                }
            }
            // A proxy may let nothing through but what a worker cannot do without.
            Err(error) => debug!(error = %Chain(&error), "the server does not tell its version"),
        }
        std::future::pending().await
    }

    /// The stream is gone, and the server has its jobs again. What stayed in the queue would be in the way of the next
    /// stream's.
    fn drop_waiting(&self) {
        self.run.ledger.lose_stream();
        while let Ok(Taken { job, .. }) = self.waiting.try_recv() {
            debug!(id = job.id.as_str(), "job not started: its stream was lost, and the server has it again");
        }
    }

    /// Waits until jobs may be taken, and returns what by; nothing once no stream is needed.
    async fn next_tap(&self) -> Option<Arc<Tap>> {
        tokio::select! {
            biased;
            () = self.run.lifecycle.reached(Phase::Draining) => self.is_needed().then(|| self.intake.tap()),
            tap = self.intake.open() => Some(tap),
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
        self.0.stop_because("no more jobs can be taken");
    }
}
