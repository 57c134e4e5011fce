//! The store of jobs: all jobs under one lock, a clock, and the signals that wake waiting tasks.
//!
//! One lock is sufficient, because it is held only briefly: JSON is parsed before the lock is taken and serialized after
//! the lock is released. Tasks wait on watch channels, because a watch channel does not lose a change that happens
//! between a check and the wait.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio::sync::watch;

use super::id::StoredJobId;
use super::job::{JobStatus, JobView};
use super::jobs::Jobs;
use super::options::{Options, millis};
use super::order::EnqueueRequest;
use crate::lock::lock;

/// The jobs of an embedded server. Clones share the same jobs, which outlive the server.
#[derive(Clone)]
pub struct Store {
    shared: Arc<StoreShared>,
}

struct StoreShared {
    jobs: Mutex<Jobs>,
    heartbeat_interval: Duration,
    /// The signal to the take streams that a job may have become ready or that a slot may have become free.
    takers: watch::Sender<()>,
    /// The next time at which a scheduled job becomes ready or a finished job is removed, if any. The timer, `keep_time`,
    /// sleeps until then.
    next_due: watch::Sender<Option<u64>>,
}

impl Store {
    /// Creates an empty store.
    pub fn new(options: Options) -> Self {
        let heartbeat_interval = options.heartbeat_interval;
        let shared = StoreShared {
            jobs: Mutex::new(Jobs::new(options)),
            heartbeat_interval,
            takers: watch::Sender::new(()),
            next_due: watch::Sender::new(None),
        };
        Self { shared: Arc::new(shared) }
    }

    /// Enqueues a job from one line of JSON in the format of a `POST /jobs` body, and returns the job's id.
    ///
    /// # Errors
    ///
    /// If the line is not a valid job. The error describes the problem.
    pub fn enqueue_line(&self, line: &str) -> Result<String, String> {
        let request: EnqueueRequest = serde_json::from_str(line).map_err(|error| format!("invalid JSON: {error}"))?;
        let order = request.into_order().map_err(|error| error.to_string())?;
        let enqueued = self.with(|jobs, now| jobs.enqueue(now, order));
        Ok(enqueued.job.id.to_string())
    }

    /// Returns the number of jobs with this status.
    pub fn count(&self, status: JobStatus) -> usize {
        self.with(|jobs, _| jobs.jobs().filter(|job| job.status == status).count())
    }

    /// Returns a job in the JSON format of `GET /jobs/{id}`, or `None` if there is no such job.
    pub fn job(&self, id: &str) -> Option<Value> {
        let id = StoredJobId::parse(id)?;
        let job = self.with(|jobs, _| jobs.get(id).cloned())?;
        serde_json::to_value(JobView::full(&job)).ok()
    }

    /// Returns all failed attempts of a job, oldest first, each in the JSON format of `GET /jobs/{id}/errors/{attempt}`.
    /// An unknown job has none.
    pub fn errors(&self, id: &str) -> Vec<Value> {
        let records = StoredJobId::parse(id).and_then(|id| self.with(|jobs, _| jobs.errors(id).map(<[_]>::to_vec)));
        let records = records.unwrap_or_default();
        records.iter().filter_map(|record| serde_json::to_value(record).ok()).collect()
    }

    /// Advances the jobs to the current time, runs `action` on them, then wakes the take streams and the timer if
    /// needed.
    pub(super) fn with<T>(&self, action: impl FnOnce(&mut Jobs, u64) -> T) -> T {
        let mut jobs = lock(&self.shared.jobs);
        // Read the clock under the lock, otherwise a job's `dequeued_at` could be earlier than its `ready_at`.
        let now = now_ms();
        jobs.advance(now);
        let answer = action(&mut jobs, now);
        let should_look = jobs.take_look_flag();
        let next_due = jobs.next_due();
        // Send under the lock, otherwise this value could overwrite the value of a later state.
        self.shared.next_due.send_if_modified(|due| std::mem::replace(due, next_due) != next_due);
        drop(jobs);
        // Wake the streams after the unlock, because the first step of a woken stream is to take the lock.
        if should_look {
            self.shared.takers.send_replace(());
        }
        answer
    }

    pub(super) fn heartbeat_interval(&self) -> Duration {
        self.shared.heartbeat_interval
    }

    pub(super) fn watch_for_takers(&self) -> watch::Receiver<()> {
        self.shared.takers.subscribe()
    }

    /// Makes scheduled jobs ready and removes finished jobs when they are due. Sleeps until the next due time instead of
    /// polling.
    pub(super) async fn keep_time(self) {
        let mut next_due = self.shared.next_due.subscribe();
        loop {
            let due = *next_due.borrow_and_update();
            // If the wall clock is set back during the sleep, nothing is due afterwards, and the loop sleeps again.
            let wait = Duration::from_millis(due.unwrap_or_default().saturating_sub(now_ms()));
            tokio::select! {
                biased;
                () = tokio::time::sleep(wait), if due.is_some() => self.with(|_, _| ()),
                changed = next_due.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// Prints no jobs, because payloads may be large or secret.
impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").finish_non_exhaustive()
    }
}

/// Returns the current Unix time in milliseconds, the protocol's unit.
#[expect(clippy::disallowed_methods, reason = "the protocol's times are wall times")]
fn now_ms() -> u64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}
