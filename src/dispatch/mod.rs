//! [`Dispatcher`]: what a worker does with a job. [`ExecDispatcher`] runs a handler for it.

mod brake;
mod errands;
mod outcome;
mod pids;
mod result_file;
mod routes;
mod variables;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::handler::{Handler, Handlers, Stdin};
use crate::job::{Failure, Job, JobId, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use crate::process::{
    Channel, Children, Exit, HeadStart, Input, Process, Start, Stops, Termination, TooFewDescriptors, Usage,
    ensure_descriptors, keep_exit_statuses,
};
use brake::{Known, NotStarted};
use outcome::Cause;
use pids::Pids;
use result_file::{ResultDir, ResultFile};
use routes::{Route, Routes};

/// How long a worker that is being killed waits for a process that has outlived SIGKILL. The server hands the job out again as
/// soon as the worker ends.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// How a job ended, and what it took.
#[derive(Debug, Clone, PartialEq)]
pub struct Ended {
    /// What is reported.
    pub outcome: Outcome,
    /// The status with which its process exited, if it had one and exited by itself.
    pub exit_code: Option<i32>,
    /// What its process used, if it had one.
    pub usage: Option<Usage>,
}

impl From<Outcome> for Ended {
    fn from(outcome: Outcome) -> Self {
        Self { outcome, exit_code: None, usage: None }
    }
}

/// Does the work of a job.
///
/// A worker calls it from as many loops at once as it has. When the lifecycle reaches [`Phase::Killing`], it ends what it
/// does and returns [`Outcome::Interrupted`], unless the work has already ended.
pub trait Dispatcher: Send + Sync + 'static {
    /// Sees one job through to its end.
    fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> impl Future<Output = Ended> + Send;

    /// Whether jobs of that type are counted by it in the metrics; all other types are counted together. There should be a
    /// bounded number of types for which that is so.
    fn is_counted_apart(&self, _job_type: &str) -> bool {
        false
    }

    /// The process that runs for a job, if one does.
    fn pid(&self, _id: &JobId) -> Option<u32> {
        None
    }

    /// What cannot be started now, by name.
    fn broken(&self) -> Vec<String> {
        Vec::new()
    }
}

/// Runs a process for each job, and goes by its exit status and by what it leaves in its result file.
#[derive(Debug)]
pub struct ExecDispatcher {
    routes: watch::Sender<Arc<Routes>>,
    results: ResultDir,
    worker_id: String,
    pids: Pids,
    children: Children,
    head_start: HeadStart,
}

