//! [`AckProcessor`]: reports what became of the jobs. Successes leave in bulk, failures one by one; neither waits for the
//! other. A report that the server has no use for now is kept in the [`Ledger`], for the case that its job comes again.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, error, warn};

use crate::backoff::{Backoff, retry};
use crate::chain::Chain;
use crate::client::{Acceptance, Client, ClientError, JobState};
use crate::job::{Failure, JobId, Outcome};
use crate::ledger::{Attempt, Delivery, Ledger};
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

/// A place in the ack queue; given back when the report has been settled or given up.
type Place = OwnedSemaphorePermit;

#[derive(Debug)]
struct Success {
    attempt: Attempt,
    _place: Place,
}

#[derive(Debug)]
struct Failed {
    attempt: Attempt,
    failure: Failure,
    _place: Place,
}

/// The way into the ack queue.
#[derive(Debug, Clone)]
pub(crate) struct AckQueue {
    places: Arc<Semaphore>,
    successes: mpsc::UnboundedSender<Success>,
    failures: mpsc::UnboundedSender<Failed>,
}

impl AckQueue {
    /// Hands over a report; waits while the queue is full.
    pub(crate) async fn report(&self, attempt: Attempt, outcome: Outcome) {
        // The semaphore is never closed, and the processor outlives every queue: a place and a receiver there always are.
        let Ok(place) = Arc::clone(&self.places).acquire_owned().await else { return };
        match outcome {
            Outcome::Success => drop(self.successes.send(Success { attempt, _place: place })),
            Outcome::Failure(failure) => drop(self.failures.send(Failed { attempt, failure, _place: place })),
            Outcome::Interrupted => {}
        }
    }
}

/// Takes reports from its queue and sees each through: accepted, kept, refused, or given up because the worker is killed.
#[derive(Debug)]
pub(crate) struct AckProcessor {
    successes: AbortOnDropHandle<()>,
    failures: AbortOnDropHandle<()>,
    closing: CancellationToken,
}

/// What the sending side needs.
#[derive(Debug, Clone)]
pub(crate) struct Reporter {
    client: Arc<Client>,
    ledger: Arc<Ledger>,
    backoff: Backoff,
    lifecycle: Lifecycle,
    /// When a report first noticed that the worker is killed.
    killed: Arc<OnceLock<Instant>>,
}

impl AckProcessor {
    /// Starts it with a queue of `capacity` reports, those under way included.
    pub(crate) fn start(reporter: Reporter, capacity: usize) -> (Self, AckQueue) {
        let (successes, success_queue) = mpsc::unbounded_channel();
        let (failures, failure_queue) = mpsc::unbounded_channel();
        let closing = CancellationToken::new();
        let reporting = reporter.clone().report_successes(success_queue, closing.clone());
        let processor = Self {
            successes: AbortOnDropHandle::new(tokio::spawn(reporting)),
            failures: AbortOnDropHandle::new(tokio::spawn(reporter.report_failures(failure_queue, closing.clone()))),
            closing,
        };
        (processor, AckQueue { places: Arc::new(Semaphore::new(capacity)), successes, failures })
    }

    /// Takes no more reports, and waits until every one that it has is settled or given up.
    pub(crate) async fn finish(self) {
        self.closing.cancel();
        let (successes, failures) = tokio::join!(self.successes, self.failures);
        for ended in [successes, failures] {
            ended.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()));
        }
    }
}

/// What became of a report that the server has answered.
enum Settled {
    /// The server knows, or need not know any more.
    Done,
    /// The server does not hold the attempt for us now. What it held when that was found out.
    NotHeld(Option<Delivery>),
}

impl Reporter {
    pub(crate) fn new(client: Arc<Client>, ledger: Arc<Ledger>, backoff: Backoff, lifecycle: Lifecycle) -> Self {
        Self { client, ledger, backoff, lifecycle, killed: Arc::default() }
    }

