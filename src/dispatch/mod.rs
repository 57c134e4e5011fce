//! [`Dispatcher`], the trait that runs jobs, and [`ExecDispatcher`], which runs them in handler processes.

mod brake;
mod file_threads;
mod outcome;
mod pids;
mod result_file;
mod routes;
mod variables;
mod warm;

use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{Level, enabled, error, info, warn};

use crate::config::OUTPUT_TARGET;
use crate::handler::{Handler, Handlers, Stdin};
use crate::job::{Failure, Job, JobId, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use crate::process::{
    Channel, Children, Input, OpenFiles, Printer, Process, ReadDelay, Resident, ResourceUsage, Start, Starter, Stops,
    Termination, TooFewDescriptors, Trial, keep_exit_statuses,
};
use brake::{Begin, NotStarted};
use outcome::Cause;
use pids::{Listed, Pids};
use result_file::{ResultDir, ResultFile};
use routes::{Route, Routes};
pub(crate) use variables::is_about_a_job;
use warm::{Busy, Idle, Pool, StartError};

/// The longest wait for a process that survives SIGKILL while the worker is being killed. Afterwards the worker ends, and the
/// server redelivers the job even if the process still runs.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// The usual error types of a handler that starts a process for each job.
const SPAWNED_FAILURES: [&str; 4] = ["ExitStatus", "Signal", "Timeout", "SpawnError"];

/// The usual error types of a warm handler, whose processes run one job after another.
const WARM_FAILURES: [&str; 8] =
    ["ExitStatus", "Signal", "Timeout", "SpawnError", "StartError", "HandlerError", "NoReply", "ProtocolError"];

/// The end of a job: its outcome, and the time and resources used.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// The outcome to report.
    pub outcome: Outcome,
    /// The exit status of the job's process, if the process ended with the job.
    pub exit: Option<ExitStatus>,
    /// The resources that the process used for the job, if known.
    pub usage: Option<ResourceUsage>,
    /// The time that the work took.
    pub took: Took,
}

/// The duration of a job's work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Took {
    /// The duration of the whole call of [`Dispatcher::dispatch`].
    Dispatch,
    /// The given duration. The rest of the call was a wait for the process.
    Run(Duration),
    /// No time, because the work was not started.
    Nothing,
}

impl From<Outcome> for Ended {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, exit: None, usage: None, took: Took::Dispatch }
    }
}

impl Ended {
    /// Returns the `Ended` of a job whose work was not started.
    fn unstarted(outcome: Outcome) -> Self {
        Self { took: Took::Nothing, ..outcome.into() }
    }

    /// Sets the duration of the work to the time since `began`.
    fn since(self, began: Instant) -> Self {
        Self { took: Took::Run(began.elapsed()), ..self }
    }
}

