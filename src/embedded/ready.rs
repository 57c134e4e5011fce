//! The ready queue: which job goes out next, over all queues or some of them.
//!
//! The queues are ordered sets, not heaps, because a deleted job leaves from the middle, and a requeued job returns to its
//! old place.

use std::collections::{BTreeSet, HashMap};

use super::id::JobId;
use super::job::Job;

/// Urgency, then age.
type Place = (u16, JobId);

/// The ready jobs, in one order over all queues and one order per queue, so that no taker skips over jobs of other queues.
#[derive(Debug, Default)]
pub(super) struct ReadyQueue {
    all: BTreeSet<Place>,
    by_queue: HashMap<String, BTreeSet<Place>>,
}

impl ReadyQueue {
    /// Adds a job at its place.
    pub(super) fn insert(&mut self, job: &Job) {
        self.all.insert(job.place());
        // Not the entry API, which would copy the name for every job.
        if let Some(queue) = self.by_queue.get_mut(&job.spec.queue) {
            queue.insert(job.place());
        } else {
            let queue = BTreeSet::from([job.place()]);
            self.by_queue.insert(job.spec.queue.clone(), queue);
        }
    }

    /// Removes a job. Does nothing if the job is not ready.
    pub(super) fn remove(&mut self, job: &Job) {
        self.all.remove(&job.place());
        if let Some(queue) = self.by_queue.get_mut(&job.spec.queue) {
            queue.remove(&job.place());
            // Queue names come from outside; empty ones must not pile up.
            if queue.is_empty() {
                self.by_queue.remove(&job.spec.queue);
            }
        }
    }

    /// Returns the next job for a taker of `queues`. An empty list means all queues.
    pub(super) fn first(&self, queues: &[String]) -> Option<JobId> {
        let place = if queues.is_empty() {
            self.all.first().copied()
        } else {
            let fronts = queues.iter().filter_map(|queue| self.by_queue.get(queue)?.first());
            fronts.min().copied()
        };
        place.map(|(_, id)| id)
    }
}
