//! [`Status`]: what a worker is doing, for people and programs. [`Unready`]: why it cannot work now.

use std::fmt;

use serde::Serialize;

use crate::dispatch::{HandlerProcess, HandlerStatus};

/// What a worker is doing, and has done since it started.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Status {
    /// `running`, `paused`, `draining` or `killing`.
    pub state: &'static str,
    /// Whether a take stream is open.
    pub connected: bool,
    /// Streams from before a reload, which stay open until the jobs that came over them are reported.
    pub finishing_streams: usize,
    /// For how long it has been there.
    pub uptime_seconds: f64,
    /// Jobs that run.
    pub running: usize,
    /// Jobs that were taken, and wait for a worker loop.
    pub waiting: usize,
    /// Reports that the server has not accepted yet.
    pub reports_waiting: i64,
    /// Jobs that succeeded.
    pub succeeded: u64,
    /// Jobs that failed.
    pub failed: u64,
    /// Jobs that were cut short, and go back to the server.
    pub interrupted: u64,
    /// What each worker loop is at.
    pub loops: Vec<LoopStatus>,
    /// The handlers that are configured.
    pub handlers: Vec<HandlerStatus>,
    /// The processes of warm handlers, those of replaced handlers included.
    pub handler_processes: Vec<HandlerProcess>,
    /// The last failures, newest first.
    pub last_failures: Vec<LastFailure>,
    /// The jobs that have ended in the last minutes.
    pub history: EndedJobs,
}

/// A job that has failed.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LastFailure {
    /// The server's name for the job.
    pub id: String,
    /// Its type.
    pub r#type: String,
    /// Its queue.
    pub queue: String,
    /// Which attempt failed, from 1.
    pub attempt: u32,
    /// The kind of failure, as it was reported.
    pub error_type: Option<String>,
    /// The message, as it was reported; cut if it is long.
    pub message: String,
    /// The time since the failure.
    pub ago_seconds: f64,
}

/// The jobs that have ended in the last minutes, in buckets of equal width, oldest first.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EndedJobs {
    /// The width of a bucket.
    pub bucket_seconds: u64,
    /// The part of the newest bucket that is over.
    pub newest_bucket_seconds: f64,
    /// The number of jobs that succeeded, by bucket.
    pub succeeded: Vec<u32>,
    /// The number of jobs that failed, by bucket.
    pub failed: Vec<u32>,
}

/// What a worker loop is at.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LoopStatus {
    /// The loop's name: `THREAD:FIBER`.
    pub name: String,
    /// Its job, if it has one.
    pub job: Option<RunningJob>,
}

/// A job that runs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RunningJob {
    /// The server's name for it.
    pub id: String,
    /// Its type.
    pub r#type: String,
    /// Its queue.
    pub queue: String,
    /// Which attempt it is, from 1.
    pub attempt: u32,
    /// For how long it has been running.
    pub running_seconds: f64,
    /// Its process, once it has been started.
    pub pid: Option<u32>,
}

/// Why a worker cannot start jobs now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unready {
    /// It has no stream.
    NotConnected,
    /// It was told to take nothing.
    Paused,
    /// It is on its way to a stop.
    Stopping(&'static str),
    /// That handler cannot be started.
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
