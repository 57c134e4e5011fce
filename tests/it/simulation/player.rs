//! [`Player`]: a dispatcher that plays each job's script instead of running a process.

use std::time::Duration;

use tokio::time::{Instant, sleep};
use zizq_worker::{Dispatcher, Ended, Failure, Job, Lifecycle, Outcome, Phase};

use super::checks::{Book, Ending};
use super::script::{End, Script};
use super::server::EPOCH_MS;

/// The dispatcher of one worker. It plays the worker's jobs, and records each run.
pub struct Player {
    /// The worker's name.
    pub worker: String,
    /// The book that records the runs.
    pub book: Book,
    /// The time for which a run continues after a kill, like a process in its grace period.
    pub grace: Duration,
    /// The start time of the world.
    pub start: Instant,
}

impl Dispatcher for Player {
    async fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> Ended {
        let script: Script = serde_json::from_slice(&job.payload).unwrap();
        let step = script.step(job.attempts);
        let mut run = self.book.begin(&self.worker, job.id.as_str(), job.attempts, step.lasts());
        let ends = Instant::now() + step.lasts();
        tokio::select! {
            biased;
            () = self.stopped(lifecycle) => {}
            () = tokio::time::sleep_until(ends) => {}
        }
        let ending = if Instant::now() < ends { Ending::Interrupted } else { step.end.into() };
        run.end(ending);
        outcome(ending, step.end, run.number, self.unix_ms()).into()
    }
}

impl Player {
    /// Waits until the worker's stop interrupts the run: `grace` after `Phase::Killing`, or at `Phase::Forcing`.
    async fn stopped(&self, lifecycle: &Lifecycle) {
        lifecycle.reached(Phase::Killing).await;
        tokio::select! {
            biased;
            () = lifecycle.reached(Phase::Forcing) => {}
            () = sleep(self.grace) => {}
        }
    }

    fn unix_ms(&self) -> u64 {
        EPOCH_MS + u64::try_from(self.start.elapsed().as_millis()).unwrap_or(0)
    }
}

impl From<End> for Ending {
    fn from(end: End) -> Self {
        if end == End::Good { Self::Good } else { Self::Bad }
    }
}

fn outcome(ending: Ending, end: End, run: usize, now_ms: u64) -> Outcome {
    // The message names the run, so that the book can match the report to the run.
    let mut failure = Failure::new("Played", format!("run {run}"));
    match (ending, end) {
        (Ending::Interrupted | Ending::Vanished, _) => return Outcome::Interrupted,
        (_, End::Good) => return Outcome::Success,
        (_, End::Bad) => {}
        (_, End::Snooze(ms)) => failure.retry_at = Some(now_ms + ms),
        (_, End::Kill) => failure.kill = true,
    }
    Outcome::Failure(failure)
}
