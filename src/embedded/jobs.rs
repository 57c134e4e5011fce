//! The state machine of jobs: `scheduled → ready → in_flight → completed | dead | scheduled`.
//!
//! The functions do not read the clock, wait or wake tasks. The caller passes the time, and a flag tells the
//! [`Store`](super::Store) to wake the take streams.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;
use std::sync::Arc;

use super::id::{IdSource, StoredJobId};
use super::job::{ErrorRecord, JobStatus, Spec, StoredJob};
use super::lease::{LeaseId, Leases};
use super::options::{DEAD_RETENTION_MS, Options, RETRY_LIMIT, ServerBackoff};
use super::order::Order;
use super::page::{Direction, PageRequest};
use super::patch::Patch;
use super::ready::ReadyQueue;
use super::report::FailureBody;

#[derive(Debug)]
struct Entry {
    job: StoredJob,
    /// The failed attempts, oldest first.
    errors: Vec<ErrorRecord>,
}

/// The result of an enqueue: a new job, or the job that already holds the unique key.
#[derive(Debug)]
pub(super) struct Enqueued {
    pub(super) job: StoredJob,
    pub(super) duplicate: bool,
}

/// All jobs, and the indexes over them.
#[derive(Debug)]
pub(super) struct Jobs {
    options: Options,
    ids: IdSource,
    /// The jobs by id. Ids sort in the order of enqueueing, so the map yields the jobs oldest first.
    jobs: BTreeMap<StoredJobId, Entry>,
    ready: ReadyQueue,
    /// The time of each job's next change: `ready_at` for a scheduled job, `purge_at` for a finished job. Other jobs have
    /// no entry.
    due: BTreeSet<(u64, StoredJobId)>,
    /// The job that last claimed each unique key.
    unique: HashMap<String, StoredJobId>,
    leases: Leases,
    /// Whether a take stream may now be able to take a job, because a job has become ready or a slot has become free.
    /// The store reads and clears this flag after each operation.
    takers_should_look: bool,
    is_halted: bool,
}

impl Jobs {
    pub(super) fn new(options: Options) -> Self {
        Self {
            options,
            ids: IdSource::default(),
            jobs: BTreeMap::new(),
            ready: ReadyQueue::default(),
            due: BTreeSet::new(),
            unique: HashMap::new(),
            leases: Leases::default(),
            takers_should_look: false,
            is_halted: false,
        }
    }

    /// Returns the time at which [`advance`](Self::advance) next changes a job, or `None` if no change is due.
    pub(super) fn next_due(&self) -> Option<u64> {
        self.due.first().map(|(time, _)| *time)
    }

    /// Reports whether a job has become ready or a slot has become free since the last call, and clears the flag.
    pub(super) fn take_look_flag(&mut self) -> bool {
        std::mem::take(&mut self.takers_should_look)
    }

    /// Handles the jobs that are due by `now`: makes the scheduled ones ready and removes the finished ones.
    pub(super) fn advance(&mut self, now: u64) {
        while let Some((time, id)) = self.due.first().copied()
            && time <= now
        {
            // Remove the entry, otherwise the loop would find it again and never end.
            self.due.pop_first();
            match self.jobs.get(&id).map(|entry| entry.job.status) {
                Some(JobStatus::Scheduled) => self.make_ready(id),
                Some(JobStatus::Completed | JobStatus::Dead) => drop(self.forget(id)),
                _ => {}
            }
        }
    }

    /// Enqueues one job. If another job already holds the unique key, returns that job and enqueues nothing.
    pub(super) fn enqueue(&mut self, now: u64, order: Order) -> Enqueued {
        if let Some(job) = self.holder_of_key(&order.spec) {
            return Enqueued { job: job.clone(), duplicate: true };
        }
        let id = self.ids.next(now);
        if let Some(unique) = &order.spec.unique {
            self.unique.insert(unique.key.clone(), id);
        }
        let ready_at = order.ready_at.unwrap_or(now);
        let mut job = new_job(id, order.spec, ready_at);
        if ready_at > now {
            self.due.insert((ready_at, id));
        } else {
            job.status = JobStatus::Ready;
            self.ready.insert(&job);
            self.takers_should_look = true;
        }
        self.jobs.insert(id, Entry { job: job.clone(), errors: Vec::new() });
        Enqueued { job, duplicate: false }
    }

