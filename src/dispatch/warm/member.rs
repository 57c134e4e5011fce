//! [`Member`]: one process of a pool, and its keeper, the task that supervises the process from its start to its end.

use std::io;
use std::process::ExitStatus;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tracing::{Span, error_span};

use super::Pool;
use crate::config::SPAN_TARGET;
use crate::dispatch::PROCESS_STATES;
use crate::dispatch::deadline::last_wait;
use crate::dispatch::output_log::log_line;
use crate::job::JobId;
use crate::lifecycle::{Lifecycle, Phase};
use crate::lock::lock;
use crate::places::Place;
use crate::process::{Channel, Resident, ResourceUsage, Signal, Tail, Termination};
use crate::watch;

/// The longest interval between two checks of an idle process's connection, age and idle time.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The maximum age of a CPU time that is reused. The CPU time read after one job can serve as the CPU time before the next job.
const CPU_AGE: Duration = Duration::from_millis(1);

/// The maximum age at which a memory peak is reused. Reading the peak takes longer than a short job.
const PEAK_AGE: Duration = Duration::from_secs(1);

/// A requested stop of a process. The variants are in order of severity, and a request never becomes less severe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum StopRequest {
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

/// The end of a process, as its keeper has observed it.
#[derive(Debug)]
pub(super) struct End {
    /// The exit status and the resource usage, or an error if the exec failed or the process outlived SIGKILL.
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
    /// The number of jobs after which the process is replaced.
    pub(super) max_jobs: Option<u64>,
    /// The age at which the process is replaced.
    pub(super) max_age: Option<Duration>,
    /// The log span for output that arrives between jobs.
    span: Span,
    /// The handle of the process. The keeper drops the handle when it ends the process.
    resident: Weak<Resident>,
    work: Mutex<Work>,
    stop: watch::Sender<StopRequest>,
    end: watch::Sender<Option<Arc<End>>>,
}

#[derive(Debug)]
pub(super) struct Work {
    pub(super) state: ProcessState,
    pub(super) job: Option<JobId>,
    /// The log span for output that arrives now: the job's span during a job, and otherwise the process's own.
    span: Span,
    /// The last part of the job's stderr.
    tail: Tail,
    pub(super) jobs: u64,
    cpu: Option<(Instant, Duration)>,
    peak: Option<(Instant, u64)>,
}

impl Member {
    pub(super) fn work(&self) -> MutexGuard<'_, Work> {
        lock(&self.work)
    }

    /// Requests a stop, and marks the process as ending. A request that is less severe than an earlier one does not replace it.
    pub(super) fn stop(&self, stop: StopRequest) {
        self.stop.send_if_modified(|present| {
            let before = *present;
            *present = stop.max(before);
            *present != before
        });
        self.work().state = ProcessState::Ending;
    }

    pub(super) fn is_asked_to_end(&self) -> bool {
        *self.stop.borrow() != StopRequest::NotRequested
    }

    /// Waits until the process and the rest of its group have ended, or the worker has given up on the process.
    pub(super) async fn ended(&self) -> Arc<End> {
        let mut ends = self.end.subscribe();
        loop {
            if let Some(end) = &*ends.borrow_and_update() {
                return Arc::clone(end);
            }
            // `changed` fails only once the sender is dropped, and `self` holds the sender.
            let _ = ends.changed().await;
        }
    }

    pub(super) fn has_ended(&self) -> bool {
        self.end.borrow().is_some()
    }

    /// Records that a job begins. From now on, output is logged in the current span, which is the job's.
    pub(super) fn begin(&self, job: &JobId) {
        let mut work = self.work();
        (work.state, work.job, work.tail) = (ProcessState::Busy, Some(job.clone()), Tail::default());
        work.span = Span::current();
    }

    /// Records that the job has ended, and returns the last part of the job's stderr. First reads the output that is still in the
    /// pipes, because it belongs to the job.
    pub(super) fn finish(&self) -> Tail {
        if let Some(resident) = self.resident.upgrade() {
            resident.read_present_output(|channel, line| self.print(channel, line));
        }
        let mut work = self.work();
        work.jobs += 1;
        (work.state, work.job, work.span) = (ProcessState::Idle, None, self.span.clone());
        std::mem::take(&mut work.tail)
    }

    /// Sends the process the signal that announces a drain.
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

    /// Returns the resident memory of the process in bytes.
    pub(super) fn memory(&self) -> Option<u64> {
        self.resident.upgrade()?.resident_memory()
    }

    /// Returns the peak of the process's resident memory in bytes. The value may be up to [`PEAK_AGE`] old.
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

