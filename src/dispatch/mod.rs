//! [`Dispatcher`], the trait for running jobs. [`ExecDispatcher`] runs them in handler processes.

mod brake;
mod deadline;
mod exec;
mod file_threads;
mod outcome;
mod output_log;
mod pids;
mod result_file;
mod routes;
mod started;
mod status;
mod task;
mod variables;
mod warm;

use std::process::ExitStatus;
use std::time::Duration;

use tokio::time::Instant;

use crate::job::{Job, JobId, Outcome};
use crate::lifecycle::Lifecycle;
#[cfg(doc)]
use crate::lifecycle::Phase;
use crate::process::ResourceUsage;

pub use exec::ExecDispatcher;
pub(crate) use status::PROCESS_STATES;
pub use status::{BrakeStatus, HandlerProcess, HandlerStatus, ProcessStarts};
pub(crate) use variables::is_about_a_job;

/// The result of running a job: its outcome, and the time and resources used.
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
    /// The duration of the whole call to [`Dispatcher::dispatch`].
    Dispatch,
    /// The contained duration. The rest of the call was spent waiting for a process.
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

/// The component that runs the worker's jobs.
///
/// The worker's loops call [`dispatch`](Self::dispatch) concurrently. When the lifecycle reaches [`Phase::Killing`], `dispatch`
/// stops the work and returns [`Outcome::Interrupted`], unless the work has already ended.
pub trait Dispatcher: Send + Sync + 'static {
    /// Runs one job, and returns its outcome with the time and resources used.
    fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> impl Future<Output = Ended> + Send;

    /// Reports whether a job type always gets a label of its own in the metrics. Of the other types, only the first hundred get
    /// one. An implementation must return true only for a bounded number of types, because each of these types adds metrics that
    /// are never removed.
    fn is_counted_apart(&self, _job_type: &str) -> bool {
        false
    }

    /// Returns the types for which [`is_counted_apart`](Self::is_counted_apart) is true. The metrics of such a type exist
    /// even before the first job of that type.
    fn types_counted_apart(&self) -> Vec<String> {
        Vec::new()
    }

    /// Returns the error types that are usual for jobs of a type. The metrics for these errors exist before the first failure.
    fn usual_failures(&self, _job_type: &str) -> &'static [&'static str] {
        &[]
    }

    /// Returns the id of the process that runs a job, if there is one.
    fn pid(&self, _id: &JobId) -> Option<u32> {
        None
    }

    /// Returns the names of the handlers that currently cannot be started.
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

    /// Ends the processes that are kept between jobs. The worker calls this when no job is running any more, before it closes the
    /// take stream.
    fn finish(&self, _lifecycle: &Lifecycle) -> impl Future<Output = ()> + Send {
        std::future::ready(())
    }
}
