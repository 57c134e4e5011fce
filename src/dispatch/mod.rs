//! [`Dispatcher`]: what a worker does with a job. [`ExecDispatcher`] runs a handler for it.

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
use tracing::{error, info, warn};

use crate::config::OUTPUT_TARGET;
use crate::handler::{Handler, Handlers, Stdin};
use crate::job::{Failure, Job, JobId, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use crate::process::{
    Channel, Children, Input, OpenFiles, Process, ReadDelay, Resident, ResourceUsage, Start, Starter, Stops,
    Termination, TooFewDescriptors, Trial, keep_exit_statuses,
};
use brake::{Begin, NotStarted};
use outcome::Cause;
use pids::{Listed, Pids};
use result_file::{ResultDir, ResultFile};
use routes::{Route, Routes};
pub(crate) use variables::is_about_a_job;
use warm::{Busy, Pool, StartError};

/// How long a worker that is being killed waits for a process that has outlived SIGKILL. The server hands the job out again as
/// soon as the worker ends.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// The error types of a handler with a process for each job.
const SPAWNED_FAILURES: [&str; 4] = ["ExitStatus", "Signal", "Timeout", "SpawnError"];

/// The error types of a warm handler.
const WARM_FAILURES: [&str; 8] =
    ["ExitStatus", "Signal", "Timeout", "SpawnError", "StartError", "HandlerError", "NoReply", "ProtocolError"];

/// How a job ended, and what it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// What is reported.
    pub outcome: Outcome,
    /// How its process exited, if it had one that ended with it.
    pub exit: Option<ExitStatus>,
    /// What its process used for it, if it had one.
    pub usage: Option<ResourceUsage>,
    /// How long the work took.
    pub took: Took,
}

/// How long the work of a job took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Took {
    /// As long as the call of [`Dispatcher::dispatch`].
    Dispatch,
    /// That long. The rest of the call was a wait for the start.
    Run(Duration),
    /// The work was not started.
    Nothing,
}

impl From<Outcome> for Ended {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, exit: None, usage: None, took: Took::Dispatch }
    }
}

impl Ended {
    /// Ends a job whose work was not started.
    fn unstarted(outcome: Outcome) -> Self {
        Self { took: Took::Nothing, ..outcome.into() }
    }

    /// Notes that the work began at that moment, and ends now.
    fn since(self, began: Instant) -> Self {
        Self { took: Took::Run(began.elapsed()), ..self }
    }
}

/// Does the work of a job.
///
/// A worker calls it from as many loops at once as it has. When the lifecycle reaches [`Phase::Killing`], it ends what it
/// does and returns [`Outcome::Interrupted`], unless the work has already ended.
pub trait Dispatcher: Send + Sync + 'static {
    /// Sees one job through to its end.
    fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> impl Future<Output = Ended> + Send;

    /// Whether jobs of that type always have a label of their own in the metrics. Of the other types, the first hundred have one.
    /// The number of types for which this is true should be bounded.
    fn is_counted_apart(&self, _job_type: &str) -> bool {
        false
    }

    /// The types for which [`is_counted_apart`](Self::is_counted_apart) is true. Their metrics exist before their first job.
    fn types_counted_apart(&self) -> Vec<String> {
        Vec::new()
    }

    /// The error types that failures of such a job usually have. Their metrics exist before the first failure.
    fn usual_failures(&self, _job_type: &str) -> &'static [&'static str] {
        &[]
    }

    /// The process that runs for a job, if one does.
    fn pid(&self, _id: &JobId) -> Option<u32> {
        None
    }

    /// What cannot be started now, by name.
    fn broken(&self) -> Vec<String> {
        Vec::new()
    }

    /// The processes that do one job after another.
    fn processes(&self) -> Vec<HandlerProcess> {
        Vec::new()
    }

    /// The handlers that are configured.
    fn handlers(&self) -> Vec<HandlerStatus> {
        Vec::new()
    }

    /// How many of those were started.
    fn process_starts(&self) -> Vec<ProcessStarts> {
        Vec::new()
    }

    /// Ends what is kept between jobs. Called once no job runs any more, and before the stream closes.
    fn finish(&self, _lifecycle: &Lifecycle) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}

