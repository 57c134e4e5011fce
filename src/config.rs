//! [`Config`]: every setting resolved and checked. A flag or variable wins over the file, the file over the `DEFAULT_*`.

mod file;
mod value;

use std::ffi::OsString;
use std::fmt;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::backoff::Backoff;
use crate::cli::Args;
use crate::client::{ServerUrl, WorkerId};
use crate::process::Program;
use file::{ConfigFile, Field};
use value::Raw;

pub use crate::backoff::{DEFAULT_RETRY_MAX_WAIT, DEFAULT_RETRY_MIN_WAIT, DEFAULT_RETRY_MULTIPLIER};
pub use crate::client::DEFAULT_URL;

/// One job at a time is right for every handler; more is for whoever knows that theirs can stand it.
pub const DEFAULT_THREADS: NonZeroUsize = NonZeroUsize::MIN;

/// Like threads.
pub const DEFAULT_FIBERS: NonZeroUsize = NonZeroUsize::MIN;

/// Time for jobs of ordinary length to end.
pub const DEFAULT_SHUTDOWN_DEADLINE: Duration = Duration::from_secs(30);

/// More loops than processes that one machine runs well, and far more than a server hands out by default (1024).
const MAX_CONCURRENCY: usize = 65_536;

/// Characters that the server refuses in the name of a queue.
const FORBIDDEN_IN_QUEUES: [char; 8] = [',', '*', '?', '[', ']', '{', '}', '\\'];

/// Everything that the program needs to know.
#[derive(Debug)]
pub struct Config {
    /// What the worker does.
    pub worker: WorkerConfig,
    /// What is run for a job.
    pub handler: Program,
    /// What is logged, and how.
    pub log: LogConfig,
    /// The server to start in this process.
    pub embedded: Option<EmbeddedConfig>,
}

/// The settings of a [`Worker`](crate::Worker).
#[derive(Debug, Clone)]
pub struct WorkerConfig {
    /// Where the server is.
    pub url: ServerUrl,
    /// What the server calls the worker in its log.
    pub worker_id: WorkerId,
    /// The queues to take jobs from; none means all.
    pub queues: Vec<String>,
    /// How many groups of worker loops there are.
    pub threads: NonZeroUsize,
    /// How many loops are in each group.
    pub fibers: NonZeroUsize,
    /// How many unreported jobs the server may hand to this worker.
    pub prefetch: NonZeroUsize,
    /// The waits before reconnecting, and before a report is sent again.
    pub backoff: Backoff,
    /// How long draining may take before it becomes killing.
    pub shutdown_deadline: Duration,
    /// After how long without a job the worker drains by itself.
    pub exit_when_idle: Option<Duration>,
}

/// The settings of the log.
#[derive(Debug, Clone, Default)]
pub struct LogConfig {
    /// From which severity on events are logged.
    pub level: LogLevel,
    /// How they are written; by whether stderr is a terminal when not given.
    pub format: Option<LogFormat>,
    /// `RUST_LOG`: a filter that wins over the level.
    pub filter: Option<String>,
}

/// The severities of the log, by their names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// The forms of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Coloured, for people at a terminal.
    Pretty,
    /// One plain line for each event, for journals.
    Compact,
    /// One JSON object for each event, for machines.
    Json,
}

/// The server in this process.
#[derive(Debug)]
pub struct EmbeddedConfig {
    /// Where the jobs to start with come from.
    pub jobs: Option<JobsSource>,
}

/// Where NDJSON lines are read from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobsSource {
    /// Standard input.
    Stdin,
    /// A file.
    File(PathBuf),
}

impl fmt::Display for JobsSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("stdin"),
            Self::File(path) => path.display().fmt(f),
        }
    }
}

/// Where a setting's value was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A flag, with its dashes.
    Flag(String),
    /// The words after `--`.
    TrailingCommand,
    /// An environment variable.
    Variable(String),
    /// A line of the configuration file.
    File(PathBuf, usize),
    /// Nowhere, though it is needed.
    Missing,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) | Self::Variable(name) => f.write_str(name),
            Self::TrailingCommand => f.write_str("the command after --"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Missing => f.write_str("the command line"),
        }
    }
}

