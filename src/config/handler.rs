//! [`Handler`]: the command for a job, and its settings. `Scope`: the lookup of these settings.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::time::Duration;

use signal_hook::low_level::signal_name;

use super::declared::{self, Declared};
use super::file::Keys;
use super::handlers::WrittenCommand;
use super::layers::{Layers, Parse, read};
use super::value::Raw;
use super::variable::{Variable, variable_of};
use super::{ConfigError, Source, Warning};
use crate::cli::Reach;
use crate::process::{Output, Program, Signal};

pub use super::handlers::Handlers;

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
    Warm(PoolSettings),
}

/// Default time limit for a warm handler to connect.
pub const DEFAULT_START_TIMEOUT: Duration = Duration::from_secs(60);

/// The size of a warm handler's pool, and the limits of its processes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PoolSettings {
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

impl Default for PoolSettings {
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

pub(super) const STDIN_NAMES: [(&str, Stdin); 3] =
    [("payload", Stdin::Payload), ("job", Stdin::Job), ("none", Stdin::None)];

/// The names of the modes, and whether each is warm.
pub(super) const MODE_NAMES: [(&str, bool); 2] = [("spawn", false), ("warm", true)];

pub(super) const OUTPUT_NAMES: [(&str, Output); 3] =
    [("log", Output::Log), ("inherit", Output::Inherit), ("null", Output::Null)];

/// The lookup of one handler's settings. A value in `route`, which is the table `[handlers.TYPE]`, overrides the value of the
/// default handler.
pub(super) struct Scope<'a> {
    pub(super) layers: &'a Layers<'a>,
    pub(super) name: String,
    pub(super) route: Option<&'a Keys>,
}

