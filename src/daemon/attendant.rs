//! [`Attendant`]: handles the requests that signals make, and reports the worker's state to the service manager and the terminal.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::OptionFuture;
use humantime::format_duration;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::{JoinError, JoinHandle, spawn_blocking};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval};
use tracing::{error, info, warn};

use crate::admin::Inspector;
use crate::cli::Args;
use crate::config::{Config, ConfigError, Warning, WorkerConfig};
use crate::dispatch::HandlerProcess;
use crate::lifecycle::{Lifecycle, Phase, Request};
use crate::logging::Log;
use crate::supervisor::Supervisor;
use crate::worker::{LoopStatus, RunningJob, Status};

/// Update interval of the live line on the terminal.
const LIVE_PERIOD: Duration = Duration::from_secs(1);

/// Time that a worker in `Phase::Killing` has to exit, in addition to the longest kill grace. It is twice the time limit of the
/// last report attempts.
const MARGIN: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub(super) struct Attendant {
    pub(super) args: Arc<Args>,
    pub(super) log: Log,
    pub(super) inspector: Arc<Inspector>,
    /// The settings of the running worker.
    pub(super) running: WorkerConfig,
    /// The longest kill grace of all handlers since the start, including those that a reload has replaced.
    pub(super) longest_grace: Duration,
    /// The longest time that a job can take under the settings in force. `None` if a handler has no time limit.
    pub(super) longest_job: Option<Duration>,
    pub(super) supervisor: Option<Supervisor>,
    /// The task that reads the settings during a reload.
    pub(super) reading: Option<JoinHandle<Result<Config, ConfigError>>>,
}

impl Attendant {
    /// Handles requests until the worker has stopped. This task also notifies the watchdog, each time after it has read the
    /// worker's status. Reading the status takes locks that jobs take too, so a deadlock on these locks stops the notifications.
    pub(super) async fn attend(mut self, mut requests: UnboundedReceiver<Request>) {
        let lifecycle = self.inspector.lifecycle.clone();
        let mut ticks = self.supervisor.as_ref().map(Supervisor::period).map(ticks_every);
        if let Some(supervisor) = &self.supervisor {
            supervisor.ready();
        }
        let mut connection = self.inspector.controls.connection();
        loop {
            tokio::select! {
                biased;
                () = lifecycle.reached(Phase::Draining) => break,
                Some(request) = requests.recv() => self.obey(request),
                Some(read) = OptionFuture::from(self.reading.as_mut()) => self.finish_reload(read),
                Ok(()) = connection.changed() => self.tell(),
                Some(_) = OptionFuture::from(ticks.as_mut().map(Interval::tick)) => self.tell(),
            }
        }
        self.attend_stop(requests).await;
    }

    async fn attend_stop(mut self, mut requests: UnboundedReceiver<Request>) {
        let lifecycle = self.inspector.lifecycle.clone();
        if let Some(supervisor) = &mut self.supervisor {
            supervisor.stopping(&self.inspector.worker());
        }
        let mut stop = StopTimes { begun: Instant::now(), asked: None, killed: None };
        let period = self.supervisor.as_ref().map(Supervisor::period);
        let mut ticks = self.log.live_line().map(|_| LIVE_PERIOD).or(period).map(ticks_every);
        loop {
            tokio::select! {
                biased;
                () = lifecycle.reached(Phase::Stopped) => break,
                Some(request) = requests.recv() => self.obey(request),
                Some(_) = OptionFuture::from(ticks.as_mut().map(Interval::tick)) => {
                    stop.look_at(&lifecycle);
                    self.tell_of(&stop);
                    self.show(&stop);
                }
            }
        }
        if let Some(line) = self.log.live_line() {
            line.show("");
        }
    }

    fn tell(&mut self) {
        if let Some(supervisor) = &mut self.supervisor {
            supervisor.tell(&self.inspector.worker());
        }
    }

    fn tell_of(&mut self, stop: &StopTimes) {
        self.tell();
        // A process that survives SIGKILL hangs in the kernel. Once the grace and `MARGIN` have passed, stop asking for more time,
        // so that the service manager enforces its own time limit for the stop.
        let is_in_time = stop.killed.is_none_or(|killed| killed.elapsed() < self.longest_grace + MARGIN);
        if let Some(supervisor) = self.supervisor.as_ref().filter(|_| is_in_time) {
            supervisor.extend();
        }
    }

    fn show(&self, stop: &StopTimes) {
        let Some(line) = self.log.live_line() else { return };
        let Status { running, .. } = self.inspector.worker();
        // Show nothing at first if no job is running, because the stop then usually ends before the line could be read.
        if running == 0 && stop.begun.elapsed() < LIVE_PERIOD {
            return;
        }
        line.show(&match (stop.killed, stop.asked) {
            (Some(_), _) => format!("killing: {running} running; press Ctrl-C again to skip their grace"),
            (None, Some(asked)) => {
                let left = self.running.shutdown_deadline.saturating_sub(asked.elapsed()).as_secs();
                format!("draining: {running} running, {left}s left; press Ctrl-C again to kill")
            }
            (None, None) => format!("draining: {running} running; press Ctrl-C to set a deadline"),
        });
    }

