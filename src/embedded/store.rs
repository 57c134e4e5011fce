//! The store of jobs: the state machine under one lock, a clock, and the signals that wake waiting tasks.
//!
//! One lock is sufficient, because it is held only briefly: JSON is parsed before the lock is taken and serialized after
//! the lock is released. Tasks wait on watch channels, because a watch channel does not lose a change that happens
//! between a check and the wait.

use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio::sync::watch;

use super::id::JobId;
use super::job::{JobView, Status};
use super::options::{Options, millis};
use super::order::EnqueueRequest;
use super::state::State;
use crate::lock::lock;

/// The jobs of an embedded server. Clones share the same jobs, which outlive the server.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
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
        let shared = Shared {
            state: Mutex::new(State::new(options)),
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
        let enqueued = self.with(|state, now| state.enqueue(now, order));
        Ok(enqueued.job.id.to_string())
    }

    /// Returns the number of jobs with this status.
    pub fn count(&self, status: Status) -> usize {
        self.with(|state, _| state.jobs().filter(|job| job.status == status).count())
    }

    /// Returns a job in the JSON format of `GET /jobs/{id}`, or `None` if there is no such job.
    pub fn job(&self, id: &str) -> Option<Value> {
        let id = JobId::parse(id)?;
        let job = self.with(|state, _| state.get(id).cloned())?;
        serde_json::to_value(JobView::full(&job)).ok()
    }

    /// Returns all failed attempts of a job, oldest first, each in the JSON format of `GET /jobs/{id}/errors/{attempt}`.
    /// An unknown job has none.
    pub fn errors(&self, id: &str) -> Vec<Value> {
        let records = JobId::parse(id).and_then(|id| self.with(|state, _| state.errors(id).map(<[_]>::to_vec)));
        let records = records.unwrap_or_default();
        records.iter().filter_map(|record| serde_json::to_value(record).ok()).collect()
    }

    /// Advances the state to the current time, runs `action` on the state, then wakes the take streams and the timer if
    /// needed.
    pub(super) fn with<T>(&self, action: impl FnOnce(&mut State, u64) -> T) -> T {
        // Ignore the poisoning, because a panic in one request must not stop all others.
        let mut state = lock(&self.shared.state);
        // Read the clock under the lock, otherwise a job's `dequeued_at` could be earlier than its `ready_at`.
        let now = now_ms();
        state.advance(now);
        let answer = action(&mut state, now);
        let should_look = state.take_look_flag();
        let next_due = state.next_due();
        // Send under the lock, otherwise this value could overwrite the value of a later state.
        self.shared.next_due.send_if_modified(|due| std::mem::replace(due, next_due) != next_due);
        drop(state);
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
