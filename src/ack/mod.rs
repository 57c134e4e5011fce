//! [`AckProcessor`]: reports what became of the jobs. Successes leave in bulk, failures one by one; neither waits for the
//! other. A report that the server has no use for now is kept in the [`Ledger`](crate::ledger::Ledger), for the case that its
//! job comes again.

mod link;
mod reporter;

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::error;

use crate::job::{Failure, Outcome};
use crate::ledger::Attempt;
use crate::metrics::Metrics;
pub(crate) use link::Link;
pub(crate) use reporter::Reporter;

/// A place in the ack queue; given back when the report has been settled or given up.
#[derive(Debug)]
struct Place {
    _permit: OwnedSemaphorePermit,
    metrics: Metrics,
}

impl Place {
    fn take(permit: OwnedSemaphorePermit, metrics: &Metrics) -> Self {
        metrics.report_waits();
        Self { _permit: permit, metrics: metrics.clone() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.metrics.report_leaves();
    }
}

#[derive(Debug)]
struct Success {
    attempt: Attempt,
    _place: Place,
}

#[derive(Debug)]
struct Failed {
    attempt: Attempt,
    failure: Failure,
    /// It may have been sent before.
    in_doubt: bool,
    _place: Place,
}

/// The way into the ack queue.
#[derive(Debug, Clone)]
pub(crate) struct AckQueue {
    places: Arc<Semaphore>,
    successes: mpsc::UnboundedSender<Success>,
    failures: mpsc::UnboundedSender<Failed>,
    metrics: Metrics,
}

impl AckQueue {
    /// Hands over a report; waits while the queue is full.
    pub(crate) async fn report(&self, attempt: Attempt, outcome: Outcome) {
        self.put(attempt, outcome, false).await;
    }

    /// Hands over a report that may have been sent before.
    pub(crate) async fn report_again(&self, attempt: Attempt, outcome: Outcome) {
        self.put(attempt, outcome, true).await;
    }

    async fn put(&self, attempt: Attempt, outcome: Outcome, in_doubt: bool) {
        // The semaphore is never closed. Once nobody receives, the worker has stopped, and the job goes back.
        let Ok(permit) = Arc::clone(&self.places).acquire_owned().await else { return };
        let place = Place::take(permit, &self.metrics);
        match outcome {
            Outcome::Success => drop(self.successes.send(Success { attempt, _place: place })),
            Outcome::Failure(failure) => drop(self.failures.send(Failed { attempt, failure, in_doubt, _place: place })),
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
    reporter: Reporter,
}

impl AckProcessor {
    /// Starts it with a queue of `capacity` reports, those under way included.
    pub(crate) fn start(reporter: Reporter, capacity: usize, metrics: Metrics) -> (Self, AckQueue) {
        let (successes, success_queue) = mpsc::unbounded_channel();
        let (failures, failure_queue) = mpsc::unbounded_channel();
        let closing = CancellationToken::new();
        let success_task = tokio::spawn(reporter.clone().report_successes(success_queue, closing.clone()));
        let failure_task = tokio::spawn(reporter.clone().report_failures(failure_queue, closing.clone()));
        let processor = Self {
            successes: AbortOnDropHandle::new(success_task),
            failures: AbortOnDropHandle::new(failure_task),
            closing,
            reporter,
        };
        (processor, AckQueue { places: Arc::new(Semaphore::new(capacity)), successes, failures, metrics })
    }

    /// Waits until every report is settled or given up, and takes no more. Every run has ended before.
    pub(crate) async fn finish(self) {
        self.reporter.await_outcomes().await;
        self.closing.cancel();
        let (successes, failures) = tokio::join!(self.successes, self.failures);
        for ended in [successes, failures] {
            ended.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()));
        }
        let ids = self.reporter.ledger.ended();
        if !ids.is_empty() {
            self.reporter.metrics.reports_dropped(ids.len());
            error!(?ids, error = "the jobs did not come again in time", "report dropped");
        }
    }
}