    fn obey(&mut self, request: Request) {
        match request {
            Request::Status => log_status(&self.inspector.worker()),
            // Ignore SIGCONT without a warning, because systemd sends it after each SIGTERM.
            Request::Resume if self.inspector.lifecycle.phase() >= Phase::Draining => {}
            _ if self.inspector.lifecycle.phase() >= Phase::Draining => {
                warn!(?request, "signal ignored, the worker is stopping");
            }
            Request::Reload if self.reading.is_some() => warn!("signal ignored, the settings are being read"),
            Request::Reload => self.begin_reload(),
            Request::Pause => {
                if self.inspector.controls.pause() {
                    info!("paused: finishing what was taken; SIGCONT takes jobs again");
                }
            }
            Request::Resume => {
                if self.inspector.controls.resume() {
                    info!("resumed: taking jobs");
                }
            }
        }
    }

    /// Starts to read the settings on a blocking thread, because reading a file can be slow or block forever.
    fn begin_reload(&mut self) {
        if let Some(supervisor) = &self.supervisor {
            supervisor.reloading();
        }
        let args = Arc::clone(&self.args);
        self.reading = Some(spawn_blocking(move || Config::resolve(&args)));
    }

    fn finish_reload(&mut self, read: Result<Result<Config, ConfigError>, JoinError>) {
        self.reading = None;
        let read = read.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic()));
        let reloaded = read.and_then(|config| self.take_over(config));
        self.inspector.controls.metrics().reloaded(reloaded.is_ok());
        if let Err(error) = reloaded {
            error!(%error, "configuration not reloaded, everything stays as it was");
        }
        if let Some(supervisor) = &self.supervisor {
            supervisor.ready();
        }
    }

    /// Applies all reloadable settings, or none of them on an error.
    fn take_over(&mut self, mut config: Config) -> Result<(), ConfigError> {
        self.log.refilter(&config.log)?;
        let written = config.settings();
        config.take_over(&self.running);
        // Skip the warnings about unknown variables: they were logged at the start, and the environment does not change.
        let warnings =
            config.warnings().into_iter().filter(|warning| !matches!(warning, Warning::UnknownVariable { .. }));
        warnings.for_each(|warning| warning.log());
        let new_stream = self.inspector.controls.reconnect(&config.worker);
        let needing_restart = self.inspector.renew(config.settings(), &written);
        self.longest_grace = self.longest_grace.max(config.handlers.longest_grace());
        // Keep the old limit for the log message below: running jobs keep the handlers with which they were started.
        let longest_job = std::mem::replace(&mut self.longest_job, config.handlers.longest_job());
        self.inspector.controls.dispatcher().replace(config.handlers);
        self.running = config.worker;
        info!(new_stream, "configuration reloaded");
        if new_stream {
            let at_most = longest_job.map_or("no limit".to_owned(), |limit| format_duration(limit).to_string());
            info!(
                at_most,
                "opening a new stream; the old one stays open until each job that runs now has ended and is reported"
            );
        }
        if !needing_restart.is_empty() {
            warn!(settings = needing_restart.join(", "), "some changed settings need a restart to take effect");
        }
        Ok(())
    }
}

/// The times of a stop. `begun` is the time at which the drain began. `asked` is the time at which `look_at` first found a request
/// to stop. `killed` is the time at which `look_at` first found the worker in `Phase::Killing` or a later phase.
struct StopTimes {
    begun: Instant,
    asked: Option<Instant>,
    killed: Option<Instant>,
}

impl StopTimes {
    fn look_at(&mut self, lifecycle: &Lifecycle) {
        let now = Instant::now();
        if lifecycle.is_awaited() {
            self.asked.get_or_insert(now);
        }
        if lifecycle.phase() >= Phase::Killing {
            self.killed.get_or_insert(now);
        }
    }
}

fn ticks_every(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

fn log_status(status: &Status) {
    let Status { state, connected, running, waiting, reports_waiting, succeeded, failed, interrupted, .. } = status;
    let uptime = format_duration(Duration::from_secs(status.uptime_seconds as u64)).to_string();
    info!(state, connected, uptime, running, waiting, reports_waiting, succeeded, failed, interrupted, "status");
    for LoopStatus { name, job } in &status.loops {
        if let Some(RunningJob { id, r#type, queue, attempt, running_seconds, pid }) = job {
            info!(
                worker = name,
                running_seconds,
                pid,
                job.id = id,
                "job.type" = r#type,
                job.queue = queue,
                job.attempt = attempt,
                "job running"
            );
        }
    }
    for HandlerProcess { handler, pid, state, jobs, age_seconds, memory_bytes, job } in &status.handler_processes {
        info!(handler, pid, state, jobs, age_seconds, memory_bytes, job.id = job, "handler process");
    }
}
