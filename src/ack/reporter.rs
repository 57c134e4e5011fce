//! [`Reporter`]: the sending side. It sees each report through: accepted, kept, refused, or given up because the worker is
//! killed.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::stream::{self, FuturesUnordered, StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::link::Link;
use super::{Failed, Success};
use crate::backoff::{Backoff, retry};
use crate::chain::Chain;
use crate::client::{Acceptance, ClientError, JobState};
use crate::job::{Failure, JobId, Outcome};
use crate::ledger::{Attempt, Delivery, Ledger};
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;

/// How many ids one bulk request carries at most, so that its size stays far below what servers and proxies accept.
const MAX_SUCCESSES_PER_REQUEST: usize = 1000;

/// For how many turns of the scheduler a bulk request waits for what ends at the same moment.
const TURNS: usize = 3;

/// How many failures are under way at once: enough to hide the round trip, few enough to spare the server.
const MAX_FAILURES_UNDER_WAY: usize = 8;

/// How many successes that the server denies are looked into at once, for the same reasons.
const MAX_LOOKS_UNDER_WAY: usize = 8;

/// How long the last try of a report may take once the worker is killed.
const LAST_TRY_TIMEOUT: Duration = Duration::from_secs(5);

/// How long all last tries together may take, however many there are: one for what was under way when the worker was
/// killed, and one for what had gathered behind it.
const LAST_TRIES_TIMEOUT: Duration = LAST_TRY_TIMEOUT.saturating_mul(2);

/// What the sending side needs.
#[derive(Debug, Clone)]
pub(crate) struct Reporter {
    link: Link,
    pub(super) ledger: Arc<Ledger>,
    backoff: Backoff,
    lifecycle: Lifecycle,
    pub(super) metrics: Metrics,
    /// When a report first noticed that the worker is killed.
    killed: Arc<OnceLock<Instant>>,
}

/// What became of a report that the server has answered.
enum Settled {
    /// The server knows, or need not know any more.
    Done,
    /// The server does not hold the attempt for us now. What it held when that was found out.
    NotHeld(Option<Delivery>),
}

impl Reporter {
    pub(crate) fn new(
        link: Link,
        ledger: Arc<Ledger>,
        backoff: Backoff,
        lifecycle: Lifecycle,
        metrics: Metrics,
    ) -> Self {
        Self { link, ledger, backoff, lifecycle, metrics, killed: Arc::default() }
    }

    /// One bulk request at a time: while it is under way, the next one gathers. No timer holds a report back.
    pub(super) async fn report_successes(
        self,
        mut queue: mpsc::UnboundedReceiver<Success>,
        closing: CancellationToken,
    ) {
        let mut batch = Vec::new();
        loop {
            tokio::select! {
                count = queue.recv_many(&mut batch, MAX_SUCCESSES_PER_REQUEST) => if count == 0 { break },
                () = closing.cancelled(), if !queue.is_closed() => {
                    queue.close();
                    continue;
                }
            }
            await_the_simultaneous().await;
            let attempt = || {
                // What has gathered since the last try leaves with this one.
                while batch.len() < MAX_SUCCESSES_PER_REQUEST
                    && let Ok(success) = queue.try_recv()
                {
                    batch.push(success);
                }
                // What the last try has settled does not leave again.
                batch.retain(|success| self.ledger.is_reporting(&success.attempt));
                self.try_successes(batch.iter().map(|success| success.attempt.clone()).collect())
            };
            if let Err(error) = self.see_through(attempt).await {
                self.give_up(&batch, &error);
            }
            batch.clear();
        }
    }

    fn give_up(&self, batch: &[Success], error: &ClientError) {
        let attempts = batch.iter().map(|success| &success.attempt);
        let dropped: Vec<&Attempt> = attempts.filter(|attempt| self.ledger.is_reporting(attempt)).collect();
        let ids: Vec<JobId> = dropped.iter().map(|attempt| attempt.id.clone()).collect();
        self.drop_reports(&ids, error);
        dropped.into_iter().for_each(|attempt| self.ledger.forget(attempt));
    }

    /// Sends one bulk request, and another for those whose jobs came again while it was under way.
    async fn try_successes(&self, mut attempts: Vec<Attempt>) -> Result<(), ClientError> {
        while !attempts.is_empty() {
            let ids: Vec<JobId> = attempts.iter().map(|attempt| attempt.id.clone()).collect();
            let held: Vec<Option<Delivery>> = attempts.iter().map(|attempt| self.ledger.held(attempt)).collect();
            let not_found: HashSet<JobId> = self.link.client().success(&ids).await?.into_iter().collect();
            let (denied, accepted): (Vec<_>, Vec<_>) =
                attempts.into_iter().zip(held).partition(|(attempt, _)| not_found.contains(&attempt.id));
            accepted.iter().for_each(|(attempt, _)| self.ledger.settle(attempt));
            let looks = stream::iter(denied).map(|(attempt, seen)| self.look_into(attempt, seen));
            let looked: Vec<Option<Attempt>> = looks.buffer_unordered(MAX_LOOKS_UNDER_WAY).try_collect().await?;
            attempts = looked.into_iter().flatten().collect();
        }
        Ok(())
    }

