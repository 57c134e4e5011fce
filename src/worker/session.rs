//! [`Session`]: one take stream, from its opening to its close.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::{debug, error, info};

use super::history::beginning;
use super::intake::Intake;
use super::purpose::Purpose;
use super::{Run, Taken};
use crate::ack::Urgency;
use crate::backoff::sleep_until_if;
use crate::client::StreamSettings;
use crate::job::{Failure, Job, JobId, Report};
use crate::ledger::{Arrival, Attempt, Delivery, StreamId};
use crate::lifecycle::Phase;
use crate::stream::{Received, StreamError, TakeStream};
use crate::watch;

/// The time that a search stream has to bring its jobs, beyond the first round trip.
const SEARCH_TIME: Duration = Duration::from_secs(1);

/// An open stream and the queue for its jobs.
pub(super) struct Session {
    pub(super) run: Run,
    pub(super) intake: Intake,
    pub(super) dispatch_queue: async_channel::Sender<Taken>,
    pub(super) id: StreamId,
    pub(super) settings: Arc<StreamSettings>,
    pub(super) stream: TakeStream,
    pub(super) purpose: watch::Receiver<Purpose>,
    /// The places in the dispatch queue: as many as the prefetch, even if the server sends more jobs.
    places: Arc<Semaphore>,
    /// The jobs that the server holds for this worker and that are not started. They go back when the stream closes.
    held_back: Vec<Job>,
    /// While the stream finishes: the last delivery before that.
    finishing_since: Option<Delivery>,
    search: Option<SearchProgress>,
}

/// The progress of a search stream, which was opened for certain jobs.
struct SearchProgress {
    /// The end of the time to bring them.
    end: Instant,
    prefetch: usize,
    /// The number of jobs that the stream may still bring.
    left: usize,
    has_found: bool,
}

/// The reason for which this worker closed a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CloseReason {
    /// Every job that came over the stream has been reported, or the worker has stopped.
    Finished,
    /// A search stream has brought none of its jobs.
    NotFound {
        prefetch: usize,
        /// Whether the stream has brought as many jobs as its prefetch.
        is_full: bool,
    },
}

impl Session {
    pub(super) fn new(
        run: Run,
        intake: Intake,
        dispatch_queue: async_channel::Sender<Taken>,
        settings: Arc<StreamSettings>,
        stream: TakeStream,
        purpose: watch::Receiver<Purpose>,
    ) -> Self {
        let places = Arc::new(Semaphore::new(settings.prefetch));
        let id = run.ledger.open_stream();
        Self {
            run,
            intake,
            dispatch_queue,
            id,
            settings,
            stream,
            purpose,
            places,
            held_back: Vec::new(),
            finishing_since: None,
            search: None,
        }
    }

    /// Turns the session into one that searches for certain jobs, with its own prefetch.
    pub(super) fn searching(self, prefetch: usize) -> Self {
        let end = Instant::now() + SEARCH_TIME;
        Self { search: Some(SearchProgress { end, prefetch, left: prefetch, has_found: false }), ..self }
    }

    /// Follows the stream until it is lost or obsolete, and closes it.
    pub(super) async fn run(mut self) -> Result<CloseReason, StreamError> {
        let ended = self.follow().await;
        self.run.ledger.lose_stream(self.id);
        self.stream.close().await;
        ended.map(|()| match self.search {
            None => CloseReason::Finished,
            Some(SearchProgress { has_found: true, .. }) => CloseReason::Finished,
            Some(SearchProgress { left, prefetch, .. }) => CloseReason::NotFound { prefetch, is_full: left == 0 },
        })
    }

    async fn follow(&mut self) -> Result<(), StreamError> {
        let mut movements = self.run.ledger.movements();
        loop {
            let purpose = *self.purpose.borrow_and_update();
            match purpose {
                Purpose::Nothing => return Ok(()),
                Purpose::Take => self.take_held_back().await,
                Purpose::Finish if self.is_finished() => return Ok(()),
                Purpose::Finish => drop(self.finishing_since.get_or_insert_with(|| self.run.ledger.last_delivery())),
            }
            let search_end = self.search.as_ref().map(|search| search.end).filter(|end| *end > Instant::now());
            tokio::select! {
                biased;
                changed = self.purpose.changed() => if changed.is_err() { return Ok(()) },
                _ = movements.changed(), if purpose == Purpose::Finish => {}
                received = self.stream.next() => self.receive(received?, purpose).await,
                () = sleep_until_if(search_end) => {}
            }
        }
    }

    /// Reports whether no job of the stream is under way, and none is awaited.
    fn is_finished(&self) -> bool {
        let is_awaited = self.search.as_ref().is_some_and(|search| search.left > 0 && Instant::now() < search.end);
        !is_awaited && (self.run.ledger.under_way(self.id, None) == 0 || self.is_superseded())
    }

    /// Reports whether another stream takes and no job of this one has started: its jobs then come over the other stream.
    fn is_superseded(&self) -> bool {
        self.run.lifecycle.phase() == Phase::Running
            && !self.intake.is_paused()
            && self.run.activity.is_taking()
            && self.run.ledger.is_all_waiting(self.id)
    }

