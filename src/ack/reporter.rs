//! [`Reporter`]: the sending side. It sees each report through: accepted, parked, refused, or given up because the worker is
//! killed.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::Failed;
use crate::backoff::{Backoff, Early, retry};
use crate::chain::Chain;
use crate::client::{Acceptance, Client, ClientError, JobState};
use crate::fate::{Answer, Kind, Step, Told, fate};
use crate::job::{Failure, Outcome};
use crate::ledger::{Attempt, Delivery, Ledger};
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::Metrics;

/// The time that the last try of a report has once the worker is killed.
const LAST_TRY_TIMEOUT: Duration = Duration::from_secs(5);

/// The time that all last tries together have, however many there are: one for the reports that were under way when the worker
/// was killed, and one for those that had gathered behind them.
const LAST_TRIES_TIMEOUT: Duration = LAST_TRY_TIMEOUT.saturating_mul(2);

/// Everything that the sending side needs.
#[derive(Debug, Clone)]
pub(crate) struct Reporter {
    pub(super) ledger: Arc<Ledger>,
    pub(super) backoff: Backoff,
    pub(super) lifecycle: Lifecycle,
    metrics: Metrics,
    /// The moment at which a report first noticed that the worker is killed.
    killed: Arc<OnceLock<Instant>>,
    dropped: Arc<AtomicUsize>,
}

/// The end of the tries of a failure, unless they end with an error.
enum Tried {
    Settle,
    /// Park the failure. The delivery by which the job was held when the server was last asked or told.
    Park(Option<Delivery>),
}

impl Reporter {
    pub(crate) fn new(ledger: Arc<Ledger>, backoff: Backoff, lifecycle: Lifecycle, metrics: Metrics) -> Self {
        Self { ledger, backoff, lifecycle, metrics, killed: Arc::default(), dropped: Arc::default() }
    }

    /// Waits until no outcome is being reported or is parked, or until the worker is killed. Outcomes that are all that is
    /// left, and parked, are waited for as long as `patience`.
    pub(super) async fn await_outcomes(&self, patience: Duration) {
        let mut movements = self.ledger.movements();
        let mut all_parked_since = None;
        while !self.ledger.ended().is_empty() {
            let since = self.ledger.is_all_parked().then(|| *all_parked_since.get_or_insert_with(Instant::now));
            if since.is_none() {
                all_parked_since = None;
            }
            tokio::select! {
                biased;
                () = self.lifecycle.reached(Phase::Killing) => return,
                // It fails only once the ledger is gone, and `self` has it.
                _ = movements.changed() => {}
                () = sleep_until_after(since, patience) => return,
            }
        }
    }

    pub(super) async fn report_failures(self, mut queue: mpsc::UnboundedReceiver<Failed>, closing: CancellationToken) {
        let mut under_way = FuturesUnordered::new();
        loop {
            tokio::select! {
                biased;
                Some(()) = under_way.next() => {}
                () = closing.cancelled(), if !queue.is_closed() => queue.close(),
                report = queue.recv() => match report {
                    Some(report) => under_way.push(self.report_failure(report)),
                    None => break,
                },
            }
        }
        under_way.collect::<()>().await;
    }

    async fn report_failure(&self, report: Failed) {
        let Failed { attempt, mut failure, in_doubt, _place } = report;
        let in_doubt = AtomicBool::new(in_doubt);
        // The attempt has been replaced by a later one.
        while let Some(client) = self.ledger.destination(&attempt) {
            match self.see_through(&client, || self.try_failure(&attempt, &failure, &in_doubt)).await {
                Ok(Tried::Settle) => return self.ledger.settle(&attempt),
                Ok(Tried::Park(seen)) => match self.ledger.park(&attempt, seen, Outcome::Failure(failure)) {
                    // The job has been redelivered meanwhile.
                    Some(Outcome::Failure(again)) => failure = again,
                    _ => return debug!(job.id = attempt.id.as_str(), "failure kept until its job comes again"),
                },
                Err(error) => return self.drop_report(&attempt, &error),
            }
        }
    }

    /// Sends a failure, and asks for its job before and after, as its [fate] requires.
    async fn try_failure(
        &self,
        attempt: &Attempt,
        failure: &Failure,
        in_doubt: &AtomicBool,
    ) -> Result<Tried, ClientError> {
        let Some(client) = self.ledger.destination(attempt) else { return Ok(Tried::Settle) };
        let _slot = client.failure_slot().await;
        let mut answer = if in_doubt.load(Ordering::Relaxed) { Answer::InDoubt } else { Answer::Unsent };
        let (mut told, mut seen) = (Told::NotAsked, self.ledger.held(attempt));
        let mut error = None;
        loop {
            match fate(Kind::Failure, answer, told, self.ledger.hold(attempt, seen)) {
                Step::Ask => {
                    // A denial is of the delivery by which the job was held when the report left.
                    if answer != Answer::Denied {
                        seen = self.ledger.held(attempt);
                    }
                    (told, error) = self.ask(&client, attempt, Kind::Failure).await;
                }
                Step::Send => {
                    seen = self.ledger.held(attempt);
                    told = Told::NotAsked;
                    // The way to a connection may take long: the failure leaves only if the job is held as it is now.
                    let is_held = self.ledger.watch_hold(attempt, seen);
                    let sent = client.failure_if(&attempt.id, failure, is_held).await;
                    if matches!(sent, Err(ClientError::Withdrawn)) {
                        continue;
                    }
                    (answer, error) = answer_to(sent);
                    in_doubt.fetch_or(error.as_ref().is_some_and(ClientError::may_have_arrived), Ordering::Relaxed);
                }
                Step::Settle => return Ok(Tried::Settle),
                Step::Park => return Ok(Tried::Park(seen)),
                Step::Retry | Step::Drop => return error.map_or(Ok(Tried::Park(seen)), Err),
            }
        }
    }

