//! [`Warning`]: a warning about a valid configuration that is probably a mistake.

use std::fmt;
use std::time::Duration;

use tracing::warn;

use super::declared::duration;
use super::handler::{Handler, Mode, PoolSettings};
use super::handlers::table_of;
use super::{Config, WorkerConfig};

/// A warning about a valid configuration that is probably a mistake. The worker logs warnings at its start and at a reload, and
/// `--check` prints them. `handler` is the name of the handler's table in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the fields are the documentation")]
pub enum Warning {
    /// An environment variable that starts with `ZIZQ_` but belongs to no setting.
    UnknownVariable { variable: String, nearest: Option<String> },
    /// A prefetch below the number of worker loops, so that some loops stay idle.
    LowPrefetch { prefetch: usize, concurrency: usize },
    /// A warm handler whose `max_processes` is below the number of worker loops.
    FewProcesses { handler: String, max_processes: usize, concurrency: usize },
    /// Settings of warm handlers in a table whose handlers are all spawned.
    NotWarm { handler: String, settings: String },
    /// A file that holds the value of a variable, and that only the running worker may read.
    UnreadableVariable { handler: String, variable: String, problem: String },
    /// A handler for a job type that contains `*`. The `*` matches only itself.
    Pattern { handler: String },
    /// A handler whose time limit is longer than the shutdown deadline.
    LongTimeout { handler: String, timeout: Duration, shutdown_deadline: Duration },
    /// A handler whose `kill_grace` is longer than the shutdown deadline.
    LongGrace { handler: String, kill_grace: Duration, shutdown_deadline: Duration },
}

const UNKNOWN_VARIABLE: &str =
    "variable is no setting and has no effect; correct its name, unless another program has it";

const LOW_PREFETCH: &str = "prefetch is below threads x fibers: the server never hands out enough jobs for every worker loop, so some stay idle; raise prefetch";

const FEW_PROCESSES: &str = "max_processes is below threads x fibers: jobs beyond it wait in their worker loops, and jobs of other types wait behind them; raise max_processes, or lower threads or fibers";

const NOT_WARM: &str = "settings of warm handlers have no effect here, because the handler is spawned; set mode = \"warm\", or remove them";

const UNREADABLE_VARIABLE: &str =
    "this check may not read the file of a variable, so its contents are not checked; a start needs them";

const PATTERN: &str = "a job type is not a pattern: the handler gets only jobs whose type has that very `*`; name each type in a table of its own";

const LONG_TIMEOUT: &str = "timeout is longer than the shutdown deadline: a job that takes its time is stopped at a shutdown and runs again; raise shutdown_deadline, or lower timeout";

const LONG_GRACE: &str = "kill_grace is longer than the shutdown deadline: a stopped job may take longer to end than all others to finish; lower kill_grace, or raise shutdown_deadline";

impl Warning {
    /// Logs the warning.
    pub fn log(&self) {
        match self {
            Self::UnknownVariable { variable, nearest } => {
                warn!(variable, nearest = nearest.as_deref(), "{UNKNOWN_VARIABLE}");
            }
            Self::LowPrefetch { prefetch, concurrency } => {
                warn!(prefetch, concurrency, idle = concurrency - prefetch, "{LOW_PREFETCH}");
            }
            Self::FewProcesses { handler, max_processes, concurrency } => {
                warn!(handler, max_processes, concurrency, "{FEW_PROCESSES}");
            }
            Self::NotWarm { handler, settings } => warn!(handler, settings, "{NOT_WARM}"),
            Self::UnreadableVariable { handler, variable, problem } => {
                warn!(handler, variable, problem, "{UNREADABLE_VARIABLE}");
            }
            Self::Pattern { handler } => warn!(handler, "{PATTERN}"),
            Self::LongTimeout { handler, timeout, shutdown_deadline } => {
                let (timeout, shutdown_deadline) = (duration(*timeout), duration(*shutdown_deadline));
                warn!(handler, timeout, shutdown_deadline, "{LONG_TIMEOUT}");
            }
            Self::LongGrace { handler, kill_grace, shutdown_deadline } => {
                let (kill_grace, shutdown_deadline) = (duration(*kill_grace), duration(*shutdown_deadline));
                warn!(handler, kill_grace, shutdown_deadline, "{LONG_GRACE}");
            }
        }
    }
}

