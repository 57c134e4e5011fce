//! [`Member`]: one process of a pool, and the task that keeps it from its start to its end.

use std::io;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tracing::{Span, info_span};

use super::Pool;
use crate::dispatch::{PROCESS_STATES, last_wait, log_line};
use crate::job::JobId;
use crate::lifecycle::{Lifecycle, Phase};
use crate::places::Place;
use crate::process::{Channel, Resident, ResourceUsage, Signal, Tail, Termination};
use crate::watch;

/// How often an idle process is looked at, at most: whether it is still connected, too old, or idle for too long.
const LOOK: Duration = Duration::from_secs(1);

/// How soon after a job the CPU time that was read at its end is taken for that at the begin of the next one.
const CPU_AGE: Duration = Duration::from_millis(1);

/// How old the peak of a process's memory may be in the log: to read it costs more than to run a job.
const PEAK_AGE: Duration = Duration::from_secs(1);

/// The end that a process is asked for. Later values are greater, and no request is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stop {
    Keep,
    /// To end by itself, which its connection tells it; by SIGTERM after the grace, and by SIGKILL after it once more.
    Retire,
    /// To end by SIGTERM, and by SIGKILL after the grace.
    Terminate,
    /// To end by SIGKILL.
    Kill,
}

/// The state of a process, in the order of [`PROCESS_STATES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Doing {
    Starting,
    Idle,
    Busy,
    Ending,
}

impl Doing {
    pub(super) fn name(self) -> &'static str {
        PROCESS_STATES[self as usize]
    }
}

/// How a process ended.
#[derive(Debug)]
pub(super) struct End {
    /// Its status and what it used, if they could be had; or why it never became its program.
    pub(super) status: io::Result<(ExitStatus, ResourceUsage)>,
    pub(super) never_ran: bool,
    /// How it took its termination, if it was terminated.
    pub(super) termination: Option<Termination>,
}

/// One process of a pool.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) number: u64,
    pub(super) pid: u32,
    pub(super) started: Instant,
    /// The reload before which it was started.
    pub(super) generation: u64,
    /// After how many jobs, and at what age, another one takes its place.
    pub(super) max_jobs: Option<u64>,
    pub(super) max_age: Option<Duration>,
    /// Where its output is logged between jobs.
    span: Span,
    /// Alive until the keeper ends the process.
    resident: Weak<Resident>,
    work: Mutex<Work>,
    stop: watch::Sender<Stop>,
    end: watch::Sender<Option<Arc<End>>>,
}

#[derive(Debug)]
pub(super) struct Work {
    pub(super) doing: Doing,
    pub(super) job: Option<JobId>,
    /// Where its output is logged.
    span: Span,
    /// The stderr of its job.
    tail: Tail,
    pub(super) jobs: u64,
    cpu: Option<(Instant, Duration)>,
    peak: Option<(Instant, u64)>,
}

impl Member {
    pub(super) fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks it to end, or to end sooner than it was asked before.
    pub(super) fn stop(&self, stop: Stop) {
        self.stop.send_if_modified(|present| {
            let before = *present;
            *present = stop.max(before);
            *present != before
        });
        self.work().doing = Doing::Ending;
    }

    pub(super) fn is_asked_to_end(&self) -> bool {
        *self.stop.borrow() != Stop::Keep
    }