/// A process that does one job after another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HandlerProcess {
    /// The file name of its program.
    pub handler: String,
    /// Its process id.
    pub pid: u32,
    /// `starting`, `idle`, `busy` or `ending`.
    pub state: &'static str,
    /// How many jobs it has done.
    pub jobs: u64,
    /// For how long it has been there.
    pub age_seconds: f64,
    /// The memory that it has resident, without its children.
    pub memory_bytes: Option<u64>,
    /// The job that it does.
    pub job: Option<String>,
}

/// A handler that is configured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HandlerStatus {
    /// The type of its jobs; none for the handler of all other types.
    pub r#type: Option<String>,
    /// The file name of its program.
    pub handler: String,
    /// `spawn` or `warm`.
    pub mode: &'static str,
    /// The number of starts since it was configured, failed ones included.
    pub starts: u64,
    /// The failures that slow its starts down, if there are any.
    pub brake: Option<BrakeStatus>,
    /// The processes that are kept between jobs.
    pub pids: Vec<u32>,
}

/// The failures in a row of a handler that cannot be started, or that ends before it has done a job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BrakeStatus {
    /// The number of failures since the handler last worked.
    pub failures: u64,
    /// The last failure.
    pub error: String,
    /// The time until the next start.
    pub pause_seconds: f64,
}

/// The states of such a process.
pub(crate) const PROCESS_STATES: [&str; 4] = ["starting", "idle", "busy", "ending"];

/// How many processes of a handler were started for one reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessStarts {
    /// The file name of its program.
    pub handler: String,
    /// Why the process before it ended, or `demand` if there was none.
    pub reason: &'static str,
    /// How many.
    pub count: u64,
}

/// Runs a process for each job, and goes by its exit status and by what it leaves in its result file.
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
    /// A dispatcher that runs `handlers`, up to `concurrency` at once, and tells them which worker they run under. Result
    /// files are made in a directory of its own below `temp_dir`. Starts a process that ends at once, to learn how processes can be
    /// started here. The process's signal handlers should be there before the first job: those that are registered later may run
    /// in a child that has just been made.
    ///
    /// # Errors
    /// When that directory cannot be made, or its path is too long for the socket of a warm handler.
    pub fn new(handlers: Handlers, concurrency: usize, worker_id: String, temp_dir: &Path) -> io::Result<Self> {
        let results = ResultDir::create(temp_dir)?;
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
            starter: starter(concurrency),
            read_delay: ReadDelay::default(),
        })
    }

    /// Jobs that start from now on are run by these handlers, and so are those that wait for one that cannot be started.
    pub fn replace(&self, handlers: Handlers) {
        self.routes.send_modify(|routes| *routes = Arc::new(routes.renewed(handlers)));
    }

    /// Reaps what handlers leave behind, for as long as it is polled, if this process is process 1 or a subreaper. Takes the status
    /// of every child that no job has started: a program with other children should not poll this.
    ///
    /// # Errors
    /// When the operating system refuses the signal handler.
    pub fn reap_orphans(&self) -> impl Future<Output = io::Result<()>> + Send + use<> {
        self.children.clone().reap_orphans()
    }

    /// Starts a process of each warm handler, waits until it connects, and ends it. Returns the handlers' names, and how long
    /// each took to connect.
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

/// A job, and what its earlier tries have left.
struct Task<'a> {
    job: &'a Job,
    lifecycle: &'a Lifecycle,
    routes: watch::Receiver<Arc<Routes>>,
    /// Whether a warm process has ended before it had read the job.
    was_unread: bool,
}

