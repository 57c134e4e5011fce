//! [`Pool`]: the processes of a warm handler. Each process connects to a socket of its own and runs one job after another.
//!
//! A pool has `max_processes` places for running jobs, and as many slots for processes. A job first waits for a place. Then it
//! takes the most recently used idle process. If no process is idle, the job joins the line for the next idle one. As soon as a
//! slot is free, the job also starts a new process. A process keeps its slot until it has ended, so there are never more
//! processes than slots.
//!
//! | a process is | from | until |
//! | --- | --- | --- |
//! | starting | its start | it connects; it is killed if it does not connect within `start_timeout` |
//! | idle | it connects, or replies | a job takes it, or it is retired |
//! | busy | a job takes it | its reply or its end; without a reply, the job fails, is interrupted, or is tried again |
//! | ending | it is retired, terminated or killed; or it exits | it is reaped, and the rest of its group has ended |

mod busy;
mod line;
mod member;
mod processes;
mod starting;
mod wire;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::brake::Begin;
use crate::handler::{self, Handler};
use crate::lifecycle::{Lifecycle, Phase};
use crate::lock::lock;
use crate::places::{Place, Places};
use crate::process::Resident;
pub(super) use busy::{Busy, HandlerHealth};
use line::Waiting;
pub(super) use line::{Idle, InLine};
use member::{End, Member, ProcessState, StopRequest, spawn_keeper};
pub(super) use processes::Processes;
use starting::Socket;
pub(super) use starting::{StartError, Starting};

/// The idle time after which a process is retired during a drain. Until then, it is kept for jobs that were taken before the
/// drain but have not begun.
const IDLE_IN_DRAIN: Duration = Duration::from_secs(1);

/// The recorded reason for ending a process that closed its connection, or sent data while it had no job.
const HANG_UP: &str = "hang-up";

/// The processes of one warm handler, and the jobs that wait for them.
#[derive(Debug)]
pub(super) struct Pool {
    name: String,
    handler: Handler,
    settings: handler::PoolSettings,
    processes: Arc<Processes>,
    /// The places for jobs. A job holds its place while it waits for a process and while it runs.
    jobs: Places,
    /// The slots for processes, each held until its process has ended.
    slots: Places,
    waiting: Mutex<Waiting>,
    /// The number of reloads so far. A process with a lower `Member::generation` is outdated.
    generation: AtomicU64,
    /// The reasons why processes ended: one reason for each ended process that has not been replaced yet. The oldest reason is
    /// recorded as the reason for the next start.
    vacancies: Mutex<VecDeque<&'static str>>,
    has_warned: AtomicBool,
    /// Whether the last start failed while the pool had other usable processes.
    is_short_of_processes: AtomicBool,
    /// The time of the last successful job.
    last_success: Mutex<Option<Instant>>,
}

impl Pool {
    /// Returns the pool for a handler. If `max_processes` is not set, the limit is `concurrency`. `before` is the pool that the new
    /// pool replaces, if any. The new pool takes over the slots of `before`, so that the remaining processes of `before` count
    /// towards the limit.
    pub(super) fn new(
        handler: &Handler,
        settings: &handler::PoolSettings,
        concurrency: usize,
        processes: &Arc<Processes>,
        before: Option<&Self>,
    ) -> Arc<Self> {
        let max = settings.max_processes.map_or(concurrency, std::num::NonZeroUsize::get);
        let slots = before.map_or_else(|| Places::new(max), |before| before.slots.clone());
        slots.resize(max);
        Arc::new(Self {
            name: handler.program.file_name(),
            handler: handler.clone(),
            settings: settings.clone(),
            processes: Arc::clone(processes),
            jobs: Places::new(max),
            slots,
            waiting: Mutex::default(),
            generation: AtomicU64::new(0),
            vacancies: Mutex::default(),
            has_warned: AtomicBool::new(false),
            is_short_of_processes: AtomicBool::new(false),
            last_success: Mutex::default(),
        })
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        lock(&self.waiting)
    }

