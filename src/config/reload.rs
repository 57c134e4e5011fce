//! [`Config::take_over`]: the settings of a reload that take effect in a running worker.

use super::worker::default_prefetch;
use super::{Config, WorkerConfig, declared};

impl Config {
    /// Turns a reloaded configuration into one for the running worker. Settings that need a restart keep their `running` values.
    pub fn take_over(&mut self, running: &WorkerConfig) {
        let WorkerConfig { url, tls, queues, prefetch, stream_limits, .. } = self.worker.clone();
        // Compute the default from the running threads and fibers, because new ones take effect only at a restart.
        let is_given = self.sources.contains_key(declared::PREFETCH.key);
        let prefetch = if is_given { prefetch } else { default_prefetch(running.concurrency()) };
        self.worker = WorkerConfig { url, tls, queues, prefetch, stream_limits, ..running.clone() };
    }
}