/// What has come of one try to have a job done.
enum Tried {
    Ended(Ended),
    /// It is to be tried again, and why the start has failed if that is the reason.
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
    /// Runs a process for a job. `fault` is the error of the start before, if that failed.
    async fn try_spawned(&self, route: &Route, task: &mut Task<'_>, fault: Option<io::Error>) -> Tried {
        let Task { job, lifecycle, routes, .. } = task;
        let result = self.results.file();
        let start = || self.start(route, job, lifecycle, &result);
        match route.brake.start(fault, stopped_or_replaced(lifecycle, routes), start).await {
            Ok(started) => {
                let since = started.since;
                match started.see_through(&result).await {
                    Ok(ended) => Tried::Ended(ended.since(since)),
                    Err(error) => Tried::Again(Some(error)),
                }
            }
            Err(why) => Tried::not_started(route, why).await,
        }
    }

    /// Has a warm process do a job. `fault` is the error of the start before, if that failed.
    async fn try_warm(&self, route: &Route, pool: &Arc<Pool>, task: &mut Task<'_>, fault: Option<io::Error>) -> Tried {
        let busy = match self.warm_process(route, pool, task, fault).await {
            Ok(busy) => busy,
            Err(tried) => return tried,
        };
        let _listed = self.pids.list(&task.job.id, busy.pid());
        let (started, since) = (busy.started(), Instant::now());
        let (ended, health) = busy.run(task.job, task.lifecycle).await;
        match health {
            warm::HandlerHealth::Works => route.brake.release(),
            warm::HandlerHealth::Crashed(why) => route.brake.crashed(started, &why),
            // A job that ends its readers is not handed out for ever.
            warm::HandlerHealth::JobUnread if !std::mem::replace(&mut task.was_unread, true) => {
                return Tried::Again(None);
            }
            warm::HandlerHealth::JobUnread | warm::HandlerHealth::Unknown => {}
        }
        Tried::Ended(ended.since(since))
    }

    /// Waits for a process that is idle, or starts one.
    async fn warm_process(
        &self,
        route: &Route,
        pool: &Arc<Pool>,
        task: &mut Task<'_>,
        fault: Option<io::Error>,
    ) -> Result<Busy, Tried> {
        let cut_short = async |why| Tried::not_started(route, NotStarted::CutShort(why)).await;
        let waiting = async { pool.process_or_slot(pool.place().await).await };
        let found = tokio::select! {
            biased;
            found = waiting => found,
            why = killed_or_replaced(route, task) => return Err(cut_short(why).await),
        };
        let (place, slot) = match found {
            Ok(busy) => return Ok(busy),
            Err(to_be_started) => to_be_started,
        };
        let spawn = |socket: &PathBuf| self.spawn_warm(route, socket);
        let lifecycle = task.lifecycle;
        let start = || pool.start(self.results.socket(), &slot, lifecycle, spawn);
        let starting = match route.brake.start(fault, stopped_or_replaced(lifecycle, &mut task.routes), start).await {
            Ok(starting) => starting,
            Err(why) => return Err(Tried::not_started(route, why).await),
        };
        let connected = tokio::select! {
            biased;
            connected = starting.begun() => connected,
            why = killed_or_replaced(route, task) => return Err(cut_short(why).await),
        };
        match connected {
            Ok(()) => starting.busy(place).ok_or(Tried::Again(None)),
            Err(error) => Err(Tried::Again(Some(error))),
        }
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

/// Dropped before its end, it kills what is kept between jobs.
impl Drop for ExecDispatcher {
    fn drop(&mut self) {
        self.routes().processes().kill();
    }
}

impl Dispatcher for ExecDispatcher {
    async fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> Ended {
        let mut task = Task { job, lifecycle, routes: self.routes.subscribe(), was_unread: false };
        let mut fault: Option<(Arc<Route>, io::Error)> = None;
        loop {
            let route = task.routes.borrow_and_update().find(&job.job_type).cloned();
            let Some(route) = route else {
                let message = format!("no handler for jobs of type {:?}, and no default handler", job.job_type);
                return Ended::unstarted(Outcome::Failure(Failure::new("UnknownJobType", message)));
            };
            // The fault of another handler says nothing of this one.
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

/// Why a job waits no longer for a start.
enum Cut {
    /// The worker stops.
    Stopping,
    /// A reload has replaced handlers.
    Replaced,
}

/// Whether a process ran, but has not connected.
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
        // It fails only once the sender is gone, and the dispatcher has it.
        _ = routes.changed() => Cut::Replaced,
    }
}

/// A job that waits for a process while others have all of them has as much time as the drain has.
/// A reload that leaves the handler as it was does not cut that short.
async fn killed_or_replaced(route: &Route, task: &mut Task<'_>) -> Cut {
    let Task { job, lifecycle, routes, .. } = task;
    loop {
        tokio::select! {
            biased;
            () = lifecycle.reached(Phase::Killing) => return Cut::Stopping,
            _ = routes.changed() => {
                let routes = routes.borrow_and_update();
                if !routes.find(&job.job_type).is_some_and(|found| std::ptr::eq(&**found, route)) {
                    return Cut::Replaced;
                }
            }
        }
    }
}

/// A process that has been made for a job.
struct Started<'a> {
    process: Process,
    /// Whether the stop had been asked for before. Then the process has not missed the signal that tells of it.
    was_stopping: bool,
    since: Instant,
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
        // Asked before: a handler may already run when its start returns, and be there when the stop is asked for.
        let (was_stopping, since) = (lifecycle.is_awaited(), Instant::now());
        let process = self.spawn(route, job, result)?;
        let listed = self.pids.list(&job.id, process.id());
        Ok(Started { process, was_stopping, since, handler: &route.handler, lifecycle, _listed: listed })
    }
}

impl Begin for Started<'_> {
    async fn begun(&self) -> io::Result<()> {
        self.process.begun().await
    }