    /// Tries until the server has answered. Once killing, the try under way is the last.
    pub(super) async fn see_through<T, F>(
        &self,
        client: &Client,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, ClientError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let attempt = || self.in_time(attempt());
        let on_error = |error: &ClientError, wait: Option<Duration>| {
            self.metrics.report_retried();
            match wait {
                Some(wait) => warn!(error = %Chain(error), retry_in = ?wait, "report failed, trying again"),
                None => debug!(error = %Chain(error), "report failed, before its time"),
            }
        };
        let early = || self.server_may_be_back(client);
        retry(self.backoff.waits(), &self.lifecycle, Phase::Killing, attempt, on_error, early).await
    }

    /// Waits until calls to the server succeed again, or this report's turn has come to find that out.
    async fn server_may_be_back(&self, client: &Client) -> Early {
        tokio::select! {
            biased;
            () = client.health().recovered() => Early::Recovery,
            () = client.health().scouts_turn(self.backoff.longest_first_wait()) => Early::Turn,
        }
    }

    /// One try, which may not take long once the worker is killed.
    async fn in_time<T>(&self, attempt: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
        tokio::select! {
            biased;
            () = self.last_try_over() => Err(ClientError::TimedOut(LAST_TRY_TIMEOUT)),
            answer = attempt => answer,
        }
    }

    async fn last_try_over(&self) {
        self.lifecycle.reached(Phase::Killing).await;
        let now = Instant::now();
        let killed = *self.killed.get_or_init(|| now);
        tokio::select! {
            biased;
            () = tokio::time::sleep_until((now + LAST_TRY_TIMEOUT).min(killed + LAST_TRIES_TIMEOUT)) => {}
            () = self.lifecycle.reached(Phase::Forcing) => {}
        }
    }

    /// Asks for the state of a job whose report was denied, or is in doubt, or is parked.
    pub(super) async fn ask(&self, client: &Client, attempt: &Attempt, kind: Kind) -> (Told, Option<ClientError>) {
        let state = match client.job(&attempt.id).await {
            Ok(state) => state,
            Err(error) if error.is_refusal() => {
                warn!(job.id = attempt.id.as_str(), error = %Chain(&error), "cannot look at a job whose report was denied");
                return (Told::Withheld, Some(error));
            }
            Err(error) => return (Told::Unreachable, Some(error)),
        };
        let id = attempt.id.as_str();
        match kind {
            Kind::Success => {
                debug!(job.id = id, ?state, "success was already handled, or its job was handed out again");
            }
            Kind::Failure => {
                debug!(job.id = id, ?state, "failure was already handled, or its job was handed out again");
            }
        }
        match told(state, attempt, kind) {
            // A server that never had the job knows nothing of it.
            Told::Gone if !self.ledger.came_from(attempt, client) => (Told::Withheld, None),
            told => (told, None),
        }
    }

    /// Gives a report up, and says so.
    pub(super) fn drop_report(&self, attempt: &Attempt, error: &ClientError) {
        self.drop_reports(&[attempt], error);
    }

    pub(super) fn drop_reports(&self, attempts: &[&Attempt], error: &ClientError) {
        self.count_dropped(attempts.len());
        for attempt in attempts {
            error!(job.id = attempt.id.as_str(), error = %Chain(error), "report dropped");
            self.ledger.forget(attempt);
        }
    }

    pub(super) fn count_dropped(&self, count: usize) {
        self.metrics.reports_dropped(count);
        self.dropped.fetch_add(count, Ordering::Relaxed);
    }

    /// The number of reports that were given up.
    pub(super) fn dropped(&self) -> usize {
        self.dropped.load(Ordering::Relaxed) + self.ledger.evicted()
    }
}

async fn sleep_until_after(since: Option<Instant>, patience: Duration) {
    match since.and_then(|since| since.checked_add(patience)) {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

/// The answer to a report of a failure, and the error if there is one.
fn answer_to(reported: Result<Acceptance, ClientError>) -> (Answer, Option<ClientError>) {
    match reported {
        Ok(Acceptance::Accepted) => (Answer::Accepted, None),
        Ok(Acceptance::AlreadyHandled) => (Answer::Denied, None),
        Err(error) if error.is_retryable() => (Answer::Failed, Some(error)),
        Err(error) => (Answer::Refused, Some(error)),
    }
}

fn told(state: Option<JobState>, attempt: &Attempt, kind: Kind) -> Told {
    match state {
        None => Told::Gone,
        Some(state) if state.is_over() => Told::Over,
        Some(state) if kind == Kind::Failure && is_past(&state, attempt) => Told::Past,
        Some(state) if state.is_in_flight() => Told::InFlight,
        Some(_) => Told::Waiting,
    }
}

/// Whether the server has counted a failure since the attempt began.
fn is_past(state: &JobState, attempt: &Attempt) -> bool {
    attempt.attempts.is_some_and(|before| state.attempts > before)
}
