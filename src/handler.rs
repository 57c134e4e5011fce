//! [`Handler`]: what is run for a job, and how; [`Handlers`]: which one for which type.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};
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

/// How often a handler is started.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Mode {
    /// Once for each job.
    #[default]
    Spawn,
    /// Once for many jobs, which come to it over a socket.
    Warm(Pool),
}

/// How long a warm handler may take to connect.
pub const DEFAULT_START_TIMEOUT: Duration = Duration::from_secs(60);

/// How many processes of a warm handler there are, and for how long.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// How many stay, however long they have been idle.
    pub min_processes: usize,
    /// How many there are at most; as many as there are worker loops when not given.
    pub max_processes: Option<NonZeroUsize>,
    /// How long a process may take from its start until it connects.
    pub start_timeout: Duration,
    /// How many jobs a process does at most before another takes its place. Up to a quarter more, by chance.
    pub max_jobs: Option<NonZeroU64>,
    /// How old a process becomes at most. Up to a quarter more, by chance.
    pub max_age: Option<Duration>,
    /// How much memory a process may have resident after a job, in bytes.
    pub max_memory: Option<u64>,
    /// How long a process may be idle.
    pub idle_timeout: Option<Duration>,
}

impl Default for Pool {
    fn default() -> Self {
        Self {
            min_processes: 0,
            max_processes: None,
            start_timeout: DEFAULT_START_TIMEOUT,
            max_jobs: None,
            max_age: None,
            max_memory: None,
            idle_timeout: None,
        }
    }
}

/// What is run for a job, and what its exit means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// The executable and its arguments.
    pub program: Program,
    /// How often it is started.
    pub mode: Mode,
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
            mode: Mode::default(),
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
    /// Whether a handler is warm.
    pub(crate) fn is_any_warm(&self) -> bool {
        self.routes.values().chain(&self.default).any(|handler| matches!(handler.mode, Mode::Warm(_)))
    }

    /// Returns each handler with its job type; the default one has none.
    pub(crate) fn by_type(&self) -> impl Iterator<Item = (Option<&str>, &Handler)> {
        let routes = self.routes.iter().map(|(job_type, handler)| (Some(job_type.as_str()), handler));
        self.default.iter().map(|handler| (None, handler)).chain(routes)
    }

    /// Returns the longest time that a job may take, with its end; nothing if a handler has no limit.
    pub(crate) fn longest_job(&self) -> Option<Duration> {
        let longest = |(_, handler): (_, &Handler)| Some(handler.timeout? + handler.kill_grace);
        self.by_type().map(longest).try_fold(Duration::ZERO, |longest, job| Some(longest.max(job?)))
    }

    /// The longest `kill_grace` of all.
    pub(crate) fn longest_grace(&self) -> Duration {
        self.routes.values().chain(&self.default).map(|handler| handler.kill_grace).max().unwrap_or_default()
    }
}
