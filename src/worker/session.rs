//! [`Session`]: one take stream, from its opening to its end.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio::time::Instant;
use tracing::{debug, error, info};

use super::intake::Intake;
use super::purpose::Purpose;
use super::{Run, Taken};
use crate::client::StreamSettings;
use crate::job::{Failure, Job, JobId, Outcome};
use crate::ledger::{Arrival, Attempt, Delivery, StreamId};
use crate::lifecycle::Phase;
use crate::stream::{Received, StreamError, TakeStream};
use crate::watch;

/// The time that a stream has to bring the jobs for which it was opened, beyond the first round trip.
const SEARCH_TIME: Duration = Duration::from_secs(1);

/// An open stream, and where its jobs go.
pub(super) struct Session {
    pub(super) run: Run,
    pub(super) intake: Intake,
    pub(super) dispatch_queue: async_channel::Sender<Taken>,
    pub(super) id: StreamId,
    pub(super) settings: Arc<StreamSettings>,
    pub(super) stream: TakeStream,
    pub(super) purpose: watch::Receiver<Purpose>,
    /// Room in the dispatch queue: the server may hand out no more than it was asked for.
    places: Arc<Semaphore>,
    /// Jobs that the server holds for us and that are not started; they go back when the stream closes.
    held_back: Vec<Job>,
    /// Since it finishes, the last delivery before that.
    finishing_since: Option<Delivery>,
    search: Option<Sought>,
}

/// A stream that was opened for certain jobs.
struct Sought {
    /// The end of the time that it has to bring them.
    end: Instant,
    prefetch: usize,
    /// The number of jobs that may still come over it.
    left: usize,
    has_found: bool,
}

/// Why a stream was closed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Closed {
    /// Everything that came over it has been reported, or the worker has stopped.
    Finished,
    /// It was opened for certain jobs, and has brought none of them.
    NotFound {
        prefetch: usize,
        /// Whether it has brought as many jobs as it could.
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

    /// Makes it a stream that was opened to bring back certain jobs, by a prefetch of its own.
    pub(super) fn searching(self, prefetch: usize) -> Self {
        let end = Instant::now() + SEARCH_TIME;
        Self { search: Some(Sought { end, prefetch, left: prefetch, has_found: false }), ..self }
    }

    /// Follows the stream until it is lost, or of no use any more. Closes it then.
    pub(super) async fn run(mut self) -> Result<Closed, StreamError> {
        let ended = self.follow().await;
        self.run.ledger.lose_stream(self.id);
        self.stream.close().await;
        ended.map(|()| match self.search {
            None => Closed::Finished,
            Some(Sought { has_found: true, .. }) => Closed::Finished,
            Some(Sought { left, prefetch, .. }) => Closed::NotFound { prefetch, is_full: left == 0 },
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

    /// Whether nothing that came over the stream is under way, and nothing more is awaited.
    fn is_finished(&self) -> bool {
        let is_awaited = self.search.as_ref().is_some_and(|search| search.left > 0 && Instant::now() < search.end);
        !is_awaited && (self.run.ledger.under_way(self.id, None) == 0 || self.is_superseded())
    }

    /// Whether another stream takes, and nothing of this one has been started: then its jobs come over the other one.
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

    /// Whether a job is started though the stream finishes: the worker takes jobs of this kind, over another stream, and
    /// this one has to stay open anyway, for jobs that came before it was to finish.
    fn may_start(&self, job: &Job) -> bool {
        self.search.is_none()
            && !self.intake.is_paused()
            && self.intake.settings().fits(job, &self.settings)
            && self.finishing_since.is_some_and(|since| self.run.ledger.under_way(self.id, Some(since)) > 0)
    }

    /// Finds out what has come: a job to be started, or an outcome to be reported, or nothing new.
    async fn arrive(&self, job: Job) -> Option<Taken> {
        let Run { ledger, acks, activity, .. } = &self.run;
        let attempt = Attempt { id: job.id.clone(), attempts: Some(job.attempts) };
        match ledger.arrive(&attempt, self.id, &self.settings) {
            (Arrival::New, delivery) => {
                debug!(
                    job.id = job.id.as_str(),
                    "job.type" = job.job_type,
                    waiting = self.dispatch_queue.len(),
                    "job received"
                );
                let unfinished = activity.take_job();
                return Some(Taken { job, stream: self.id, delivery, place: None, _unfinished: unfinished });
            }
            (Arrival::UnderWay, _) => {
                info!(job.id = job.id.as_str(), "job received again while it is here, not started");
            }
            (Arrival::Ended(outcome), _) => {
                info!(job.id = job.id.as_str(), "job received again after it ended here, reported");
                self.unless_stopped(acks.report_again(attempt, outcome)).await;
            }
        }
        None
    }

    /// Waits for room in the dispatch queue. Holds the job back if the stream gets another use meanwhile.
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
        // It may be redelivered, when another worker has reported it.
        self.held_back.retain(|other| other.id != job.id);
        self.held_back.push(job);
    }

    /// Reports as failed what is no job, but has an id: otherwise it would be redelivered again and again.
    async fn refuse(&self, id: JobId, reason: &str) {
        error!(job.id = id.as_str(), reason, "malformed job, reported as failed");
        let attempt = Attempt { id, attempts: None };
        let failure =
            Outcome::Failure(Failure::new("MalformedJob", format!("the worker cannot read this job: {reason}")));
        let outcome = match self.run.ledger.arrive(&attempt, self.id, &self.settings) {
            (Arrival::New, _) => {
                self.run.metrics.job_malformed();
                failure
            }
            (Arrival::Ended(outcome), _) => outcome,
            (Arrival::UnderWay, _) => return,
        };
        if let Some(attempt) = self.run.ledger.end(&attempt.id, &outcome) {
            self.unless_stopped(self.run.acks.report(attempt, outcome)).await;
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

/// Waits until the stream's use is another one, or is decided no more.
async fn until_other(purposes: &mut watch::Receiver<Purpose>, present: Purpose) {
    let _ = purposes.wait_for(|purpose| *purpose != present).await.is_ok();
}

/// Waits for a moment, if there is one.
pub(super) async fn sleep_until_if(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}