/// Spawns the keeper task of a process, and returns the `Member`. The keeper releases the slot when the process has ended.
pub(super) fn spawn_keeper(
    pool: &Arc<Pool>,
    resident: Resident,
    slot: Arc<Place>,
    lifecycle: &Lifecycle,
) -> Arc<Member> {
    let resident = Arc::new(resident);
    let pid = resident.id();
    // The span has no parent, because the process outlives the job for which it is started.
    let span = error_span!(target: SPAN_TARGET, parent: None, "handler", handler = pool.name, pid);
    let work = Work {
        state: ProcessState::Starting,
        job: None,
        span: span.clone(),
        tail: Tail::default(),
        jobs: 0,
        cpu: None,
        peak: None,
    };
    // Use a random factor, so that the processes do not all end at once.
    let spread = || 1.0 + fastrand::f64() / 4.0;
    let member = Arc::new(Member {
        number: pool.processes.next.fetch_add(1, Ordering::Relaxed),
        pid,
        started: Instant::now(),
        generation: pool.generation.load(Ordering::Relaxed),
        max_jobs: pool.settings.max_jobs.map(|max| (max.get() as f64 * spread()) as u64),
        max_age: pool.settings.max_age.map(|max| max.mul_f64(spread())),
        span,
        resident: Arc::downgrade(&resident),
        work: Mutex::new(work),
        stop: watch::Sender::new(StopRequest::NotRequested),
        end: watch::Sender::new(None),
    });
    let keeper = Keeper { pool: Arc::clone(pool), member: Arc::clone(&member), lifecycle: lifecycle.clone() };
    pool.processes.members().insert(member.number, (Arc::clone(pool), Arc::clone(&member)));
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
        // A reply just before the end may have put the process back among the idle processes.
        pool.remove_idle(member);
    }

    /// Carries out stop requests, and waits until the leader of the process group has exited. Returns `None` if the leader exited
    /// without a signal from the worker.
    async fn wait_for_exit(&self, resident: &Resident) -> Option<Termination> {
        let mut stops = self.member.stop.subscribe();
        let grace = self.pool.handler.kill_grace;
        if *stops.borrow_and_update() == StopRequest::NotRequested {
            tokio::select! {
                biased;
                () = resident.exited() => return None,
                _ = stops.changed() => {}
            }
        }
        if *stops.borrow_and_update() == StopRequest::Retire {
            tokio::select! {
                biased;
                () = resident.exited() => return None,
                _ = stops.changed() => {}
                () = sleep(grace) => {}
            }
        }
        if *stops.borrow_and_update() == StopRequest::Kill {
            return Some(resident.kill(last_wait(&self.lifecycle)).await);
        }
        Some(self.terminate(resident, grace).await)
    }

    async fn terminate(&self, resident: &Resident, grace: Duration) -> Termination {
        let mut stops = self.member.stop.subscribe();
        let skip_grace = async {
            tokio::select! {
                biased;
                () = self.lifecycle.reached(Phase::Forcing) => {}
                _ = stops.wait_for(|stop| *stop == StopRequest::Kill) => {}
            }
        };
        resident.terminate(grace, skip_grace, last_wait(&self.lifecycle)).await
    }

    /// Checks the process periodically, and ends it if it is idle and there is a reason. Never returns.
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
