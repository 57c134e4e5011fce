//! [`WorkerConfig`]: the settings of a worker, and their defaults.

use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use humantime::format_duration;
use tracing::info;

use super::declared;
use super::layers::Layers;
use super::tls;
use super::value::Raw;
use super::{
    Config, ConfigError, DEFAULT_RETRY_MAX_WAIT, DEFAULT_RETRY_MIN_WAIT, DEFAULT_RETRY_MULTIPLIER, Source, Warning,
};
use crate::backoff::Backoff;
use crate::client::url::without_secrets;
use crate::client::{Connector, ServerUrl, Tls, WorkerId};
use crate::stream::{DEFAULT_MAX_JOB_SIZE, DEFAULT_STREAM_IDLE_TIMEOUT, StreamLimits};

/// Default of `threads`. One job at a time is safe for every handler.
pub const DEFAULT_THREADS: NonZeroUsize = NonZeroUsize::MIN;

/// Default of `fibers`. One job at a time is safe for every handler.
pub const DEFAULT_FIBERS: NonZeroUsize = NonZeroUsize::MIN;

/// Default time limit for running jobs to finish at a shutdown. Most jobs finish within this time.
pub const DEFAULT_SHUTDOWN_DEADLINE: Duration = Duration::from_secs(30);

/// The maximum of `threads` × `fibers`. One machine cannot run this many processes well, and a server's default limit of
/// unreported jobs is far lower (1024).
const MAX_CONCURRENCY: usize = 65_536;

/// Characters that the server refuses in the name of a queue.
const FORBIDDEN_IN_QUEUES: [char; 8] = [',', '*', '?', '[', ']', '{', '}', '\\'];

/// The settings of a [`Worker`](crate::Worker).
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerConfig {
    /// The server's URL.
    pub url: ServerUrl,
    /// The trusted certificates and the client certificate, if `url` is https.
    pub tls: Tls,
    /// The source of connections to `url`. The default connects over the network. A program that embeds the worker can supply its
    /// own connections.
    pub connector: Connector,
    /// The worker's name in the server's log.
    pub worker_id: WorkerId,
    /// The queues to take jobs from. Empty means all queues.
    pub queues: Vec<String>,
    /// The number of groups of worker loops.
    pub threads: NonZeroUsize,
    /// The number of worker loops in each group.
    pub fibers: NonZeroUsize,
    /// The maximum number of jobs that the worker has received and not yet reported.
    pub prefetch: NonZeroUsize,
    /// The backoff between attempts to reconnect, and between attempts to send a report.
    pub backoff: Backoff,
    /// The maximum silence on a take stream, and the maximum size of a job.
    pub stream_limits: StreamLimits,
    /// The time limit for a drain. When it expires, running jobs are killed.
    pub shutdown_deadline: Duration,
    /// The number of started jobs after which the worker drains.
    pub max_jobs: Option<NonZeroU64>,
    /// The running time after which the worker drains.
    pub max_time: Option<Duration>,
    /// The time without a job after which the worker drains.
    pub exit_when_idle: Option<Duration>,
}

impl Default for WorkerConfig {
    fn default() -> Self {
        Self {
            url: ServerUrl::default(),
            tls: Tls::default(),
            connector: Connector::default(),
            worker_id: WorkerId::default(),
            queues: Vec::new(),
            threads: DEFAULT_THREADS,
            fibers: DEFAULT_FIBERS,
            prefetch: default_prefetch(DEFAULT_THREADS.saturating_mul(DEFAULT_FIBERS)),
            backoff: Backoff::default(),
            stream_limits: StreamLimits::default(),
            shutdown_deadline: DEFAULT_SHUTDOWN_DEADLINE,
            max_jobs: None,
            max_time: None,
            exit_when_idle: None,
        }
    }
}

impl WorkerConfig {
    pub(super) fn resolve(layers: &Layers<'_>) -> Result<Self, ConfigError> {
        let threads = layers.pick(&declared::THREADS, Raw::count)?.unwrap_or(DEFAULT_THREADS);
        let fibers = layers.pick(&declared::FIBERS, Raw::count)?.unwrap_or(DEFAULT_FIBERS);
        let concurrency = concurrency(layers, threads, fibers)?;
        let prefetch = layers.pick(&declared::PREFETCH, |raw, name| raw.count_up_to(name, 2 * MAX_CONCURRENCY))?;
        let deadline = layers.pick(&declared::SHUTDOWN_DEADLINE, Raw::positive_duration)?;
        let queues = layers.pick(&declared::QUEUES, |raw, name| raw.list(name).and_then(check_queues))?;
        let (url, url_source) = layers.locate(&declared::URL, server_url)?.unzip();
        let url = url.unwrap_or_default();
        Ok(Self {
            tls: tls::resolve(layers, &url, url_source.unwrap_or(Source::Missing))?,
            connector: Connector::default(),
            url,
            worker_id: layers.pick(&declared::WORKER_ID, Raw::parsed)?.unwrap_or_default(),
            queues: queues.unwrap_or_default(),
            threads,
            fibers,
            prefetch: prefetch.unwrap_or(default_prefetch(concurrency)),
            backoff: resolve_backoff(layers)?,
            stream_limits: resolve_stream_limits(layers)?,
            shutdown_deadline: deadline.unwrap_or(DEFAULT_SHUTDOWN_DEADLINE),
            max_jobs: layers.pick(&declared::MAX_JOBS, Raw::count)?.and_then(|count| count.try_into().ok()),
            max_time: layers.pick(&declared::MAX_TIME, Raw::positive_duration)?,
            exit_when_idle: layers.pick(&declared::EXIT_WHEN_IDLE, Raw::positive_duration)?,
        })
    }