/// Runs jobs.
///
/// The worker's loops call [`dispatch`](Self::dispatch) concurrently. When the lifecycle reaches [`Phase::Killing`], `dispatch`
/// stops the work and returns [`Outcome::Interrupted`], unless the work has already ended.
pub trait Dispatcher: Send + Sync + 'static {
    /// Runs one job, and returns its outcome with the time and resources used.
    fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> impl Future<Output = Ended> + Send;

    /// Reports whether a job type always has a label of its own in the metrics. Of the other types, only the first hundred have
    /// one. An implementation must return true for a bounded number of types only, because each adds metrics that are never
    /// removed.
    fn is_counted_apart(&self, _job_type: &str) -> bool {
        false
    }

    /// Returns the types for which [`is_counted_apart`](Self::is_counted_apart) is true. The metrics of these types exist before
    /// their first job.
    fn types_counted_apart(&self) -> Vec<String> {
        Vec::new()
    }

    /// Returns the error types that are usual for jobs of a type. The metrics of these errors exist before the first failure.
    fn usual_failures(&self, _job_type: &str) -> &'static [&'static str] {
        &[]
    }

    /// Returns the id of the process that runs a job, if there is one.
    fn pid(&self, _id: &JobId) -> Option<u32> {
        None
    }

    /// Returns the names of the handlers that cannot be started now.
    fn broken(&self) -> Vec<String> {
        Vec::new()
    }

    /// Returns the long-lived processes, each of which runs one job after another.
    fn processes(&self) -> Vec<HandlerProcess> {
        Vec::new()
    }

    /// Returns the configured handlers.
    fn handlers(&self) -> Vec<HandlerStatus> {
        Vec::new()
    }

    /// Returns the number of starts of long-lived processes, by handler and by the reason for the start.
    fn process_starts(&self) -> Vec<ProcessStarts> {
        Vec::new()
    }

    /// Ends the processes that are kept between jobs. The worker calls this when no job runs any more, before it closes the take
    /// stream.
    fn finish(&self, _lifecycle: &Lifecycle) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// A long-lived process that runs one job after another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HandlerProcess {
    /// The file name of the handler's program.
    pub handler: String,
    /// The process id.
    pub pid: u32,
    /// `starting`, `idle`, `busy` or `ending`.
    pub state: &'static str,
    /// The number of jobs that the process has done.
    pub jobs: u64,
    /// The time since the start of the process.
    pub age_seconds: f64,
    /// The resident memory of the process, without that of its children.
    pub memory_bytes: Option<u64>,
    /// The id of the current job, if any.
    pub job: Option<String>,
}

/// A configured handler.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HandlerStatus {
    /// The type of the handler's jobs. `None` for the default handler.
    pub r#type: Option<String>,
    /// The file name of the handler's program.
    pub handler: String,
    /// `spawn` or `warm`.
    pub mode: &'static str,
    /// The number of starts, including failed ones, since the handler was configured.
    pub starts: u64,
    /// The failures that delay the handler's next start, if any.
    pub brake: Option<BrakeStatus>,
    /// The ids of the processes that are kept between jobs.
    pub pids: Vec<u32>,
}

/// The consecutive failures of a handler that cannot be started, or whose processes end before they have done a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BrakeStatus {
    /// The number of failures since the handler last worked.
    pub failures: u64,
    /// The message of the last failure.
    pub error: String,
    /// The time until the next start is allowed.
    pub pause_seconds: f64,
}

/// The values of `HandlerProcess::state`.
pub(crate) const PROCESS_STATES: [&str; 4] = ["starting", "idle", "busy", "ending"];

/// The number of processes of a handler that were started for the same reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessStarts {
    /// The file name of the handler's program.
    pub handler: String,
    /// The reason for which the replaced process ended, or `demand` if the process replaced none.
    pub reason: &'static str,
    /// The number of started processes.
    pub count: u64,
}

/// A dispatcher that runs jobs in handler processes. The exit status and the result file, or the reply of a warm process, decide
/// the outcome.
#[derive(Debug)]
pub struct ExecDispatcher {
    routes: watch::Sender<Arc<Routes>>,
    results: ResultDir,
    worker_id: String,
    pids: Pids,
    children: Children,
    starter: Starter,
    read_delay: ReadDelay,
}

impl ExecDispatcher {
    /// Returns a dispatcher that runs up to `concurrency` jobs at once with `handlers`, and passes `worker_id` to the handlers.
    /// Result files are kept in a new directory below `temp_dir`. To find out how processes can be started on this system, this
    /// starts a process that exits at once. Register this program's signal handlers before the first job, because a signal
    /// handler that is registered later can run in a newly started child.
    ///
    /// # Errors
    /// If the directory cannot be created, or its path is too long for the socket of a warm handler.
    pub fn new(handlers: Handlers, concurrency: usize, worker_id: String, temp_dir: &Path) -> io::Result<Self> {
        let results = ResultDir::create(temp_dir)?;
        let processes = handlers.max_processes(concurrency);
        if handlers.is_any_warm() && !results.has_room_for_sockets() {
            return Err(io::Error::other(
                "its path is too long for the sockets of warm handlers (108 bytes, see unix(7))",
            ));
        }
        Ok(Self {
            routes: watch::Sender::new(Arc::new(Routes::new(handlers, concurrency))),
            results,
            worker_id,
            pids: Pids::default(),
            children: Children::of_this_process(),
            starter: starter(processes),
            read_delay: ReadDelay::default(),
        })
    }

