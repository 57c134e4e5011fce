//! The state of handlers and of their processes, as the admin server and the metrics show it.

use serde::Serialize;

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
    /// The resident memory of the process, without that of its children. `None` if it cannot be read.
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
    /// The reason why the replaced process ended, or `demand` if the new process replaced none.
    pub reason: &'static str,
    /// The number of started processes.
    pub count: u64,
}