    /// Returns the maximum number of jobs that run at once: threads × fibers.
    pub fn concurrency(&self) -> NonZeroUsize {
        self.threads.saturating_mul(self.fibers)
    }

    /// Logs the main settings at the start of a worker, and a warning if the prefetch is too low to keep all worker loops busy.
    pub(crate) fn announce(&self) {
        let (threads, fibers, prefetch) = (self.threads.get(), self.fibers.get(), self.prefetch.get());
        let queues = if self.queues.is_empty() { "(all)".to_owned() } else { self.queues.join(",") };
        let (version, worker_id) = (env!("CARGO_PKG_VERSION"), &self.worker_id);
        info!(version, %worker_id, url = %self.url, queues, threads, fibers, prefetch, "worker starting");
        self.low_prefetch().iter().for_each(Warning::log);
    }
}

impl Config {
    /// Turns a reloaded configuration into one for the running worker. Settings that need a restart keep their `running` values.
    pub fn take_over(&mut self, running: &WorkerConfig) {
        let WorkerConfig { url, tls, queues, prefetch, stream_limits, .. } = self.worker.clone();
        // Compute the default from the threads and fibers of the running worker, because a change of these two needs a restart.
        let is_given = self.sources.contains_key(declared::PREFETCH.key);
        let prefetch = if is_given { prefetch } else { default_prefetch(running.concurrency()) };
        self.worker = WorkerConfig { url, tls, queues, prefetch, stream_limits, ..running.clone() };
    }
}

/// Returns the default prefetch: two jobs per worker loop, one running and one queued. With only one job per loop, a loop would
/// be idle while its report travels to the server and the next job travels to the worker.
fn default_prefetch(concurrency: NonZeroUsize) -> NonZeroUsize {
    concurrency.saturating_add(concurrency.get())
}

fn concurrency(layers: &Layers<'_>, threads: NonZeroUsize, fibers: NonZeroUsize) -> Result<NonZeroUsize, ConfigError> {
    match threads.checked_mul(fibers).filter(|product| product.get() <= MAX_CONCURRENCY) {
        Some(concurrency) => Ok(concurrency),
        None => {
            let larger = if threads >= fibers { &declared::THREADS } else { &declared::FIBERS };
            let source = layers.locate(larger, |_, _| Ok(()))?.map_or(Source::Missing, |((), source)| source);
            Err(ConfigError::new(
                source,
                format!("threads x fibers must be at most {MAX_CONCURRENCY} (got {threads} x {fibers})"),
            ))
        }
    }
}

/// Parses a URL. Messages omit the user, the password and the query, which can be secrets.
fn server_url(raw: &Raw, name: &str) -> Result<ServerUrl, String> {
    match raw.text(name) {
        Ok(url) => url.parse(),
        Err(_) => Err(format!("url must be a string (got {})", without_secrets(&raw.to_string()))),
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
    let min = layers.locate(&declared::RETRY_MIN_WAIT, Raw::positive_duration)?;
    let max = layers.locate(&declared::RETRY_MAX_WAIT, Raw::positive_duration)?;
    let growth = |raw: &Raw, name: &str| raw.number(name).and_then(check_growth);
    let multiplier = layers.pick(&declared::RETRY_MULTIPLIER, growth)?;
    let min_wait = min.as_ref().map_or(DEFAULT_RETRY_MIN_WAIT, |(wait, _)| *wait);
    let max_wait = max.as_ref().map_or(DEFAULT_RETRY_MAX_WAIT, |(wait, _)| *wait);
    Backoff::try_new(min_wait, max_wait, multiplier.unwrap_or(DEFAULT_RETRY_MULTIPLIER)).map_err(|problem| {
        // Each wait is valid by itself, and the default waits fit together, so at least one wait in this conflict was given by the
        // user. Report the source of that wait.
        match (min, max) {
            (Some((_, source)), None) => {
                let (least, most) = (format_duration(min_wait), format_duration(max_wait));
                let problem =
                    format!("retry_min_wait must be at most retry_max_wait ({most} unless set) (got {least})");
                ConfigError::new(source, problem)
            }
            (_, max) => ConfigError::new(max.map_or(Source::Missing, |(_, source)| source), problem),
        }
    })
}

fn resolve_stream_limits(layers: &Layers<'_>) -> Result<StreamLimits, ConfigError> {
    let idle_timeout = layers.pick(&declared::STREAM_IDLE_TIMEOUT, Raw::positive_duration)?;
    let max_job_size = layers.pick(&declared::MAX_JOB_SIZE, Raw::size)?;
    Ok(StreamLimits {
        idle_timeout: idle_timeout.unwrap_or(DEFAULT_STREAM_IDLE_TIMEOUT),
        max_job_size: max_job_size.unwrap_or(DEFAULT_MAX_JOB_SIZE),
    })
}

fn check_growth(multiplier: f64) -> Result<f64, String> {
    if multiplier >= 1.0 && multiplier.is_finite() {
        Ok(multiplier)
    } else {
        Err(format!("retry_multiplier must be at least 1 (got {multiplier})"))
    }
}