    /// Replaces the handlers for all jobs that have not been started yet, including those that wait for a start or for a warm
    /// process.
    pub fn replace(&self, handlers: Handlers) {
        self.routes.send_modify(|routes| *routes = Arc::new(routes.renewed(handlers)));
    }

    /// Reaps orphaned descendants of handlers while the returned future is polled, if this process is process 1 or a subreaper.
    /// The future also reaps every child that this dispatcher has not started, so do not poll it in a program with other
    /// children.
    ///
    /// # Errors
    /// If the operating system refuses the signal handler.
    pub fn reap_orphans(&self) -> impl Future<Output = io::Result<()>> + Send + use<> {
        self.children.clone().reap_orphans()
    }

    /// Starts a process of each warm handler, waits until it connects, and ends it. Returns each handler's name, with the time to
    /// connect or an error.
    pub(crate) async fn start_each_warm(&self) -> Vec<(String, Result<Duration, String>)> {
        let mut tried = Vec::new();
        for route in self.routes().all() {
            let Some(pool) = &route.pool else { continue };
            let result = match self.try_start(route, pool).await {
                Ok(took) => Ok(took),
                Err(error) => Err(why_not_started(route, &error).await),
            };
            tried.push((route.brake.name().to_owned(), result));
        }
        tried
    }

    async fn try_start(&self, route: &Route, pool: &Arc<Pool>) -> io::Result<Duration> {
        let spawn = |socket: &PathBuf| self.spawn_warm(route, socket);
        let starting = pool.start(self.results.socket(), &pool.slot().await, &Lifecycle::new(), spawn)?;
        starting.begun().await?;
        Ok(starting.end().await)
    }

    fn routes(&self) -> Arc<Routes> {
        Arc::clone(&self.routes.borrow())
    }

    fn spawn(&self, route: &Route, job: &Job, result: &ResultFile<'_>) -> io::Result<Process> {
        let handler = &route.handler;
        route.count_start();
        Process::spawn(Start {
            command: route.command()?,
            variables: &variables::of(job, handler, &self.worker_id, result),
            input: match handler.stdin {
                Stdin::Payload => Input::Bytes(job.payload.clone()),
                Stdin::Job => Input::Bytes(job.object.clone()),
                Stdin::None => Input::Nothing,
            },
            output: handler.output,
            starter: &self.starter,
            read_delay: &self.read_delay,
            children: &self.children,
        })
    }
}

/// A job, and the state that is kept between the tries to run it here.
struct Task<'a> {
    job: &'a Job,
    lifecycle: &'a Lifecycle,
    routes: watch::Receiver<Arc<Routes>>,
    /// The number of warm processes that ended before they had read the whole job.
    unread: usize,
}

/// The result of one try to run a job.
enum Tried {
    Ended(Ended),
    /// Another try is needed. Holds the error if the start failed.
    Again(Option<io::Error>),
}

impl Tried {
    async fn not_started(route: &Route, why: NotStarted<Cut>) -> Self {
        match why {
            NotStarted::CutShort(Cut::Replaced) => Self::Again(None),
            NotStarted::CutShort(Cut::Stopping) => Self::Ended(Ended::unstarted(Outcome::Interrupted)),
            NotStarted::Failed(error) => {
                let error_type = if is_start_error(&error) { "StartError" } else { "SpawnError" };
                let failure = Failure::new(error_type, why_not_started(route, &error).await);
                Self::Ended(Ended::unstarted(Outcome::Failure(failure)))
            }
        }
    }
}

