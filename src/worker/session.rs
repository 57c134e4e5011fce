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

/// The time limit for a search stream to bring wanted jobs, counted from the moment when the stream is open.
const SEARCH_TIME: Duration = Duration::from_secs(1);

/// An open stream and the queue for its jobs.
pub(super) struct Session {
    run: Run,
    intake: Intake,
    dispatch_queue: async_channel::Sender<Taken>,
    pub(super) id: StreamId,
    settings: Arc<StreamSettings>,
    stream: TakeStream,
    purpose: watch::Receiver<Purpose>,
    /// The permits for this stream's jobs in the dispatch queue: as many as the prefetch, even if the server sends more jobs.
    places: Arc<Semaphore>,
    /// The received jobs that are not started. They are started if the stream takes again. Otherwise the server requeues them
    /// when the stream closes.
    held_back: Vec<Job>,
    /// The last delivery before the stream began to finish its jobs, or `None` while the stream takes.
    finishing_since: Option<Delivery>,
    search: Option<SearchProgress>,
}

/// The progress of a search stream. Such a stream is opened to receive particular jobs, called the wanted jobs.
struct SearchProgress {
    /// The deadline for the wanted jobs to arrive.
    end: Instant,
    prefetch: usize,
    /// The number of jobs that the stream may still bring.
    left: usize,
    has_found: bool,
}

/// The reason why this worker closed a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CloseReason {
    /// No job of the stream is in flight, another stream gets the stream's jobs, or the worker has stopped.
    Finished,
    /// A search stream has delivered none of the wanted jobs.
    NotFound {
        prefetch: usize,
        /// Whether the stream has brought as many jobs as its prefetch.
        is_full: bool,
    },
}

impl Session {
    /// Returns the session of a stream. `search` is the prefetch of a search stream.
    pub(super) fn new(
        run: Run,
        intake: Intake,
        dispatch_queue: async_channel::Sender<Taken>,
        settings: Arc<StreamSettings>,
        stream: TakeStream,
        purpose: watch::Receiver<Purpose>,
        search: Option<usize>,
    ) -> Self {
        let places = Arc::new(Semaphore::new(settings.prefetch));
        let id = run.ledger.open_stream();
        let end = Instant::now() + SEARCH_TIME;
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
            search: search.map(|prefetch| SearchProgress { end, prefetch, left: prefetch, has_found: false }),
        }
    }

    /// Receives jobs until the stream is lost or no longer needed, and then closes the stream.
    pub(super) async fn run(mut self) -> Result<CloseReason, StreamError> {
        let ended = self.follow().await;
        self.run.ledger.lose_stream(self.id);
        self.stream.close().await;
        ended.map(|()| match self.search {
            Some(SearchProgress { has_found: false, left, prefetch, .. }) => {
                CloseReason::NotFound { prefetch, is_full: left == 0 }
            }
            _ => CloseReason::Finished,
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

    /// Reports whether the stream can close, because none of its jobs is in flight, or because another stream will receive these
    /// jobs. A search stream also stays open while wanted jobs can still arrive.
    fn is_finished(&self) -> bool {
        let is_awaited = self.search.as_ref().is_some_and(|search| search.left > 0 && Instant::now() < search.end);
        !is_awaited && (self.run.ledger.under_way(self.id, None) == 0 || self.is_superseded())
    }

    /// Reports whether another stream takes jobs and no job of this stream has started. When this stream closes, the server
    /// redelivers the jobs of this stream over the other one.
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
                let is_draining = self.run.lifecycle.phase() >= Phase::Draining;
                match arrived {
                    Some(taken) if !is_draining && (purpose == Purpose::Take || self.may_start(&taken.job)) => {
                        self.push(taken, purpose).await;
                    }
                    Some(taken) => self.hold_back(taken),
                    None => {
                        if let Some(search) = &mut self.search {
                            search.has_found = true;
                        }
                    }
                }
            }
            Received::Malformed { id, reason } => self.refuse(id, &reason).await,
        }
    }

    /// Reports whether a job may start although the stream only finishes its jobs. The job may start only if the present settings
    /// cover its queue, and if earlier jobs keep this stream open anyway.
    fn may_start(&self, job: &Job) -> bool {
        self.search.is_none()
            && !self.intake.is_paused()
            && self.intake.settings().fits(job, &self.settings)
            && self.finishing_since.is_some_and(|since| self.run.ledger.under_way(self.id, Some(since)) > 0)
    }

    /// Records the arrival of a job in the ledger. Returns the job if it is new in this worker. If the job has already ended
    /// here, queues its report instead.
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

    /// Queues a job once a permit is free. Holds the job back if the stream's purpose changes or the worker drains before that.
    async fn push(&mut self, mut taken: Taken, purpose: Purpose) {
        tokio::select! {
            biased;
            () = self.run.lifecycle.reached(Phase::Draining) => return self.hold_back(taken),
            _ = self.purpose.wait_for(|present| *present != purpose) => return self.hold_back(taken),
            // The semaphore is never closed.
            place = Arc::clone(&self.places).acquire_owned() => taken.place = place.ok(),
        }
        // The send fails only if the worker is stopping and has closed the queue.
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
        // The job may have been held back before. Keep only the newest delivery, because another worker may have reported an
        // attempt since.
        self.held_back.retain(|other| other.id != job.id);
        self.held_back.push(job);
    }

    /// Reports a malformed job as failed, so that the server does not redeliver the job again and again.
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
