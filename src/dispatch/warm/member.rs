//! [`Member`]: one process of a pool, and its keeper, the task that supervises it from start to end.

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

/// Longest interval between two checks of an idle process: its connection, its age and its idle time.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Maximum age at which the CPU time read after one job is reused as the CPU time before the next.
const CPU_AGE: Duration = Duration::from_millis(1);

/// Maximum age of a memory peak that is reused. Reading the peak costs more than running a job.
const PEAK_AGE: Duration = Duration::from_secs(1);

/// The stop requested of a process, in order of severity. A request is never withdrawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Stop {
    NotRequested,
    /// The connection is closed, so that the process exits. SIGTERM follows after `kill_grace`, and SIGKILL after another
    /// `kill_grace`.
    Retire,
    /// SIGTERM at once, and SIGKILL after `kill_grace`.
    Terminate,
    /// SIGKILL at once.
    Kill,
}

/// The state of a process, in the order of [`PROCESS_STATES`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ProcessState {
    Starting,
    Idle,
    Busy,
    Ending,
}

impl ProcessState {
    pub(super) fn name(self) -> &'static str {
        PROCESS_STATES[self as usize]
    }
}

/// The end of a process.
#[derive(Debug)]
pub(super) struct End {
    /// The exit status and the resource usage, or the error if the exec failed or SIGKILL had no effect in time.
    pub(super) status: io::Result<(ExitStatus, ResourceUsage)>,
    pub(super) never_ran: bool,
    /// The result of the termination, if the worker terminated the process.
    pub(super) termination: Option<Termination>,
}

/// One process of a pool.
#[derive(Debug)]
pub(super) struct Member {
    pub(super) number: u64,
    pub(super) pid: u32,
    pub(super) started: Instant,
    /// The number of reloads before the start of the process.
    pub(super) generation: u64,
    /// The limits at which the process is replaced.
    pub(super) max_jobs: Option<u64>,
    pub(super) max_age: Option<Duration>,
    /// The log span of output between jobs.
    span: Span,
    /// The process handle, which the keeper drops when it ends the process.
    resident: Weak<Resident>,
    work: Mutex<Work>,
    stop: watch::Sender<Stop>,
    end: watch::Sender<Option<Arc<End>>>,
}

#[derive(Debug)]
pub(super) struct Work {
    pub(super) state: ProcessState,
    pub(super) job: Option<JobId>,
    /// The log span of output that arrives now: the job's, or between jobs the process's.
    span: Span,
    /// The end of the job's stderr.
    tail: Tail,
    pub(super) jobs: u64,
    cpu: Option<(Instant, Duration)>,
    peak: Option<(Instant, u64)>,
}

impl Member {
    pub(super) fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Requests a stop. A less severe request than an earlier one has no effect.
    pub(super) fn stop(&self, stop: Stop) {
        self.stop.send_if_modified(|present| {
            let before = *present;
            *present = stop.max(before);
            *present != before
        });
        self.work().state = ProcessState::Ending;
    }

    pub(super) fn is_asked_to_end(&self) -> bool {
        *self.stop.borrow() != Stop::NotRequested
    }

