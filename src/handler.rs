//! [`Handler`]: what is run for a job, and how; [`Handlers`]: which one for which type.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use crate::process::{Output, Program, Signal};

/// How long a terminated job may take to end before it is killed.
pub const DEFAULT_KILL_GRACE: Duration = Duration::from_secs(5);

/// What comes on a handler's stdin.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Stdin {
    /// The payload's JSON.
    #[default]
    Payload,
    /// The whole job as the server sent it, as JSON.
    Job,
    /// Nothing.
    None,
}

/// What is run for a job, and what its exit means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// The executable and its arguments.
    pub program: Program,
    /// Its whole environment, but for what it is told about the job.
    pub env: Vec<(OsString, OsString)>,
    /// Its working directory; the worker's own when not given.
    pub cwd: Option<PathBuf>,
    /// What it reads.
    pub stdin: Stdin,
    /// Where its output goes.
    pub output: Output,
    /// Exit statuses that count as success, besides 0.
    pub success_exit_codes: BTreeSet<u8>,
    /// Exit statuses after which the job is not tried again.
    pub kill_exit_codes: BTreeSet<u8>,
    /// How long it may run.
    pub timeout: Option<Duration>,
    /// How long it may take to end when it is terminated.
    pub kill_grace: Duration,
    /// What it is sent when the worker is told to stop.
    pub drain_signal: Option<Signal>,
}

impl Handler {
    /// A handler with nothing but defaults, in an empty environment.
    pub fn new(program: Program) -> Self {
        Self {
            program,
            env: Vec::new(),
            cwd: None,
            stdin: Stdin::default(),
            output: Output::default(),
            success_exit_codes: BTreeSet::new(),
            kill_exit_codes: BTreeSet::new(),
            timeout: None,
            kill_grace: DEFAULT_KILL_GRACE,
            drain_signal: None,
        }
    }
}

/// The handlers: by job type, and the one for all other types.
#[derive(Debug, Clone, Default)]
pub struct Handlers {
    /// By type, exactly as it is written.
    pub routes: HashMap<String, Handler>,
    /// For types without a route.
    pub default: Option<Handler>,
}

impl Handlers {
    /// The longest `kill_grace` of all.
    pub(crate) fn longest_grace(&self) -> Duration {
        self.routes.values().chain(&self.default).map(|handler| handler.kill_grace).max().unwrap_or_default()
    }
}