    /// Returns the existing job that blocks `spec` because of the unique key. The index may name a job whose status no
    /// longer blocks the key, so the status is checked too.
    fn holder_of_key(&self, spec: &Spec) -> Option<&StoredJob> {
        let unique = spec.unique.as_ref()?;
        let job = self.get(*self.unique.get(&unique.key)?)?;
        unique.scope.covers(job.status).then_some(job)
    }

    /// Opens a take stream that may hold up to `prefetch` jobs from `queues`. A `prefetch` of 0 means no limit, and empty
    /// `queues` mean all queues.
    pub(super) fn open(&mut self, prefetch: usize, queues: Vec<String>) -> LeaseId {
        self.leases.open(prefetch, queues)
    }

    /// Takes the next job for a stream. Returns `None` if no job is ready, the stream is full or closed, the limit on
    /// jobs in flight is reached, or the server has halted. Takes one job per call, so that the prefetch and the limit
    /// are checked for each job.
    pub(super) fn take(&mut self, now: u64, lease: LeaseId) -> Option<StoredJob> {
        let limit = self.options.in_flight_limit;
        if self.is_halted || (limit > 0 && self.leases.held() >= limit) {
            return None;
        }
        let id = self.ready.first(self.leases.open_for(lease)?)?;
        let job = &mut self.jobs.get_mut(&id)?.job;
        self.ready.remove(job);
        self.leases.hold(lease, id);
        job.status = JobStatus::InFlight;
        job.dequeued_at = Some(now);
        Some(job.clone())
    }

    /// Closes a stream and requeues its jobs, without counting a failed attempt.
    pub(super) fn close(&mut self, lease: LeaseId) {
        for id in self.leases.close(lease) {
            self.make_ready(id);
        }
    }

    /// Stops all takes. The server calls this before it drops its connections one by one. Otherwise a job that is
    /// requeued when one connection is dropped could be sent over a connection that is still open.
    pub(super) fn halt(&mut self) {
        self.is_halted = true;
    }

    /// Allows takes again, for a new server. Closes the streams of the previous server and requeues the jobs that they
    /// held.
    pub(super) fn start(&mut self) {
        self.is_halted = false;
        for id in self.leases.close_all() {
            self.make_ready(id);
        }
    }

    /// Completes a job. Returns false if the job is not in flight.
    pub(super) fn complete(&mut self, now: u64, id: StoredJobId) -> bool {
        if !self.release(id) {
            return false;
        }
        let job = self.jobs.get_mut(&id).map(|entry| &mut entry.job);
        let own = job.and_then(|job| {
            job.completed_at = Some(now);
            job.spec.retention?.completed_ms
        });
        // As on the real server, a completed job without a retention of its own is not kept.
        self.finish(id, JobStatus::Completed, now, own.unwrap_or_default());
        true
    }

    /// Records a failed attempt, and either schedules a retry or marks the job as dead. Returns `None` if the job is not in
    /// flight. `chance`, from 0 to 1, scales the jitter of the backoff.
    pub(super) fn fail(&mut self, now: u64, id: StoredJobId, failure: FailureBody, chance: f64) -> Option<StoredJob> {
        if !self.release(id) {
            return None;
        }
        // Count the attempt first, because the backoff, the retry limit and the error record all use the new count.
        let entry = self.jobs.get_mut(&id)?;
        entry.job.attempts += 1;
        entry.job.failed_at = Some(now);
        let retry_at = retry_time(self.options.backoff, &entry.job, &failure, now, chance);
        entry.errors.push(failure.into_record(&entry.job, now));
        match retry_at {
            Some(time) => self.retry(id, time),
            None => self.bury(id, now),
        }
    }