impl ExecDispatcher {
    /// Runs a process for a job. `fault` is the error of the previous start, if it failed.
    async fn try_spawned(&self, route: &Route, task: &mut Task<'_>, fault: Option<io::Error>) -> Tried {
        let Task { job, lifecycle, routes, .. } = task;
        let result = self.results.file();
        let start = || self.start(route, job, lifecycle, &result);
        match route.brake.start(fault, stopped_or_replaced(lifecycle, routes), start).await {
            Ok((started, _)) => {
                let since = started.since;
                match started.see_through(&result).await {
                    Ok(ended) => Tried::Ended(ended.since(since)),
                    Err(error) => Tried::Again(Some(error)),
                }
            }
            Err(why) => Tried::not_started(route, why).await,
        }
    }

    /// Runs a job in a warm process. `fault` is the error of the previous start, if it failed.
    async fn try_warm(
        &self,
        route: &Arc<Route>,
        pool: &Arc<Pool>,
        task: &mut Task<'_>,
        fault: Option<io::Error>,
    ) -> Tried {
        let busy = match self.warm_process(route, pool, task, fault).await {
            Ok(busy) => busy,
            Err(tried) => return tried,
        };
        let _listed = self.pids.list(&task.job.id, busy.pid());
        let (started, since) = (busy.started(), Instant::now());
        let (ended, health) = busy.run(task.job, task.lifecycle).await;
        match health {
            warm::HandlerHealth::Works => route.brake.proven(started),
            warm::HandlerHealth::Crashed(why) => route.brake.crashed(started, &why),
            warm::HandlerHealth::JobUnread(why) => {
                if let Some(why) = why {
                    route.brake.crashed(started, &why);
                }
                task.unread += 1;
                // Limit the retries, because some jobs crash every process that reads them.
                if task.unread < if pool.is_any_at_work() { MAX_UNREAD } else { MAX_UNREAD_ALONE } {
                    return Tried::Again(None);
                }
            }
            warm::HandlerHealth::Unknown => {}
        }
        Tried::Ended(ended.since(since))
    }

    /// Waits for an idle process, or starts one.
    async fn warm_process(
        &self,
        route: &Arc<Route>,
        pool: &Arc<Pool>,
        task: &mut Task<'_>,
        fault: Option<io::Error>,
    ) -> Result<Busy, Tried> {
        let cut_short = async |why| Tried::not_started(route, NotStarted::CutShort(why)).await;
        let place = tokio::select! {
            biased;
            place = pool.place() => place,
            why = killed_or_replaced(route, task) => return Err(cut_short(why).await),
        };
        let mut in_line = match pool.take_idle() {
            Ok(idle) => {
                if let Some(error) = &fault {
                    route.brake.failed_since(start_of(error), error);
                }
                return Ok(pool.busy(idle, place));
            }
            Err(in_line) => in_line,
        };
        let slot = tokio::select! {
            biased;
            idle = &mut in_line => return Ok(pool.busy(idle, place)),
            slot = pool.slot() => slot,
            why = killed_or_replaced(route, task) => return Err(cut_short(why).await),
        };
        let spawn = |socket: &PathBuf| self.spawn_warm(route, socket);
        let lifecycle = task.lifecycle;
        let start = || pool.start(self.results.socket(), &slot, lifecycle, spawn);
        let cut = async {
            tokio::select! {
                biased;
                cut = stopped_or_replaced(lifecycle, &mut task.routes) => WarmCut::Short(cut),
                idle = &mut in_line => WarmCut::Idle(idle),
            }
        };
        let (starting, cut) = match route.brake.start(fault, cut, start).await {
            Ok(started) => started,
            Err(NotStarted::CutShort(WarmCut::Idle(idle))) => return Ok(pool.busy(idle, place)),
            Err(NotStarted::CutShort(WarmCut::Short(why))) => return Err(cut_short(why).await),
            // Do not fail the job. It can still get one of the processes that work, while the brake delays the next start.
            Err(NotStarted::Failed(_)) if pool.is_any_at_work() => return Err(Tried::Again(None)),
            Err(NotStarted::Failed(error)) => return Err(Tried::not_started(route, NotStarted::Failed(error)).await),
        };
        let idle = match cut {
            Some(WarmCut::Idle(idle)) => idle,
            _ => tokio::select! {
                biased;
                connected = starting.begun() => return match connected {
                    Ok(()) => starting.busy(place).ok_or(Tried::Again(None)),
                    Err(error) => Err(Tried::Again(Some(error))),
                },
                why = killed_or_replaced(route, task) => return Err(cut_short(why).await),
                idle = in_line => idle,
            },
        };
        let (brake_of, since) = (Arc::clone(route), starting.started());
        pool.adopt(starting, lifecycle, move |error| brake_of.brake.failed_since(since, error));
        Ok(pool.busy(idle, place))
    }

