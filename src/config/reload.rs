//! What of a configuration that is read again takes effect in a worker that runs.

use super::worker::default_prefetch;
use super::{Config, WorkerConfig};

impl Config {
    /// The settings of the worker after this configuration has been read again: those of the stream are new, and all others
    /// are as they run. With the keys of those that would be other after a restart.
    pub fn taken_over(&self, running: &WorkerConfig) -> (WorkerConfig, Vec<&'static str>) {
        let WorkerConfig {
            url,
            tls,
            queues,
            prefetch,
            stream_limits,
            worker_id,
            threads,
            fibers,
            backoff,
            shutdown_deadline,
            max_jobs,
            max_time,
            exit_when_idle,
        } = &self.worker;
        let prefetch =
            if self.is_given("prefetch") { *prefetch } else { default_prefetch(running.concurrency()) };
        let waiting = [
            ("worker_id", *worker_id != running.worker_id),
            ("threads", *threads != running.threads),
            ("fibers", *fibers != running.fibers),
            ("retry_min_wait, retry_max_wait or retry_multiplier", *backoff != running.backoff),
            ("shutdown_deadline", *shutdown_deadline != running.shutdown_deadline),
            ("max_jobs", *max_jobs != running.max_jobs),
            ("max_time", *max_time != running.max_time),
            ("exit_when_idle", *exit_when_idle != running.exit_when_idle),
        ];
        let taken_over = WorkerConfig {
            url: url.clone(),
            tls: tls.clone(),
            queues: queues.clone(),
            prefetch,
            stream_limits: *stream_limits,
            ..running.clone()
        };
        (taken_over, waiting.into_iter().filter(|(_, differs)| *differs).map(|(name, _)| name).collect())
    }

    /// Whether a setting was given anywhere.
    fn is_given(&self, name: &str) -> bool {
        self.sources.contains_key(name)
    }
}
