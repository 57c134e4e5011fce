//! [`AckProcessor`]: reports what became of the jobs. Successes leave in bulk, failures one by one; neither waits for the other.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, error, warn};

use crate::backoff::{Backoff, retry};
use crate::chain::Chain;
use crate::client::{Acceptance, Client, ClientError};
use crate::job::{Failure, JobId};
use crate::lifecycle::{Lifecycle, Phase};

/// How many ids one bulk request carries at most, so that its size stays far below what servers and proxies accept.
const MAX_SUCCESSES_PER_REQUEST: usize = 1000;

/// How many failures are under way at once: enough to hide the round trip, few enough to spare the server.
const MAX_FAILURES_UNDER_WAY: usize = 8;

/// How long the last try of a report may take once the worker is killed.
const LAST_TRY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long all last tries together may take, however many there are: one for what was under way when the worker was
/// killed, and one for what had gathered behind it.
const LAST_TRIES_TIMEOUT: Duration = LAST_TRY_TIMEOUT.saturating_mul(2);

/// A place in the ack queue; given back when the report has been answered or given up.
type Place = OwnedSemaphorePermit;

/// The worker loops' side of the ack queue.
#[derive(Debug, Clone)]
pub(crate) struct AckQueue {
    places: Arc<Semaphore>,
    successes: mpsc::UnboundedSender<(JobId, Place)>,
    failures: mpsc::UnboundedSender<(JobId, Failure, Place)>,
}

impl AckQueue {
    /// Hands over a success; waits while the queue is full.
    pub(crate) async fn success(&self, id: JobId) {
        if let Some(place) = self.place().await {
            let _ = self.successes.send((id, place));
        }
    }

    /// Hands over a failure; waits while the queue is full.
    pub(crate) async fn failure(&self, id: JobId, failure: Failure) {
        if let Some(place) = self.place().await {
            let _ = self.failures.send((id, failure, place));
        }
    }

    /// The semaphore is never closed, and the processor outlives every queue, so a place and a receiver there always are.
    async fn place(&self) -> Option<Place> {
        Arc::clone(&self.places).acquire_owned().await.ok()
    }
}

/// Takes reports from its queue and sees each through: accepted, refused, or given up because the worker is killed.
#[derive(Debug)]
pub(crate) struct AckProcessor {
    successes: AbortOnDropHandle<()>,
    failures: AbortOnDropHandle<()>,
}

/// What the sending side needs.
#[derive(Debug, Clone)]
struct Reporter {
    client: Arc<Client>,
    backoff: Backoff,
    lifecycle: Lifecycle,
    /// When a report first noticed that the worker is killed.
    killed: Arc<OnceLock<Instant>>,
}

impl AckProcessor {
    /// Starts it with a queue of `capacity` reports, those under way included.
    pub(crate) fn start(
        client: Arc<Client>,
        capacity: usize,
        backoff: Backoff,
        lifecycle: Lifecycle,
    ) -> (Self, AckQueue) {
        let (successes, success_queue) = mpsc::unbounded_channel();
        let (failures, failure_queue) = mpsc::unbounded_channel();
        let reporter = Reporter { client, backoff, lifecycle, killed: Arc::default() };
        let processor = Self {
            successes: AbortOnDropHandle::new(tokio::spawn(reporter.clone().report_successes(success_queue))),
            failures: AbortOnDropHandle::new(tokio::spawn(reporter.report_failures(failure_queue))),
        };
        (processor, AckQueue { places: Arc::new(Semaphore::new(capacity)), successes, failures })
    }

    /// Waits until every report has been answered or given up. Every clone of its queue must be gone, or going.
    pub(crate) async fn finish(self) {
        let (successes, failures) = tokio::join!(self.successes, self.failures);
        for ended in [successes, failures] {
            ended.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()));
        }
    }
}

impl Reporter {
    /// One bulk request at a time: while it is under way, the next one gathers. No timer holds a report back.
    async fn report_successes(self, mut queue: mpsc::UnboundedReceiver<(JobId, Place)>) {
        let mut waiting = Vec::new();
        while queue.recv_many(&mut waiting, MAX_SUCCESSES_PER_REQUEST).await > 0 {
            let (ids, places): (Vec<JobId>, Vec<Place>) = waiting.drain(..).unzip();
            self.report_bulk(&ids).await;
            drop(places);
        }
    }

    async fn report_bulk(&self, ids: &[JobId]) {
        match self.send(ids, || self.client.success(ids)).await {
            Ok(not_found) => not_found.iter().for_each(|id| debug!(%id, "success was already handled")),
            Err(error) => log_undelivered(ids, &error),
        }
    }

    async fn report_failures(self, mut queue: mpsc::UnboundedReceiver<(JobId, Failure, Place)>) {
        let mut under_way = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(()) = under_way.next() => {}
                report = queue.recv(), if under_way.len() < MAX_FAILURES_UNDER_WAY => match report {
                    Some((id, failure, place)) => under_way.push(self.report_failure(id, failure, place)),
                    None => break,
                },
            }
        }
        under_way.collect::<()>().await;
    }

    async fn report_failure(&self, id: JobId, failure: Failure, _place: Place) {
        let ids = std::slice::from_ref(&id);
        match self.send(ids, || self.client.failure(&id, &failure)).await {
            Ok(Acceptance::Accepted) => {}
            Ok(Acceptance::AlreadyHandled) => debug!(%id, "failure was already handled"),
            Err(error) => log_undelivered(ids, &error),
        }
    }

    /// Sends until the server has answered. Once killing, the try under way is the last.
    async fn send<T, F>(&self, ids: &[JobId], call: impl Fn() -> F) -> Result<T, ClientError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let attempt = || async {
            tokio::select! {
                biased;
                () = self.last_try_over() => Err(ClientError::TimedOut(LAST_TRY_TIMEOUT)),
                answer = call() => answer,
            }
        };
        retry(&self.backoff, &self.lifecycle, Phase::Killing, attempt, |error, wait| {
            warn!(reports = ids.len(), error = %Chain(error), retry_in = ?wait, "report failed, trying again");
        })
        .await
    }

    async fn last_try_over(&self) {
        self.lifecycle.reached(Phase::Killing).await;
        let now = Instant::now();
        let killed = *self.killed.get_or_init(|| now);
        tokio::time::sleep_until((now + LAST_TRY_TIMEOUT).min(killed + LAST_TRIES_TIMEOUT)).await;
    }
}

fn log_undelivered(ids: &[JobId], error: &ClientError) {
    error!(?ids, error = %Chain(error), "report dropped");
}
