//! The ready queue: the ready jobs in the order in which they are taken, both over all queues and per queue.
//!
//! The jobs are kept in ordered sets, not in heaps or lists, because a deleted or patched job is removed from the middle,
//! and a requeued job is inserted at its old position.

use std::collections::{BTreeSet, HashMap};

use super::id::StoredJobId;
use super::job::StoredJob;

/// The sort key of a ready job: its priority, then its id, which rises with the time of enqueueing.
type ReadyKey = (u16, StoredJobId);

/// The ready jobs, sorted once over all queues and once per queue, so that a search in one queue does not iterate over the
/// jobs of other queues.
#[derive(Debug, Default)]
pub(super) struct ReadyQueue {
    all: BTreeSet<ReadyKey>,
    by_queue: HashMap<String, BTreeSet<ReadyKey>>,
}

impl ReadyQueue {
    pub(super) fn insert(&mut self, job: &StoredJob) {
        self.all.insert(job.place());
        // The entry API would clone the queue's name for every job, even if the queue exists.
        if let Some(queue) = self.by_queue.get_mut(&job.spec.queue) {
            queue.insert(job.place());
        } else {
            let queue = BTreeSet::from([job.place()]);
            self.by_queue.insert(job.spec.queue.clone(), queue);
        }
    }

    /// Removes a job. Does nothing if the job is not ready.
    pub(super) fn remove(&mut self, job: &StoredJob) {
        self.all.remove(&job.place());
        if let Some(queue) = self.by_queue.get_mut(&job.spec.queue) {
            queue.remove(&job.place());
            // Clients choose the names of queues, so the map would grow without limit if it kept empty queues.
            if queue.is_empty() {
                self.by_queue.remove(&job.spec.queue);
            }
        }
    }

    /// Returns the next job in `queues`, without removing it. An empty list means all queues.
    pub(super) fn first(&self, queues: &[String]) -> Option<StoredJobId> {
        let place = if queues.is_empty() {
            self.all.first().copied()
        } else {
            let fronts = queues.iter().filter_map(|queue| self.by_queue.get(queue)?.first());
            fronts.min().copied()
        };
        place.map(|(_, id)| id)
    }
}
