//! [`Handler`]: the command for a job, and its settings. [`Handlers`]: the handlers by job type.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use crate::process::{Output, Program, Signal};

/// Default time between SIGTERM and SIGKILL.
pub const DEFAULT_KILL_GRACE: Duration = Duration::from_secs(5);

/// The input on a handler's stdin.
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

/// The number of jobs that a process of a handler runs: one, or many.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Mode {
    /// One process for each job.
    #[default]
    Spawn,
    /// One process for many jobs, which it receives over a socket.
    Warm(Pool),
}

/// Default time limit for a warm handler to connect.
pub const DEFAULT_START_TIMEOUT: Duration = Duration::from_secs(60);

/// The size of a warm handler's pool, and the limits of its processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pool {
    /// The number of processes that are kept even after `idle_timeout`.
    pub min_processes: usize,
    /// The maximum number of processes. `None` means one for each worker loop.
    pub max_processes: Option<NonZeroUsize>,
    /// The time limit for a process to connect after its start.
    pub start_timeout: Duration,
    /// The number of jobs after which a process is replaced, extended by up to 25 % at random.
    pub max_jobs: Option<NonZeroU64>,
    /// The age at which a process is replaced, extended by up to 25 % at random.
    pub max_age: Option<Duration>,
    /// The resident memory in bytes, measured after each job, above which a process is replaced.
    pub max_memory: Option<u64>,
    /// The idle time after which a process beyond `min_processes` is ended.
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

/// The command for a job, and its settings.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handler {
    /// The executable and its arguments.
    pub program: Program,
    /// The mode: one process for each job, or one for many.
    pub mode: Mode,
    /// The whole environment of the command, except the variables that the worker adds for each process.
    pub env: Vec<(OsString, OsString)>,
    /// The working directory. `None` means the worker's own.
    pub cwd: Option<PathBuf>,
    /// The input on stdin.
    pub stdin: Stdin,
    /// The destination of the output.
    pub output: Output,
    /// Exit statuses that count as success, besides 0.
    pub success_exit_codes: BTreeSet<u8>,
    /// Exit statuses after which the job is not retried.
    pub kill_exit_codes: BTreeSet<u8>,
    /// The time limit of a job.
    pub timeout: Option<Duration>,
    /// The time between SIGTERM and SIGKILL.
    pub kill_grace: Duration,
    /// The signal that announces a drain to running processes.
    pub drain_signal: Option<Signal>,
}

impl Handler {
    /// Returns a handler with default settings and an empty environment.
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

/// The handlers by job type, and the default one.
#[derive(Debug, Clone, Default)]
pub struct Handlers {
    /// The handlers by exact job type.
    pub routes: HashMap<String, Handler>,
    /// The handler for all other types.
    pub default: Option<Handler>,
}

impl Handlers {
    fn all(&self) -> impl Iterator<Item = &Handler> {
        self.routes.values().chain(&self.default)
    }

    /// Reports whether any handler is warm.
    pub(crate) fn is_any_warm(&self) -> bool {
        self.all().any(|handler| matches!(handler.mode, Mode::Warm(_)))
    }

    /// Returns the number of simultaneous processes to expect if up to `concurrency` jobs run at once: the sizes of all warm
    /// pools together, or `concurrency` if that is greater.
    pub(crate) fn max_processes(&self, concurrency: usize) -> usize {
        let warm = self.all().filter_map(|handler| match &handler.mode {
            Mode::Spawn => None,
            Mode::Warm(pool) => Some(pool.max_processes.map_or(concurrency, NonZeroUsize::get)),
        });
        warm.sum::<usize>().max(concurrency)
    }

    /// Returns each handler with its job type, `None` for the default handler.
    pub(crate) fn by_type(&self) -> impl Iterator<Item = (Option<&str>, &Handler)> {
        let routes = self.routes.iter().map(|(job_type, handler)| (Some(job_type.as_str()), handler));
        self.default.iter().map(|handler| (None, handler)).chain(routes)
    }

    /// Returns the longest time that a job can take, including the kill grace. `None` if a handler has no time limit.
    pub(crate) fn longest_job(&self) -> Option<Duration> {
        self.all().try_fold(Duration::ZERO, |longest, handler| Some(longest.max(handler.timeout? + handler.kill_grace)))
    }

    /// Returns the longest `kill_grace` of all handlers.
    pub(crate) fn longest_grace(&self) -> Duration {
        self.all().map(|handler| handler.kill_grace).max().unwrap_or_default()
    }
}