    async fn overdue(&self) {
        time_is_up(self.handler, self.since).await;
    }
}

impl Started<'_> {
    /// Sees the process through to its end. An error is why it, as it turned out, could not be started.
    async fn see_through(self, result: &ResultFile<'_>) -> io::Result<Ended> {
        let Self { process, was_stopping, since, handler, lifecycle, _listed } = self;
        let stops = Stops {
            terminate: cause_to_terminate(handler, lifecycle, since),
            skip_grace: lifecycle.reached(Phase::Forcing),
            give_up: last_wait(lifecycle),
            kill_grace: handler.kill_grace,
            notify: handler.drain_signal.filter(|_| !was_stopping).map(|signal| (signal, lifecycle.awaited())),
        };
        let exit = process.supervise(stops, log_line).await?;
        if matches!(exit.terminated, Some((_, Termination::GivenUp))) {
            error!("process outlives the worker: its job may run twice");
        }
        Ok(outcome::of(handler, exit, result.read()).await)
    }
}

/// Finds out how processes can be started here, and prepares for as many at once.
fn starter(concurrency: usize) -> Starter {
    keep_exit_statuses();
    let trial = Trial::of_this_machine();
    match &trial {
        Trial::Usual => {}
        Trial::Slow(error) => {
            warn!(%error, "processes are started in a slower way, the system refuses the usual one");
        }
        Trial::Impossible(error) => error!(%error, "no process can be started here"),
    }
    let (open_files, enough) = OpenFiles::ensure(concurrency, trial.way());
    if let Err(TooFewDescriptors { limit, needed }) = enough {
        warn!(
            limit,
            needed, "limit of open files is too low for that many jobs at once; raise it (ulimit -n, LimitNOFILE=)"
        );
    }
    Starter::new(trial.way(), open_files)
}

/// Waits until the worker ends without a process that has outlived SIGKILL.
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

/// Logs under the job's span. The line is a field: its control characters are escaped there, in every format.
fn log_line(channel: Channel, line: &str) {
    match channel {
        Channel::Stdout => info!(target: OUTPUT_TARGET, line, "stdout"),
        Channel::Stderr => warn!(target: OUTPUT_TARGET, line, "stderr"),
    }
}
