//! What of a configuration that is read again takes effect in a worker that runs.

use super::worker::default_prefetch;
use super::{Config, WorkerConfig, declared};

impl Config {
    /// Makes this configuration, which has been read again, the one by which a running worker can go on: what needs a
    /// restart is as it runs.
    pub fn take_over(&mut self, running: &WorkerConfig) {
        let WorkerConfig { url, tls, queues, prefetch, stream_limits, .. } = self.worker.clone();
        // The default goes by threads and fibers, and those are as they were.
        let is_given = self.sources.contains_key(declared::PREFETCH.key);
        let prefetch = if is_given { prefetch } else { default_prefetch(running.concurrency()) };
        self.worker = WorkerConfig { url, tls, queues, prefetch, stream_limits, ..running.clone() };
    }
}
