//! [`AckProcessor`]: sends the outcomes of jobs to the server. Successes are sent in bulk, and each failure in its own request.
//! Successes and failures do not wait for each other. An outcome that cannot be reported now is parked in the
//! [`Ledger`](crate::ledger::Ledger) until its job is redelivered.

mod parked;
mod reporter;
mod successes;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::error;

use crate::job::{Failure, Report};
use crate::ledger::Attempt;
use crate::metrics::Metrics;
use crate::places::{Place, Places};
pub(crate) use reporter::Reporter;

/// A report's slot in the ack queue, freed when the report is settled, parked or dropped.
#[derive(Debug)]
struct AckSlot {
    _place: Place,
    metrics: Metrics,
}

impl AckSlot {
    fn take(place: Place, metrics: &Metrics) -> Self {
        metrics.report_waits();
        Self { _place: place, metrics: metrics.clone() }
    }
}

impl Drop for AckSlot {
    fn drop(&mut self) {
        self.metrics.report_leaves();
    }
}

/// The urgency of a success report. Failure reports have no urgency, because each is sent in its own request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// Send at once. Used while the worker loops need jobs, because the server sends new jobs only as reports arrive.
    Now,
    /// Wait a few milliseconds, so that more successes can share the request. Used while enough jobs are queued for the worker
    /// loops.
    Soon,
}

#[derive(Debug)]
struct SuccessReport {
    attempt: Attempt,
    urgency: Urgency,
    _slot: AckSlot,
}

#[derive(Debug)]
struct FailureReport {
    attempt: Attempt,
    failure: Failure,
    _slot: AckSlot,
}

/// The sending side of the ack queue.
#[derive(Debug, Clone)]
pub(crate) struct AckQueue {
    places: Places,
    successes: mpsc::UnboundedSender<SuccessReport>,
    failures: mpsc::UnboundedSender<FailureReport>,
    metrics: Metrics,
}

impl AckQueue {
    /// Queues a report. If the queue is full, waits for a slot first.
    pub(crate) async fn report(&self, attempt: Attempt, report: Report, urgency: Urgency) {
        let _slot = AckSlot::take(self.places.take().await, &self.metrics);
        // A send fails only after `AckProcessor::finish` has closed the queue. The server requeues the job when the stream
        // closes, so the error can be ignored.
        match report {
            Report::Success => drop(self.successes.send(SuccessReport { attempt, urgency, _slot })),
            Report::Failure(failure) => drop(self.failures.send(FailureReport { attempt, failure, _slot })),
        }
    }

    /// Changes the capacity of the queue. Reports in flight count towards the capacity.
    pub(crate) fn resize(&self, capacity: usize) {
        self.places.resize(capacity);
    }
}

/// The tasks that send the queued reports. Each report is retried until it is accepted, refused or parked, or until its last try
/// in `Phase::Killing` fails.
#[derive(Debug)]
pub(crate) struct AckProcessor {
    tasks: [AbortOnDropHandle<()>; 3],
    closing: CancellationToken,
    reporter: Reporter,
}

impl AckProcessor {
    /// Starts the tasks. The queue has room for `capacity` reports, including reports in flight.
    pub(crate) fn start(reporter: Reporter, capacity: usize, metrics: Metrics) -> (Self, AckQueue) {
        let (successes, success_queue) = mpsc::unbounded_channel();
        let (failures, failure_queue) = mpsc::unbounded_channel();
        let closing = CancellationToken::new();
        let queue = AckQueue { places: Places::new(capacity), successes, failures, metrics };
        let tasks = [
            tokio::spawn(reporter.clone().report_successes(success_queue, closing.clone())),
            tokio::spawn(reporter.clone().report_failures(failure_queue, closing.clone())),
            tokio::spawn(reporter.clone().watch_parked(queue.clone(), closing.clone())),
        ];
        let tasks = tasks.map(AbortOnDropHandle::new);
        (Self { tasks, closing, reporter }, queue)
    }

    /// Waits until every outcome is settled or dropped, then stops the tasks. Must be called after all runs have ended, so that
    /// no new report arrives. Once all remaining outcomes are parked, waits at most `patience` longer, then drops them. Returns
    /// the number of reports dropped since `start`.
    pub(crate) async fn finish(self, patience: Duration) -> usize {
        self.reporter.await_outcomes(patience).await;
        self.closing.cancel();
        for task in self.tasks {
            task.await.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()));
        }
        for id in self.reporter.ledger.ended() {
            self.reporter.count_dropped();
            error!(job.id = id.as_str(), error = "the job was not redelivered in time", "report dropped");
        }
        self.reporter.dropped()
    }
}
