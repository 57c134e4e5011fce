//! [`Pids`]: the id of the process that runs each job.

use std::collections::HashMap;
use std::sync::Mutex;

use crate::job::JobId;
use crate::lock::lock;

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
        lock(&self.pids.0).remove(self.id);
    }
}

impl Pids {
    pub(super) fn list<'a>(&'a self, id: &'a JobId, pid: u32) -> Listed<'a> {
        lock(&self.0).insert(id.clone(), pid);
        Listed { pids: self, id }
    }

    pub(super) fn get(&self, id: &JobId) -> Option<u32> {
        lock(&self.0).get(id).copied()
    }
}