/// Displays the message, followed by the values of the warning's fields in parentheses.
impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownVariable { variable, nearest: None } => write!(f, "{UNKNOWN_VARIABLE} ({variable})"),
            Self::UnknownVariable { variable, nearest: Some(nearest) } => {
                write!(f, "{UNKNOWN_VARIABLE} ({variable}; the nearest setting is {nearest})")
            }
            Self::LowPrefetch { prefetch, concurrency } => {
                write!(f, "{LOW_PREFETCH} (prefetch {prefetch}, threads x fibers {concurrency})")
            }
            Self::FewProcesses { handler, max_processes, concurrency } => {
                write!(f, "{FEW_PROCESSES} ({handler}.max_processes {max_processes}, threads x fibers {concurrency})")
            }
            Self::NotWarm { handler, settings } => write!(f, "{NOT_WARM} ({handler}: {settings})"),
            Self::UnreadableVariable { handler, variable, problem } => {
                write!(f, "{UNREADABLE_VARIABLE} ({handler}.env.{variable}: {problem})")
            }
            Self::Pattern { handler } => write!(f, "{PATTERN} ({handler})"),
            Self::LongTimeout { handler, timeout, shutdown_deadline } => {
                let (timeout, deadline) = (duration(*timeout), duration(*shutdown_deadline));
                write!(f, "{LONG_TIMEOUT} ({handler}.timeout {timeout}, shutdown_deadline {deadline})")
            }
            Self::LongGrace { handler, kill_grace, shutdown_deadline } => {
                let (grace, deadline) = (duration(*kill_grace), duration(*shutdown_deadline));
                write!(f, "{LONG_GRACE} ({handler}.kill_grace {grace}, shutdown_deadline {deadline})")
            }
        }
    }
}

impl Config {
    /// Returns all warnings about this configuration.
    pub fn warnings(&self) -> Vec<Warning> {
        let handlers = self.handlers.by_type();
        let handlers = handlers.flat_map(|(job_type, handler)| self.handler_warnings(job_type, handler));
        let mut handlers: Vec<Warning> = handlers.collect();
        handlers.sort_by_key(ToString::to_string);
        self.found_warnings.iter().cloned().chain(self.worker.low_prefetch()).chain(handlers).collect()
    }

    fn handler_warnings(&self, job_type: Option<&str>, handler: &Handler) -> Vec<Warning> {
        let (concurrency, shutdown_deadline) = (self.worker.concurrency().get(), self.worker.shutdown_deadline);
        let (name, kill_grace) = (|| table_of(job_type), handler.kill_grace);
        let mut warnings = Vec::new();
        if job_type.is_some_and(|job_type| job_type.contains('*')) {
            warnings.push(Warning::Pattern { handler: name() });
        }
        if let Mode::Warm(PoolSettings { max_processes: Some(max), .. }) = &handler.mode
            && max.get() < concurrency
        {
            warnings.push(Warning::FewProcesses { handler: name(), max_processes: max.get(), concurrency });
        }
        if let Some(timeout) = handler.timeout.filter(|timeout| *timeout > shutdown_deadline) {
            warnings.push(Warning::LongTimeout { handler: name(), timeout, shutdown_deadline });
        }
        if kill_grace > shutdown_deadline {
            warnings.push(Warning::LongGrace { handler: name(), kill_grace, shutdown_deadline });
        }
        warnings
    }
}

impl WorkerConfig {
    /// Returns a warning if the prefetch is too low to keep all worker loops busy.
    pub(crate) fn low_prefetch(&self) -> Option<Warning> {
        let (prefetch, concurrency) = (self.prefetch.get(), self.concurrency().get());
        (prefetch < concurrency).then_some(Warning::LowPrefetch { prefetch, concurrency })
    }
}
