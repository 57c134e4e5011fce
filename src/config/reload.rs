//! What of a configuration that is read again takes effect in a worker that runs.

use super::worker::default_prefetch;
use super::{Config, Setting, WorkerConfig};

/// Tables and keys that do. All others need a restart.
const RELOADABLE: [&str; 9] = [
    "url",
    "tls.",
    "handler.",
    "handlers.",
    "log.level",
    "worker.queues",
    "worker.prefetch",
    "worker.stream_idle_timeout",
    "worker.max_job_size",
];

impl Config {
    /// Makes this configuration, which has been read again, the one by which a running worker can go on: what needs a
    /// restart is as it runs.
    pub fn take_over(&mut self, running: &WorkerConfig) {
        let WorkerConfig { url, tls, queues, prefetch, stream_limits, .. } = self.worker.clone();
        // The default goes by threads and fibers, and those are as they were.
        let is_given = self.sources.contains_key("prefetch");
        let prefetch = if is_given { prefetch } else { default_prefetch(running.concurrency()) };
        self.worker = WorkerConfig { url, tls, queues, prefetch, stream_limits, ..running.clone() };
    }
}

impl Setting {
    /// Whether it takes effect in a worker that runs.
    pub fn is_reloadable(&self) -> bool {
        RELOADABLE.iter().any(|key| match key.strip_suffix('.') {
            Some(_) => self.name.starts_with(key),
            None => self.name == *key,
        })
    }
}