/// A mistake in a setting: where it is, and what would be right.
#[derive(Debug)]
pub struct ConfigError {
    source: Source,
    problem: String,
    status: u8,
}

/// Exit status for a mistake on the command line, as everywhere.
const STATUS_USAGE: u8 = 2;

/// Exit status for a mistake in the configuration: `EX_CONFIG` of sysexits(3).
const STATUS_CONFIG: u8 = 78;

impl ConfigError {
    /// A mistake in the value that `source` gives.
    pub(crate) fn new(source: Source, problem: impl Into<String>) -> Self {
        let status = if matches!(source, Source::File(..)) { STATUS_CONFIG } else { STATUS_USAGE };
        Self { source, problem: problem.into(), status }
    }

    /// A mistake in what `source` refers to: a file or a handler.
    pub(crate) fn unusable(source: Source, problem: impl Into<String>) -> Self {
        Self { source, problem: problem.into(), status: STATUS_CONFIG }
    }

    /// The exit status that tells it apart.
    pub fn exit_status(&self) -> u8 {
        self.status
    }
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.source, self.problem)
    }
}

impl std::error::Error for ConfigError {}

impl Config {
    /// Resolves and checks every setting.
    ///
    /// # Errors
    /// The first mistake found.
    pub fn resolve(args: &Args) -> Result<Self, ConfigError> {
        let file = ConfigFile::load(args.given("config").as_ref())?;
        let layers = Layers { args, file: &file };
        let worker = WorkerConfig::resolve(&layers)?;
        let embedded = resolve_embedded(args, &worker.url)?;
        Ok(Self { handler: resolve_handler(&layers)?, log: LogConfig::resolve(&layers)?, worker, embedded })
    }
}

/// The command line and the file, one over the other.
struct Layers<'a> {
    args: &'a Args,
    file: &'a ConfigFile,
}

impl Layers<'_> {
    /// The value of one setting, read by `parse`, from the uppermost layer that has one.
    fn pick<T>(
        &self,
        name: &'static str,
        in_file: &Field,
        parse: impl Fn(&Raw<'_>) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        self.locate(name, in_file, parse).map(|found| found.map(|(value, _)| value))
    }

    /// The same, with the place where it was found.
    fn locate<T>(
        &self,
        name: &'static str,
        in_file: &Field,
        parse: impl Fn(&Raw<'_>) -> Result<T, String>,
    ) -> Result<Option<(T, Source)>, ConfigError> {
        let given = self.args.given(name);
        let (raw, source) = match (&given, in_file) {
            (Some(given), _) => (Raw::Text(&given.values), given.source.clone()),
            (None, Some(field)) => (Raw::Toml(field.get_ref()), self.file.source(field)),
            (None, None) => return Ok(None),
        };
        match parse(&raw) {
            Ok(value) => Ok(Some((value, source))),
            Err(problem) => Err(ConfigError::new(source, problem)),
        }
    }
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            url: ServerUrl::default(),
            worker_id: WorkerId::default(),
            queues: Vec::new(),
            threads: DEFAULT_THREADS,
            fibers: DEFAULT_FIBERS,
            prefetch: default_prefetch(DEFAULT_THREADS.saturating_mul(DEFAULT_FIBERS)),
            backoff: Backoff::default(),
            shutdown_deadline: DEFAULT_SHUTDOWN_DEADLINE,
            exit_when_idle: None,
        }
    }
}

