//! [`Pool`]: the processes of a warm handler. Each is started once, connects to a socket of its own, and does one job after
//! another.
//!
//! A job that wants to run has one of as many places as there may be processes. Then it takes the process that was used last,
//! or starts one. A process keeps its slot until it is seen dead, so that there are never more than there may be.
//!
//! | a process is | from | until |
//! | --- | --- | --- |
//! | starting | its start | it connects; it is killed if it does not in time |
//! | idle | it connects, or replies | a job takes it, or it is retired |
//! | busy | a job takes it | its reply, or its end: then the job has failed |
//! | ending | it is retired, terminated or killed; or it exits | it is reaped, and the rest of its group has ended |

mod member;
mod wire;

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::net::UnixListener;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::task::TaskTracker;
use tracing::{debug, info, warn};

use super::brake::Begin;
use super::outcome::{self, Cause};
use super::result_file::Verdict;
use super::{Ended, HandlerProcess, ProcessStarts, time_is_up};
use crate::handler::{self, Handler};
use crate::job::{Failure, Job, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use crate::places::{Place, Places};
use crate::process::{Resident, Signal, Tail, Termination, Usage};
use member::{Doing, End, Member, Newborn, Stop, keep};
use wire::{NoReply, Reply, Wire};

/// How long a process may take to exit after it has closed its connection in the middle of a job.
const EXIT_GRACE: Duration = Duration::from_secs(1);

/// How long an idle process is kept in a drain, in which jobs that were taken before are still started.
const IDLE_IN_DRAIN: Duration = Duration::from_secs(1);

/// Why a process ends that has closed its connection, or sends something without a job.
const HANG_UP: &str = "hang-up";

/// Processes and their pools, by number.
type Members = BTreeMap<u64, (Arc<Pool>, Arc<Member>)>;

/// All warm processes of one dispatcher.
#[derive(Debug, Default)]
pub(super) struct Processes {
    members: Mutex<Members>,
    next: AtomicU64,
    /// The keepers. All of them have ended once all processes have.
    tasks: TaskTracker,
    starts: Mutex<BTreeMap<(String, &'static str), u64>>,
}

impl Processes {
    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(&self, pool: &Arc<Pool>, member: &Arc<Member>) {
        self.members().insert(member.number, (Arc::clone(pool), Arc::clone(member)));
    }

    fn count_start(&self, handler: &str, reason: &'static str) {
        let mut starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        *starts.entry((handler.to_owned(), reason)).or_default() += 1;
    }

    /// Ends all processes, and waits until they and their groups are gone. No job runs any more.
    pub(super) async fn finish(&self, lifecycle: &Lifecycle) {
        self.stop_all(Stop::Retire);
        self.tasks.close();
        let mut gone = pin!(self.tasks.wait());
        tokio::select! {
            biased;
            () = &mut gone => return,
            () = lifecycle.reached(Phase::Killing) => self.stop_all(Stop::Terminate),
        }
        gone.await;
    }

    fn stop_all(&self, stop: Stop) {
        let all: Vec<_> = self.members().values().cloned().collect();
        for (pool, member) in all {
            pool.forget_idle(&member);
            member.stop(stop);
        }
    }

    /// Kills all of them, and waits for none.
    pub(super) fn kill(&self) {
        self.stop_all(Stop::Kill);
    }

    /// Describes each process.
    pub(super) fn list(&self) -> Vec<HandlerProcess> {
        let all: Vec<_> = self.members().values().cloned().collect();
        let described = all.iter().map(|(pool, member)| {
            let memory_bytes = member.memory();
            let work = member.work();
            HandlerProcess {
                handler: pool.name.clone(),
                pid: member.pid,
                state: work.doing.name(),
                jobs: work.jobs,
                age_seconds: member.started.elapsed().as_secs_f64(),
                memory_bytes,
                job: work.job.as_ref().map(ToString::to_string),
            }
        });
        described.collect()
    }

    /// How many processes were started, by handler and reason.
    pub(super) fn starts(&self) -> Vec<ProcessStarts> {
        let starts = self.starts.lock().unwrap_or_else(PoisonError::into_inner);
        let count = |((handler, reason), count): (&(String, &'static str), &u64)| ProcessStarts {
            handler: handler.clone(),
            reason,
            count: *count,
        };
        starts.iter().map(count).collect()
    }
}

/// The processes of one handler.
#[derive(Debug)]
pub(super) struct Pool {
    name: String,
    handler: Handler,
    settings: handler::Pool,
    processes: Arc<Processes>,
    /// One for each job that has a process or may start one.
    jobs: Places,
    /// One for each process that is there.
    slots: Places,
    idle: Mutex<Vec<Idle>>,
    /// Notified when a process becomes idle.
    returned: Notify,
    /// Counts the reloads.
    generation: AtomicU64,
    /// Why the processes ended whose places have not been taken by others.
    vacancies: Mutex<VecDeque<&'static str>>,
    has_warned: AtomicBool,
    /// When a job last succeeded.
    last_success: Mutex<Option<Instant>>,
}

#[derive(Debug)]
struct Idle {
    member: Arc<Member>,
    wire: Wire,
    since: Instant,
}

/// A process that has a job.
pub(super) struct Busy {
    pool: Arc<Pool>,
    member: Arc<Member>,
    wire: Option<Wire>,
    _place: Place,
}

impl Pool {
    /// Of a handler, which has up to `concurrency` jobs at once unless it says otherwise. The processes of `before`, which it
    /// replaces, count to those that there may be.
    pub(super) fn new(
        handler: &Handler,
        settings: &handler::Pool,
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
            idle: Mutex::default(),
            returned: Notify::new(),
            generation: AtomicU64::new(0),
            vacancies: Mutex::default(),
            has_warned: AtomicBool::new(false),
            last_success: Mutex::default(),
        })
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn last_success(&self) -> MutexGuard<'_, Option<Instant>> {
        self.last_success.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a process of the handler has done a job since that one was started.
    fn has_worked_since(&self, member: &Member) -> bool {
        self.last_success().is_some_and(|success| success >= member.started)
    }

    /// Waits for a place among the jobs that may have a process.
    pub(super) async fn place(&self) -> Place {
        self.jobs.take().await
    }

    /// Waits for a slot to start a process in.
    pub(super) async fn slot(&self) -> Arc<Place> {
        Arc::new(self.slots.take().await)
    }

    /// Waits for a process that is idle, or for a slot to start one in.
    pub(super) async fn process_or_slot(self: &Arc<Self>, place: Place) -> Result<Busy, (Place, Arc<Place>)> {
        loop {
            let returned = self.returned.notified();
            if let Some(Idle { member, wire, .. }) = self.take_idle() {
                return Ok(Busy { pool: Arc::clone(self), member, wire: Some(wire), _place: place });
            }
            tokio::select! {
                biased;
                slot = self.slot() => return Err((place, slot)),
                () = returned => {}
            }
        }
    }

    /// The process that was used last, so that few are busy where there is little to do.
    fn take_idle(&self) -> Option<Idle> {
        loop {
            let mut idle = self.idle().pop()?;
            if idle.member.has_ended() {
                continue;
            }
            if idle.wire.is_idle() {
                return Some(idle);
            }
            self.no_use(&idle.member);
        }
    }

    /// Kills an idle process that has closed its connection, or sends something without a job. No job is harmed.
    fn no_use(&self, member: &Member) {
        warn!(
            handler = self.name,
            pid = member.pid,
            "idle handler process has closed its connection or sent a line without a job"
        );
        self.retire(member, HANG_UP, Stop::Terminate);
    }

    /// Takes a process from the idle ones, if it is one.
    fn forget_idle(&self, member: &Member) -> Option<Idle> {
        let mut idle = self.idle();
        let at = idle.iter().position(|idle| idle.member.number == member.number)?;
        Some(idle.remove(at))
    }

    /// Asks a process to end, after which its place may be taken by another one, for that reason.
    fn retire(&self, member: &Member, reason: &'static str, stop: Stop) {
        let jobs = member.work().jobs;
        info!(handler = self.name, pid = member.pid, reason, jobs, "handler process is ended");
        self.vacant(reason);
        member.stop(stop);
    }

    fn vacant(&self, reason: &'static str) {
        let mut vacancies = self.vacancies.lock().unwrap_or_else(PoisonError::into_inner);
        vacancies.push_back(reason);
        vacancies.truncate(self.slots.capacity());
    }

    /// Ends each process as soon as it is idle. The processes after it run the handler's new code.
    pub(super) fn renew(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        let idle = std::mem::take(&mut *self.idle());
        idle.iter().for_each(|idle| self.retire(&idle.member, "reload", Stop::Retire));
    }

    /// Looks at a process that may be idle. An idle one that is kept stays where it is among the others.
    fn look_at(&self, member: &Arc<Member>, lifecycle: &Lifecycle) {
        let reason = {
            let mut all = self.idle();
            let Some(at) = all.iter().position(|idle| idle.member.number == member.number) else { return };
            let reason = self.reason_to_end(&mut all[at], lifecycle);
            if reason.is_some() {
                all.remove(at);
                // Before another one is looked at, which counts those that remain.
                member.work().doing = Doing::Ending;
            }
            reason
        };
        match reason {
            None => {}
            Some(HANG_UP) => self.no_use(member),
            Some(reason) => self.retire(member, reason, Stop::Retire),
        }
    }

    /// Why an idle process is to end.
    fn reason_to_end(&self, idle: &mut Idle, lifecycle: &Lifecycle) -> Option<&'static str> {
        let Idle { member, wire, since } = idle;
        let is_superfluous = || self.remaining() > self.settings.min_processes;
        if !wire.is_idle() {
            Some(HANG_UP)
        } else if member.generation != self.generation.load(Ordering::Relaxed) {
            // It became idle while a reload ended the idle ones.
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

    /// The number of processes that have not been asked to end.
    fn remaining(&self) -> usize {
        let members = self.processes.members();
        let is_here = |(pool, member): &&(Arc<Self>, Arc<Member>)| {
            std::ptr::eq(&**pool, self) && member.work().doing != Doing::Ending
        };
        members.values().filter(is_here).count()
    }

    /// Notes that a process has ended. The start of one that has not connected has failed, and that is told elsewhere.
    fn ended(&self, member: &Member, end: &End, was_starting: bool) {
        self.processes.members().remove(&member.number);
        if !was_starting && !member.is_asked_to_end() {
            let status = end.status.as_ref().map_or_else(ToString::to_string, |(status, _)| status.to_string());
            warn!(handler = self.name, pid = member.pid, %status, "handler process has ended by itself");
            self.vacant("exit");
        }
    }

    /// Why a process that has just replied takes no more jobs.
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

    /// Up to a quarter more, by chance, so that not all processes end at once.
    fn newborn(&self, slot: Arc<Place>) -> Newborn {
        let more = |whole: f64| whole * (1.0 + fastrand::f64() / 4.0);
        Newborn {
            number: self.processes.next.fetch_add(1, Ordering::Relaxed),
            generation: self.generation.load(Ordering::Relaxed),
            max_jobs: self.settings.max_jobs.map(|max| more(max.get() as f64) as u64),
            max_age: self.settings.max_age.map(|max| max.mul_f64(1.0 + fastrand::f64() / 4.0)),
            slot,
        }
    }

    /// Starts a process. `spawn` is given the path of the socket that it connects to.
    pub(super) fn start(
        self: &Arc<Self>,
        socket: PathBuf,
        slot: &Arc<Place>,
        lifecycle: &Lifecycle,
        spawn: impl FnOnce(&PathBuf) -> io::Result<Resident>,
    ) -> io::Result<Starting> {
        let listener = UnixListener::bind(&socket).map_err(|error| match error.raw_os_error() {
            Some(_) => error,
            // A path that is too long would be taken for a fault of the job.
            None => io::Error::other(format!("its socket: {error}")),
        })?;
        let socket = Socket(socket);
        let resident = spawn(&socket.0)?;
        let vacancy = self.vacancies.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
        let reason = vacancy.unwrap_or("demand");
        self.processes.count_start(&self.name, reason);
        let member = keep(self, resident, self.newborn(Arc::clone(slot)), lifecycle);
        debug!(handler = self.name, pid = member.pid, reason, "handler process started");
        Ok(Starting { pool: Arc::clone(self), member, listener, _socket: socket, wire: Mutex::new(None) })
    }
}

/// The path of a socket, which is removed with this: a process connects once.
struct Socket(PathBuf);

impl Drop for Socket {
    fn drop(&mut self) {
        // The end of the directory removes what cannot be removed now.
        let _ = std::fs::remove_file(&self.0);
    }
}

/// A process that has been started, and is to connect. Dropped before, it is killed.
pub(super) struct Starting {
    pool: Arc<Pool>,
    member: Arc<Member>,
    listener: UnixListener,
    _socket: Socket,
    wire: Mutex<Option<Wire>>,
}

impl Starting {
    /// The process, which has connected.
    pub(super) fn busy(self, place: Place) -> Option<Busy> {
        let wire = self.wire.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        Some(Busy { pool: Arc::clone(&self.pool), member: Arc::clone(&self.member), wire: Some(wire), _place: place })
    }
}

impl Starting {
    /// Ends the process, which has connected. Returns how long it took from its start until now.
    pub(super) async fn end(self) -> Duration {
        let took = self.member.started.elapsed();
        drop(self.wire.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.member.stop(Stop::Retire);
        self.member.ended().await;
        took
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        // It has been taken if the process has a job.
        if self.wire.get_mut().is_ok_and(|wire| wire.is_some()) || self.member.work().doing == Doing::Starting {
            self.member.stop(Stop::Kill);
        }
    }
}

impl Begin for Starting {
    /// Waits until it connects.
    async fn begun(&self) -> io::Result<()> {
        if self.wire.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return Ok(());
        }
        let limit = self.pool.settings.start_timeout;
        tokio::select! {
            biased;
            connected = self.listener.accept() => {
                *self.wire.lock().unwrap_or_else(PoisonError::into_inner) = Some(Wire::new(connected?.0));
                self.member.work().doing = Doing::Idle;
                Ok(())
            }
            end = self.member.ended() => Err(self.not_connected(&end)),
            () = tokio::time::sleep_until(self.member.started + limit) => {
                self.member.stop(Stop::Kill);
                self.member.ended().await;
                let limit = humantime::format_duration(limit);
                Err(StartError::of(format!("did not connect to ZIZQ_SOCKET within {limit}"), self.member.last_line()))
            }
        }
    }

    async fn overdue(&self) {
        std::future::pending::<()>().await;
    }
}

impl Starting {
    fn not_connected(&self, end: &End) -> io::Error {
        let what = match &end.status {
            // The brake tells by the error whether it may pass.
            Err(error) if end.never_ran => match error.raw_os_error() {
                Some(errno) => return io::Error::from_raw_os_error(errno),
                None => format!("could not be started: {error}"),
            },
            Err(error) => format!("ended before it connected to ZIZQ_SOCKET: {error}"),
            Ok((status, _)) => format!("{} before it connected to ZIZQ_SOCKET", outcome::in_words(*status)),
        };
        StartError::of(what, self.member.last_line())
    }
}

/// Why a process has not connected.
#[derive(Debug)]
pub(super) struct StartError(String);

impl StartError {
    fn of(what: String, last_line: Option<String>) -> io::Error {
        let text = match last_line {
            Some(line) => format!("{what}: {line}"),
            None => what,
        };
        io::Error::other(Self(text))
    }
}

impl fmt::Display for StartError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for StartError {}

/// How an exchange with a process has ended.
enum Came {
    Replied(Reply),
    Broke(NoReply),
    Stopped(Cause),
    Ended,
}

/// Whether a job has shown that the handler works.
pub(super) enum Proof {
    /// The handler works.
    Works,
    /// It has ended without having done any job.
    Crashed(String),
    /// A process that was idle has ended before it has read the job, which has not begun.
    Unread,
    None,
}

impl Busy {
    pub(super) fn pid(&self) -> u32 {
        self.member.pid
    }

    pub(super) fn started(&self) -> Instant {
        self.member.started
    }

    /// Has the process do a job.
    pub(super) async fn run(mut self, job: &Job, lifecycle: &Lifecycle) -> (Ended, Proof) {
        let since = Instant::now();
        let (was_stopping, cpu_before) = (lifecycle.is_awaited(), self.member.cpu_time_before_job());
        self.member.begin(&job.id);
        let Some(mut wire) = self.wire.take() else { return (Outcome::Interrupted.into(), Proof::None) };
        let (came, notified) = self.exchange(&mut wire, job, lifecycle, since, was_stopping).await;
        if let Came::Replied(reply) = came {
            return (self.replied(wire, reply, cpu_before), Proof::Works);
        }
        let is_unread = matches!(came, Came::Broke(NoReply::Unread)) && self.member.work().jobs > 0;
        let ended = self.failed(wire, came, notified, cpu_before, lifecycle).await;
        if is_unread && ended.outcome != Outcome::Interrupted {
            return (ended, Proof::Unread);
        }
        let is_crash = !self.pool.has_worked_since(&self.member) && matches!(ended.outcome, Outcome::Failure(_));
        let proof = match &ended.outcome {
            Outcome::Failure(failure) if is_crash => Proof::Crashed(failure.message.clone()),
            _ => Proof::None,
        };
        (ended, proof)
    }

    async fn exchange(
        &self,
        wire: &mut Wire,
        job: &Job,
        lifecycle: &Lifecycle,
        since: Instant,
        was_stopping: bool,
    ) -> (Came, Option<Signal>) {
        let handler = &self.pool.handler;
        let mut exchange = pin!(wire.exchange(job));
        let mut to_tell = handler.drain_signal.filter(|_| !was_stopping);
        let mut told = None;
        let came = loop {
            let telling = async {
                match to_tell {
                    Some(_) => lifecycle.awaited().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                reply = &mut exchange => break reply.map_or_else(Came::Broke, Came::Replied),
                () = lifecycle.reached(Phase::Killing) => break Came::Stopped(Cause::Killing),
                () = time_is_up(handler, since) => break Came::Stopped(Cause::Timeout),
                _ = self.member.ended() => {
                    // Its reply may have come just before.
                    let reply = exchange.as_mut().now_or_never().and_then(Result::ok);
                    break reply.map_or(Came::Ended, Came::Replied);
                }
                () = telling => {
                    if let Some(signal) = to_tell.take() {
                        self.member.tell(signal);
                        told = Some(signal);
                    }
                }
            }
        };
        (came, told)
    }

    /// Ends a job with a reply, and keeps the process for the next one.
    fn replied(&mut self, wire: Wire, reply: Reply, cpu_before: Option<Duration>) -> Ended {
        let stderr = self.member.finish();
        let used = self.member.cpu_time_after_job().zip(cpu_before).map(|(after, before)| after.saturating_sub(before));
        let usage = used.map(|cpu| Usage { cpu, max_rss: self.member.peak_memory().unwrap_or_default() });
        let outcome = match reply.failure {
            None => {
                *self.pool.last_success() = Some(Instant::now());
                Outcome::Success
            }
            Some(verdict) => Outcome::Failure(self.failure_of(verdict, &stderr)),
        };
        match self.pool.reason_to_recycle(&self.member, reply.is_last) {
            Some(reason) => self.pool.retire(&self.member, reason, Stop::Retire),
            None => {
                self.pool.idle().push(Idle { member: Arc::clone(&self.member), wire, since: Instant::now() });
                // It may have ended since its reply, and then no keeper takes it from there.
                if self.member.has_ended() {
                    self.pool.forget_idle(&self.member);
                }
                self.pool.returned.notify_one();
            }
        }
        Ended { outcome, exit: None, usage }
    }

    fn failure_of(&self, verdict: Verdict, stderr: &Tail) -> Failure {
        let message = format!("{} replied that the job has failed", self.pool.name);
        verdict.apply_to(Failure::new("HandlerError", message).with_backtrace(stderr.text()))
    }

    /// Ends a job without a reply, and the process with it.
    async fn failed(
        &mut self,
        wire: Wire,
        came: Came,
        told: Option<Signal>,
        cpu_before: Option<Duration>,
        lifecycle: &Lifecycle,
    ) -> Ended {
        let (cause, nonsense) = match came {
            Came::Stopped(cause) => {
                self.pool.retire(
                    &self.member,
                    if cause == Cause::Timeout { "timeout" } else { "kill" },
                    Stop::Terminate,
                );
                (Some(cause), None)
            }
            Came::Broke(NoReply::Nonsense(what)) => {
                self.pool.retire(&self.member, "protocol", Stop::Kill);
                (None, Some(what))
            }
            Came::Broke(NoReply::Closed | NoReply::Unread) => {
                let exited = tokio::time::timeout(EXIT_GRACE, self.member.ended());
                let exited = tokio::select! {
                    biased;
                    exited = exited => exited.is_ok(),
                    () = lifecycle.reached(Phase::Killing) => false,
                };
                if !exited {
                    self.pool.retire(&self.member, HANG_UP, Stop::Terminate);
                }
                (None, (!exited).then(|| "it has closed its connection without a reply".to_owned()))
            }
            Came::Ended | Came::Replied(_) => (None, None),
        };
        let end = self.member.ended().await;
        drop(wire);
        let stderr = self.member.finish();
        let (status, used) = end.status.as_ref().ok().copied().unzip();
        let usage = used.map(|used| Usage { cpu: used.cpu.saturating_sub(cpu_before.unwrap_or_default()), ..used });
        let failed = |error_type: &str, what: &str, kill: bool| {
            let message = outcome::message(&self.pool.name, what, &stderr);
            Outcome::Failure(Failure { kill, ..Failure::new(error_type, message).with_backtrace(stderr.text()) })
        };
        let is_given_up = end.termination == Some(Termination::GivenUp);
        let outcome = match (cause, nonsense, status) {
            (Some(Cause::Killing), ..) => Outcome::Interrupted,
            _ if is_given_up => Outcome::Interrupted,
            (_, Some(_), _) if lifecycle.phase() >= Phase::Killing => Outcome::Interrupted,
            (Some(Cause::Timeout), ..) => {
                failed("Timeout", &format!("was stopped {}", outcome::after(&self.pool.handler)), false)
            }
            (None, Some(what), _) => failed("ProtocolError", &format!("broke the protocol: {what}"), false),
            (None, None, Some(status)) => match (status.code(), status.signal()) {
                (Some(0), _) => failed("NoReply", "exited with status 0 without a reply", false),
                (Some(code), _) => {
                    let kill = u8::try_from(code).is_ok_and(|code| self.pool.handler.kill_exit_codes.contains(&code));
                    failed("ExitStatus", &outcome::in_words(status), kill)
                }
                // It did not know the signal that was to tell it of the drain, and died of it.
                (None, signal) if told.is_some() && signal == told.map(Signal::as_raw) => Outcome::Interrupted,
                (None, _) => failed("Signal", &outcome::in_words(status), false),
            },
            (None, None, None) => failed("WaitError", "ended, but its exit status could not be read", false),
        };
        Ended { outcome, exit: status, usage }
    }
}

/// Dropped in the middle of a job, it is killed.
impl Drop for Busy {
    fn drop(&mut self) {
        if self.wire.is_some() || self.member.work().doing == Doing::Busy {
            self.member.stop(Stop::Kill);
        }
    }
}
