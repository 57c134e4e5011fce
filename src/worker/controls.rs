//! [`Controls`]: what can be asked of a worker, and told to it, while it runs.

use std::sync::Arc;
use std::time::Duration;

use super::Summary;
use super::activity::{Activity, Connection, Counts, Current};
use super::intake::Intake;
use super::status::{LoopStatus, RunningJob, Status, Unready};
use crate::config::WorkerConfig;
use crate::dispatch::Dispatcher;
use crate::lifecycle::{Lifecycle, Phase};
use crate::metrics::{Age, CountedType, Gauges, Metrics};
use crate::watch;

/// The handle by which a worker is watched and steered; to stop it is the [`Lifecycle`]'s.
#[derive(Debug)]
pub struct Controls<D> {
    pub(super) dispatcher: Arc<D>,
    pub(super) intake: Intake,
    pub(super) activity: Activity,
    pub(super) metrics: Metrics,
}

impl<D> Clone for Controls<D> {
    fn clone(&self) -> Self {
        Self {
            dispatcher: Arc::clone(&self.dispatcher),
            intake: self.intake.clone(),
            activity: self.activity.clone(),
            metrics: self.metrics.clone(),
        }
    }
}

impl<D: Dispatcher> Controls<D> {
    /// What jobs are done by.
    pub fn dispatcher(&self) -> &D {
        &self.dispatcher
    }

    /// Takes nothing more. When everything that was taken has been reported, the stream is closed, so that the server can
    /// give its jobs to others. Returns whether it took jobs before.
    pub fn pause(&self) -> bool {
        self.intake.set_paused(true)
    }

    /// Takes jobs again. Returns whether it was paused.
    pub fn resume(&self) -> bool {
        self.intake.set_paused(false)
    }

    /// Takes jobs by the url, TLS settings, queues, prefetch and stream limits in `config` from now on, over a new stream.
    /// Returns whether anything is new in them. The present stream stays open until everything that came over it has been
    /// reported to its server. If that server does not answer any more, its jobs are reported to the new one.
    pub fn reconnect(&self, config: &WorkerConfig) -> bool {
        self.intake.change_settings(config)
    }

    /// The counters that have come with a reload.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Waits for changes of the streams that are open.
    pub(crate) fn connection(&self) -> watch::Receiver<Connection> {
        self.activity.connection()
    }

    /// What it is doing.
    pub fn status(&self, lifecycle: &Lifecycle) -> Status {
        let Counts { running, waiting } = self.activity.counts();
        let Summary { succeeded, failed, interrupted, .. } = self.activity.ended().summary();
        Status {
            state: self.state(lifecycle),
            connected: self.activity.is_connected(),
            finishing_streams: self.activity.finishing_streams(),
            uptime_seconds: seconds(self.activity.uptime()),
            running,
            waiting,
            reports_waiting: self.metrics.waiting_reports(),
            succeeded,
            failed,
            interrupted,
            loops: self.activity.loops().map(|(name, current)| self.loop_status(name, current)).collect(),
            handlers: self.dispatcher.handlers(),
            handler_processes: self.dispatcher.processes(),
            last_failures: self.activity.failures().list(),
            history: self.activity.history().list(),
        }
    }

    fn loop_status(&self, name: &str, current: Option<Current>) -> LoopStatus {
        let job = current.map(|Current { id, job_type, queue, attempt, started }| RunningJob {
            pid: self.dispatcher.pid(&id),
            id: id.to_string(),
            r#type: job_type,
            queue,
            attempt,
            running_seconds: seconds(started.elapsed()),
        });
        LoopStatus { name: name.to_owned(), job }
    }

    fn state(&self, lifecycle: &Lifecycle) -> &'static str {
        match lifecycle.phase() {
            Phase::Running if self.intake.is_paused() => "paused",
            Phase::Running => "running",
            Phase::Draining => "draining",
            Phase::Killing | Phase::Forcing | Phase::Stopped => "killing",
        }
    }

    /// Why it cannot start jobs now; nothing when it can.
    pub fn unready(&self, lifecycle: &Lifecycle) -> Vec<Unready> {
        let state = self.state(lifecycle);
        let of_state = match state {
            "running" => None,
            "paused" => Some(Unready::Paused),
            _ => Some(Unready::Stopping(state)),
        };
        let is_connected = if state == "running" { self.activity.is_taking() } else { self.activity.is_connected() };
        let unconnected = (!is_connected).then_some(Unready::NotConnected);
        let broken = self.dispatcher.broken().into_iter().map(Unready::Broken);
        of_state.into_iter().chain(unconnected).chain(broken).collect()
    }

    /// All counters, in the text format of Prometheus.
    pub fn metrics_text(&self, lifecycle: &Lifecycle) -> String {
        let Counts { running, waiting } = self.activity.counts();
        let (loops, connected) = (self.activity.loop_names().count(), self.activity.is_taking());
        let gauges = Gauges {
            running,
            waiting,
            loops,
            connected,
            state: self.state(lifecycle),
            types: self.types(),
            running_jobs: self.running_jobs(),
            processes: self.dispatcher.processes(),
            process_starts: self.dispatcher.process_starts(),
        };
        // It fails for names that Prometheus does not know; that there are none is held by a test.
        self.metrics.text(gauges).unwrap_or_default()
    }
}

impl<D: Dispatcher> Controls<D> {
    fn types(&self) -> Vec<CountedType> {
        let types = self.dispatcher.types_counted_apart().into_iter();
        types.map(|name| CountedType { failures: self.dispatcher.usual_failures(&name), name }).collect()
    }

    fn running_jobs(&self) -> Vec<Age> {
        let running = self.activity.loops().filter_map(|(_, current)| current);
        let age = |Current { job_type, started, .. }: Current| Age {
            is_apart: self.dispatcher.is_counted_apart(&job_type),
            job_type,
            seconds: seconds(started.elapsed()),
        };
        running.map(age).collect()
    }
}

/// Microseconds are as fine as anybody wants to read.
pub(super) fn seconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e6
}