impl WorkerConfig {
    fn resolve(layers: &Layers<'_>) -> Result<Self, ConfigError> {
        let file = &layers.file.table.worker;
        let threads = layers.pick("threads", &file.threads, |raw| raw.count("threads"))?.unwrap_or(DEFAULT_THREADS);
        let fibers = layers.pick("fibers", &file.fibers, |raw| raw.count("fibers"))?.unwrap_or(DEFAULT_FIBERS);
        let concurrency = concurrency(layers, threads, fibers)?;
        let prefetch =
            layers.pick("prefetch", &file.prefetch, |raw| raw.count_up_to("prefetch", 2 * MAX_CONCURRENCY))?;
        let deadline = layers
            .pick("shutdown-deadline", &file.shutdown_deadline, |raw| raw.positive_duration("shutdown_deadline"))?;
        let idle =
            layers.pick("exit-when-idle", &file.exit_when_idle, |raw| raw.positive_duration("exit_when_idle"))?;
        let queues = layers.pick("queues", &file.queues, |raw| raw.list("queues").and_then(check_queues))?;
        Ok(Self {
            url: layers.pick("url", &layers.file.table.url, |raw| raw.parsed("url"))?.unwrap_or_default(),
            worker_id: layers.pick("worker-id", &file.worker_id, |raw| raw.parsed("worker_id"))?.unwrap_or_default(),
            queues: queues.unwrap_or_default(),
            threads,
            fibers,
            prefetch: prefetch.unwrap_or(default_prefetch(concurrency)),
            backoff: resolve_backoff(layers)?,
            shutdown_deadline: deadline.unwrap_or(DEFAULT_SHUTDOWN_DEADLINE),
            exit_when_idle: idle,
        })
    }

    /// How many jobs run at once: threads × fibers.
    pub fn concurrency(&self) -> NonZeroUsize {
        self.threads.saturating_mul(self.fibers)
    }
}

/// For each loop one job to run and one to follow it, so that none waits for a report's round trip.
fn default_prefetch(concurrency: NonZeroUsize) -> NonZeroUsize {
    concurrency.saturating_add(concurrency.get())
}

fn concurrency(layers: &Layers<'_>, threads: NonZeroUsize, fibers: NonZeroUsize) -> Result<NonZeroUsize, ConfigError> {
    match threads.checked_mul(fibers).filter(|product| product.get() <= MAX_CONCURRENCY) {
        Some(concurrency) => Ok(concurrency),
        None => {
            let file = &layers.file.table.worker;
            let (larger, field) = if threads >= fibers { ("threads", &file.threads) } else { ("fibers", &file.fibers) };
            let source = layers.locate(larger, field, |_| Ok(()))?.map_or(Source::Missing, |((), source)| source);
            Err(ConfigError::new(
                source,
                format!("threads x fibers must be at most {MAX_CONCURRENCY} (got {threads} x {fibers})"),
            ))
        }
    }
}

fn check_queues(queues: Vec<String>) -> Result<Vec<String>, String> {
    let bad = queues.iter().find_map(|queue| queue.find(FORBIDDEN_IN_QUEUES).map(|at| (queue, &queue[at..])));
    match bad {
        Some((queue, rest)) => {
            let refused = rest.chars().next().unwrap_or_default();
            Err(format!("queues must be names without , * ? [ ] {{ }} \\ (got {refused} in {queue:?})"))
        }
        None => Ok(queues),
    }
}

fn resolve_backoff(layers: &Layers<'_>) -> Result<Backoff, ConfigError> {
    let file = &layers.file.table.worker;
    let duration = |name: &'static str, field, setting| layers.locate(name, field, |raw| raw.duration(setting));
    let min = duration("retry-min-wait", &file.retry_min_wait, "retry_min_wait")?;
    let max = duration("retry-max-wait", &file.retry_max_wait, "retry_max_wait")?;
    let multiplier = layers.locate("retry-multiplier", &file.retry_multiplier, |raw| raw.number("retry_multiplier"))?;
    // A wrong combination is shown where one of the two was given: the defaults fit together.
    let min_wait = min.as_ref().map_or(DEFAULT_RETRY_MIN_WAIT, |(wait, _)| *wait);
    let max_wait = max.as_ref().map_or(DEFAULT_RETRY_MAX_WAIT, |(wait, _)| *wait);
    let growth = multiplier.as_ref().map_or(DEFAULT_RETRY_MULTIPLIER, |(growth, _)| *growth);
    Backoff::try_new(min_wait, max_wait, growth).map_err(|problem| {
        let sources = [
            ("retry_min_wait must", &min.map(|m| m.1)),
            ("retry_max_wait", &max.map(|m| m.1)),
            ("retry_multiplier", &multiplier.map(|m| m.1)),
        ];
        let named = sources.iter().find(|(name, source)| problem.starts_with(name) && source.is_some());
        let any = sources.iter().find_map(|(_, source)| source.as_ref());
        let source = named.and_then(|(_, source)| source.as_ref()).or(any).cloned().unwrap_or(Source::Missing);
        ConfigError::new(source, problem)
    })
}

