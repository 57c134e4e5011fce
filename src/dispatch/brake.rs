//! [`Brake`]: keeps a handler that cannot be started from running through a queue.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::Mutex;
use tokio::time::Instant;
use tracing::{error, info};

use crate::lifecycle::Lifecycle;

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

/// When it has to be known whether a start has worked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Known {
    /// When it returns.
    AtOnce,
    /// Later, from the process itself. A fault is handed to the next start then.
    Later,
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

    /// Whether the handler could not be started when that was last tried.
    pub(super) fn is_engaged(&self) -> bool {
        self.engaged.load(Ordering::Acquire)
    }

    /// When the pause after the last failed start ends. `None` while a start is under way.
    pub(super) fn pause_end(&self) -> Option<Instant> {
        self.turn.try_lock().ok()?.not_before
    }

    /// The handler's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Starts something, as soon as this handler may be started. `fault` is what has just come of starting it, if that failed.
    pub(super) async fn start<T>(
        &self,
        lifecycle: &Lifecycle,
        fault: Option<io::Error>,
        spawn: impl Fn(Known) -> io::Result<T>,
    ) -> Result<T, NotStarted> {
        let fault = match fault {
            None if !self.is_engaged() => match spawn(Known::Later) {
                Ok(started) => return Ok(started),
                Err(error) => Some(error),
            },
            fault => fault,
        };
        if let Some(error) = fault.filter(is_the_jobs_own) {
            return Err(NotStarted::Failed(error));
        }
        // Many may find a fault at once. Each tries again when it is its turn: it counts once, and costs one job.
        tokio::select! {
            biased;
            () = lifecycle.awaited() => Err(NotStarted::Stopping),
            started = self.start_in_turn(|| spawn(Known::AtOnce)) => started,
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

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    fn brake() -> Brake {
        Brake::new("handle.sh".to_owned())
    }

    fn fault(errno: Errno) -> io::Error {
        errno.into()
    }

    /// Tries a start that goes wrong in that way, and says how long it took.
    async fn fail(brake: &Brake, errno: Errno) -> Duration {
        let begun = Instant::now();
        let started = brake.start(&Lifecycle::new(), None, |_| Err::<(), _>(fault(errno))).await;
        assert!(matches!(started, Err(NotStarted::Failed(_))));
        begun.elapsed()
    }

    async fn succeed(brake: &Brake) -> Duration {
        let begun = Instant::now();
        brake.start(&Lifecycle::new(), None, |_| Ok(())).await.unwrap();
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_fault_that_passes_in_time_is_none() {
        for errno in
            [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE, Errno::TXTBSY, Errno::NOENT, Errno::ACCESS]
        {
            let (brake, begun) = (brake(), Instant::now());
            let over = begun + Duration::from_secs(4);
            let spawn = |_| if Instant::now() < over { Err(fault(errno)) } else { Ok(()) };
            brake.start(&Lifecycle::new(), None, spawn).await.unwrap();
            assert!(begun.elapsed() < Duration::from_secs(5), "{errno}: {:?}", begun.elapsed());
            assert_eq!(succeed(&brake).await, Duration::ZERO);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_fault_that_does_not_pass_fails_the_job_after_five_seconds() {
        let took = fail(&brake(), Errno::NOENT).await.as_secs_f64();
        assert!((5.0..5.7).contains(&took), "{took}");
        assert_eq!(fail(&brake(), Errno::NOEXEC).await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_are_one_second_apart_and_then_up_to_thirty_until_a_start_works() {
        let brake = brake();
        let mut pauses = Vec::new();
        for _ in 0..8 {
            pauses.push(fail(&brake, Errno::NOEXEC).await.as_secs_f64().round());
        }
        assert_eq!(pauses, [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]);
        assert_eq!(succeed(&brake).await.as_secs_f64().round(), 30.0);
        assert_eq!(succeed(&brake).await, Duration::ZERO);
        assert_eq!(fail(&brake, Errno::NOEXEC).await, Duration::ZERO);
        assert_eq!(fail(&brake, Errno::NOEXEC).await.as_secs_f64().round(), 1.0);
    }

    #[tokio::test(start_paused = true)]
    async fn jobs_that_come_at_once_fail_one_after_the_other() {
        let (brake, begun, tries) = (brake(), Instant::now(), Cell::new(0));
        let spawn = |_| {
            tries.set(tries.get() + 1);
            // The first job tries twice: at once, and in its turn.
            if tries.get() <= 4 { Err(fault(Errno::NOEXEC)) } else { Ok(()) }
        };
        let lifecycle = Lifecycle::new();
        let start = || brake.start(&lifecycle, None, spawn);
        let (a, b, c, d) = tokio::join!(start(), start(), start(), start());
        assert!([a, b, c].iter().all(Result::is_err));
        assert!(d.is_ok());
        assert_eq!(begun.elapsed().as_secs_f64().round(), 7.0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_wrong_with_one_job_fails_it_at_once_and_slows_down_no_other() {
        let brake = brake();
        assert_eq!(fail(&brake, Errno::TOOBIG).await, Duration::ZERO);
        let zero_byte = |_| Err::<(), _>(io::ErrorKind::InvalidInput.into());
        assert!(matches!(brake.start(&Lifecycle::new(), None, zero_byte).await, Err(NotStarted::Failed(_))));
        assert_eq!(succeed(&brake).await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_that_turns_out_to_have_failed_is_tried_again_and_its_end_is_known_at_once_then() {
        let (brake, known) = (brake(), Cell::new(None));
        let spawn = |when| {
            known.set(Some(when));
            Ok(())
        };
        brake.start(&Lifecycle::new(), None, spawn).await.unwrap();
        assert_eq!(known.get(), Some(Known::Later));
        brake.start(&Lifecycle::new(), Some(fault(Errno::NOENT)), spawn).await.unwrap();
        assert_eq!(known.get(), Some(Known::AtOnce));
        let started = brake.start(&Lifecycle::new(), Some(fault(Errno::TOOBIG)), spawn).await;
        assert!(matches!(started, Err(NotStarted::Failed(error)) if error.raw_os_error() == Some(7)));
        assert_eq!(succeed(&brake).await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn while_starts_fail_the_end_of_each_is_known_at_once() {
        let brake = brake();
        fail(&brake, Errno::NOEXEC).await;
        let spawn = |known| if known == Known::AtOnce { Ok(()) } else { Err(fault(Errno::NOEXEC)) };
        brake.start(&Lifecycle::new(), None, spawn).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_the_wait() {
        let (brake, lifecycle, begun) = (brake(), Lifecycle::new(), Instant::now());
        fail(&brake, Errno::NOEXEC).await;
        let stop = async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            lifecycle.stop();
        };
        let (started, ()) = tokio::join!(brake.start(&lifecycle, None, |_| Ok(())), stop);
        assert!(matches!(started, Err(NotStarted::Stopping)));
        assert!(begun.elapsed() < Duration::from_secs(1));
    }
}
