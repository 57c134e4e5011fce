//! [`WorkerConfig`]: what a worker does, and its defaults.

use std::num::{NonZeroU64, NonZeroUsize};
use std::time::Duration;

use humantime::format_duration;
use tracing::info;

use super::declared;
use super::layers::Layers;
use super::tls;
use super::value::Raw;
use super::{ConfigError, DEFAULT_RETRY_MAX_WAIT, DEFAULT_RETRY_MIN_WAIT, DEFAULT_RETRY_MULTIPLIER, Source, Warning};
use crate::backoff::Backoff;
use crate::client::url::without_secrets;
use crate::client::{Connector, ServerUrl, Tls, WorkerId};
use crate::stream::{DEFAULT_MAX_JOB_SIZE, DEFAULT_STREAM_IDLE_TIMEOUT, StreamLimits};

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

/// The settings of a [`Worker`](crate::Worker).
#[derive(Debug, Clone, PartialEq)]
pub struct WorkerConfig {
    /// Where the server is.
    pub url: ServerUrl,
    /// Whom it trusts, and who it says it is, where `url` is https.
    pub tls: Tls,
    /// How connections to `url` are made: over the network, unless the embedding program supplies them.
    pub connector: Connector,
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
    /// Beyond these a take stream, or a job of it, is given up.
    pub stream_limits: StreamLimits,
    /// How long draining may take before it becomes killing.
    pub shutdown_deadline: Duration,
    /// After how many started jobs the worker drains by itself.
    pub max_jobs: Option<NonZeroU64>,
    /// After how long it does so.
    pub max_time: Option<Duration>,
    /// After how long without a job it does so.
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
            max_jobs: layers.pick(&declared::MAX_JOBS, Raw::count)?.map(at_most_u64),
            max_time: layers.pick(&declared::MAX_TIME, Raw::positive_duration)?,
            exit_when_idle: layers.pick(&declared::EXIT_WHEN_IDLE, Raw::positive_duration)?,
        })
    }

    /// How many jobs run at once: threads × fibers.
    pub fn concurrency(&self) -> NonZeroUsize {
        self.threads.saturating_mul(self.fibers)
    }

    /// Logs what a worker with these settings is about to do, and warns of what is allowed but hardly meant.
    pub(crate) fn announce(&self) {
        let (threads, fibers, prefetch) = (self.threads.get(), self.fibers.get(), self.prefetch.get());
        let queues = if self.queues.is_empty() { "(all)".to_owned() } else { self.queues.join(",") };
        let (version, worker_id) = (env!("CARGO_PKG_VERSION"), &self.worker_id);
        info!(version, %worker_id, url = %self.url, queues, threads, fibers, prefetch, "worker starting");
        self.low_prefetch().iter().for_each(Warning::log);
    }
}

fn at_most_u64(count: NonZeroUsize) -> NonZeroU64 {
    NonZeroU64::try_from(count).unwrap_or(NonZeroU64::MAX)
}

/// For each loop one job to run and one to follow it, so that none waits for a report's round trip.
pub(super) fn default_prefetch(concurrency: NonZeroUsize) -> NonZeroUsize {
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

/// Reads a url. It may hold a password by mistake, so no message quotes it whole.
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
        // Each of the two is right by itself. The blame goes to one that was given, for the defaults fit together.
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
