//! [`ExecDispatcher`]: the dispatcher that runs jobs in handler processes.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tracing::{error, warn};

use super::brake::Begin;
use super::pids::Pids;
use super::result_file::ResultDir;
use super::routes::{Route, Routes};
use super::task::{Task, Tried, why_not_started};
use super::warm::Pool;
use super::{Dispatcher, Ended, HandlerProcess, HandlerStatus, ProcessStarts};
use crate::handler::Handlers;
use crate::job::{Failure, Job, JobId, Outcome};
use crate::lifecycle::Lifecycle;
use crate::process::{
    Children, OpenFiles, ReadDelay, Starter, TOO_FEW_DESCRIPTORS, TooFewDescriptors, Trial, keep_exit_statuses,
};

/// The error types that are usual for a handler that starts a process for each job.
const SPAWNED_FAILURES: [&str; 6] = ["ExitStatus", "Signal", "Timeout", "SpawnError", "WaitError", "Panic"];

/// The error types that are usual for a warm handler, whose processes run one job after another.
const WARM_FAILURES: [&str; 10] = [
    "ExitStatus",
    "Signal",
    "Timeout",
    "SpawnError",
    "WaitError",
    "Panic",
    "StartError",
    "HandlerError",
    "NoReply",
    "ProtocolError",
];

/// A dispatcher that runs jobs in handler processes. A warm process decides the outcome of a job by its reply. For any other
/// process, the exit status and the result file decide the outcome.
#[derive(Debug)]
pub struct ExecDispatcher {
    pub(super) routes: watch::Sender<Arc<Routes>>,
    pub(super) results: ResultDir,
    pub(super) worker_id: String,
    pub(super) pids: Pids,
    pub(super) children: Children,
    pub(super) starter: Starter,
    pub(super) read_delay: ReadDelay,
}

impl ExecDispatcher {
    /// Returns a dispatcher that runs up to `concurrency` jobs at once with `handlers`, and passes `worker_id` to the handlers.
    /// Creates a directory for result files in `temp_dir`. Starts a process that exits at once, to find out how processes can be
    /// started on this system. Register this program's signal handlers before the first job, because a signal handler that is
    /// registered later can run in a newly started child.
    ///
    /// # Errors
    /// If the directory cannot be created, or its path is too long for the sockets of warm handlers.
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

    /// Replaces the handlers for all jobs that have not been started yet, including jobs that wait for a start or for a warm
    /// process.
    pub fn replace(&self, handlers: Handlers) {
        self.routes.send_modify(|routes| *routes = Arc::new(routes.renewed(handlers)));
    }

    /// Reaps orphaned descendants of handlers while the returned future is polled, if this process is process 1 or a subreaper.
    /// The future also reaps every child that this dispatcher has not started, so do not poll it in a program with other
    /// children.
    ///
    /// # Errors
    /// If the operating system refuses the signal handler for SIGCHLD.
    pub fn reap_orphans(&self) -> impl Future<Output = io::Result<()>> + Send + use<> {
        self.children.clone().reap_orphans()
    }

    /// Starts a process of each warm handler, waits until it connects, and ends it. Returns each handler's name, with either the
    /// time until the process connected or the error.
    pub(crate) async fn start_each_warm(&self) -> Vec<(String, Result<Duration, String>)> {
        let mut tried = Vec::new();
        for route in self.routes().all() {
            let Some(pool) = &route.pool else { continue };
            let result = match self.try_start(route, pool).await {
                Ok(took) => Ok(took),
                Err(error) => Err(why_not_started(route, &error).await),
            };
            tried.push((route.brake.name.clone(), result));
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
}

/// Kills the processes that are kept between jobs, unless [`finish`](Dispatcher::finish) has already ended them.
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

/// Finds out how processes can be started on this system. Raises the limit of open files, so that `processes` handler processes
/// can run at once.
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
        warn!(limit, needed, "{TOO_FEW_DESCRIPTORS}");
    }
    Starter::new(trial.way(), open_files)
}
