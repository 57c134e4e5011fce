//! [`AckProcessor`]: reports the outcomes of jobs. Successes leave in bulk, failures one by one; neither waits for the other. An
//! outcome that the server has no use for now is parked in the [`Ledger`](crate::ledger::Ledger) until its job is redelivered.

mod keeper;
mod reporter;
mod successes;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::error;

use crate::job::{Failure, Outcome};
use crate::ledger::Attempt;
use crate::metrics::Metrics;
use crate::places::{self, Places};
pub(crate) use reporter::Reporter;

/// A place in the ack queue; given back when the report has been settled, parked or given up.
#[derive(Debug)]
struct Place {
    _place: places::Place,
    metrics: Metrics,
}

impl Place {
    fn take(place: places::Place, metrics: &Metrics) -> Self {
        metrics.report_waits();
        Self { _place: place, metrics: metrics.clone() }
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
    /// Whether the report may have been sent before.
    in_doubt: bool,
    _place: Place,
}

/// The way into the ack queue.
#[derive(Debug, Clone)]
pub(crate) struct AckQueue {
    places: Places,
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

    /// Makes room for that many reports from now on, those under way included.
    pub(crate) fn resize(&self, capacity: usize) {
        self.places.resize(capacity);
    }

    async fn put(&self, attempt: Attempt, outcome: Outcome, in_doubt: bool) {
        let place = Place::take(self.places.take().await, &self.metrics);
        // The receiver is gone once the worker has stopped: the job goes back.
        match outcome {
            Outcome::Success => drop(self.successes.send(Success { attempt, _place: place })),
            Outcome::Failure(failure) => drop(self.failures.send(Failed { attempt, failure, in_doubt, _place: place })),
            Outcome::Interrupted => {}
        }
    }
}

/// Takes reports from its queue and sees each through: accepted, parked, refused, or given up because the worker is killed.
#[derive(Debug)]
pub(crate) struct AckProcessor {
    tasks: [AbortOnDropHandle<()>; 3],
    closing: CancellationToken,
    reporter: Reporter,
}

impl AckProcessor {
    /// Starts it with a queue of `capacity` reports, those under way included.
    pub(crate) fn start(reporter: Reporter, capacity: usize, metrics: Metrics) -> (Self, AckQueue) {
        let (successes, success_queue) = mpsc::unbounded_channel();
        let (failures, failure_queue) = mpsc::unbounded_channel();
        let closing = CancellationToken::new();
        let tasks = [
            tokio::spawn(reporter.clone().report_successes(success_queue, closing.clone())),
            tokio::spawn(reporter.clone().report_failures(failure_queue, closing.clone())),
            tokio::spawn(reporter.clone().keep(closing.clone())),
        ];
        let tasks = tasks.map(AbortOnDropHandle::new);
        let queue = AckQueue { places: Places::new(capacity), successes, failures, metrics };
        (Self { tasks, closing, reporter }, queue)
    }

    /// Waits until every report is settled or given up, and takes no more. Every run has ended before. Outcomes that are all
    /// that is left, and parked, are waited for as long as `patience`. Returns the number of reports that were given up since
    /// the start.
    pub(crate) async fn finish(self, patience: Duration) -> usize {
        self.reporter.await_outcomes(patience).await;
        self.closing.cancel();
        for task in self.tasks {
            task.await.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()));
        }
        let ids = self.reporter.ledger.ended();
        if !ids.is_empty() {
            self.reporter.count_dropped(ids.len());
            for id in ids {
                error!(job.id = id.as_str(), error = "the job was not redelivered in time", "report dropped");
            }
        }
        self.reporter.dropped()
    }
}
