//! [`Activity`]: a worker's running jobs and counts, for its status, its metrics and `exit_when_idle`.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use humantime::format_duration;
use tracing::info;

use super::Summary;
use super::history::{Failures, History, beginning};
use crate::job::{Job, JobId, Outcome};
use crate::ledger::Ledger;
use crate::lifecycle::{Lifecycle, Phase};
use crate::lock::lock;
use crate::watch;

/// The running jobs and counts of one worker, over all its runs.
#[derive(Debug)]
pub(super) struct Activity {
    pub(super) started: Instant,
    state: watch::Sender<IdleState>,
    /// The open streams, in a channel of their own because they change far less often than `state`.
    pub(super) connection: watch::Sender<Connection>,
    loops: Vec<Slot>,
    running: AtomicUsize,
    pub(super) ended: Tally,
    pub(super) history: History,
    pub(super) failures: Failures,
}

/// The number of ended jobs by outcome.
#[derive(Debug, Default)]
pub(super) struct Tally {
    succeeded: AtomicU64,
    failed: AtomicU64,
    interrupted: AtomicU64,
}

impl Tally {
    pub(super) fn count(&self, outcome: &Outcome) {
        let counter = match outcome {
            Outcome::Success => &self.succeeded,
            Outcome::Failure(_) => &self.failed,
            Outcome::Interrupted => &self.interrupted,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns a summary with the counts. All other fields have their defaults.
    pub(super) fn summary(&self) -> Summary {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Summary {
            succeeded: count(&self.succeeded),
            failed: count(&self.failed),
            interrupted: count(&self.interrupted),
            ..Summary::default()
        }
    }
}

/// The name and the current job of one worker loop.
#[derive(Debug)]
struct Slot {
    name: String,
    current: Mutex<Option<Current>>,
}

/// A job that a worker loop runs.
#[derive(Debug, Clone)]
pub(super) struct Current {
    pub(super) id: JobId,
    pub(super) job_type: String,
    pub(super) queue: String,
    pub(super) attempt: u32,
    pub(super) started: Instant,
}

/// The open streams.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Connection {
    /// Whether a stream takes jobs.
    pub(super) is_taking: bool,
    /// Whether any stream is open.
    pub(super) is_open: bool,
    /// The number of streams that finish their jobs while another stream takes jobs or is being opened.
    pub(super) finishing: usize,
}

/// The values that decide whether the worker is idle.
#[derive(Debug, Default)]
struct IdleState {
    is_taking: bool,
    unfinished: usize,
}

impl IdleState {
    /// Reports whether the worker is idle. A worker without a taking stream is not idle, because the server may have
    /// jobs waiting.
    fn is_idle(&self) -> bool {
        self.is_taking && self.unfinished == 0
    }
}

/// The numbers of running and waiting jobs at one moment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Counts {
    pub(super) running: usize,
    pub(super) waiting: usize,
}

/// A guard that counts a taken job as unfinished until the job's report is queued or the job is given back.
#[derive(Debug)]
pub(super) struct Unfinished(Arc<Activity>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.0.state.send_modify(|state| state.unfinished -= 1);
    }
}

/// A guard that marks a job as running in a worker loop.
#[derive(Debug)]
pub(super) struct Running {
    activity: Arc<Activity>,
    slot: usize,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.activity.running.fetch_sub(1, Ordering::Relaxed);
        self.activity.loops[self.slot].set(None);
    }
}

impl Slot {
    fn set(&self, current: Option<Current>) {
        *lock(&self.current) = current;
    }
}

impl Activity {
    /// Returns the activity of a new worker with `threads` × `fibers` loops.
    pub(super) fn new(threads: usize, fibers: usize) -> Self {
        let names = (0..threads).flat_map(|thread| (0..fibers).map(move |fiber| format!("{thread}:{fiber}")));
        let started = Instant::now();
        Self {
            started,
            state: watch::Sender::default(),
            connection: watch::Sender::default(),
            loops: names.map(|name| Slot { name, current: Mutex::default() }).collect(),
            running: AtomicUsize::default(),
            ended: Tally::default(),
            history: History::new(started),
            failures: Failures::default(),
        }
    }

    pub(super) fn set_connection(&self, connection: Connection) {
        let is_taking = connection.is_taking;
        self.state.send_if_modified(|state| std::mem::replace(&mut state.is_taking, is_taking) != is_taking);
        self.connection.send_if_modified(|before| std::mem::replace(before, connection) != connection);
    }

    pub(super) fn is_taking(&self) -> bool {
        self.state.borrow().is_taking
    }

    pub(super) fn take_job(self: &Arc<Self>) -> Unfinished {
        self.state.send_modify(|state| state.unfinished += 1);
        Unfinished(Arc::clone(self))
    }

    /// Records that a job starts in the loop with the number `slot`.
    pub(super) fn start_job(self: &Arc<Self>, slot: usize, job: &Job) -> Running {
        self.running.fetch_add(1, Ordering::Relaxed);
        self.loops[slot].set(Some(Current {
            id: job.id.clone(),
            job_type: beginning(&job.job_type).to_owned(),
            queue: beginning(&job.queue).to_owned(),
            attempt: job.attempts.saturating_add(1),
            started: Instant::now(),
        }));
        Running { activity: Arc::clone(self), slot }
    }

    pub(super) fn note_end(&self, job: &Job, outcome: &Outcome) {
        self.ended.count(outcome);
        self.history.count(outcome);
        if let Outcome::Failure(failure) = outcome {
            self.failures.push(job, failure);
        }
    }

    pub(super) fn counts(&self) -> Counts {
        let running = self.running.load(Ordering::Relaxed);
        Counts { running, waiting: self.state.borrow().unfinished.saturating_sub(running) }
    }

    pub(super) fn loop_names(&self) -> impl Iterator<Item = &str> {
        self.loops.iter().map(|slot| slot.name.as_str())
    }

    /// Returns the names of the loops, each with its current job.
    pub(super) fn loops(&self) -> impl Iterator<Item = (&str, Option<Current>)> {
        let current = |slot: &Slot| lock(&slot.current).clone();
        self.loops.iter().map(move |slot| (slot.name.as_str(), current(slot)))
    }

    /// Starts a drain once the worker has been idle for `limit` and no report is outstanding. An outstanding report delays the
    /// drain, because the server can hold back more jobs until it receives the report.
    pub(super) async fn stop_when_idle(&self, lifecycle: &Lifecycle, ledger: &Ledger, limit: Duration) {
        let (mut states, mut movements) = (self.state.subscribe(), ledger.movements());
        while states.wait_for(IdleState::is_idle).await.is_ok() {
            tokio::select! {
                biased;
                () = lifecycle.reached(Phase::Draining) => return,
                // Any change restarts the time limit, even if the worker is already idle again.
                _ = states.changed() => {}
                _ = movements.changed() => {}
                () = tokio::time::sleep(limit), if ledger.is_all_parked() => {
                    info!(?limit, "no job for that long: draining");
                    lifecycle.finish_because(format!("idle for {} (exit_when_idle)", format_duration(limit)));
                    return;
                }
            }
        }
    }
}
