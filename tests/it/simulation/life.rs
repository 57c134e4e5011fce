//! [`Life`]: one simulated worker, with methods to stop, pause, reload and crash it.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::Instant;
use zizq_worker::{Controls, Lifecycle, Phase, Summary, Worker, WorkerConfig, WorkerError};

use super::bounds;
use super::checks::{Ending, Run};
use super::player::Player;
use super::world::World;

/// A worker from its start to its end.
pub struct Life {
    /// The unique name of the worker.
    pub name: String,
    /// The current settings.
    pub config: WorkerConfig,
    /// Whether the worker is paused.
    pub is_paused: bool,
    /// The worker's summary, once the worker has ended without an error.
    pub summary: Option<Summary>,
    grace: Duration,
    lifecycle: Lifecycle,
    controls: Controls<Player>,
    task: JoinHandle<Result<Summary, WorkerError>>,
    /// The time by which the worker must have ended, and the event that set this deadline, such as "drain".
    due: Option<(Instant, &'static str)>,
    world: World,
}

impl Life {
    /// Starts a worker. If the worker is killed, its runs continue for `grace`.
    pub fn start(world: &World, mut config: WorkerConfig, grace: Duration) -> Self {
        let name = world.next_name();
        config.connector = world.network.connector(&name);
        config.worker_id = name.parse().unwrap();
        world.trace.note(&name, format_args!("starts: {}", shown(&config)));
        let player = Player { worker: name.clone(), book: world.book.clone(), grace, start: world.start };
        let worker = Worker::new(config.clone(), player);
        let (lifecycle, controls) = (Lifecycle::new(), worker.controls());
        let running = lifecycle.clone();
        let task = tokio::spawn(async move { worker.run(&running).await });
        Self {
            name,
            config,
            is_paused: false,
            summary: None,
            grace,
            lifecycle,
            controls,
            task,
            due: None,
            world: world.clone(),
        }
    }

    fn note(&self, line: std::fmt::Arguments<'_>) {
        self.world.trace.note(&self.name, line);
    }

    /// Reports whether the worker is stopping.
    pub fn is_ending(&self) -> bool {
        self.lifecycle.phase() > Phase::Running
    }

    /// Reports whether the worker's end has a deadline.
    pub fn is_awaited(&self) -> bool {
        self.due.is_some()
    }

    /// Reports whether the worker's settings make it stop by itself.
    pub fn is_bounded(&self) -> bool {
        let WorkerConfig { max_jobs, max_time, exit_when_idle, .. } = &self.config;
        max_jobs.is_some() || max_time.is_some() || exit_when_idle.is_some()
    }

    /// Returns the worker's runs in progress.
    pub fn running(&self) -> Vec<Run> {
        self.world.book.running_in(&self.name)
    }

    fn must_end_within(&mut self, bound: Duration, why: &'static str) {
        let due = Instant::now() + bound;
        if self.due.is_none_or(|(before, _)| due < before) {
            self.due = Some((due, why));
        }
    }

    /// Starts a drain.
    pub fn stop(&mut self) {
        self.note(format_args!("is asked to drain"));
        self.world.book.quiet(&self.name);
        self.lifecycle.stop();
        self.must_end_within(bounds::drain(&self.config, self.grace), "drain");
    }

    /// Kills the worker. Runs that do not end within the grace period are interrupted.
    pub fn kill(&mut self) {
        self.note(format_args!("is killed"));
        self.world.book.quiet(&self.name);
        self.lifecycle.kill();
        self.must_end_within(bounds::kill(self.grace), "kill");
    }

    /// Stops the worker at once, without a grace period.
    pub fn force(&mut self) {
        self.note(format_args!("is killed without grace"));
        self.world.book.quiet(&self.name);
        self.lifecycle.force();
        self.must_end_within(bounds::force(), "stop without grace");
    }

    /// Pauses the worker, so that it takes no more jobs.
    pub fn pause(&mut self) {
        self.note(format_args!("is paused"));
        self.is_paused = true;
        self.world.book.quiet(&self.name);
        self.controls.pause();
    }

    /// Resumes the worker.
    pub fn resume(&mut self) {
        self.note(format_args!("is resumed"));
        self.is_paused = false;
        if !self.is_awaited() {
            self.world.book.loud(&self.name);
        }
        self.controls.resume();
    }

    /// Reloads the worker with changed settings.
    pub fn reload(&mut self, change: impl FnOnce(&mut WorkerConfig)) {
        let host = self.config.url.host().to_owned();
        change(&mut self.config);
        if !self.world.network.server(&host).is(&self.world.network.server(self.config.url.host())) {
            self.world.book.moved(&self.name);
        }
        self.note(format_args!("is reloaded: {}", shown(&self.config)));
        self.controls.reconnect(&self.config);
    }

    /// Crashes the worker: aborts its task, and cuts all its connections.
    pub async fn crash(self) {
        self.note(format_args!("crashes"));
        self.world.book.crashed(&self.name);
        self.task.abort();
        let _ = self.task.await;
        drop(self.controls);
        self.world.network.cut_worker(&self.name);
    }

    /// Waits until the worker has ended, and checks its result. Records a violation if the worker is still running at its
    /// deadline.
    pub async fn ended(&mut self) {
        let result = match self.due {
            Some((due, why)) => match tokio::time::timeout_at(due, &mut self.task).await {
                Ok(result) => result,
                Err(_) => {
                    let late = format!("the {why} of {} has not ended in time", self.name);
                    return self.world.book.violation(late);
                }
            },
            None => (&mut self.task).await,
        };
        match result {
            Ok(result) => self.judge(result),
            Err(died) => self.world.book.violation(format!("{} died: {died}", self.name)),
        }
    }

    /// Waits until the worker has ended, and checks its result. Records a violation if this takes longer than `bound`, or if the
    /// worker misses an earlier deadline.
    pub async fn ends_within(&mut self, bound: Duration, why: &'static str) {
        self.must_end_within(bound, why);
        self.ended().await;
    }

    fn judge(&mut self, result: Result<Summary, WorkerError>) {
        self.note(format_args!("has ended: {result:?}"));
        let book = &self.world.book;
        let summary = match result {
            Ok(summary) => *self.summary.insert(summary),
            Err(_) if book.was_turned_away(&self.name) => return,
            Err(error) => return book.violation(format!("{} gave up: {error}", self.name)),
        };
        let runs = book.runs_of(&self.name);
        let count = |wanted| {
            let ended = runs.iter().filter(|run| run.ended.is_some_and(|(_, ending)| ending == wanted));
            u64::try_from(ended.count()).unwrap_or(u64::MAX)
        };
        let expected = [Ending::Good, Ending::Bad, Ending::Interrupted].map(count);
        let told = [summary.succeeded, summary.failed, summary.interrupted];
        if told != expected {
            book.violation(format!("{} counted {told:?}, and its runs were {expected:?}", self.name));
        }
        if runs.iter().any(|run| run.ended.is_none()) {
            book.violation(format!("{} ended before its runs", self.name));
        }
    }
}

fn shown(config: &WorkerConfig) -> String {
    let WorkerConfig { url, queues, threads, fibers, prefetch, backoff, stream_limits, shutdown_deadline, .. } = config;
    let WorkerConfig { max_jobs, max_time, exit_when_idle, .. } = config;
    format!(
        "{url} queues {queues:?} {threads}x{fibers} prefetch {prefetch} {backoff:?} idle {:?} deadline {shutdown_deadline:?} \
         max_jobs {max_jobs:?} max_time {max_time:?} exit_when_idle {exit_when_idle:?}",
        stream_limits.idle_timeout
    )
}