    /// Schedules a retry. If `time` is in the past, the next [`advance`](Self::advance) makes the job ready.
    fn retry(&mut self, id: StoredJobId, time: u64) -> Option<StoredJob> {
        // Restore the key now, not when the job becomes ready, because even a scheduled job blocks new jobs with its key.
        self.restore_key(id);
        let job = &mut self.jobs.get_mut(&id)?.job;
        job.status = JobStatus::Scheduled;
        job.ready_at = time;
        self.due.insert((time, id));
        Some(job.clone())
    }

    /// Marks a job as dead, and keeps the job until its retention time ends.
    fn bury(&mut self, id: StoredJobId, now: u64) -> Option<StoredJob> {
        let own = self.get(id)?.spec.retention.and_then(|retention| retention.dead_ms);
        self.finish(id, JobStatus::Dead, now, own.unwrap_or(DEAD_RETENTION_MS))
    }

    pub(super) fn get(&self, id: StoredJobId) -> Option<&StoredJob> {
        self.jobs.get(&id).map(|entry| &entry.job)
    }

    pub(super) fn errors(&self, id: StoredJobId) -> Option<&[ErrorRecord]> {
        self.jobs.get(&id).map(|entry| entry.errors.as_slice())
    }

    /// Returns one page of a job's failed attempts, plus one more attempt if there is a next page.
    pub(super) fn errors_on(&self, id: StoredJobId, page: &PageRequest<u32>) -> Option<Vec<ErrorRecord>> {
        let errors = self.errors(id)?.iter().cloned();
        let cursor = page.cursor;
        Some(match page.direction {
            Direction::Asc => {
                let after = errors.filter(|error| cursor.is_none_or(|from| error.attempt > from));
                after.take(page.reach()).collect()
            }
            Direction::Desc => {
                let before = errors.filter(|error| cursor.is_none_or(|from| error.attempt < from));
                before.rev().take(page.reach()).collect()
            }
        })
    }

    /// Returns all jobs, oldest first.
    pub(super) fn jobs(&self) -> impl Iterator<Item = &StoredJob> {
        self.jobs.values().map(|entry| &entry.job)
    }

