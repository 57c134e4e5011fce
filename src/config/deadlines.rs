//! Whether the deadlines fit into one another.

use std::time::Duration;

use humantime::format_duration;
use tracing::warn;

use super::Config;
use super::handler::table_of;
use crate::handler::{Handler, Mode};

impl Config {
    /// Warns of warm handlers that may have fewer processes than jobs that run at once.
    pub fn warn_of_pools(&self) {
        let concurrency = self.worker.concurrency().get();
        let routes = self.handlers.routes.iter().map(|(job_type, handler)| (Some(job_type.as_str()), handler));
        for (job_type, handler) in self.handlers.default.iter().map(|handler| (None, handler)).chain(routes) {
            let Mode::Warm(pool) = &handler.mode else { continue };
            if let Some(max_processes) = pool.max_processes.filter(|max| max.get() < concurrency) {
                warn!(
                    handler = table_of(job_type),
                    max_processes,
                    concurrency,
                    "max_processes is below threads x fibers: jobs beyond it wait in their worker loops, and jobs of other types wait behind them; raise max_processes, or lower threads or fibers"
                );
            }
        }
    }

    /// Warns of handlers whose limits are longer than a shutdown may take.
    pub fn warn_of_deadlines(&self) {
        let deadline = self.worker.shutdown_deadline;
        let routes = self.handlers.routes.iter().map(|(job_type, handler)| (Some(job_type.as_str()), handler));
        let all = self.handlers.default.iter().map(|handler| (None, handler)).chain(routes);
        all.for_each(|(job_type, handler)| warn_of(&table_of(job_type), handler, deadline));
    }
}

fn warn_of(table: &str, handler: &Handler, deadline: Duration) {
    let shutdown_deadline = format_duration(deadline).to_string();
    if let Some(timeout) = handler.timeout.filter(|timeout| *timeout > deadline) {
        let timeout = format_duration(timeout).to_string();
        warn!(
            handler = table,
            timeout,
            shutdown_deadline,
            "timeout is longer than the shutdown deadline: a job that takes its time is stopped at a shutdown and runs again; raise shutdown_deadline, or lower timeout"
        );
    }
    if handler.kill_grace > deadline {
        let kill_grace = format_duration(handler.kill_grace).to_string();
        warn!(
            handler = table,
            kill_grace,
            shutdown_deadline,
            "kill_grace is longer than the shutdown deadline: a stopped job may take longer to end than all others to finish; lower kill_grace, or raise shutdown_deadline"
        );
    }
}