    /// A success whose job is not in flight: it is gone, or will come again, or has come meanwhile: then it is returned.
    async fn look_into(&self, attempt: Attempt, seen: Option<Delivery>) -> Result<Option<Attempt>, ClientError> {
        let state = match self.link.client().job(&attempt.id).await {
            Err(error) if !error.is_retryable() => {
                warn!(id = attempt.id.as_str(), error = %Chain(&error), "cannot look at a job whose success was denied");
                return Ok(self.ledger.park(&attempt, seen, Outcome::Success).map(|_| attempt));
            }
            looked => looked?,
        };
        debug!(id = attempt.id.as_str(), ?state, "success was already handled, or its job was handed out again");
        if state.is_none_or(|state| state.is_over()) {
            self.ledger.settle(&attempt);
            return Ok(None);
        }
        let came_again = self.ledger.park(&attempt, seen, Outcome::Success);
        Ok(came_again.map(|_| attempt))
    }

    /// Waits until no outcome is being reported, or kept for its job to come again; or until the worker is killed.
    pub(super) async fn await_outcomes(&self) {
        let mut waits = self.backoff.waits();
        let mut next_look = Instant::now() + waits.next_wait();
        let mut movements = self.ledger.movements();
        while !self.ledger.ended().is_empty() {
            tokio::select! {
                () = self.lifecycle.reached(Phase::Killing) => return,
                // It fails only once the ledger is gone, and `self` has it.
                _ = movements.changed() => {}
                () = tokio::time::sleep_until(next_look) => {
                    self.look_into_parked().await;
                    next_look = Instant::now() + waits.next_wait();
                }
            }
        }
    }

    /// Forgets the outcomes that are kept in vain, because their jobs will not come to this worker.
    async fn look_into_parked(&self) {
        for (attempt, succeeded) in self.ledger.parked() {
            let client = self.link.client();
            let state = tokio::select! {
                () = self.lifecycle.reached(Phase::Killing) => return,
                state = client.job(&attempt.id) => state,
            };
            // Who is not reached now may be later.
            let Ok(state) = state else { return };
            if self.is_over(&attempt, succeeded, state).await {
                self.ledger.settle(&attempt);
            }
        }
    }

    /// Whether an outcome is of no use any more. A success is of use wherever the job is in flight.
    async fn is_over(&self, attempt: &Attempt, succeeded: bool, state: Option<JobState>) -> bool {
        match state {
            None => true,
            Some(state) if state.is_over() => true,
            Some(state) if succeeded && state.is_in_flight() => {
                let ids = std::slice::from_ref(&attempt.id);
                self.link.client().success(ids).await.is_ok_and(|not_found| not_found.is_empty())
            }
            Some(state) => !succeeded && is_past(&state, attempt),
        }
    }

    pub(super) async fn report_failures(self, mut queue: mpsc::UnboundedReceiver<Failed>, closing: CancellationToken) {
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
        let Failed { attempt, mut failure, in_doubt, _place } = report;
        let fate_unknown = AtomicBool::new(in_doubt);
        loop {
            match self.see_through(|| self.try_failure(&attempt, &failure, &fate_unknown)).await {
                Ok(Settled::Done) => return self.ledger.settle(&attempt),
                Ok(Settled::NotHeld(seen)) => match self.ledger.park(&attempt, seen, Outcome::Failure(failure)) {
                    // It came again meanwhile.
                    Some(Outcome::Failure(again)) => failure = again,
                    _ => return debug!(id = attempt.id.as_str(), "failure kept until its job comes again"),
                },
                Err(error) => {
                    self.drop_reports(std::slice::from_ref(&attempt.id), &error);
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
            match self.link.client().job(&attempt.id).await? {
                Some(state) if state.is_in_flight() && !is_past(&state, attempt) => {}
                state => return Ok(settled_by(state, attempt, held)),
            }
        }
        match self.link.client().failure(&attempt.id, failure).await {
            Ok(Acceptance::Accepted) => Ok(Settled::Done),
            Ok(Acceptance::AlreadyHandled) => Ok(settled_by(self.link.client().job(&attempt.id).await?, attempt, held)),
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
        let attempt = || self.in_time(attempt());
        retry(&self.backoff, &self.lifecycle, Phase::Killing, attempt, |error, wait| {
            self.metrics.report_retried();
            warn!(error = %Chain(error), retry_in = ?wait, "report failed, trying again");
        })
        .await
    }

    /// One try, which may not take long once the worker is killed.
    async fn in_time<T>(&self, attempt: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
        tokio::select! {
            biased;
            () = self.last_try_over() => Err(ClientError::TimedOut(LAST_TRY_TIMEOUT)),
            answer = attempt => answer,
        }
    }

    fn drop_reports(&self, ids: &[JobId], error: &ClientError) {
        self.metrics.reports_dropped(ids.len());
        error!(?ids, error = %Chain(error), "report dropped");
    }

    async fn last_try_over(&self) {
        self.lifecycle.reached(Phase::Killing).await;
        let now = Instant::now();
        let killed = *self.killed.get_or_init(|| now);
        tokio::select! {
            () = tokio::time::sleep_until((now + LAST_TRY_TIMEOUT).min(killed + LAST_TRIES_TIMEOUT)) => {}
            () = self.lifecycle.reached(Phase::Forcing) => {}
        }
    }
}

/// Lets the jobs end that end at the same moment: whatever is ready in this runtime gets its turn. With nothing else to do,
/// that takes no time.
async fn await_the_simultaneous() {
    for _ in 0..TURNS {
        yield_now().await;
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