fn resolve_handler(layers: &Layers<'_>) -> Result<Program, ConfigError> {
    let (words, source) = handler_words(layers)?;
    let mut words = words.into_iter();
    let Some(name) = words.next() else {
        return Err(ConfigError::new(source, "exec must name a command (got nothing)"));
    };
    Program::find(name, words.collect(), layers.args.path_list.as_ref())
        .map_err(|problem| ConfigError::unusable(source, format!("handler cannot be run: {problem}")))
}

fn handler_words(layers: &Layers<'_>) -> Result<(Vec<OsString>, Source), ConfigError> {
    let flag = layers.args.given("exec").map(|given| given.source);
    match layers.args.trailing_command() {
        Some(_) if matches!(flag, Some(Source::Flag(_))) => {
            Err(ConfigError::new(Source::TrailingCommand, "give the handler once: with --exec or after --, not both"))
        }
        Some(words) => Ok((words, Source::TrailingCommand)),
        None => layers.locate("exec", &layers.file.table.handler.exec, |raw| raw.command("exec"))?.ok_or_else(|| {
            let help = "no handler given; say what to run with --exec \"CMD ARGS\", -- CMD ARGS, ZIZQ_EXEC, or exec in the file's [handler]";
            ConfigError::new(Source::Missing, help)
        }),
    }
}

impl LogConfig {
    fn resolve(layers: &Layers<'_>) -> Result<Self, ConfigError> {
        let file = &layers.file.table.log;
        Ok(Self {
            level: layers
                .pick("log-level", &file.level, |raw| raw.one_of("log_level", &LogLevel::NAMES))?
                .unwrap_or_default(),
            format: layers.pick("log-format", &file.format, |raw| raw.one_of("log_format", &LogFormat::NAMES))?,
            filter: layers.args.rust_log.clone(),
        })
    }
}

impl LogLevel {
    const NAMES: [(&'static str, Self); 5] = [
        ("error", Self::Error),
        ("warn", Self::Warn),
        ("info", Self::Info),
        ("debug", Self::Debug),
        ("trace", Self::Trace),
    ];
}

impl LogFormat {
    const NAMES: [(&'static str, Self); 3] =
        [("pretty", Self::Pretty), ("compact", Self::Compact), ("json", Self::Json)];
}

#[cfg(feature = "embedded")]
fn resolve_embedded(args: &Args, url: &ServerUrl) -> Result<Option<EmbeddedConfig>, ConfigError> {
    let given = args.given("jobs");
    let jobs = given.as_ref().and_then(|given| given.values.last()).map(|file| match file.as_str() {
        "-" => JobsSource::Stdin,
        file => JobsSource::File(Path::new(file).to_owned()),
    });
    let flag = |name: &str| Source::Flag(name.to_owned());
    match args.is_set("embedded") {
        false if jobs.is_some() => {
            Err(ConfigError::new(flag("--jobs"), "only the embedded server takes jobs from a file; add --embedded"))
        }
        true if url.is_https() => {
            Err(ConfigError::new(flag("--embedded"), "the embedded server speaks plain http; change url"))
        }
        true if !url.prefix().is_empty() => Err(ConfigError::new(
            flag("--embedded"),
            format!("the embedded server has no path prefix; take {} off url", url.prefix()),
        )),
        embedded => Ok(embedded.then_some(EmbeddedConfig { jobs })),
    }
}

#[cfg(not(feature = "embedded"))]
fn resolve_embedded(_: &Args, _: &ServerUrl) -> Result<Option<EmbeddedConfig>, ConfigError> {
    Ok(None)
}