    fn spawn_warm(&self, route: &Route, socket: &Path) -> io::Result<Resident> {
        route.count_start();
        Resident::spawn(Start {
            command: route.command()?,
            variables: &variables::of_warm(socket, &self.worker_id),
            input: Input::Nothing,
            output: route.handler.output,
            starter: &self.starter,
            read_delay: &self.read_delay,
            children: &self.children,
        })
    }
}

/// If dropped before [`finish`](Dispatcher::finish), kills the processes that are kept between jobs.
impl Drop for ExecDispatcher {
    fn drop(&mut self) {
        self.routes().processes().kill();
    }
}

impl Dispatcher for ExecDispatcher {
    async fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> Ended {
        let mut task = Task { job, lifecycle, routes: self.routes.subscribe(), unread: 0 };
        let mut fault: Option<(Arc<Route>, io::Error)> = None;
        loop {
            let route = task.routes.borrow_and_update().find(&job.job_type).cloned();
            let Some(route) = route else {
                let message = format!("no handler for jobs of type {:?}, and no default handler", job.job_type);
                return Ended::unstarted(Outcome::Failure(Failure::new("UnknownJobType", message)));
            };
            // Drop the error if a reload replaced the handler.
            let fault_of_this = fault.take().filter(|(of, _)| Arc::ptr_eq(of, &route)).map(|(_, error)| error);
            let tried = match &route.pool {
                Some(pool) => self.try_warm(&route, pool, &mut task, fault_of_this).await,
                None => self.try_spawned(&route, &mut task, fault_of_this).await,
            };
            match tried {
                Tried::Ended(ended) => return ended,
                Tried::Again(error) => fault = error.map(|error| (route, error)),
            }
        }
    }

    fn is_counted_apart(&self, job_type: &str) -> bool {
        self.routes().has_own(job_type)
    }

    fn types_counted_apart(&self) -> Vec<String> {
        self.routes().own_types()
    }

    fn usual_failures(&self, job_type: &str) -> &'static [&'static str] {
        match self.routes().find(job_type) {
            Some(route) if route.pool.is_some() => &WARM_FAILURES,
            Some(_) => &SPAWNED_FAILURES,
            None => &["UnknownJobType"],
        }
    }

    fn pid(&self, id: &JobId) -> Option<u32> {
        self.pids.get(id)
    }

    fn broken(&self) -> Vec<String> {
        self.routes().broken()
    }

    fn processes(&self) -> Vec<HandlerProcess> {
        self.routes().processes().list()
    }

    fn handlers(&self) -> Vec<HandlerStatus> {
        self.routes().list()
    }

    fn process_starts(&self) -> Vec<ProcessStarts> {
        self.routes().processes().starts()
    }

    async fn finish(&self, lifecycle: &Lifecycle) {
        let processes = Arc::clone(self.routes().processes());
        processes.finish(lifecycle).await;
    }
}