impl Scope<'_> {
    pub(super) fn handler(&self, (words, source): WrittenCommand) -> Result<Handler, ConfigError> {
        self.note("exec", &source);
        let mut words = words.into_iter();
        let Some(name) = words.next() else {
            return Err(ConfigError::new(source, "exec must name a command (got nothing)"));
        };
        let program = Program::find(name, words.collect(), self.layers.args.path_list.as_ref())
            .map_err(|problem| ConfigError::unusable(source, format!("handler cannot be run: {problem}")))?;
        let (success_exit_codes, kill_exit_codes) = self.exit_codes()?;
        Ok(Handler {
            mode: self.mode()?,
            env: self.env()?,
            cwd: self.cwd()?,
            stdin: self.pick(&declared::STDIN, |raw, name| raw.one_of(name, &STDIN_NAMES))?.unwrap_or_default(),
            output: self.pick(&declared::OUTPUT, |raw, name| raw.one_of(name, &OUTPUT_NAMES))?.unwrap_or_default(),
            success_exit_codes,
            kill_exit_codes,
            timeout: self.pick(&declared::TIMEOUT, Raw::positive_duration)?,
            kill_grace: self.pick(&declared::KILL_GRACE, Raw::duration)?.unwrap_or(DEFAULT_KILL_GRACE),
            drain_signal: self.pick(&declared::DRAIN_SIGNAL, |raw, name| raw.text(name).and_then(parse_signal))?,
            program,
        })
    }

    fn mode(&self) -> Result<Mode, ConfigError> {
        let is_warm = self.pick(&declared::MODE, is_warm)?.unwrap_or_default();
        // Check the settings of the pool even if the handler is spawned.
        let pool = self.pool()?;
        Ok(if is_warm { Mode::Warm(pool) } else { Mode::Spawn })
    }

    fn pool(&self) -> Result<PoolSettings, ConfigError> {
        let max = self.pick(&declared::MAX_PROCESSES, Raw::count)?;
        let min = self.locate(&declared::MIN_PROCESSES, Raw::count_from_0)?;
        if let (Some((min, source)), Some(max)) = (&min, max)
            && *min > max.get()
        {
            let problem = format!("min_processes must be at most max_processes ({max}) (got {min})");
            return Err(ConfigError::new(source.clone(), problem));
        }
        let max_jobs = self.pick(&declared::PROCESS_MAX_JOBS, Raw::count)?;
        Ok(PoolSettings {
            min_processes: min.map(|(min, _)| min).unwrap_or_default(),
            max_processes: max,
            start_timeout: self
                .pick(&declared::START_TIMEOUT, Raw::positive_duration)?
                .unwrap_or(DEFAULT_START_TIMEOUT),
            max_jobs: max_jobs.and_then(|count| count.try_into().ok()),
            max_age: self.pick(&declared::MAX_AGE, Raw::positive_duration)?,
            max_memory: self.pick(&declared::MAX_MEMORY, Raw::size)?.map(|bytes| bytes as u64),
            idle_timeout: self.pick(&declared::IDLE_TIMEOUT, Raw::positive_duration)?,
        })
    }

    /// Returns the value in the route's table, or else the value of the default handler.
    fn pick<T>(&self, declared: &Declared, parse: Parse<T>) -> Result<Option<T>, ConfigError> {
        Ok(self.locate(declared, parse)?.map(|(value, _)| value))
    }

    fn locate<T>(&self, declared: &Declared, parse: Parse<T>) -> Result<Option<(T, Source)>, ConfigError> {
        let own = self.own(declared, parse)?;
        let found = if own.is_some() { own } else { self.layers.locate(declared, parse)? };
        found.iter().for_each(|(_, source)| self.note(declared.table_and_key().1, source));
        Ok(found)
    }

    /// Returns the value in the route's table.
    pub(super) fn own<T>(&self, declared: &Declared, parse: Parse<T>) -> Result<Option<(T, Source)>, ConfigError> {
        let Some((raw, source)) = self.own_value(declared) else { return Ok(None) };
        Ok(Some((read(declared, &raw, &source, parse)?, source)))
    }

    fn own_value(&self, declared: &Declared) -> Option<(Raw, Source)> {
        self.layers.file.value_in(self.route?, declared.table_and_key().1)
    }

    fn note(&self, name: &str, source: &Source) {
        self.layers.note(&format!("{}.{name}", self.name), source, "");
    }

    /// Returns the handler's environment. Without `env_clear`, the handler inherits all variables of the worker's environment
    /// except those for which `is_the_workers_own` returns true. With `env_clear`, it inherits only the variables in `pass_env`.
    /// Variables in `env` override inherited ones, and the route's `env` overrides the default handler's.
    fn env(&self) -> Result<Vec<(OsString, OsString)>, ConfigError> {
        let clear = self.pick(&declared::ENV_CLEAR, Raw::boolean)?.unwrap_or_default();
        let pass = self.locate(&declared::PASS_ENV, Raw::strings)?;
        if let Some((names, source)) = &pass
            && !names.is_empty()
            && !clear
        {
            return Err(ConfigError::new(
                source.clone(),
                "pass_env goes with env_clear = true: without it, everything is passed",
            ));
        }
        let pass = pass.map(|(names, _)| names).unwrap_or_default();
        let is_passed = |name: &OsStr| {
            if clear { pass.iter().any(|pass| name == pass.as_str()) } else { !is_the_workers_own(name) }
        };
        let inherited = self.layers.args.environment.iter().filter(|(name, _)| is_passed(name));
        let mut env: Vec<(OsString, OsString)> = inherited.cloned().collect();
        let tables = [self.layers.file.value(&declared::ENV), self.own_value(&declared::ENV)];
        for (raw, source) in tables.into_iter().flatten() {
            self.note("env", &source);
            for (name, variable) in read(&declared::ENV, &raw, &source, Raw::variables)? {
                let value = self.value_of(&name, &variable, &source)?;
                self.layers.note(&variable_of(&self.name, &name), &source, variable.path());
                env.push((OsString::from(name), value));
            }
        }
        Ok(env)
    }

    /// Returns the value of a variable. In an offline check, a missing permission to read the value's file is only a warning,
    /// because `ExecReload=` can run such a check. Under systemd, the worker can read the files of its credentials, but a command
    /// of `ExecReload=` cannot.
    fn value_of(&self, name: &str, variable: &Variable, source: &Source) -> Result<OsString, ConfigError> {
        variable.resolve().or_else(|problem| {
            let is_check = self.layers.args.check() == Some(Reach::Offline);
            if !is_check || problem.kind() != ErrorKind::PermissionDenied {
                return Err(ConfigError::unusable(source.clone(), format!("env.{name}: {problem}")));
            }
            let (handler, variable, problem) = (self.name.clone(), name.to_owned(), problem.to_string());
            self.layers.warn(Warning::UnreadableVariable { handler, variable, problem });
            Ok(OsString::new())
        })
    }

    fn cwd(&self) -> Result<Option<PathBuf>, ConfigError> {
        let Some((cwd, source)) = self.locate(&declared::CWD, Raw::text)? else {
            return Ok(None);
        };
        match std::path::absolute(&cwd).ok().filter(|path| path.is_dir()) {
            Some(path) => Ok(Some(path)),
            None => Err(ConfigError::unusable(source, format!("cwd must be a directory that exists (got {cwd})"))),
        }
    }

    fn exit_codes(&self) -> Result<(BTreeSet<u8>, BTreeSet<u8>), ConfigError> {
        let success = self.pick(&declared::SUCCESS_EXIT_CODES, Raw::exit_codes)?.unwrap_or_default();
        let Some((kill, source)) = self.locate(&declared::KILL_EXIT_CODES, Raw::exit_codes)? else {
            return Ok((success, BTreeSet::new()));
        };
        match kill.iter().find(|code| **code == 0 || success.contains(code)) {
            Some(code) => {
                Err(ConfigError::new(source, format!("kill_exit_codes must not name a success (got {code})")))
            }
            None => Ok((success, kill)),
        }
    }
}

/// Reports whether a variable starts with `ZIZQ_`, or is for messages to the service manager. A handler that inherited a variable
/// for such messages could send them in the worker's name.
fn is_the_workers_own(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"ZIZQ_")
        || ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"].iter().any(|own| name == *own)
}

pub(super) fn is_warm(raw: &Raw, name: &str) -> Result<bool, String> {
    raw.one_of(name, &MODE_NAMES)
}

/// Parses a signal's name, with or without the prefix `SIG`. Rejects SIGKILL and SIGSTOP, which no process can catch.
fn parse_signal(name: String) -> Result<Signal, String> {
    let wanted = name.trim().to_uppercase();
    let named = |number: &i32| {
        signal_name(*number).is_some_and(|known| known == wanted || known.trim_start_matches("SIG") == wanted)
    };
    (1..32)
        .find(named)
        .and_then(Signal::from_named_raw)
        .filter(|signal| ![Signal::KILL, Signal::STOP].contains(signal))
        .ok_or_else(|| format!("drain_signal must be a signal that can be caught, like USR1 (got {name})"))
}
