//! [`WorkerConfig`]: what a worker does, and its defaults.

use std::num::NonZeroUsize;
use std::time::Duration;

use super::layers::Layers;
use super::{ConfigError, DEFAULT_RETRY_MAX_WAIT, DEFAULT_RETRY_MIN_WAIT, DEFAULT_RETRY_MULTIPLIER, Source};
use crate::backoff::Backoff;
use crate::client::{ServerUrl, WorkerId};

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
    pub(super) fn resolve(layers: &Layers<'_>) -> Result<Self, ConfigError> {
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
