//! [`Setting`]: one setting as it is in force, and where it was written, for people.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::time::Duration;

use bytesize::ByteSize;
use humantime::format_duration;
use signal_hook::low_level::signal_name;

use super::handler::{MODE_NAMES, ModeName, OUTPUT_NAMES, STDIN_NAMES, table_of};
use super::{Config, Source};
use crate::handler::{Handler, Mode};
use crate::stream::StreamLimits;

/// One setting in force.
#[derive(Debug, Clone)]
pub struct Setting {
    /// Its key in the configuration file.
    pub name: String,
    /// What it is.
    pub value: String,
    /// The same without what others need not know, where that is less.
    pub public_value: Option<String>,
    /// Where it was written; nowhere when it is the default.
    pub source: Option<Source>,
}

const NONE: &str = "none";

fn shown(value: Option<impl Display>, otherwise: &str) -> String {
    value.map_or(otherwise.to_owned(), |value| value.to_string())
}

fn duration(value: Duration) -> String {
    format_duration(value).to_string()
}

fn list(values: impl IntoIterator<Item = impl Display>) -> String {
    let values: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
    if values.is_empty() { NONE.to_owned() } else { values.join(", ") }
}

impl Config {
    /// Every setting in force, handlers last.
    pub fn settings(&self) -> Vec<Setting> {
        let mut settings = self.server_settings();
        settings.extend(self.worker_settings());
        settings.extend(self.other_settings());
        settings.extend(self.handlers.default.iter().flat_map(|handler| self.handler_settings(None, handler)));
        let mut routes: Vec<_> = self.handlers.routes.iter().collect();
        routes.sort_by_key(|(job_type, _)| *job_type);
        settings.extend(routes.iter().flat_map(|(job_type, handler)| self.handler_settings(Some(job_type), handler)));
        settings
    }

    /// A setting by its key, and by the name under which it is looked up.
    fn setting(&self, name: &str, looked_up: &str, value: impl Display) -> Setting {
        let source = self.sources.get(looked_up).map(|(source, _)| source.clone());
        Setting { name: name.to_owned(), value: value.to_string(), public_value: None, source }
    }

    fn server_settings(&self) -> Vec<Setting> {
        let StreamLimits { idle_timeout, max_job_size } = self.worker.stream_limits;
        let file = |name| shown(self.sources.get(name).map(|(_, path)| path), NONE);
        vec![
            self.setting("url", "url", &self.worker.url),
            self.setting("tls.ca", "tls-ca", file("tls-ca")),
            self.setting("tls.client_cert", "tls-client-cert", file("tls-client-cert")),
            self.setting("tls.client_key", "tls-client-key", file("tls-client-key")),
            self.setting("worker.stream_idle_timeout", "stream-idle-timeout", duration(idle_timeout)),
            self.setting("worker.max_job_size", "max-job-size", ByteSize(max_job_size as u64)),
            self.setting("worker.worker_id", "worker-id", &self.worker.worker_id),
        ]
    }

    fn worker_settings(&self) -> Vec<Setting> {
        let worker = &self.worker;
        let queues = if worker.queues.is_empty() { "all".to_owned() } else { list(&worker.queues) };
        let (min, max, multiplier) = worker.backoff.parts();
        vec![
            self.setting("worker.queues", "queues", queues),
            self.setting("worker.threads", "threads", worker.threads),
            self.setting("worker.fibers", "fibers", worker.fibers),
            self.setting("worker.prefetch", "prefetch", worker.prefetch),
            self.setting("worker.retry_min_wait", "retry-min-wait", duration(min)),
            self.setting("worker.retry_max_wait", "retry-max-wait", duration(max)),
            self.setting("worker.retry_multiplier", "retry-multiplier", multiplier),
            self.setting("worker.shutdown_deadline", "shutdown-deadline", duration(worker.shutdown_deadline)),
            self.setting("worker.max_jobs", "max-jobs", shown(worker.max_jobs, "no limit")),
            self.setting("worker.max_time", "max-time", shown(worker.max_time.map(duration), "no limit")),
            self.setting(
                "worker.exit_when_idle",
                "exit-when-idle",
                shown(worker.exit_when_idle.map(duration), "never"),
            ),
        ]
    }

    fn other_settings(&self) -> Vec<Setting> {
        let level = self.log.filter.clone().unwrap_or_else(|| self.log.level.to_string());
        let mut log_level = self.setting("log.level", "log-level", level);
        if self.log.filter.is_some() {
            log_level.source = Some(Source::Variable("RUST_LOG".to_owned()));
        }
        vec![
            log_level,
            self.setting("log.format", "log-format", shown(self.log.format, "pretty on a terminal, else compact")),
            self.setting("admin.listen", "admin-listen", shown(self.admin.as_ref(), "off")),
        ]
    }

    fn handler_settings(&self, job_type: Option<&str>, handler: &Handler) -> Vec<Setting> {
        let table = table_of(job_type);
        let setting = |name: &str, value: String| {
            let name = format!("{table}.{name}");
            self.setting(&name, &name, value)
        };
        let path = handler.program.path().display().to_string();
        let names: BTreeSet<_> = handler.env.iter().map(|(name, _)| name.to_string_lossy()).collect();
        let mut settings = vec![
            Setting { public_value: Some(path), ..setting("exec", handler.program.to_string()) },
            setting("mode", name_in(&MODE_NAMES, ModeName::of(&handler.mode))),
            setting("stdin", name_in(&STDIN_NAMES, handler.stdin)),
            setting("output", name_in(&OUTPUT_NAMES, handler.output)),
            Setting { public_value: Some(format!("{} variables", names.len())), ..setting("env", list(&names)) },
            setting("cwd", shown(handler.cwd.as_ref().map(|cwd| cwd.display()), "the worker's")),
            setting("success_exit_codes", list(&handler.success_exit_codes)),
            setting("kill_exit_codes", list(&handler.kill_exit_codes)),
            setting("timeout", shown(handler.timeout.map(duration), NONE)),
            setting("kill_grace", duration(handler.kill_grace)),
            setting("drain_signal", shown(handler.drain_signal.and_then(|signal| signal_name(signal.as_raw())), NONE)),
        ];
        if let Mode::Warm(pool) = &handler.mode {
            const OFF: &str = "off";
            settings.extend([
                setting("min_processes", pool.min_processes.to_string()),
                setting("max_processes", shown(pool.max_processes, "threads x fibers")),
                setting("start_timeout", duration(pool.start_timeout)),
                setting("max_jobs", shown(pool.max_jobs, OFF)),
                setting("max_age", shown(pool.max_age.map(duration), OFF)),
                setting("max_memory", shown(pool.max_memory.map(ByteSize), OFF)),
                setting("idle_timeout", shown(pool.idle_timeout.map(duration), OFF)),
            ]);
        }
        settings
    }
}

fn name_in<T: PartialEq>(names: &[(&str, T)], value: T) -> String {
    let found = names.iter().find(|(_, named)| *named == value);
    found.map_or_else(String::new, |(name, _)| (*name).to_owned())
}
