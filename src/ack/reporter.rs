//! [`Reporter`]: sends each report, with retries until the report is accepted, refused or parked, or until its last try in
//! `Phase::Killing` fails.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};

use super::FailureReport;
use crate::backoff::{Backoff, Early, retry, sleep_until_if};
use crate::chain::Chain;
use crate::client::{Acceptance, Client, ClientError, JobState};
use crate::fate::{Answer, Kind, Step, Told, fate};
use crate::job::{Failure, Report};
use crate::ledger::{Attempt, Delivery, Ledger};
use crate::lifecycle::{Lifecycle, Phase};
use crate::lock::lock;
use crate::metrics::Metrics;

/// The time limit for the last try of each report, after the worker has entered `Phase::Killing`.
const LAST_TRY_TIMEOUT: Duration = Duration::from_secs(5);

/// The time limit of all last tries together. The limit is enough for two tries in sequence: one for the reports in flight when
/// `Phase::Killing` begins, then one for the reports that were queued behind them.
const LAST_TRIES_TIMEOUT: Duration = LAST_TRY_TIMEOUT.saturating_mul(2);

/// The sender of all reports. Clones share the ledger and the count of dropped reports.
#[derive(Debug, Clone)]
pub(crate) struct Reporter {
    pub(super) ledger: Arc<Ledger>,
    pub(super) backoff: Backoff,
    pub(super) lifecycle: Lifecycle,
    metrics: Metrics,
    /// The moment at which a try first saw `Phase::Killing`. `LAST_TRIES_TIMEOUT` counts from this moment.
    killed: Arc<OnceLock<Instant>>,
    dropped: Arc<AtomicUsize>,
}

/// The number of refused checks of a job (`GET /jobs/{id}`) after which a proxy is assumed to refuse every check. A single refusal
/// may be temporary.
const MAX_REFUSED_LOOKS: usize = 5;

/// The uncertainty after the answer to a failure report was lost: the server may or may not have counted the failure.
#[derive(Debug, Default)]
struct Doubt {
    /// The delivery that held the job when the report was sent, or `None` if no answer was lost. A later delivery of the same
    /// attempt shows that the server has not counted the failure.
    delivery: Option<Delivery>,
    /// The number of refused checks of the job since the answer was lost.
    refused_looks: usize,
}

impl Reporter {
    pub(crate) fn new(ledger: Arc<Ledger>, backoff: Backoff, lifecycle: Lifecycle, metrics: Metrics) -> Self {
        Self { ledger, backoff, lifecycle, metrics, killed: Arc::default(), dropped: Arc::default() }
    }

    /// Waits until no report is outstanding and no outcome is parked, or until the worker enters `Phase::Killing`. Once all
    /// remaining outcomes are parked, waits at most `patience` longer.
    pub(super) async fn await_outcomes(&self, patience: Duration) {
        let mut movements = self.ledger.movements();
        let mut all_parked_since: Option<Instant> = None;
        while !self.ledger.ended().is_empty() {
            all_parked_since = self.ledger.is_all_parked().then(|| all_parked_since.unwrap_or_else(Instant::now));
            tokio::select! {
                biased;
                () = self.lifecycle.reached(Phase::Killing) => return,
                // The wait fails only after the ledger is dropped, and `self` keeps the ledger alive.
                _ = movements.changed() => {}
                () = sleep_until_if(all_parked_since.and_then(|since| since.checked_add(patience))) => return,
            }
        }
    }

