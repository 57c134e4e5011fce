//! [`Brake`]: delays the starts of a handler that keeps failing, because without delays the handler would soon fail every job in
//! its queue.

use std::io;
use std::pin::pin;
use std::sync;
use std::time::Duration;

use rustix::io::Errno;
use tokio::sync::{Mutex, MutexGuard, Notify};
use tokio::time::Instant;
use tracing::{error, info};

use super::BrakeStatus;
use crate::lock::lock;

/// The time for which a job retries a start whose error may be temporary, for example while a deploy replaces the program file.
const PATIENCE: Duration = Duration::from_secs(5);

/// The pause before a job's first retry of its start. The pause doubles with each retry.
const FIRST_PAUSE: Duration = Duration::from_millis(10);

/// The longest pause between two retries of one job, before a random part of up to a quarter is added.
const LONGEST_PAUSE: Duration = Duration::from_millis(500);

/// The delay before the next job's start after the handler's first failure. The delay doubles with each further failure.
const FIRST_DELAY: Duration = Duration::from_secs(1);

/// The longest delay before the next job's start.
const LONGEST_DELAY: Duration = Duration::from_secs(30);

/// The reason why a job was not started.
#[derive(Debug)]
pub(super) enum NotStarted<C> {
    /// The wait for the start was cut short, for the contained reason.
    CutShort(C),
    /// The start failed, with the contained error.
    Failed(io::Error),
}

/// The start of a process, which may still be in progress.
pub(super) trait Begin {
    /// Waits until the program runs. For a warm process, waits until the process has connected.
    ///
    /// # Errors
    /// When the start has failed.
    fn begun(&self) -> impl Future<Output = io::Result<()>> + Send;

    /// Waits for the job's timeout, which also applies while the start is in progress. Never returns if the job has no timeout,
    /// or if the process is a warm one.
    fn overdue(&self) -> impl Future<Output = ()> + Send;
}

/// The event that shows that a handler works.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProvenBy {
    /// A process that was started for a single job has executed its program.
    Start,
    /// A warm process has replied to a job, see [`Brake::proven`].
    Job,
}

/// The record of one handler's failures. After a failure, starts run one at a time, with a pause between them, until the handler
/// works again.
#[derive(Debug)]
pub(super) struct Brake {
    pub(super) name: String,
    proof: ProvenBy,
    turn: Mutex<()>,
    /// `None` while the brake is not engaged: the handler has not failed, or has worked since.
    trouble: sync::Mutex<Option<Trouble>>,
    /// The notification that ends the pause early, because the handler works again.
    released: Notify,
}

/// The failures since the handler last worked.
#[derive(Debug)]
struct Trouble {
    delay: Duration,
    /// The end of the last pause, which may be in the past.
    not_before: Instant,
    /// The time of the last counted failure.
    failed_at: Instant,
    /// Whether the last start succeeded. The brake of a warm handler nevertheless stays engaged until a process has done a job.
    runs: bool,
    failures: u64,
    /// The message of the last failure.
    error: String,
}

impl Brake {
    pub(super) fn new(name: String, proof: ProvenBy) -> Self {
        Self { name, proof, turn: Mutex::default(), trouble: sync::Mutex::default(), released: Notify::new() }
    }