/// The reason why a job stops waiting for a start.
enum Cut {
    /// The worker stops.
    Stopping,
    /// A reload has replaced handlers.
    Replaced,
}

/// The reason why a job stops waiting for the start of a warm process.
enum WarmCut {
    Short(Cut),
    /// Another process has become idle.
    Idle(Idle),
}

/// The number of processes that may end before they have read a job until the job fails, if other processes of the pool work.
const MAX_UNREAD: usize = 5;

/// The same limit if no other process of the pool works.
const MAX_UNREAD_ALONE: usize = 2;

/// Returns the time at which the failed start began, or the present time if no process was started.
fn start_of(error: &io::Error) -> Instant {
    let failed = error.get_ref().and_then(|error| error.downcast_ref::<StartError>());
    failed.map_or_else(Instant::now, StartError::started)
}

/// Reports whether the error is that of a process that was started, but did not connect.
fn is_start_error(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|error| error.is::<StartError>())
}

async fn why_not_started(route: &Route, error: &io::Error) -> String {
    if is_start_error(error) { format!("{} {error}", route.brake.name()) } else { route.not_started(error).await }
}

async fn stopped_or_replaced(lifecycle: &Lifecycle, routes: &mut watch::Receiver<Arc<Routes>>) -> Cut {
    tokio::select! {
        biased;
        () = lifecycle.awaited() => Cut::Stopping,
        // `changed` fails only once the sender is dropped, and the dispatcher holds the sender.
        _ = routes.changed() => Cut::Replaced,
    }
}

/// Waits until the lifecycle reaches `Phase::Killing`, or a reload replaces the job's route. A drain does not end the wait,
/// because jobs taken before the drain still run. Neither does a reload that keeps the handler.
async fn killed_or_replaced(route: &Route, task: &mut Task<'_>) -> Cut {
    let Task { job, lifecycle, routes, .. } = task;
    loop {
        // Check before the wait, because an earlier wait on `routes` may have consumed the notification.
        let is_same = routes.borrow_and_update().find(&job.job_type).is_some_and(|found| std::ptr::eq(&**found, route));
        if !is_same {
            return Cut::Replaced;
        }
        tokio::select! {
            biased;
            () = lifecycle.reached(Phase::Killing) => return Cut::Stopping,
            // `changed` fails only once the sender is dropped, and the dispatcher holds the sender.
            _ = routes.changed() => {}
        }
    }
}

/// A process that was started for one job.
struct Started<'a> {
    process: Process,
    /// Whether a stop of the worker was requested before the start. If so, the process needs no drain signal.
    was_stopping: bool,
    since: Instant,
    job: &'a Job,
    handler: &'a Handler,
    lifecycle: &'a Lifecycle,
    _listed: Listed<'a>,
}

impl ExecDispatcher {
    fn start<'a>(
        &'a self,
        route: &'a Route,
        job: &'a Job,
        lifecycle: &'a Lifecycle,
        result: &ResultFile<'_>,
    ) -> io::Result<Started<'a>> {
        // Read `was_stopping` before the start, otherwise a process that starts just before the stop would get no drain signal.
        let (was_stopping, since) = (lifecycle.is_awaited(), Instant::now());
        let process = self.spawn(route, job, result).map_err(|error| blame(error, job))?;
        let listed = self.pids.list(&job.id, process.id());
        Ok(Started { process, was_stopping, since, job, handler: &route.handler, lifecycle, _listed: listed })
    }
}

impl Begin for Started<'_> {
    async fn begun(&self) -> io::Result<()> {
        self.process.begun().await.map_err(|error| blame(error, self.job))
    }

    async fn overdue(&self) {
        time_is_up(self.handler, self.since).await;
    }
}