    /// Returns the jobs after `cursor` in `direction`, or all jobs if there is no cursor.
    pub(super) fn jobs_from(
        &self,
        cursor: Option<StoredJobId>,
        direction: Direction,
    ) -> Box<dyn Iterator<Item = &StoredJob> + '_> {
        let bound = cursor.map_or(Bound::Unbounded, Bound::Excluded);
        match direction {
            Direction::Asc => Box::new(self.jobs.range((bound, Bound::Unbounded)).map(job_of)),
            Direction::Desc => Box::new(self.jobs.range((Bound::Unbounded, bound)).rev().map(job_of)),
        }
    }

    /// Applies a patch to a job. Returns `None` if the job does not exist or is finished. A job in flight stays with the
    /// stream that holds it.
    pub(super) fn patch(&mut self, now: u64, id: StoredJobId, patch: &Patch) -> Option<StoredJob> {
        let job = &mut self.jobs.get_mut(&id)?.job;
        if job.status.is_finished() {
            return None;
        }
        // Remove the job from the indexes before its keys change, otherwise its old entries could not be found.
        self.ready.remove(job);
        self.due.remove(&(job.ready_at, id));
        patch.apply(job, now);
        if job.status == JobStatus::Scheduled {
            self.due.insert((job.ready_at, id));
        } else if job.status == JobStatus::Ready {
            self.ready.insert(job);
            self.takers_should_look = true;
        }
        Some(job.clone())
    }

    /// Applies a patch to the matching jobs that are not finished, and returns the number of patched jobs.
    pub(super) fn patch_matching(&mut self, now: u64, patch: &Patch, matches: impl Fn(&StoredJob) -> bool) -> usize {
        let ids: Vec<StoredJobId> = self.jobs().filter(|job| matches(job)).map(|job| job.id).collect();
        ids.iter().filter(|id| self.patch(now, **id, patch).is_some()).count()
    }

    /// Removes a job in any state. If the job is in flight, its slot in the stream becomes free. Returns false if there
    /// is no such job.
    pub(super) fn delete(&mut self, id: StoredJobId) -> bool {
        self.release(id);
        let Some(job) = self.forget(id) else {
            return false;
        };
        self.ready.remove(&job);
        // `due` lists a finished job at its `purge_at` and a scheduled job at its `ready_at`. It does not list other
        // jobs.
        self.due.remove(&(job.purge_at.unwrap_or(job.ready_at), id));
        true
    }

    /// Removes the matching jobs, and returns the number of removed jobs.
    pub(super) fn delete_matching(&mut self, matches: impl Fn(&StoredJob) -> bool) -> usize {
        let ids: Vec<StoredJobId> = self.jobs().filter(|job| matches(job)).map(|job| job.id).collect();
        ids.iter().filter(|id| self.delete(**id)).count()
    }

    /// Releases a job from the stream that holds it, and notes that a slot is free. Returns false if no stream holds the
    /// job.
    fn release(&mut self, id: StoredJobId) -> bool {
        let released = self.leases.release(id);
        self.takers_should_look |= released;
        released
    }

    /// Makes a scheduled or a requeued job ready.
    fn make_ready(&mut self, id: StoredJobId) {
        self.restore_key(id);
        if let Some(entry) = self.jobs.get_mut(&id) {
            entry.job.status = JobStatus::Ready;
            self.ready.insert(&entry.job);
            self.takers_should_look = true;
        }
    }

    /// Registers the unique key of a retried or requeued job again, unless the key is registered for another job.
    fn restore_key(&mut self, id: StoredJobId) {
        if let Some(entry) = self.jobs.get(&id)
            && let Some(unique) = &entry.job.spec.unique
        {
            self.unique.entry(unique.key.clone()).or_insert(id);
        }
    }

    /// Sets the final status of a job and the time of its removal, and returns the job. If `keep_ms` is 0, removes the
    /// job at once.
    fn finish(&mut self, id: StoredJobId, status: JobStatus, now: u64, keep_ms: u64) -> Option<StoredJob> {
        let job = &mut self.jobs.get_mut(&id)?.job;
        job.status = status;
        if keep_ms == 0 {
            return self.forget(id);
        }
        let purge_at = now.saturating_add(keep_ms);
        job.purge_at = Some(purge_at);
        self.due.insert((purge_at, id));
        Some(job.clone())
    }

    /// Removes a job and its unique key. The key stays if it is registered for another job.
    fn forget(&mut self, id: StoredJobId) -> Option<StoredJob> {
        let job = self.jobs.remove(&id)?.job;
        if let Some(unique) = &job.spec.unique
            && self.unique.get(&unique.key) == Some(&id)
        {
            self.unique.remove(&unique.key);
        }
        Some(job)
    }
}

/// Returns the time of a failed job's next attempt, or `None` if the job is not retried.
///
/// As on the real server, `kill` takes precedence over `retry_at`, which takes precedence over the retry limit.
fn retry_time(backoff: ServerBackoff, job: &StoredJob, failure: &FailureBody, now: u64, chance: f64) -> Option<u64> {
    if failure.kill {
        return None;
    }
    if failure.retry_at.is_some() {
        return failure.retry_at;
    }
    let limit = job.spec.retry_limit.unwrap_or(RETRY_LIMIT);
    let backoff = job.spec.backoff.map_or(backoff, Into::into);
    let delay = backoff.delay_ms(job.attempts, chance);
    (job.attempts <= limit).then(|| now.saturating_add(delay))
}

fn job_of<'a>((_, entry): (&StoredJobId, &'a Entry)) -> &'a StoredJob {
    &entry.job
}

fn new_job(id: StoredJobId, spec: Spec, ready_at: u64) -> StoredJob {
    StoredJob {
        id,
        spec: Arc::new(spec),
        status: JobStatus::Scheduled,
        ready_at,
        attempts: 0,
        dequeued_at: None,
        failed_at: None,
        completed_at: None,
        purge_at: None,
    }
}

#[cfg(test)]
mod tests;
