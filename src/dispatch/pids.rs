//! [`Pids`]: the id of the process that runs each job.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::job::JobId;

#[derive(Debug, Default)]
pub(super) struct Pids(Mutex<HashMap<JobId, u32>>);

/// The entry of a job's process in `Pids`. Dropping this removes the entry.
#[derive(Debug)]
pub(super) struct Listed<'a> {
    pids: &'a Pids,
    id: &'a JobId,
}

impl Drop for Listed<'_> {
    fn drop(&mut self) {
        self.pids.lock().remove(self.id);
    }
}

impl Pids {
    fn lock(&self) -> MutexGuard<'_, HashMap<JobId, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn list<'a>(&'a self, id: &'a JobId, pid: u32) -> Listed<'a> {
        self.lock().insert(id.clone(), pid);
        Listed { pids: self, id }
    }

    pub(super) fn get(&self, id: &JobId) -> Option<u32> {
        self.lock().get(id).copied()
    }
}