    /// One bulk request at a time: while it is under way, the next one gathers. No timer holds a report back.
    async fn report_successes(self, mut queue: mpsc::UnboundedReceiver<Success>, closing: CancellationToken) {
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                count = queue.recv_many(&mut batch, MAX_SUCCESSES_PER_REQUEST) => if count == 0 { break },
                () = closing.cancelled(), if !queue.is_closed() => {
                    queue.close();
                    continue;
                }
            }
            let attempt = || {
                // What has gathered since the last try leaves with this one.
                while batch.len() < MAX_SUCCESSES_PER_REQUEST
                    && let Ok(success) = queue.try_recv()
                {
                    batch.push(success);
                }
                self.try_successes(batch.iter().map(|success| success.attempt.clone()).collect())
            };
            if let Err(error) = self.see_through(attempt).await {
                let ids: Vec<JobId> = batch.iter().map(|success| success.attempt.id.clone()).collect();
                log_dropped(&ids, &error);
                batch.iter().for_each(|success| self.ledger.forget(&success.attempt));
            }
            batch.clear();
        }
    }

    /// Sends one bulk request. What is not found in flight is looked into by itself: it is gone, or will come again.
    async fn try_successes(&self, attempts: Vec<Attempt>) -> Result<(), ClientError> {
        let ids: Vec<JobId> = attempts.iter().map(|attempt| attempt.id.clone()).collect();
        let held: Vec<Option<Delivery>> = attempts.iter().map(|attempt| self.ledger.held(attempt)).collect();
        let not_found = self.client.success(&ids).await?;
        for (attempt, seen) in attempts.iter().zip(held) {
            if !not_found.contains(&attempt.id) || self.is_gone(attempt).await? {
                self.ledger.forget(attempt);
            } else if self.ledger.park(attempt, seen, Outcome::Success).is_some() {
                // It came again while we asked.
                self.client.success(std::slice::from_ref(&attempt.id)).await?;
                self.ledger.forget(attempt);
            }
        }
        Ok(())
    }

    async fn is_gone(&self, attempt: &Attempt) -> Result<bool, ClientError> {
        let state = self.client.job(&attempt.id).await?;
        debug!(id = attempt.id.as_str(), ?state, "success was already handled, or its job was handed out again");
        Ok(state.is_none_or(|state| state.is_over()))
    }

    async fn report_failures(self, mut queue: mpsc::UnboundedReceiver<Failed>, closing: CancellationToken) {
        let mut under_way = FuturesUnordered::new();
        loop {
            tokio::select! {
                Some(()) = under_way.next() => {}
                () = closing.cancelled(), if !queue.is_closed() => queue.close(),
                report = queue.recv(), if under_way.len() < MAX_FAILURES_UNDER_WAY => match report {
                    Some(report) => under_way.push(self.report_failure(report)),
                    None => break,
                },
            }
        }
        under_way.collect::<()>().await;
    }

    async fn report_failure(&self, report: Failed) {
        let Failed { attempt, mut failure, _place } = report;
        let fate_unknown = AtomicBool::new(false);
        loop {
            match self.see_through(|| self.try_failure(&attempt, &failure, &fate_unknown)).await {
                Ok(Settled::Done) => return self.ledger.forget(&attempt),
                Ok(Settled::NotHeld(seen)) => match self.ledger.park(&attempt, seen, Outcome::Failure(failure)) {
                    // It came again meanwhile.
                    Some(Outcome::Failure(again)) => failure = again,
                    _ => return debug!(id = attempt.id.as_str(), "failure kept until its job comes again"),
                },
                Err(error) => {
                    log_dropped(std::slice::from_ref(&attempt.id), &error);
                    return self.ledger.forget(&attempt);
                }
            }
        }
    }

    /// Sends a failure, but never to a later attempt of its job, and not a second time before it is clear that the first
    /// has not arrived: each that arrives costs the job an attempt, and the server goes by the id alone.
    async fn try_failure(
        &self,
        attempt: &Attempt,
        failure: &Failure,
        fate_unknown: &AtomicBool,
    ) -> Result<Settled, ClientError> {
        let held = self.ledger.held(attempt);
        if held.is_none() {
            return Ok(Settled::NotHeld(held));
        }
        if fate_unknown.load(Ordering::Relaxed) {
            match self.client.job(&attempt.id).await? {
                Some(state) if state.is_in_flight() && !is_past(&state, attempt) => {}
                state => return Ok(settled_by(state, attempt, held)),
            }
        }
        match self.client.failure(&attempt.id, failure).await {
            Ok(Acceptance::Accepted) => Ok(Settled::Done),
            Ok(Acceptance::AlreadyHandled) => Ok(settled_by(self.client.job(&attempt.id).await?, attempt, held)),
            Err(error) => {
                fate_unknown.fetch_or(error.may_have_arrived(), Ordering::Relaxed);
                Err(error)
            }
        }
    }

    /// Tries until the server has answered. Once killing, the try under way is the last.
    async fn see_through<T, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T, ClientError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let attempt = || {
            let attempt = attempt();
            async {
                tokio::select! {
                    biased;
                    () = self.last_try_over() => Err(ClientError::TimedOut(LAST_TRY_TIMEOUT)),
                    answer = attempt => answer,
                }
            }
        };
        retry(&self.backoff, &self.lifecycle, Phase::Killing, attempt, |error, wait| {
            warn!(error = %Chain(error), retry_in = ?wait, "report failed, trying again");
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

/// Whether a job that is not in flight for us has this failure behind it, or waits to be handed out once more.
fn settled_by(state: Option<JobState>, attempt: &Attempt, held: Option<Delivery>) -> Settled {
    debug!(id = attempt.id.as_str(), ?state, "failure was already handled, or its job was handed out again");
    match state {
        Some(state) if !state.is_over() && !is_past(&state, attempt) => Settled::NotHeld(held),
        _ => Settled::Done,
    }
}

/// Whether the server has counted a failure since the attempt began.
fn is_past(state: &JobState, attempt: &Attempt) -> bool {
    attempt.attempts.is_some_and(|before| state.attempts > before)
}

fn log_dropped(ids: &[JobId], error: &ClientError) {
    error!(?ids, error = %Chain(error), "report dropped");
}