    async fn take_held_back(&mut self) {
        self.finishing_since = None;
        for job in std::mem::take(&mut self.held_back) {
            if let Some(taken) = self.arrive(job).await {
                self.push(taken, Purpose::Take).await;
            }
        }
    }

    async fn receive(&mut self, received: Received, purpose: Purpose) {
        if let Some(search) = &mut self.search {
            search.left = search.left.saturating_sub(1);
        }
        match received {
            Received::Job(job) => {
                let arrived = self.arrive(job).await;
                if let (None, Some(search)) = (&arrived, &mut self.search) {
                    search.has_found = true;
                }
                if let Some(taken) = arrived {
                    let is_draining = self.run.lifecycle.phase() >= Phase::Draining;
                    if !is_draining && (purpose == Purpose::Take || self.may_start(&taken.job)) {
                        self.push(taken, purpose).await;
                    } else {
                        self.hold_back(taken);
                    }
                }
            }
            Received::Malformed { id, reason } => self.refuse(id, &reason).await,
        }
    }

    /// Reports whether a job is started although the stream finishes. This requires that the worker takes jobs of this kind over
    /// another stream, and that this stream must stay open for earlier jobs anyway.
    fn may_start(&self, job: &Job) -> bool {
        self.search.is_none()
            && !self.intake.is_paused()
            && self.intake.settings().fits(job, &self.settings)
            && self.finishing_since.is_some_and(|since| self.run.ledger.under_way(self.id, Some(since)) > 0)
    }

    /// Notes the arrival of a job. Returns the job if it is to be started, and reports its outcome if it has ended here.
    async fn arrive(&self, job: Job) -> Option<Taken> {
        let Run { ledger, acks, activity, .. } = &self.run;
        let attempt = Attempt { id: job.id.clone(), attempts: Some(job.attempts) };
        match ledger.arrive(&attempt, self.id, &self.settings) {
            (Arrival::New, delivery) => {
                debug!(
                    job.id = job.id.as_str(),
                    "job.type" = beginning(&job.job_type),
                    waiting = self.dispatch_queue.len(),
                    "job received"
                );
                let unfinished = activity.take_job();
                return Some(Taken { job, stream: self.id, delivery, place: None, _unfinished: unfinished });
            }
            (Arrival::UnderWay, _) => {
                info!(job.id = job.id.as_str(), "job received again while it is here, not started");
            }
            (Arrival::Ended(report), _) => {
                info!(job.id = job.id.as_str(), "job received again after it ended here, reported");
                self.unless_stopped(acks.report(attempt, report, Urgency::Now)).await;
            }
        }
        None
    }

    /// Queues a job, and waits for room. Holds the job back if the purpose of the stream changes meanwhile.
    async fn push(&mut self, mut taken: Taken, purpose: Purpose) {
        tokio::select! {
            biased;
            () = self.run.lifecycle.reached(Phase::Draining) => return self.hold_back(taken),
            () = until_other(&mut self.purpose, purpose) => return self.hold_back(taken),
            // The semaphore is never closed.
            place = Arc::clone(&self.places).acquire_owned() => taken.place = place.ok(),
        }
        // The worker loops are gone.
        if let Err(refused) = self.dispatch_queue.try_send(taken) {
            self.hold_back(refused.into_inner());
        }
    }

    fn hold_back(&mut self, taken: Taken) {
        let Taken { job, delivery, .. } = taken;
        if self.run.lifecycle.phase() >= Phase::Draining {
            debug!(job.id = job.id.as_str(), "job received while draining, it goes back to the server");
        } else {
            debug!(job.id = job.id.as_str(), "job held back, because nothing more is taken over this stream");
        }
        self.run.ledger.give_back(&job.id, delivery);
        // The same job may be redelivered after another worker has reported it.
        self.held_back.retain(|other| other.id != job.id);
        self.held_back.push(job);
    }

    /// Reports a malformed job as failed, otherwise it would be redelivered again and again.
    async fn refuse(&self, id: JobId, reason: &str) {
        error!(job.id = id.as_str(), reason, "malformed job, reported as failed");
        let attempt = Attempt { id, attempts: None };
        let failure =
            Report::Failure(Failure::new("MalformedJob", format!("the worker cannot read this job: {reason}")));
        let report = match self.run.ledger.arrive(&attempt, self.id, &self.settings) {
            (Arrival::New, _) => {
                self.run.metrics.job_malformed();
                failure
            }
            (Arrival::Ended(report), _) => report,
            (Arrival::UnderWay, _) => return,
        };
        if let Some(attempt) = self.run.ledger.end(&attempt.id, &report) {
            self.unless_stopped(self.run.acks.report(attempt, report, Urgency::Now)).await;
        }
    }

    async fn unless_stopped(&self, work: impl Future<Output = ()>) {
        tokio::select! {
            biased;
            () = self.run.lifecycle.reached(Phase::Stopped) => {}
            () = work => {}
        }
    }
}

/// Waits until the purpose of the stream changes, or its sender is gone.
async fn until_other(purposes: &mut watch::Receiver<Purpose>, present: Purpose) {
    let _ = purposes.wait_for(|purpose| *purpose != present).await.is_ok();
}
