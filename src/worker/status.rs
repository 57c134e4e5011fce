//! [`Status`]: the state of a worker. [`Unready`]: a reason why a worker cannot start jobs.

use std::fmt;

use serde::Serialize;

use crate::dispatch::{HandlerProcess, HandlerStatus};

/// The state of a worker, and its counts since it started.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// `running`, `paused`, `draining` or `killing`.
    pub state: &'static str,
    /// Whether a take stream is open.
    pub connected: bool,
    /// The number of open streams that have been replaced, for example by a reload. They stay open until their jobs are reported.
    pub finishing_streams: usize,
    /// The time since the worker was created, in seconds.
    pub uptime_seconds: f64,
    /// The number of running jobs.
    pub running: usize,
    /// The number of taken jobs that wait for a worker loop.
    pub waiting: usize,
    /// The number of reports that the server has not accepted yet.
    pub reports_waiting: i64,
    /// The number of jobs that succeeded.
    pub succeeded: u64,
    /// The number of jobs that failed.
    pub failed: u64,
    /// The number of interrupted jobs, which the server redelivers.
    pub interrupted: u64,
    /// The worker loops, each with its current job.
    pub loops: Vec<LoopStatus>,
    /// The configured handlers.
    pub handlers: Vec<HandlerStatus>,
    /// The processes of warm handlers, including those of replaced handlers.
    pub handler_processes: Vec<HandlerProcess>,
    /// The last failures, newest first.
    pub last_failures: Vec<LastFailure>,
    /// The jobs that ended in the last ten minutes.
    pub history: EndedJobs,
}

/// A failed job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastFailure {
    /// The job's id.
    pub id: String,
    /// The job's type.
    pub r#type: String,
    /// The job's queue.
    pub queue: String,
    /// The number of the failed attempt, from 1.
    pub attempt: u32,
    /// The error type, as reported.
    pub error_type: Option<String>,
    /// The message, as reported, but cut if it is long.
    pub message: String,
    /// The time since the failure, in seconds.
    pub ago_seconds: f64,
}

/// The counts of jobs that ended in the last ten minutes, in buckets of equal width, oldest first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EndedJobs {
    /// The width of a bucket, in seconds.
    pub bucket_seconds: u64,
    /// The elapsed part of the newest bucket, in seconds.
    pub newest_bucket_seconds: f64,
    /// The number of jobs that succeeded, by bucket.
    pub succeeded: Vec<u32>,
    /// The number of jobs that failed, by bucket.
    pub failed: Vec<u32>,
}

/// A worker loop and its current job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoopStatus {
    /// The loop's name: `THREAD:FIBER`.
    pub name: String,
    /// The current job, if any.
    pub job: Option<RunningJob>,
}

/// A running job.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunningJob {
    /// The job's id.
    pub id: String,
    /// The job's type.
    pub r#type: String,
    /// The job's queue.
    pub queue: String,
    /// The number of the attempt, from 1.
    pub attempt: u32,
    /// The time since the start of the job, in seconds.
    pub running_seconds: f64,
    /// The process id, once the process is started.
    pub pid: Option<u32>,
}

/// A reason why a worker cannot start jobs now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unready {
    /// The worker has no open stream, or is running and has no stream that takes jobs.
    NotConnected,
    /// The worker is paused.
    Paused,
    /// The worker is stopping. Contains the state, `draining` or `killing`.
    Stopping(&'static str),
    /// The handler of this name cannot be started.
    Broken(String),
}

impl fmt::Display for Unready {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotConnected => f.write_str("not connected to the server"),
            Self::Paused => f.write_str("paused, waiting for SIGCONT"),
            Self::Stopping(state) => f.write_str(state),
            Self::Broken(handler) => write!(f, "handler {handler} cannot be started"),
        }
    }
}
