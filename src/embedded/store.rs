//! The handle on the jobs: one lock around the state machine, the clock, and the wake-ups.
//!
//! One lock is enough: each step under the lock is a few look-ups, and JSON is read before and written after. Tasks wait on
//! watch channels, which lose no change between a check and the wait.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio::sync::watch;

use super::id::JobId;
use super::job::{JobView, Status};
use super::options::{Options, millis};
use super::order::EnqueueRequest;
use super::state::State;

/// The jobs of an embedded server. Clones share them, and they outlive any one server.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    heartbeat_interval: Duration,
    /// Takers look again whenever a job or a slot may have come free.
    takers: watch::Sender<()>,
    /// When the state next changes by itself; the server's timer sleeps until then.
    next_due: watch::Sender<Option<u64>>,
}

impl Store {
    /// An empty store.
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

    /// Enqueues one line of NDJSON, which is the body of a `POST /jobs`, and answers the job's id.
    ///
    /// # Errors
    ///
    /// The text that the API would answer: bad JSON, a name that is not allowed, and so on.
    pub fn enqueue_line(&self, line: &str) -> Result<String, String> {
        let request: EnqueueRequest = serde_json::from_str(line).map_err(|error| format!("invalid JSON: {error}"))?;
        let order = request.into_order().map_err(|error| error.to_string())?;
        let enqueued = self.with(|state, now| state.enqueue(now, order));
        Ok(enqueued.job.id.to_string())
    }

    /// Number of jobs by status; a status without jobs is absent.
    pub fn counts(&self) -> BTreeMap<Status, usize> {
        let mut counts = BTreeMap::new();
        self.with(|state, _| {
            for job in state.jobs() {
                *counts.entry(job.status).or_default() += 1;
            }
        });
        counts
    }

    /// How many jobs have this status.
    pub fn count(&self, status: Status) -> usize {
        self.counts().get(&status).copied().unwrap_or_default()
    }

    /// A job as `GET /jobs/{id}` answers it.
    pub fn job(&self, id: &str) -> Option<Value> {
        let id = JobId::parse(id)?;
        let job = self.with(|state, _| state.get(id).cloned())?;
        serde_json::to_value(JobView::full(&job)).ok()
    }

    /// A job's failed attempts, oldest first, as `GET /jobs/{id}/errors` answers them.
    pub fn errors(&self, id: &str) -> Vec<Value> {
        let records = JobId::parse(id).and_then(|id| self.with(|state, _| state.errors(id).map(<[_]>::to_vec)));
        let records = records.unwrap_or_default();
        records.iter().filter_map(|record| serde_json::to_value(record).ok()).collect()
    }

    /// Runs `action` on the state as of now, then wakes the take streams and the timer if needed.
    pub(super) fn with<T>(&self, action: impl FnOnce(&mut State, u64) -> T) -> T {
        // Ignore the poison, because a panic in one request must not stop all others.
        let mut state = self.shared.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Read under the lock, or a job could be dequeued before it was ready.
        let now = now_ms();
        state.advance(now);
        let answer = action(&mut state, now);
        let should_look = state.take_look_flag();
        let next_due = state.next_due();
        // Published under the lock, so that a later state cannot be overtaken by this one.
        self.shared.next_due.send_if_modified(|due| std::mem::replace(due, next_due) != next_due);
        drop(state);
        // Wake after the unlock, because a woken stream takes the lock first.
        if should_look {
            self.shared.takers.send_replace(());
        }
        answer
    }

    /// The part of the options that concerns the streams rather than the jobs.
    pub(super) fn heartbeat_interval(&self) -> Duration {
        self.shared.heartbeat_interval
    }

    /// Tells whenever takers should look again.
    pub(super) fn watch_for_takers(&self) -> watch::Receiver<()> {
        self.shared.takers.subscribe()
    }

    /// Makes the scheduled jobs ready on time and forgets the finished ones, without polling.
    pub(super) async fn keep_time(self) {
        let mut next_due = self.shared.next_due.subscribe();
        loop {
            let due = *next_due.borrow_and_update();
            tokio::select! {
                biased;
                () = until(due) => self.with(|_, _| ()),
                changed = next_due.changed() => if changed.is_err() { return },
            }
        }
    }
}

/// Prints counts, not jobs, because payloads may be large or secret.
impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Store").field("counts", &self.counts()).finish()
    }
}

/// The wall clock may be set while this sleeps; the caller looks at it again afterwards.
async fn until(due: Option<u64>) {
    match due {
        Some(due) => {
            let wait = due.saturating_sub(now_ms());
            tokio::time::sleep(Duration::from_millis(wait)).await;
        }
        None => std::future::pending().await,
    }
}

/// The protocol's clock: Unix milliseconds.
#[expect(clippy::disallowed_methods, reason = "the protocol's times are wall times")]
fn now_ms() -> u64 {
    millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default())
}