impl Started<'_> {
    /// Supervises the process until it ends. Returns an error if the program could not be executed.
    async fn see_through(self, result: &ResultFile<'_>) -> io::Result<Ended> {
        let Self { process, was_stopping, since, job, handler, lifecycle, _listed } = self;
        let stops = Stops {
            terminate: cause_to_terminate(handler, lifecycle, since),
            skip_grace: lifecycle.reached(Phase::Forcing),
            give_up: last_wait(lifecycle),
            kill_grace: handler.kill_grace,
            notify: handler.drain_signal.filter(|_| !was_stopping).map(|signal| (signal, lifecycle.awaited())),
        };
        let exit = process.supervise(stops, &OutputLog).await.map_err(|error| blame(error, job))?;
        if matches!(exit.terminated, Some((_, Termination::GivenUp))) {
            error!("process outlives the worker: its job may run twice");
        }
        Ok(outcome::of(handler, exit, result.read()).await)
    }
}

/// The total length of a job's id, type and queue from which E2BIG counts as the job's fault and not the handler's. The limit of
/// one variable is 128 KiB (`execve(2)`).
const LONG_TEXTS: usize = 64 * 1024;

/// Hides the errno of E2BIG unless the job's own texts are long, so that the brake attributes the error to the handler.
fn blame(error: io::Error, job: &Job) -> io::Error {
    let texts = job.id.as_str().len() + job.job_type.len() + job.queue.len();
    if error.kind() == io::ErrorKind::ArgumentListTooLong && texts < LONG_TEXTS {
        return io::Error::new(io::ErrorKind::ArgumentListTooLong, error);
    }
    error
}

/// Tests how processes can be started on this system, and raises the limit of open files for `processes` processes at once.
fn starter(processes: usize) -> Starter {
    keep_exit_statuses();
    let trial = Trial::of_this_machine();
    match &trial {
        Trial::Usual => {}
        Trial::Slow(error) => {
            warn!(%error, "processes are started in a slower way, the system refuses the usual one");
        }
        Trial::Impossible(error) => error!(%error, "no process can be started here"),
    }
    let (open_files, enough) = OpenFiles::ensure(processes, trial.way());
    if let Err(TooFewDescriptors { limit, needed }) = enough {
        warn!(
            limit,
            needed, "limit of open files is too low for that many jobs at once; raise it (ulimit -n, LimitNOFILE=)"
        );
    }
    Starter::new(trial.way(), open_files)
}

/// Waits until the worker gives up on a process that survives SIGKILL: `LAST_WAIT` after the kill, or when `Phase::Forcing` is
/// reached.
async fn last_wait(lifecycle: &Lifecycle) {
    lifecycle.reached(Phase::Killing).await;
    tokio::select! {
        () = lifecycle.reached(Phase::Forcing) => {}
        () = tokio::time::sleep(LAST_WAIT) => {}
    }
}

async fn cause_to_terminate(handler: &Handler, lifecycle: &Lifecycle, since: Instant) -> Cause {
    tokio::select! {
        () = lifecycle.reached(Phase::Killing) => Cause::Killing,
        () = time_is_up(handler, since) => Cause::Timeout,
    }
}

async fn time_is_up(handler: &Handler, since: Instant) {
    match handler.timeout {
        Some(timeout) => tokio::time::sleep_until(since + timeout).await,
        None => std::future::pending().await,
    }
}

/// A printer that logs the output of spawned handlers.
struct OutputLog;

impl Printer for OutputLog {
    fn wants(&self, channel: Channel) -> bool {
        match channel {
            Channel::Stdout => enabled!(target: OUTPUT_TARGET, Level::INFO),
            Channel::Stderr => enabled!(target: OUTPUT_TARGET, Level::WARN),
        }
    }

    fn print(&self, channel: Channel, line: &str) {
        log_line(channel, line);
    }
}

/// Logs a line of output in the current span. The line is a field, because every log format escapes control characters in fields.
fn log_line(channel: Channel, line: &str) {
    match channel {
        Channel::Stdout => info!(target: OUTPUT_TARGET, line, "stdout"),
        Channel::Stderr => warn!(target: OUTPUT_TARGET, line, "stderr"),
    }
}
