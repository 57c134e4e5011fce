//! [`Started`]: a process that was started for one job, from its start to the outcome of the job.

use std::io;

use tokio::time::Instant;
use tracing::error;

use super::brake::Begin;
use super::deadline::{cause_to_terminate, last_wait, time_is_up};
use super::outcome;
use super::output_log::OutputLog;
use super::pids::Listed;
use super::result_file::ResultFile;
use super::routes::Route;
use super::{Ended, ExecDispatcher, variables};
use crate::handler::{Handler, Stdin};
use crate::job::Job;
use crate::lifecycle::{Lifecycle, Phase};
use crate::process::{Input, Process, Start, Stops, Termination};

/// A process that was started for one job.
pub(super) struct Started<'a> {
    process: Process,
    /// Whether a stop of the worker was requested before the start. If so, the process gets no drain signal.
    was_stopping: bool,
    pub(super) since: Instant,
    job: &'a Job,
    handler: &'a Handler,
    lifecycle: &'a Lifecycle,
    _listed: Listed<'a>,
}

impl ExecDispatcher {
    pub(super) fn start<'a>(
        &'a self,
        route: &'a Route,
        job: &'a Job,
        lifecycle: &'a Lifecycle,
        result: &ResultFile<'_>,
    ) -> io::Result<Started<'a>> {
        // Read `was_stopping` before the start, because a process that starts just before the stop would otherwise get no drain
        // signal.
        let (was_stopping, since) = (lifecycle.is_awaited(), Instant::now());
        let process = self.spawn(route, job, result).map_err(|error| blame(error, job))?;
        let listed = self.pids.list(&job.id, process.id());
        Ok(Started { process, was_stopping, since, job, handler: &route.handler, lifecycle, _listed: listed })
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
    pub(super) async fn see_through(self, result: &ResultFile<'_>) -> io::Result<Ended> {
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

/// The number of bytes that a job's id, type and queue must have in total for E2BIG to be blamed on the job. With fewer bytes,
/// E2BIG is blamed on the handler. A single variable may have up to 128 KiB (`execve(2)`).
const LONG_TEXTS: usize = 64 * 1024;

/// Hides the errno of an E2BIG error if the job's id, type and queue are short. Without the errno, the brake attributes the error
/// to the handler.
fn blame(error: io::Error, job: &Job) -> io::Error {
    let texts = job.id.as_str().len() + job.job_type.len() + job.queue.len();
    if error.kind() == io::ErrorKind::ArgumentListTooLong && texts < LONG_TEXTS {
        return io::Error::new(io::ErrorKind::ArgumentListTooLong, error);
    }
    error
}