    fn last_success(&self) -> MutexGuard<'_, Option<Instant>> {
        lock(&self.last_success)
    }

    /// Reports whether a job of the handler has succeeded since `member` was started.
    fn has_worked_since(&self, member: &Member) -> bool {
        self.last_success().is_some_and(|success| success >= member.started)
    }

    /// Waits for a free place for a job.
    pub(super) async fn place(&self) -> Place {
        self.jobs.take().await
    }

    /// Waits for a free slot for a new process.
    pub(super) async fn slot(&self) -> Arc<Place> {
        Arc::new(self.slots.take().await)
    }

    /// Takes the most recently used idle process, so that the other processes reach their idle timeout under a light load. If no
    /// process is idle, joins the line for the next idle one.
    pub(super) fn take_idle(self: &Arc<Self>) -> Result<Idle, InLine> {
        loop {
            let idle = self.waiting().take(self)?;
            if let Some(idle) = self.usable(idle) {
                return Ok(idle);
            }
        }
    }

    /// Returns the process if it can take a job, and ends it otherwise.
    fn usable(&self, mut idle: Idle) -> Option<Idle> {
        if idle.member.has_ended() {
            return None;
        }
        if !idle.wire.is_idle() {
            self.retire_hung_up(&idle.member);
            return None;
        }
        Some(idle)
    }

    /// Gives an idle process to the job that holds `place`.
    pub(super) fn busy(self: &Arc<Self>, idle: Idle, place: Place) -> Busy {
        let Idle { member, wire, .. } = idle;
        Busy { pool: Arc::clone(self), member, wire: Some(wire), _place: place }
    }

    /// Waits in the background for a starting process that its job no longer needs. Once connected, the process can take any job.
    /// If the process does not connect, calls `failed` with the error. Does not call `failed` while the worker is stopping, because
    /// the stop may have ended the process.
    pub(super) fn adopt(
        self: &Arc<Self>,
        starting: Starting,
        lifecycle: &Lifecycle,
        failed: impl FnOnce(&io::Error) + Send + 'static,
    ) {
        let (pool, lifecycle) = (Arc::clone(self), lifecycle.clone());
        self.processes.tasks.spawn(async move {
            match starting.begun().await {
                Ok(()) => {
                    if let Some(idle) = starting.connected() {
                        pool.waiting().give(idle);
                    }
                }
                Err(error) if lifecycle.phase() < Phase::Draining => failed(&error),
                Err(_) => {}
            }
        });
    }

    /// Reports whether any process is idle or busy, is not outdated, and can take another job after its current or next one.
    pub(super) fn is_any_at_work(&self) -> bool {
        let generation = self.generation.load(Ordering::Relaxed);
        self.members().iter().any(|member| {
            let work = member.work();
            let has_jobs_left = member.max_jobs.is_none_or(|max| work.jobs + 1 < max);
            let works = matches!(work.state, ProcessState::Idle | ProcessState::Busy);
            works && has_jobs_left && member.generation == generation
        })
    }

    /// Ends an idle process that closed its connection, or sent data while it had no job. No job is affected.
    fn retire_hung_up(&self, member: &Member) {
        warn!(
            handler = self.name,
            pid = member.pid,
            "idle handler process has closed its connection or sent a line without a job"
        );
        self.retire(member, HANG_UP, StopRequest::Terminate);
    }

    /// Removes a process from the idle processes, if it is one of them.
    fn remove_idle(&self, member: &Member) {
        self.waiting().idle.retain(|idle| idle.member.number != member.number);
    }

    /// Ends a process. Logs the reason, and records it as the reason for the start of a replacement.
    fn retire(&self, member: &Member, reason: &'static str, stop: StopRequest) {
        let jobs = member.work().jobs;
        info!(handler = self.name, pid = member.pid, reason, jobs, "handler process is ended");
        self.record_vacancy(reason);
        member.stop(stop);
    }

    /// Records the reason why a process ended. A later start is recorded with this reason.
    fn record_vacancy(&self, reason: &'static str) {
        let mut vacancies = lock(&self.vacancies);
        vacancies.push_back(reason);
        vacancies.truncate(self.slots.capacity());
    }

    /// Ends the idle processes at once, and the others as soon as they are idle. Their replacements run the handler's new code.
    pub(super) fn renew(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        let idle = std::mem::take(&mut self.waiting().idle);
        idle.iter().for_each(|idle| self.retire(&idle.member, "reload", StopRequest::Retire));
    }

    /// Ends a process if it is idle and there is a reason to end it. The other idle processes keep their order.
    fn check_idle(&self, member: &Arc<Member>, lifecycle: &Lifecycle) {
        let reason = {
            let all = &mut self.waiting().idle;
            let Some(at) = all.iter().position(|idle| idle.member.number == member.number) else { return };
            let reason = self.reason_to_end(&mut all[at], lifecycle);
            if reason.is_some() {
                all.remove(at);
                // Set the state under the lock, because the next call counts the processes that are not ending.
                member.work().state = ProcessState::Ending;
            }
            reason
        };
        match reason {
            None => {}
            Some(HANG_UP) => self.retire_hung_up(member),
            Some(reason) => self.retire(member, reason, StopRequest::Retire),
        }
    }

    /// Returns the reason to end an idle process, if there is one.
    fn reason_to_end(&self, idle: &mut Idle, lifecycle: &Lifecycle) -> Option<&'static str> {
        let Idle { member, wire, since } = idle;
        let is_superfluous = || self.remaining() > self.settings.min_processes;
        if !wire.is_idle() {
            Some(HANG_UP)
        } else if member.generation != self.generation.load(Ordering::Relaxed) {
            // The process became idle after the reload had ended the idle processes.
            Some("reload")
        } else if lifecycle.phase() >= Phase::Draining && since.elapsed() >= IDLE_IN_DRAIN {
            Some("drain")
        } else if self.settings.idle_timeout.is_some_and(|timeout| since.elapsed() >= timeout) && is_superfluous() {
            Some("idle_timeout")
        } else if member.max_age.is_some_and(|max| member.started.elapsed() >= max) {
            Some("max_age")
        } else {
            None
        }
    }

    /// Returns the ids of the pool's processes.
    pub(super) fn pids(&self) -> Vec<u32> {
        self.members().iter().map(|member| member.pid).collect()
    }

    /// Counts the pool's processes that are not ending.
    fn remaining(&self) -> usize {
        self.members().iter().filter(|member| member.work().state != ProcessState::Ending).count()
    }

    fn members(&self) -> Vec<Arc<Member>> {
        let members = self.processes.members();
        let own = members.values().filter(|(pool, _)| std::ptr::eq(&**pool, self));
        own.map(|(_, member)| Arc::clone(member)).collect()
    }

    /// Removes a process that has ended. If it had connected and has ended by itself, logs a warning and records the vacancy. A
    /// process that had not connected is not logged here, because the failed start is reported by `Starting`.
    fn ended(&self, member: &Member, end: &End, was_starting: bool) {
        self.processes.members().remove(&member.number);
        if !was_starting && !member.is_asked_to_end() {
            let status = end.status.as_ref().map_or_else(ToString::to_string, |(status, _)| status.to_string());
            warn!(handler = self.name, pid = member.pid, %status, "handler process has ended by itself");
            self.record_vacancy("exit");
        }
    }

    /// Returns the reason to replace a process after its reply, if there is one.
    fn reason_to_recycle(&self, member: &Member, is_last: bool) -> Option<&'static str> {
        let jobs = member.work().jobs;
        let reason = if is_last {
            "last"
        } else if member.generation != self.generation.load(Ordering::Relaxed) {
            "reload"
        } else if member.max_jobs.is_some_and(|max| jobs >= max) {
            "max_jobs"
        } else if member.max_age.is_some_and(|max| member.started.elapsed() >= max) {
            "max_age"
        } else if self.settings.max_memory.is_some_and(|max| member.memory().is_some_and(|memory| memory > max)) {
            "max_memory"
        } else {
            return None;
        };
        let is_limit = ["max_age", "max_memory"].contains(&reason)
            || (reason == "max_jobs" && self.settings.max_jobs.is_some_and(|max| max.get() > 1));
        if jobs == 1 && is_limit && !self.has_warned.swap(true, Ordering::Relaxed) {
            warn!(
                handler = self.name,
                reason, "handler process has reached a limit with its first job: each job has a process of its own"
            );
        }
        Some(reason)
    }

    /// Starts a process. `spawn` receives the path of the socket to which the process must connect.
    pub(super) fn start(
        self: &Arc<Self>,
        socket: PathBuf,
        slot: &Arc<Place>,
        lifecycle: &Lifecycle,
        spawn: impl FnOnce(&PathBuf) -> io::Result<Resident>,
    ) -> io::Result<Starting> {
        let started = self.try_start(socket, slot, lifecycle, spawn);
        match &started {
            Ok(_) => self.is_short_of_processes.store(false, Ordering::Relaxed),
            Err(error) if self.is_any_at_work() && !self.is_short_of_processes.swap(true, Ordering::Relaxed) => {
                warn!(
                    handler = self.name,
                    error = error.to_string(),
                    "another handler process cannot be started, jobs wait for the present ones"
                );
            }
            Err(_) => {}
        }
        started
    }

    fn try_start(
        self: &Arc<Self>,
        socket: PathBuf,
        slot: &Arc<Place>,
        lifecycle: &Lifecycle,
        spawn: impl FnOnce(&PathBuf) -> io::Result<Resident>,
    ) -> io::Result<Starting> {
        let listener = UnixListener::bind(&socket).map_err(|error| match error.raw_os_error() {
            Some(_) => error,
            // An error without an errno does not mention the socket, for example if the path is too long.
            None => io::Error::other(format!("its socket: {error}")),
        })?;
        let socket = Socket(socket);
        let resident = spawn(&socket.0)?;
        let vacancy = lock(&self.vacancies).pop_front();
        let reason = vacancy.unwrap_or("demand");
        self.processes.count_start(&self.name, reason);
        let member = spawn_keeper(self, resident, Arc::clone(slot), lifecycle);
        debug!(handler = self.name, pid = member.pid, reason, "handler process started");
        Ok(Starting { pool: Arc::clone(self), member, listener, _socket: socket, wire: OnceLock::new() })
    }
}