impl ExecDispatcher {
    /// A dispatcher that runs `handlers`, up to `concurrency` at once, and tells them which worker they run under. Result
    /// files are made in a directory of its own below `temp_dir`. The process's signal handlers should be there before the first
    /// job: those that are registered later may run in a child that has just been made.
    ///
    /// # Errors
    /// When that directory cannot be made.
    pub fn new(handlers: Handlers, concurrency: usize, worker_id: String, temp_dir: &Path) -> io::Result<Self> {
        keep_exit_statuses();
        if let Err(TooFewDescriptors { limit, needed }) = ensure_descriptors(concurrency) {
            warn!(
                limit,
                needed, "limit of open files is too low for that many jobs at once; raise it (ulimit -n, LimitNOFILE=)"
            );
        }
        Ok(Self {
            routes: watch::Sender::new(Arc::new(Routes::new(handlers))),
            results: ResultDir::create(temp_dir)?,
            worker_id,
            pids: Pids::default(),
            children: Children::of_this_process(),
            head_start: HeadStart::default(),
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

    fn routes(&self) -> Arc<Routes> {
        Arc::clone(&self.routes.borrow())
    }

    fn spawn(&self, route: &Route, job: &Job, result: &ResultFile, known: Known) -> io::Result<Process> {
        let handler = &route.handler;
        Process::spawn(Start {
            command: route.command()?,
            variables: &variables::of(job, handler, &self.worker_id, result),
            input: match handler.stdin {
                Stdin::Payload => Input::Bytes(job.payload.clone()),
                Stdin::Job => Input::Bytes(job.object.clone()),
                Stdin::None => Input::Nothing,
            },
            output: handler.output,
            wait_for_exec: known == Known::AtOnce,
            head_start: &self.head_start,
            children: &self.children,
        })
    }
}

impl Dispatcher for ExecDispatcher {
    async fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> Ended {
        let mut routes = self.routes.subscribe();
        let mut fault: Option<(Arc<Route>, io::Error)> = None;
        loop {
            let route = routes.borrow_and_update().find(&job.job_type).cloned();
            let Some(route) = route else {
                let message = format!("no handler for jobs of type {:?}, and no default handler", job.job_type);
                return Outcome::Failure(Failure::new("UnknownJobType", message)).into();
            };
            let result = self.results.file();
            // What came of another handler says nothing of this one.
            let fault_of_this = fault.take().filter(|(of, _)| Arc::ptr_eq(of, &route)).map(|(_, error)| error);
            let started = tokio::select! {
                biased;
                started = self.start(&route, job, lifecycle, &result, fault_of_this) => started,
                // It fails only once the sender is gone, and `self` has it.
                _ = routes.changed() => continue,
            };
            match self.see_through(started, &route, job, lifecycle, &result).await {
                Ok(ended) => return ended,
                Err(error) => fault = Some((route, error)),
            }
        }
    }

    fn is_counted_apart(&self, job_type: &str) -> bool {
        self.routes().has_own(job_type)
    }

    fn pid(&self, id: &JobId) -> Option<u32> {
        self.pids.get(id)
    }

    fn broken(&self) -> Vec<String> {
        self.routes().broken()
    }
}

/// A process, and whether the stop had been asked for when it was started.
type Started = (Process, bool);

impl ExecDispatcher {
    async fn start(
        &self,
        route: &Route,
        job: &Job,
        lifecycle: &Lifecycle,
        result: &ResultFile<'_>,
        fault: Option<io::Error>,
    ) -> Result<Started, NotStarted> {
        let spawn = |known| {
            // Asked before: a handler may already run when its start returns, and be there when the stop is asked for.
            let stopping = lifecycle.is_awaited();
            self.spawn(route, job, result, known).map(|process| (process, stopping))
        };
        route.brake.start(lifecycle, fault, spawn).await
    }

    /// An error is why the process, as it turned out, could not be started.
    async fn see_through(
        &self,
        started: Result<Started, NotStarted>,
        route: &Route,
        job: &Job,
        lifecycle: &Lifecycle,
        result: &ResultFile<'_>,
    ) -> io::Result<Ended> {
        Ok(match started {
            Ok((process, started_stopping)) => {
                let _listed = self.pids.list(&job.id, process.id());
                let exit = supervise(process, &route.handler, lifecycle, started_stopping).await?;
                outcome::of(&route.handler, exit, result.read()).await
            }
            Err(NotStarted::Stopping) => Outcome::Interrupted.into(),
            Err(NotStarted::Failed(error)) => {
                Outcome::Failure(Failure::new("SpawnError", route.not_started(&error).await)).into()
            }
        })
    }
}

/// A handler that has been started after the stop was asked for has not missed the signal that tells of it.
async fn supervise(
    process: Process,
    handler: &Handler,
    lifecycle: &Lifecycle,
    started_stopping: bool,
) -> io::Result<Exit<Cause>> {
    let stops = Stops {
        terminate: cause_to_terminate(handler, lifecycle),
        skip_grace: lifecycle.reached(Phase::Forcing),
        give_up: last_wait(lifecycle),
        kill_grace: handler.kill_grace,
        notify: handler.drain_signal.filter(|_| !started_stopping).map(|signal| (signal, lifecycle.awaited())),
    };
    let exit = process.supervise(stops, log_line).await?;
    if matches!(exit.terminated, Some((_, Termination::GivenUp))) {
        error!("process outlives the worker: its job may run twice");
    }
    Ok(exit)
}

/// Waits until the worker ends without a process that has outlived SIGKILL.
async fn last_wait(lifecycle: &Lifecycle) {
    lifecycle.reached(Phase::Killing).await;
    tokio::select! {
        () = lifecycle.reached(Phase::Forcing) => {}
        () = tokio::time::sleep(LAST_WAIT) => {}
    }
}

async fn cause_to_terminate(handler: &Handler, lifecycle: &Lifecycle) -> Cause {
    let timed_out = async {
        match handler.timeout {
            Some(timeout) => tokio::time::sleep(timeout).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        () = lifecycle.reached(Phase::Killing) => Cause::Killing,
        () = timed_out => Cause::Timeout,
    }
}

/// Logs under the job's span. The line is a field: its control characters are escaped there, in every format.
fn log_line(channel: Channel, line: &str) {
    match channel {
        Channel::Stdout => info!(line, "stdout"),
        Channel::Stderr => warn!(line, "stderr"),
    }
}