    fn trouble(&self) -> sync::MutexGuard<'_, Option<Trouble>> {
        lock(&self.trouble)
    }

    /// Reports whether the handler has failed and has not worked since.
    pub(super) fn is_engaged(&self) -> bool {
        self.trouble().is_some()
    }

    /// Reports whether the brake is engaged and the last start failed. Returns false if processes do start, but end before they
    /// have done a job.
    pub(super) fn holds_starts_that_fail(&self) -> bool {
        self.trouble().as_ref().is_some_and(|trouble| !trouble.runs)
    }

    /// Returns the end of the last pause, which may be in the past. Returns `None` if the brake is not engaged. Also returns `None`
    /// if a job holds `turn`, because that job is waiting for the end of the pause or is starting a process.
    pub(super) fn pause_end(&self) -> Option<Instant> {
        let _turn = self.turn.try_lock().ok()?;
        self.trouble().as_ref().map(|trouble| trouble.not_before)
    }

    /// Returns the state of the brake, or `None` if the brake is not engaged.
    pub(super) fn status(&self) -> Option<BrakeStatus> {
        self.trouble().as_ref().map(|trouble| BrakeStatus {
            failures: trouble.failures,
            error: trouble.error.clone(),
            pause_seconds: trouble.not_before.saturating_duration_since(Instant::now()).as_secs_f64(),
        })
    }

    /// Starts a process with `spawn`. `fault` is the error of the job's previous start, if that start failed. If the brake is
    /// engaged or a start of this job has failed, the job waits for its turn and for the end of the pause. The job keeps the turn
    /// until the program runs, the start has failed, or the job reaches its timeout. Every wait ends when `cut_short` completes. If
    /// a process exists by then, its program may already run, so the process is returned together with the output of `cut_short`.
    pub(super) async fn start<T: Begin, C>(
        &self,
        fault: Option<io::Error>,
        cut_short: impl Future<Output = C>,
        spawn: impl Fn() -> io::Result<T>,
    ) -> Result<(T, Option<C>), NotStarted<C>> {
        let fault = match fault {
            None if !self.is_engaged() => match spawn() {
                Ok(started) => return Ok((started, None)),
                Err(error) => Some(error),
            },
            fault => fault,
        };
        if let Some(error) = fault.filter(|error| self.is_the_jobs_own(error)) {
            return Err(NotStarted::Failed(error));
        }
        let mut cut_short = pin!(cut_short);
        // One fault may hit many jobs at once. The jobs retry one at a time, with a pause after each failed job, so that the
        // fault does not fail all of them at once.
        let _turn = tokio::select! {
            biased;
            why = &mut cut_short => return Err(NotStarted::CutShort(why)),
            turn = self.turn() => turn,
        };
        self.start_patiently(spawn, cut_short).await
    }

    async fn turn(&self) -> MutexGuard<'_, ()> {
        let turn = self.turn.lock().await;
        let mut released = pin!(self.released.notified());
        released.as_mut().enable();
        let not_before = self.trouble().as_ref().map(|trouble| trouble.not_before);
        if let Some(not_before) = not_before {
            tokio::select! {
                biased;
                () = released => {}
                () = tokio::time::sleep_until(not_before) => {}
            }
        }
        turn
    }

    /// Reports whether this job alone caused the error, because its variables are too long (E2BIG) or contain a zero byte
    /// (`InvalidInput` without an errno). The handler or the machine caused any other error. Returns false for a warm handler,
    /// because its processes get no variables about a job.
    fn is_the_jobs_own(&self, error: &io::Error) -> bool {
        let is_about_variables = match Errno::from_io_error(error) {
            Some(errno) => errno == Errno::TOOBIG,
            None => error.kind() == io::ErrorKind::InvalidInput,
        };
        is_about_variables && self.proof == ProvenBy::Start
    }

    /// Starts a process, and retries for up to `PATIENCE` while the error may be temporary. `cut_short` or the job's timeout ends
    /// the wait.
    async fn start_patiently<T: Begin, C>(
        &self,
        spawn: impl Fn() -> io::Result<T>,
        mut cut_short: impl Future<Output = C> + Unpin,
    ) -> Result<(T, Option<C>), NotStarted<C>> {
        let give_up = Instant::now() + PATIENCE;
        let mut pause = FIRST_PAUSE;
        loop {
            let error = match spawn() {
                Ok(started) => tokio::select! {
                    biased;
                    begun = started.begun() => match begun {
                        Ok(()) => {
                            self.begun();
                            return Ok((started, None));
                        }
                        Err(error) => error,
                    },
                    why = &mut cut_short => {
                        // Start a new pause, because otherwise the next start would follow at once, while the result of this start
                        // is still unknown.
                        if self.proof == ProvenBy::Job {
                            self.pause();
                        }
                        return Ok((started, Some(why)));
                    }
                    () = started.overdue() => return Ok((started, None)),
                },
                Err(error) => error,
            };
            if !may_pass(&error) || Instant::now() >= give_up {
                if !self.is_the_jobs_own(&error) {
                    self.failed(&error);
                }
                return Err(NotStarted::Failed(error));
            }
            tokio::select! {
                biased;
                why = &mut cut_short => return Err(NotStarted::CutShort(why)),
                () = tokio::time::sleep(pause.mul_f64(1.0 + fastrand::f64() / 4.0)) => {}
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Records that a start failed. Logs only the first failure since the handler last worked.
    pub(super) fn failed(&self, error: &io::Error) {
        if self.count_failure(false, error.to_string()) {
            error!(handler = self.name, %error, "handler cannot be started, its jobs are slowed down");
        }
    }

    /// Records that a process did not connect. `started` is the time at which the process was started. Does nothing if another
    /// failure has been counted since then.
    pub(super) fn failed_since(&self, started: Instant, error: &io::Error) {
        if !self.has_failed_since(started) {
            self.failed(error);
        }
    }

    /// Reports whether a failure has been counted since `started`, the time at which a process was started. If several processes
    /// that ran at the same time fail, only the first failure is counted, because otherwise one fault would raise the delay to its
    /// maximum at once.
    fn has_failed_since(&self, started: Instant) -> bool {
        self.trouble().as_ref().is_some_and(|trouble| started <= trouble.failed_at)
    }

    /// Records that a process ended before it had shown that the handler works. `started` is the time at which the process was
    /// started. Does nothing if another failure has been counted since then.
    pub(super) fn crashed(&self, started: Instant, error: &str) {
        if !self.has_failed_since(started) && self.count_failure(true, error.to_owned()) {
            error!(handler = self.name, error, "handler ends before it has done a job, its jobs are slowed down");
        }
    }

    /// Counts a failure and starts the pause. Returns true for the first failure since the handler last worked.
    fn count_failure(&self, runs: bool, error: String) -> bool {
        let (mut trouble, now) = (self.trouble(), Instant::now());
        let (failures, delay) = match &*trouble {
            None => (1, FIRST_DELAY),
            Some(before) => (before.failures + 1, (before.delay * 2).min(LONGEST_DELAY)),
        };
        *trouble = Some(Trouble { delay, not_before: now + delay, failed_at: now, runs, failures, error });
        failures == 1
    }

    /// Starts a new pause, if the brake is engaged.
    fn pause(&self) {
        if let Some(trouble) = &mut *self.trouble() {
            trouble.not_before = Instant::now() + trouble.delay;
        }
    }

    /// Records that a start succeeded.
    fn begun(&self) {
        match self.proof {
            ProvenBy::Start => self.release(),
            ProvenBy::Job => {
                if let Some(trouble) = &mut *self.trouble() {
                    trouble.runs = true;
                }
                self.pause();
            }
        }
    }

    /// Records that a process has done a job. `started` is the time at which the process was started. Releases the brake if no
    /// failure has been counted since then. A process that was started before the last failure does not show that a new process can
    /// be started. Such a process releases the brake only if the pause ended more than `LONGEST_DELAY` ago.
    pub(super) fn proven(&self, started: Instant) {
        let is_proof = |trouble: &Trouble| started > trouble.failed_at || trouble.not_before.elapsed() > LONGEST_DELAY;
        if self.trouble().as_ref().is_some_and(is_proof) {
            self.release();
        }
    }

    /// Forgets the failures and ends the pause, because the handler works again.
    fn release(&self) {
        if self.trouble().take().is_some() {
            self.released.notify_waiters();
            info!(handler = self.name, "handler can be started again");
        }
    }
}

/// Reports whether an error may be temporary. ENOENT and EACCES may be temporary, because the program was usable when the handler
/// was configured.
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
    use std::future::{pending, ready};

    use super::*;

    /// A start that lasts for `takes`. It then fails with `errno` if one is set, and succeeds otherwise. `time` is the job's
    /// timeout.
    #[derive(Debug, Clone, Copy)]
    struct Fake {
        takes: Duration,
        errno: Option<Errno>,
        time: Duration,
    }

    const WORKS: Fake = Fake { takes: Duration::ZERO, errno: None, time: Duration::MAX };

    impl Begin for Fake {
        async fn begun(&self) -> io::Result<()> {
            tokio::time::sleep(self.takes).await;
            self.errno.map_or(Ok(()), |errno| Err(errno.into()))
        }

        async fn overdue(&self) {
            tokio::time::sleep(self.time).await;
        }
    }

    type Result<T> = std::result::Result<T, NotStarted<()>>;

    fn brake() -> Brake {
        Brake::new("handle.sh".to_owned(), ProvenBy::Start)
    }

    /// Returns the result of a `spawn` that fails with `errno` and creates no process.
    fn refused(errno: Errno) -> io::Result<Fake> {
        Err(errno.into())
    }

    /// Returns a process whose program cannot be executed.
    fn fails(errno: Errno) -> Fake {
        Fake { errno: Some(errno), ..WORKS }
    }

    async fn start(brake: &Brake, fault: Option<Errno>, spawn: impl Fn() -> io::Result<Fake>) -> Result<Fake> {
        brake.start(fault.map(Into::into), pending(), spawn).await.map(|(started, _)| started)
    }

    /// Makes a start fail with `errno`, and returns the duration of the start.
    async fn fail(brake: &Brake, errno: Errno) -> Duration {
        let begun = Instant::now();
        assert!(matches!(start(brake, None, || refused(errno)).await, Err(NotStarted::Failed(_))));
        begun.elapsed()
    }

    async fn succeed(brake: &Brake) -> Duration {
        let begun = Instant::now();
        start(brake, None, || Ok(WORKS)).await.unwrap();
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_fault_that_passes_in_time_costs_no_job() {
        for errno in
            [Errno::AGAIN, Errno::NOMEM, Errno::MFILE, Errno::NFILE, Errno::TXTBSY, Errno::NOENT, Errno::ACCESS]
        {
            for fault in [refused(errno), Ok(fails(errno))] {
                let (brake, begun) = (brake(), Instant::now());
                let over = begun + Duration::from_secs(4);
                let fault = || fault.as_ref().copied().map_err(|_| errno.into());
                let spawn = || if Instant::now() < over { fault() } else { Ok(WORKS) };
                start(&brake, Some(errno), spawn).await.unwrap();
                assert!(begun.elapsed() < Duration::from_secs(5), "{errno}: {:?}", begun.elapsed());
                assert_eq!(succeed(&brake).await, Duration::ZERO);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_lasting_fault_fails_the_job_after_five_seconds() {
        let took = fail(&brake(), Errno::NOENT).await.as_secs_f64();
        assert!((5.0..5.7).contains(&took), "{took}");
        assert_eq!(fail(&brake(), Errno::NOEXEC).await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn the_delay_grows_to_thirty_seconds_until_a_start_works() {
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
    async fn simultaneous_jobs_fail_one_after_the_other() {
        let (brake, begun, tries) = (brake(), Instant::now(), Cell::new(0));
        let spawn = || {
            tries.set(tries.get() + 1);
            // The first job tries twice: at once, because no start has failed yet, and again in its turn.
            if tries.get() <= 4 { refused(Errno::NOEXEC) } else { Ok(WORKS) }
        };
        let start = || start(&brake, None, spawn);
        let (a, b, c, d) = tokio::join!(start(), start(), start(), start());
        assert!([a, b, c].iter().all(Result::is_err));
        assert!(d.is_ok());
        assert_eq!(begun.elapsed().as_secs_f64().round(), 7.0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_of_one_job_fails_it_at_once_and_delays_no_other() {
        let brake = brake();
        assert_eq!(fail(&brake, Errno::TOOBIG).await, Duration::ZERO);
        let zero_byte = || Err(io::ErrorKind::InvalidInput.into());
        assert!(matches!(start(&brake, None, zero_byte).await, Err(NotStarted::Failed(_))));
        let fault = start(&brake, Some(Errno::TOOBIG), || Ok(WORKS)).await;
        assert!(matches!(fault, Err(NotStarted::Failed(error)) if error.raw_os_error() == Some(7)));
        assert_eq!(succeed(&brake).await, Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_of_the_machine_slows_down_all_jobs() {
        for error in [Errno::INVAL.into(), Errno::NOSYS.into(), Errno::PERM.into(), io::Error::other("no pidfd")] {
            let (brake, error) = (brake(), Cell::new(Some(error)));
            let spawn = || Err(error.take().unwrap_or(Errno::NOEXEC.into()));
            assert!(matches!(start(&brake, None, spawn).await, Err(NotStarted::Failed(_))));
            assert!(brake.is_engaged());
            assert_eq!(fail(&brake, Errno::NOEXEC).await.as_secs_f64().round(), 1.0);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_is_not_waited_for_unless_the_last_one_has_failed() {
        let (brake, begun) = (brake(), Instant::now());
        let slow = Fake { takes: Duration::from_secs(40), ..WORKS };
        start(&brake, None, || Ok(slow)).await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO);
        start(&brake, Some(Errno::NOENT), || Ok(slow)).await.unwrap();
        assert_eq!(begun.elapsed().as_secs_f64().round(), 40.0);
        fail(&brake, Errno::NOEXEC).await;
        start(&brake, None, || Ok(slow)).await.unwrap();
        assert_eq!(begun.elapsed().as_secs_f64().round(), 81.0);
    }

    #[tokio::test(start_paused = true)]
    async fn hanging_starts_run_one_at_a_time_until_their_timeout() {
        let (brake, begun, made) = (brake(), Instant::now(), Cell::new(0));
        fail(&brake, Errno::NOEXEC).await;
        let hangs = Fake { takes: Duration::MAX, time: Duration::from_secs(10), ..WORKS };
        let hang = || {
            let spawn = || {
                made.set(made.get() + 1);
                Ok(hangs)
            };
            start(&brake, None, spawn)
        };
        let look = async {
            tokio::time::sleep(Duration::from_secs(5)).await;
            assert_eq!(made.get(), 1);
        };
        let (a, b, ()) = tokio::join!(hang(), hang(), look);
        assert!(a.is_ok() && b.is_ok());
        assert_eq!(begun.elapsed().as_secs_f64().round(), 21.0);
        assert!(brake.is_engaged());
    }

    async fn after_a_moment() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_ends_the_wait() {
        for errno in [Errno::NOEXEC, Errno::NOENT] {
            let brake = brake();
            fail(&brake, errno).await;
            let begun = Instant::now();
            let started = brake.start(None, after_a_moment(), || refused(errno)).await;
            assert!(matches!(started, Err(NotStarted::CutShort(()))));
            assert!(begun.elapsed() < Duration::from_secs(1));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_whose_start_hangs_is_kept_when_the_wait_ends() {
        let (brake, begun) = (brake(), Instant::now());
        let hangs = Fake { takes: Duration::MAX, ..WORKS };
        brake.start(Some(Errno::NOENT.into()), after_a_moment(), || Ok(hangs)).await.unwrap();
        assert!(begun.elapsed() < Duration::from_secs(1));
        let tries = Cell::new(0);
        let spawn = || {
            tries.set(tries.get() + 1);
            Ok(WORKS)
        };
        let started = brake.start(Some(Errno::NOENT.into()), ready(()), spawn).await;
        assert!(matches!(started, Err(NotStarted::CutShort(()))) && tries.get() == 0);
    }
}