    pub(super) async fn report_failures(
        self,
        mut queue: mpsc::UnboundedReceiver<FailureReport>,
        closing: CancellationToken,
    ) {
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

    async fn report_failure(&self, report: FailureReport) {
        let FailureReport { attempt, mut failure, _slot } = report;
        let doubt = Mutex::default();
        // `None` means that no report is needed, because a later attempt has replaced this one.
        while let Some(client) = self.ledger.destination(&attempt) {
            let ended = self.retry_until_answered(&client, || self.try_failure(&attempt, &failure, &doubt)).await;
            let (step, seen) = match ended {
                Ok((Step::Settle, seen)) if self.ledger.settle(&attempt, seen) => return,
                Ok((Step::Settle, _)) => continue,
                Ok(park_or_release) => park_or_release,
                Err(error) => return self.drop_report(&attempt, &error),
            };
            match self.ledger.park(&attempt, seen, Report::Failure(failure), step == Step::Release) {
                // The job was redelivered before the outcome could be parked, so the report can be sent at once.
                Some(Report::Failure(again)) => failure = again,
                _ => return debug!(job.id = attempt.id.as_str(), "failure parked until its job is redelivered"),
            }
        }
    }

    /// Makes one try to report a failure. [`fate`] decides when to send the report and when to query the state of the job.
    ///
    /// Returns `Settle`, `Park` or `Release`, and the delivery that held the job when the try sent the report. If the try sent no
    /// report, returns the delivery that held the job at the last check of the job, or at the start of the try if there was no
    /// check.
    async fn try_failure(
        &self,
        attempt: &Attempt,
        failure: &Failure,
        doubt: &Mutex<Doubt>,
    ) -> Result<(Step, Option<Delivery>), ClientError> {
        let Some(client) = self.ledger.destination(attempt) else {
            return Ok((Step::Settle, self.ledger.held(attempt)));
        };
        let _slot = client.failure_slot().await;
        let (mut told, mut seen) = (Told::NotAsked, self.ledger.held(attempt));
        let mut answer = if is_in_doubt(doubt, seen) { Answer::InDoubt } else { Answer::Unsent };
        let mut error = None;
        loop {
            match fate(Kind::Failure, answer, told, self.ledger.hold(attempt, seen)) {
                Step::Ask => {
                    // A denial applies to the delivery that held the job when the report was sent, so `seen` does not change.
                    if answer != Answer::Denied {
                        seen = self.ledger.held(attempt);
                    }
                    (told, error) = self.ask(&client, attempt, Kind::Failure).await;
                    if (answer, told) == (Answer::InDoubt, Told::Withheld)
                        && let Some(refusal) = error.take_if(|_| may_look_again(doubt))
                    {
                        (told, error) = (Told::Unreachable, Some(ClientError::Hidden(refusal.into())));
                    }
                }
                Step::Send => {
                    seen = self.ledger.held(attempt);
                    told = Told::NotAsked;
                    // Opening a connection may take a long time. If the job is no longer held by the delivery given in `seen`
                    // once the connection is open, the report is withdrawn.
                    let is_held = self.ledger.watch_hold(attempt, seen);
                    let sent = client.failure_if(&attempt.id, failure, is_held).await;
                    if matches!(sent, Err(ClientError::Withdrawn)) {
                        continue;
                    }
                    (answer, error) = answer_to(sent);
                    if error.as_ref().is_some_and(ClientError::may_have_arrived) {
                        *lock(doubt) = Doubt { delivery: seen, refused_looks: 0 };
                    }
                }
                step @ (Step::Settle | Step::Park | Step::Release) => return Ok((step, seen)),
                Step::Retry | Step::Drop => return error.map_or(Ok((Step::Park, seen)), Err),
            }
        }
    }

    /// Calls `attempt` with backoff until it succeeds or fails with an error that is not retryable. When the worker enters
    /// `Phase::Killing`, a try in flight becomes the last one. A wait ends at once, and one last try follows.
    pub(super) async fn retry_until_answered<T, F>(
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
                None => debug!(error = %Chain(error), "early retry of a report failed"),
            }
        };
        let early = || self.server_may_be_back(client);
        retry(self.backoff.waits(), &self.lifecycle, Phase::Killing, attempt, on_error, early).await
    }

    /// Waits until calls to the server succeed again, or until it is this report's turn to probe the server.
    async fn server_may_be_back(&self, client: &Client) -> Early {
        tokio::select! {
            biased;
            () = client.health().recovered() => Early::Recovery,
            () = client.health().probe_turn(self.backoff.longest_first_wait()) => Early::Turn,
        }
    }

    /// Makes one try. Once the worker enters `Phase::Killing`, the try has a time limit.
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

    /// Queries the server for the state of a job whose report was denied or not answered, or whose outcome is parked. Returns the
    /// state, and the error if the query failed.
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
            // A 404 says nothing about a job that came from another server.
            Told::Gone if !self.ledger.came_from(attempt, client) => (Told::Withheld, None),
            told => (told, None),
        }
    }

    pub(super) fn drop_report(&self, attempt: &Attempt, error: &ClientError) {
        self.count_dropped();
        error!(job.id = attempt.id.as_str(), error = %Chain(error), "report dropped");
        self.ledger.forget(attempt);
    }

    pub(super) fn count_dropped(&self) {
        self.metrics.reports_dropped(1);
        self.dropped.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn dropped(&self) -> usize {
        self.dropped.load(Ordering::Relaxed) + self.ledger.evicted()
    }
}

/// Reports whether the server may have counted a failure although the answer to the failure report was lost. `held` is the delivery
/// that holds the job now.
fn is_in_doubt(doubt: &Mutex<Doubt>, held: Option<Delivery>) -> bool {
    lock(doubt).delivery.is_some_and(|doubted| held.is_none_or(|held| held == doubted))
}

/// Counts a refused check of the job, and reports whether the job may be checked again.
fn may_look_again(doubt: &Mutex<Doubt>) -> bool {
    let mut doubt = lock(doubt);
    doubt.refused_looks += 1;
    doubt.refused_looks < MAX_REFUSED_LOOKS
}

/// Returns the answer to a failure report, and the error if there is one.
fn answer_to(reported: Result<Acceptance, ClientError>) -> (Answer, Option<ClientError>) {
    match reported {
        Ok(Acceptance::Accepted) => (Answer::Accepted, None),
        Ok(Acceptance::AlreadyHandled) => (Answer::Denied, None),
        Err(error) if error.is_retryable() => (Answer::Failed, Some(error)),
        Err(error) => (Answer::Refused, Some(error)),
    }
}

fn told(state: Option<JobState>, attempt: &Attempt, kind: Kind) -> Told {
    let is_past = |state: &JobState| attempt.attempts.is_some_and(|before| state.attempts > before);
    match state {
        None => Told::Gone,
        Some(state) if state.is_over() => Told::Over,
        Some(state) if kind == Kind::Failure && is_past(&state) => Told::Past,
        Some(state) if state.is_in_flight() => Told::InFlight,
        Some(_) => Told::Waiting,
    }
}