    /// Waits until the process and the rest of its group have ended.
    pub(super) async fn ended(&self) -> Arc<End> {
        let mut ends = self.end.subscribe();
        loop {
            if let Some(end) = &*ends.borrow_and_update() {
                return Arc::clone(end);
            }
            if ends.changed().await.is_err() {
                // Unreachable, because `self` holds a sender.
                std::future::pending::<()>().await;
            }
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Records that a job begins. Output is logged in the job's span, which is the current span.
    pub(super) fn begin(&self, job: &JobId) {
        let mut work = self.work();
        (work.state, work.job, work.tail) = (ProcessState::Busy, Some(job.clone()), Tail::default());
        work.span = Span::current();
    }

    /// Records that the job has ended, and returns the end of the job's stderr. First reads the output still in the pipes, which
    /// belongs to the job.
    pub(super) fn finish(&self) -> Tail {
        if let Some(resident) = self.resident.upgrade() {
            resident.read_present_output(|channel, line| self.print(channel, line));
        }
        let mut work = self.work();
        work.jobs += 1;
        (work.state, work.job, work.span) = (ProcessState::Idle, None, self.span.clone());
        std::mem::take(&mut work.tail)
    }

    /// Sends the signal that announces a drain.
    pub(super) fn send_drain_signal(&self, signal: Signal) {
        if let Some(resident) = self.resident.upgrade() {
            resident.tell(signal);
        }
    }

    /// Returns the process's CPU time at the start of a job. Reuses the value read after the previous job if it is recent, which
    /// saves a system call.
    pub(super) fn cpu_time_before_job(&self) -> Option<Duration> {
        let known = self.work().cpu.filter(|(read, _)| read.elapsed() < CPU_AGE);
        known.map(|(_, cpu)| cpu).or_else(|| self.resident.upgrade()?.cpu_time())
    }

    /// Returns the process's CPU time at the end of a job, and keeps it for the start of the next one.
    pub(super) fn cpu_time_after_job(&self) -> Option<Duration> {
        let cpu = self.resident.upgrade()?.cpu_time()?;
        self.work().cpu = Some((Instant::now(), cpu));
        Some(cpu)
    }

    /// Returns the resident memory in bytes.
    pub(super) fn memory(&self) -> Option<u64> {
        self.resident.upgrade()?.resident_memory()
    }

    /// Returns the peak of the resident memory in bytes, at most [`PEAK_AGE`] old.
    pub(super) fn peak_memory(&self) -> Option<u64> {
        let known = self.work().peak.filter(|(read, _)| read.elapsed() < PEAK_AGE);
        let peak = known.map(|(_, peak)| peak).or_else(|| self.resident.upgrade()?.peak_memory())?;
        if known.is_none() {
            self.work().peak = Some((Instant::now(), peak));
        }
        Some(peak)
    }

    /// Returns the last line of stderr since the job began or, before the first job, since the start of the process.
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

/// The number, generation, limits and slot of a new process.
pub(super) struct MemberConfig {
    pub(super) number: u64,
    pub(super) generation: u64,
    pub(super) max_jobs: Option<u64>,
    pub(super) max_age: Option<Duration>,
    /// The process's slot, released when the process has ended.
    pub(super) slot: Arc<Place>,
}

/// Spawns the keeper task of a process, and returns the `Member`.
pub(super) fn spawn_keeper(
    pool: &Arc<Pool>,
    resident: Resident,
    config: MemberConfig,
    lifecycle: &Lifecycle,
) -> Arc<Member> {
    let MemberConfig { number, generation, max_jobs, max_age, slot } = config;
    let resident = Arc::new(resident);
    let pid = resident.id();
    // The span has no parent, because the process outlives the job for which it is started.
    let span = info_span!(parent: None, "handler", handler = pool.name, pid);
    let work = Work {
        state: ProcessState::Starting,
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
        stop: watch::Sender::new(Stop::NotRequested),
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
                termination = self.wait_for_exit(&resident) => termination,
                () = self.check_while_idle() => None,
                () = reading => None,
            }
        };
        let was_starting = std::mem::replace(&mut member.work().state, ProcessState::Ending) == ProcessState::Starting;
        pool.remove_idle(member);
        let end = if termination == Some(Termination::GivenUp) {
            End { status: Err(io::ErrorKind::TimedOut.into()), never_ran: false, termination }
        } else {
            match sole_owner(resident).await.end(print).await {
                Ok(status) => End { status, never_ran: false, termination },
                Err(error) => End { status: Err(error), never_ran: true, termination },
            }
        };
        pool.ended(member, &end, was_starting);
        drop(slot);
        member.end.send_replace(Some(Arc::new(end)));
        // A reply just before the end may have put the process back among the idle ones.
        pool.remove_idle(member);
    }

    /// Waits until the leader of the process group has exited. Returns `None` if the worker did not have to signal it.
    async fn wait_for_exit(&self, resident: &Resident) -> Option<Termination> {
        let mut stops = self.member.stop.subscribe();
        let grace = self.pool.handler.kill_grace;
        let mut grace_timer = None;
        loop {
            let stop = *stops.borrow_and_update();
            match stop {
                Stop::NotRequested => {}
                Stop::Retire => drop(grace_timer.get_or_insert_with(|| Box::pin(sleep(grace)))),
                Stop::Terminate => return self.terminate(resident, grace).await,
                Stop::Kill => return Some(resident.kill(last_wait(&self.lifecycle)).await),
            }
            let grace_over = async {
                match &mut grace_timer {
                    Some(grace_timer) => grace_timer.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = resident.exited() => return None,
                _ = stops.changed() => {}
                () = grace_over => return self.terminate(resident, grace).await,
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

    /// Checks periodically whether the process is idle and has a reason to end.
    async fn check_while_idle(&self) {
        let period = self
            .pool
            .settings
            .idle_timeout
            .map_or(CHECK_INTERVAL, |timeout| (timeout / 4).clamp(Duration::from_millis(10), CHECK_INTERVAL));
        let mut checks = interval(period);
        checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            checks.tick().await;
            self.pool.check_idle(&self.member, &self.lifecycle);
        }
    }
}

/// Waits until `resident` is the only reference. Other references are held only briefly.
async fn sole_owner(mut resident: Arc<Resident>) -> Resident {
    loop {
        match Arc::try_unwrap(resident) {
            Ok(resident) => return resident,
            Err(shared) => resident = shared,
        }
        sleep(Duration::from_millis(1)).await;
    }
}
