//! [`Controls`]: the handle to watch and control a running worker.

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

/// The handle to watch and control a running worker. The [`Lifecycle`] stops the worker.
#[derive(Debug)]
pub struct Controls<D> {
    pub(super) dispatcher: Arc<D>,
    pub(super) intake: Intake,
    pub(super) activity: Arc<Activity>,
    pub(super) metrics: Metrics,
}

impl<D> Clone for Controls<D> {
    fn clone(&self) -> Self {
        Self {
            dispatcher: Arc::clone(&self.dispatcher),
            intake: self.intake.clone(),
            activity: Arc::clone(&self.activity),
            metrics: self.metrics.clone(),
        }
    }
}

impl<D: Dispatcher> Controls<D> {
    /// Returns the worker's dispatcher.
    pub fn dispatcher(&self) -> &D {
        &self.dispatcher
    }

    /// Pauses the worker. A paused worker takes no more jobs, and closes its stream once all taken jobs are reported. The server
    /// then sends new jobs to other workers only. Returns false if the worker was already paused.
    pub fn pause(&self) -> bool {
        self.intake.set_paused(true)
    }

    /// Resumes the worker. Returns whether it was paused.
    pub fn resume(&self) -> bool {
        self.intake.set_paused(false)
    }

    /// Opens a new stream with the URL, TLS settings, queues, prefetch and stream limits in `config`, and takes new jobs over
    /// that stream. Does nothing and returns false if none of these settings has changed. The old stream stays open until all its
    /// jobs are reported to its server. If the old server stops answering, these jobs are reported to the new server.
    pub fn reconnect(&self, config: &WorkerConfig) -> bool {
        self.intake.change_settings(config)
    }

    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Returns a receiver that is notified when a stream opens or closes.
    pub(crate) fn connection(&self) -> watch::Receiver<Connection> {
        self.activity.connection.subscribe()
    }

    /// Returns the worker's status.
    pub fn status(&self, lifecycle: &Lifecycle) -> Status {
        let Counts { running, waiting } = self.activity.counts();
        let Summary { succeeded, failed, interrupted, .. } = self.activity.ended.summary();
        let Connection { is_open, finishing, .. } = *self.activity.connection.borrow();
        Status {
            state: self.state(lifecycle),
            connected: is_open,
            finishing_streams: finishing,
            uptime_seconds: seconds(self.activity.started.elapsed()),
            running,
            waiting,
            reports_waiting: self.metrics.waiting_reports(),
            succeeded,
            failed,
            interrupted,
            loops: self.activity.loops().map(|(name, current)| self.loop_status(name, current)).collect(),
            handlers: self.dispatcher.handlers(),
            handler_processes: self.dispatcher.processes(),
            last_failures: self.activity.failures.list(),
            history: self.activity.history.list(),
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

    /// Returns the reasons why the worker cannot start jobs now, or an empty list if it can.
    pub fn unready(&self, lifecycle: &Lifecycle) -> Vec<Unready> {
        let state = self.state(lifecycle);
        let of_state = match state {
            "running" => None,
            "paused" => Some(Unready::Paused),
            _ => Some(Unready::Stopping(state)),
        };
        let Connection { is_taking, is_open, .. } = *self.activity.connection.borrow();
        let is_connected = if state == "running" { is_taking } else { is_open };
        let unconnected = (!is_connected).then_some(Unready::NotConnected);
        let broken = self.dispatcher.broken().into_iter().map(Unready::Broken);
        of_state.into_iter().chain(unconnected).chain(broken).collect()
    }

    /// Returns all metrics in the text format of Prometheus.
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
            handlers: self.dispatcher.handlers(),
        };
        // Encoding fails only for names that Prometheus rejects. A test checks that no metric has such a name.
        self.metrics.text(gauges).unwrap_or_default()
    }

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

/// Returns a duration in seconds, rounded down to whole microseconds.
pub(super) fn seconds(duration: Duration) -> f64 {
    duration.as_micros() as f64 / 1e6
}