    /// Waits until it has ended, and what is left of its group with it.
    pub(super) async fn ended(&self) -> Arc<End> {
        let mut ends = self.end.subscribe();
        loop {
            if let Some(end) = &*ends.borrow_and_update() {
                return Arc::clone(end);
            }
            if ends.changed().await.is_err() {
                // `self` is a sender.
                std::future::pending::<()>().await;
            }
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Notes that it begins a job, whose span its output is logged under.
    pub(super) fn begin(&self, job: &JobId) {
        let mut work = self.work();
        (work.doing, work.job, work.tail) = (Doing::Busy, Some(job.clone()), Tail::default());
        work.span = Span::current();
    }

    /// Notes that its job has ended, and returns what the job has printed to stderr. What is in the pipes belongs to the job.
    pub(super) fn finish(&self) -> Tail {
        if let Some(resident) = self.resident.upgrade() {
            resident.read_present_output(|channel, line| self.print(channel, line));
        }
        let mut work = self.work();
        work.jobs += 1;
        (work.doing, work.job, work.span) = (Doing::Idle, None, self.span.clone());
        std::mem::take(&mut work.tail)
    }

    /// Sends it a signal that only tells it something.
    pub(super) fn tell(&self, signal: Signal) {
        if let Some(resident) = self.resident.upgrade() {
            resident.tell(signal);
        }
    }

    /// The CPU time that it has used before its next job, in nearly all cases without a system call if one job follows another.
    pub(super) fn cpu_time_before_job(&self) -> Option<Duration> {
        let known = self.work().cpu.filter(|(read, _)| read.elapsed() < CPU_AGE);
        known.map(|(_, cpu)| cpu).or_else(|| self.resident.upgrade()?.cpu_time())
    }

    /// The CPU time that it has used after a job.
    pub(super) fn cpu_time_after_job(&self) -> Option<Duration> {
        let cpu = self.resident.upgrade()?.cpu_time()?;
        self.work().cpu = Some((Instant::now(), cpu));
        Some(cpu)
    }

    /// The memory that it has resident, in bytes.
    pub(super) fn memory(&self) -> Option<u64> {
        self.resident.upgrade()?.resident_memory()
    }

    /// The most memory that it had resident, as it was a moment ago, in bytes.
    pub(super) fn peak_memory(&self) -> Option<u64> {
        let known = self.work().peak.filter(|(read, _)| read.elapsed() < PEAK_AGE);
        let peak = known.map(|(_, peak)| peak).or_else(|| self.resident.upgrade()?.peak_memory())?;
        if known.is_none() {
            self.work().peak = Some((Instant::now(), peak));
        }
        Some(peak)
    }

    /// The end of what it has printed to stderr since its job began, or since its start.
    pub(super) fn last_line(&self) -> Option<String> {
        self.work().tail.last_line()
    }

    fn print(&self, channel: Channel, line: &str) {
        let span = {
            let mut work = self.work();
            if channel == Channel::Stderr {
                work.tail.push_line(line);
            }
            work.span.clone()
        };
        span.in_scope(|| log_line(channel, line));
    }
}

/// The number, the limits and the slot of a new process.
pub(super) struct Newborn {
    pub(super) number: u64,
    pub(super) generation: u64,
    pub(super) max_jobs: Option<u64>,
    pub(super) max_age: Option<Duration>,
    /// Given back when the process has ended.
    pub(super) slot: Arc<Place>,
}

/// Keeps a process from now on, in a task of its own.
pub(super) fn keep(pool: &Arc<Pool>, resident: Resident, newborn: Newborn, lifecycle: &Lifecycle) -> Arc<Member> {
    let Newborn { number, generation, max_jobs, max_age, slot } = newborn;
    let resident = Arc::new(resident);
    let pid = resident.id();
    // Not below the span of the job that the process is started for: others follow.
    let span = info_span!(parent: None, "handler", pid);
    let work = Work {
        doing: Doing::Starting,
        job: None,
        span: span.clone(),
        tail: Tail::default(),
        jobs: 0,
        cpu: None,
        peak: None,
    };
    let member = Arc::new(Member {
        number,
        pid,
        started: Instant::now(),
        generation,
        max_jobs,
        max_age,
        span,
        resident: Arc::downgrade(&resident),
        work: Mutex::new(work),
        stop: watch::Sender::new(Stop::Keep),
        end: watch::Sender::new(None),
    });
    let keeper = Keeper { pool: Arc::clone(pool), member: Arc::clone(&member), lifecycle: lifecycle.clone() };
    pool.processes.join(pool, &member);
    pool.processes.tasks.spawn(keeper.run(resident, slot));
    member
}

struct Keeper {
    pool: Arc<Pool>,
    member: Arc<Member>,
    lifecycle: Lifecycle,
}

impl Keeper {
    async fn run(self, resident: Arc<Resident>, slot: Arc<Place>) {
        let Self { pool, member, .. } = &self;
        let print = |channel: Channel, line: &str| member.print(channel, line);
        let termination = {
            let reading = async {
                resident.read_output(print).await;
                std::future::pending::<()>().await;
            };
            tokio::select! {
                biased;
                termination = self.until_ended(&resident) => termination,
                () = self.look_after() => None,
                () = reading => None,
            }
        };
        let was_starting = std::mem::replace(&mut member.work().doing, Doing::Ending) == Doing::Starting;
        pool.forget_idle(member);
        let end = if termination == Some(Termination::GivenUp) {
            End { status: Err(io::ErrorKind::TimedOut.into()), never_ran: false, termination }
        } else {
            match alone(resident).await.end(print).await {
                Ok(status) => End { status, never_ran: false, termination },
                Err(error) => End { status: Err(error), never_ran: true, termination },
            }
        };
        pool.ended(member, &end, was_starting);
        drop(slot);
        member.end.send_replace(Some(Arc::new(end)));
        // Its last reply may have been taken in meanwhile.
        pool.forget_idle(member);
    }

    /// Waits until the leader has exited, by itself (`None`) or because it was asked to.
    async fn until_ended(&self, resident: &Resident) -> Option<Termination> {
        let mut stops = self.member.stop.subscribe();
        let grace = self.pool.handler.kill_grace;
        let mut patience = None;
        loop {
            let stop = *stops.borrow_and_update();
            match stop {
                Stop::Keep => {}
                Stop::Retire => drop(patience.get_or_insert_with(|| Box::pin(sleep(grace)))),
                Stop::Terminate => return self.terminate(resident, grace).await,
                Stop::Kill => return Some(resident.kill(last_wait(&self.lifecycle)).await),
            }
            let impatient = async {
                match &mut patience {
                    Some(patience) => patience.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = resident.exited() => return None,
                _ = stops.changed() => {}
                () = impatient => return self.terminate(resident, grace).await,
            }
        }
    }

    async fn terminate(&self, resident: &Resident, grace: Duration) -> Option<Termination> {
        let mut stops = self.member.stop.subscribe();
        let skip_grace = async {
            tokio::select! {
                biased;
                () = self.lifecycle.reached(Phase::Forcing) => {}
                _ = stops.wait_for(|stop| *stop == Stop::Kill) => {}
            }
        };
        Some(resident.terminate(grace, skip_grace, last_wait(&self.lifecycle)).await)
    }

    /// Looks after it while it is idle. Never ends.
    async fn look_after(&self) {
        let period = self
            .pool
            .settings
            .idle_timeout
            .map_or(LOOK, |timeout| (timeout / 4).clamp(Duration::from_millis(10), LOOK));
        let mut looks = interval(period);
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            looks.tick().await;
            self.pool.look_at(&self.member, &self.lifecycle);
        }
    }
}

/// Others look at it for moments only.
async fn alone(mut resident: Arc<Resident>) -> Resident {
    loop {
        match Arc::try_unwrap(resident) {
            Ok(resident) => return resident,
            Err(shared) => resident = shared,
        }
        sleep(Duration::from_millis(1)).await;
    }
}
