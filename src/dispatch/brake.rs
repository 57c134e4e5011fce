//! [`Brake`]: keeps a handler that cannot be started from running through a queue.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::{error, info};

use crate::lifecycle::{Lifecycle, Phase};

/// How long one job waits for a fault that may pass: a deploy that replaces the file, a machine short of something.
const PATIENCE: Duration = Duration::from_secs(5);

/// The pauses in that time grow from this …
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// … up to this.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// After a start that failed for good, the pause before the next job's start grows from this …
const FIRST_DELAY: Duration = Duration::from_secs(1);

/// … up to this.
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// Why a job was not started.
#[derive(Debug)]
pub(super) enum NotStarted {
    /// The worker stops before it could be.
    Stopping,
    /// It cannot be.
    Failed(io::Error),
}

/// How the starts of one handler have gone. While they fail there is one at a time, and a pause between them.
#[derive(Debug)]
pub(super) struct Brake {
    name: String,
    engaged: AtomicBool,
    turn: Mutex<Turn>,
}

#[derive(Debug, Default)]
struct Turn {
    delay: Duration,
    not_before: Option<Instant>,
}

impl Brake {
    pub(super) fn new(name: String) -> Self {
        Self { name, engaged: AtomicBool::new(false), turn: Mutex::default() }
    }

    /// Starts something, as soon as this handler may be started.
    pub(super) async fn start<T>(
        &self,
        lifecycle: &Lifecycle,
        spawn: impl Fn() -> io::Result<T>,
    ) -> Result<T, NotStarted> {
        if !self.engaged.load(Ordering::Acquire) {
            match spawn() {
                Ok(started) => return Ok(started),
                Err(error) if is_the_jobs_own(&error) => return Err(NotStarted::Failed(error)),
                // Many may find the fault at once. Each tries again when it is its turn: it counts once, and costs one job.
                Err(_) => {}
            }
        }
        tokio::select! {
            biased;
            () = lifecycle.reached(Phase::Draining) => Err(NotStarted::Stopping),
            started = self.start_in_turn(spawn) => started,
        }
    }

    async fn start_in_turn<T>(&self, spawn: impl Fn() -> io::Result<T>) -> Result<T, NotStarted> {
        let mut turn = self.turn.lock().await;
        if let Some(not_before) = turn.not_before {
            tokio::time::sleep_until(not_before).await;
        }
        match start_patiently(&spawn).await {
            Ok(started) => {
                self.release(&mut turn);
                Ok(started)
            }
            Err(error) if is_the_jobs_own(&error) => Err(NotStarted::Failed(error)),
            Err(error) => self.failed(&mut turn, error),
        }
    }

    fn failed<T>(&self, turn: &mut Turn, error: io::Error) -> Result<T, NotStarted> {
        turn.delay = (turn.delay * 2).clamp(FIRST_DELAY, LONGEST_DELAY);
        turn.not_before = Some(Instant::now() + turn.delay);
        if !self.engaged.swap(true, Ordering::AcqRel) {
            error!(handler = self.name, %error, "handler cannot be started, its jobs are slowed down");
        }
        Err(NotStarted::Failed(error))
    }

    fn release(&self, turn: &mut Turn) {
        *turn = Turn::default();
        if self.engaged.swap(false, Ordering::AcqRel) {
            info!(handler = self.name, "handler can be started again");
        }
    }
}

/// Tries for as long as the fault is one that may pass.
async fn start_patiently<T>(spawn: impl Fn() -> io::Result<T>) -> Result<T, io::Error> {
    let give_up = Instant::now() + PATIENCE;
    let mut pause = FIRST_PAUSE;
    loop {
        match spawn() {
            Err(error) if may_pass(&error) && Instant::now() < give_up => {}
            ended => return ended,
        }
        tokio::time::sleep(pause.mul_f64(1.0 + fastrand::f64() / 4.0)).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether another job might well be started: too long variables, or a zero byte in them, which no system call saw.
fn is_the_jobs_own(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::TOOBIG) | None)
}

/// Whether a fault says more about this moment than about the handler: it was fine when the worker started.
fn may_pass(error: &io::Error) -> bool {
    use Errno as E;
    matches!(
        Errno::from_io_error(error),
        Some(E::AGAIN | E::NOMEM | E::MFILE | E::NFILE | E::TXTBSY | E::NOENT | E::ACCESS)
    )
}
