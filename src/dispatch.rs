//! [`Dispatcher`]: what a worker does with a job. [`ExecDispatcher`] runs a command for it.

use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use signal_hook::low_level::signal_name;
use tracing::{info, warn};

use crate::job::{Failure, Job, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use crate::process::{Channel, Exit, Process, Program};

/// How long a terminated job may take to end before it is killed.
pub const DEFAULT_KILL_GRACE: Duration = Duration::from_secs(5);

/// Does the work of a job.
///
/// A worker calls it from as many loops at once as it has. When the lifecycle reaches [`Phase::Killing`], it ends what it
/// does and returns [`Outcome::Interrupted`], unless the work has already ended.
pub trait Dispatcher: Send + Sync + 'static {
    /// Sees one job through to its outcome.
    fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> impl Future<Output = Outcome> + Send;
}

/// Runs a program for each job, with the payload on its stdin, and goes by its exit status.
#[derive(Debug)]
pub struct ExecDispatcher {
    program: Program,
    worker_id: String,
    kill_grace: Duration,
}

impl ExecDispatcher {
    /// A dispatcher that runs `program`, and tells it which worker it runs under.
    pub fn new(program: Program, worker_id: String) -> Self {
        Self { program, worker_id, kill_grace: DEFAULT_KILL_GRACE }
    }

    fn spawn(&self, job: &Job) -> std::io::Result<Process> {
        let (priority, attempts) = (job.priority.to_string(), job.attempts.to_string());
        let ready_at = job.ready_at.to_string();
        let env = [
            ("ZIZQ_JOB_ID", job.id.as_str()),
            ("ZIZQ_JOB_TYPE", &job.job_type),
            ("ZIZQ_JOB_QUEUE", &job.queue),
            ("ZIZQ_JOB_PRIORITY", &priority),
            ("ZIZQ_JOB_ATTEMPTS", &attempts),
            ("ZIZQ_JOB_READY_AT", &ready_at),
            ("ZIZQ_WORKER_ID", &self.worker_id),
        ];
        Process::spawn(&self.program, &env, job.payload.clone())
    }
}

impl Dispatcher for ExecDispatcher {
    async fn dispatch(&self, job: &Job, lifecycle: &Lifecycle) -> Outcome {
        match self.spawn(job) {
            Ok(process) => {
                let exit = process.supervise(lifecycle.reached(Phase::Killing), self.kill_grace, log_line).await;
                outcome(&self.program.file_name(), &exit)
            }
            Err(error) => {
                let message = format!("{} could not be started: {error}", self.program.file_name());
                Outcome::Failure(Failure::new("SpawnError", message))
            }
        }
    }
}

/// Logs under the job's span. The line is a field: its control characters are escaped there, in every format.
fn log_line(channel: Channel, line: &str) {
    match channel {
        Channel::Stdout => info!(line, "stdout"),
        Channel::Stderr => warn!(line, "stderr"),
    }
}

/// What an exit means: a success only if the process ended by itself, with status 0.
fn outcome(name: &str, exit: &Exit<()>) -> Outcome {
    if exit.stopped.is_some() {
        return Outcome::Interrupted;
    }
    let (error_type, what) = match &exit.status {
        Ok(status) if status.success() => return Outcome::Success,
        Ok(status) => describe(*status),
        Err(error) => ("WaitError", format!("ended, but its exit status could not be read: {error}")),
    };
    let message = match exit.stderr.last_line() {
        Some(line) => format!("{name} {what}: {line}"),
        None => format!("{name} {what}"),
    };
    Outcome::Failure(Failure::new(error_type, message).with_backtrace(exit.stderr.text()))
}

fn describe(status: ExitStatus) -> (&'static str, String) {
    match (status.code(), status.signal()) {
        (Some(code), _) => ("ExitStatus", format!("exited with status {code}")),
        (None, signal) => {
            let number = signal.unwrap_or_default();
            let name = signal_name(number).map(|name| format!(" ({name})")).unwrap_or_default();
            ("Signal", format!("was killed by signal {number}{name}"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::process::Tail;

    fn outcome_of(raw_status: i32, stopped: Option<()>) -> Outcome {
        outcome("handle.sh", &Exit { status: Ok(ExitStatus::from_raw(raw_status)), stopped, stderr: Tail::default() })
    }

    fn failure(error_type: &str, message: &str) -> Outcome {
        Outcome::Failure(Failure::new(error_type, message))
    }

    #[test]
    fn status_0_is_a_success_and_any_other_a_failure() {
        assert_eq!(outcome_of(0, None), Outcome::Success);
        assert_eq!(outcome_of(3 << 8, None), failure("ExitStatus", "handle.sh exited with status 3"));
    }

    #[test]
    fn death_by_a_signal_names_it() {
        assert_eq!(outcome_of(9, None), failure("Signal", "handle.sh was killed by signal 9 (SIGKILL)"));
    }

    #[test]
    fn a_process_that_we_stopped_is_interrupted_however_it_ended() {
        for status in [0, 15, 9, 1 << 8] {
            assert_eq!(outcome_of(status, Some(())), Outcome::Interrupted);
        }
    }
}
