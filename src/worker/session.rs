//! [`Session`]: one take stream, from its opening to its end.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tracing::{debug, error, info};

use super::intake::{Intake, Tap};
use super::{Run, Taken};
use crate::job::{Failure, Job, JobId, Outcome};
use crate::ledger::{Arrival, Attempt, Delivery};
use crate::lifecycle::Phase;
use crate::stream::{Received, StreamError, TakeStream};

/// An open stream, and where its jobs go.
pub(super) struct Session<'a> {
    pub(super) run: &'a Run,
    pub(super) intake: &'a Intake,
    pub(super) dispatch_queue: &'a async_channel::Sender<Taken>,
    pub(super) tap: Arc<Tap>,
    pub(super) stream: TakeStream,
    /// Room in the dispatch queue: the server may hand out no more than it was asked for.
    pub(super) places: Arc<Semaphore>,
}

/// Why a stream may be closed.
pub(super) enum Left {
    /// The worker has stopped.
    Stopped,
    /// Nothing more may be taken over it, and everything that came over it has been reported.
    Shut,
}

/// How winding down went on.
enum Wound {
    Down,
    /// Something else matters by now.
    Back,
}

impl Session<'_> {
    /// Takes what comes, until the stream may be closed.
    pub(super) async fn follow(&mut self) -> Result<Left, StreamError> {
        loop {
            tokio::select! {
                biased;
                () = self.run.lifecycle.reached(Phase::Stopped) => return Ok(Left::Stopped),
                () = shut(self.run, self.intake, &self.tap) => {
                    self.run.activity.set_winding_down(true);
                    let wound = self.wind_down().await;
                    self.run.activity.set_winding_down(false);
                    if let Wound::Down = wound? {
                        return Ok(Left::Shut);
                    }
                }
                received = self.stream.next() => {
                    if let Some(taken) = self.receive(received?).await {
                        self.push(taken).await;
                    }
                }
            }
        }
    }

    /// Starts nothing more, but keeps the stream open until everything that came over it has been reported: the server
    /// hands out again what it then still holds for us.
    async fn wind_down(&mut self) -> Result<Wound, StreamError> {
        let (run, intake, tap) = (self.run, self.intake, Arc::clone(&self.tap));
        let mut movements = run.ledger.movements();
        // The server has them in flight for us, but nothing is known of them here, until they are to be started after all.
        let mut held: Vec<Job> = Vec::new();
        let under_way = run.ledger.under_way();
        if under_way > 0 && !intake.is_paused() {
            info!(under_way, "finishing what was taken, to reconnect by other settings");
        }
        while run.ledger.under_way() > 0 {
            tokio::select! {
                biased;
                () = run.lifecycle.reached(Phase::Draining) => {
                    held.iter().for_each(|job| log_given_back(&job.id));
                    return Ok(Wound::Back);
                }
                () = intake.open_again(&tap) => {
                    for job in held {
                        self.take(job).await;
                    }
                    return Ok(Wound::Back);
                }
                // It fails only once the ledger is gone, and `run` has it.
                _ = movements.changed() => {}
                // Each report frees a place that the server fills at once.
                received = self.stream.next() => if let Some(Taken { job, delivery, .. }) = self.receive(received?).await {
                    run.ledger.give_back(&job.id, delivery);
                    // It may come again, when somebody else has reported it.
                    held.retain(|other| other.id != job.id);
                    held.push(job);
                }
            }
        }
        Ok(Wound::Down)
    }

    /// Finds out what has come: a job to be started, or something to be reported, or nothing.
    async fn receive(&self, received: Received) -> Option<Taken> {
        match received {
            Received::Job(job) => self.arrive(job).await,
            Received::Malformed { id, reason } => {
                self.refuse(id, &reason).await;
                None
            }
        }
    }

    async fn arrive(&self, job: Job) -> Option<Taken> {
        let Run { ledger, acks, activity, .. } = self.run;
        let attempt = Attempt { id: job.id.clone(), attempts: Some(job.attempts) };
        match ledger.arrive(&attempt) {
            (Arrival::New, delivery) => {
                debug!(
                    id = job.id.as_str(),
                    r#type = job.job_type,
                    waiting = self.dispatch_queue.len(),
                    "job received"
                );
                return Some(Taken { job, delivery, place: None, _unfinished: activity.take_job() });
            }
            (Arrival::UnderWay, _) => info!(id = job.id.as_str(), "job received again while it is here, not started"),
            (Arrival::Ended(outcome), _) => {
                info!(id = job.id.as_str(), "job received again after it ended here, reported");
                self.unless_stopped(acks.report_again(attempt, outcome)).await;
            }
        }
        None
    }

    async fn take(&self, job: Job) {
        if let Some(taken) = self.arrive(job).await {
            self.push(taken).await;
        }
    }

    /// Waits for room in the dispatch queue, or for the drain: then the job goes back with the stream.
    async fn push(&self, mut taken: Taken) {
        tokio::select! {
            biased;
            () = self.run.lifecycle.reached(Phase::Draining) => return self.give_back(&taken),
            // The semaphore is never closed.
            place = Arc::clone(&self.places).acquire_owned() => taken.place = place.ok(),
        }
        let Taken { job: Job { id, .. }, delivery, .. } = &taken;
        let (id, delivery) = (id.clone(), *delivery);
        // The worker loops are gone.
        if self.dispatch_queue.try_send(taken).is_err() {
            self.give_back_by(&id, delivery);
        }
    }

    fn give_back(&self, taken: &Taken) {
        self.give_back_by(&taken.job.id, taken.delivery);
    }

    fn give_back_by(&self, id: &JobId, delivery: Delivery) {
        log_given_back(id);
        self.run.ledger.give_back(id, delivery);
    }

    /// Reports what is no job, but has an id, as failed: it would come again and again.
    async fn refuse(&self, id: JobId, reason: &str) {
        error!(id = id.as_str(), reason, "malformed job, reported as failed");
        let attempt = Attempt { id, attempts: None };
        let failure =
            Outcome::Failure(Failure::new("MalformedJob", format!("the worker cannot read this job: {reason}")));
        let outcome = match self.run.ledger.arrive(&attempt) {
            (Arrival::New, _) => failure,
            (Arrival::Ended(outcome), _) => outcome,
            (Arrival::UnderWay, _) => return,
        };
        if let Some(attempt) = self.run.ledger.end(&attempt.id, &outcome) {
            self.unless_stopped(self.run.acks.report(attempt, outcome)).await;
        }
    }

    async fn unless_stopped(&self, work: impl Future<Output = ()>) {
        tokio::select! {
            () = self.run.lifecycle.reached(Phase::Stopped) => {}
            () = work => {}
        }
    }
}

fn log_given_back(id: &JobId) {
    debug!(id = id.as_str(), "job received while draining, it goes back to the server");
}

/// Waits until nothing more may be taken by `tap`, though the worker runs. A drain has its own way of ending a stream.
pub(super) async fn shut(run: &Run, intake: &Intake, tap: &Arc<Tap>) {
    intake.shut(tap).await;
    if run.lifecycle.phase() >= Phase::Draining {
        std::future::pending::<()>().await;
    }
}
