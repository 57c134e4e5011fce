//! Leases: the open take streams, and the jobs in flight that each stream holds.
//!
//! A job is in flight exactly as long as a stream holds it. The leases are also indexed by job, because a report names
//! only the job.

use std::collections::HashMap;

use super::id::StoredJobId;

/// The id of a take stream. Ids are not reused, so a stream whose lease is closed cannot affect the lease of another
/// stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct LeaseId(u64);

#[derive(Debug)]
struct Lease {
    /// The maximum number of jobs that the stream may hold; 0 means no limit.
    prefetch: usize,
    /// The queues whose jobs the stream takes; empty means all queues.
    queues: Vec<String>,
    /// The number of jobs that the stream has taken and that are not yet reported.
    held: usize,
}

/// The open streams, and the stream that holds each job in flight.
#[derive(Debug, Default)]
pub(super) struct Leases {
    open: HashMap<LeaseId, Lease>,
    holders: HashMap<StoredJobId, LeaseId>,
    count: u64,
}

impl Leases {
    pub(super) fn open(&mut self, prefetch: usize, queues: Vec<String>) -> LeaseId {
        self.count += 1;
        let id = LeaseId(self.count);
        self.open.insert(id, Lease { prefetch, queues, held: 0 });
        id
    }

    /// Returns the number of jobs in flight over all streams.
    pub(super) fn held(&self) -> usize {
        self.holders.len()
    }

    /// Returns the queues of a stream, or `None` if the stream is closed or holds as many jobs as its prefetch allows.
    pub(super) fn open_for(&self, id: LeaseId) -> Option<&[String]> {
        let lease = self.open.get(&id)?;
        let has_room = lease.prefetch == 0 || lease.held < lease.prefetch;
        has_room.then_some(&lease.queues)
    }

    /// Records that a stream holds a job. Does nothing if the stream is closed, because a closed stream would never release
    /// the job.
    pub(super) fn hold(&mut self, id: LeaseId, job: StoredJobId) {
        if let Some(lease) = self.open.get_mut(&id) {
            lease.held += 1;
            self.holders.insert(job, id);
        }
    }

    /// Removes a job from the stream that holds it. Returns false if no stream holds the job.
    pub(super) fn release(&mut self, job: StoredJobId) -> bool {
        let Some(holder) = self.holders.remove(&job) else {
            return false;
        };
        if let Some(lease) = self.open.get_mut(&holder) {
            lease.held -= 1;
        }
        true
    }

    /// Closes a stream and returns the jobs that it still held.
    pub(super) fn close(&mut self, id: LeaseId) -> Vec<StoredJobId> {
        self.open.remove(&id);
        self.holders.extract_if(|_, holder| *holder == id).map(|(job, _)| job).collect()
    }

    /// Closes all streams and returns the jobs that they held.
    pub(super) fn close_all(&mut self) -> Vec<StoredJobId> {
        self.open.clear();
        self.holders.drain().map(|(job, _)| job).collect()
    }
}
