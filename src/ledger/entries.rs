//! [`Entries`]: the state of each job in the ledger, and the transitions between states.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tracing::error;

use super::{Arrival, Attempt, Delivery, StreamId};
use crate::client::{Client, StreamSettings};
use crate::fate::Kind;
use crate::job::{JobId, Report};

#[derive(Debug, Default)]
pub(super) struct Entries {
    pub(super) by_id: BTreeMap<JobId, LedgerEntry>,
    /// The parked and settled jobs, oldest first.
    pub(super) kept: VecDeque<JobId>,
    pub(super) max_kept: usize,
    pub(super) deliveries: u64,
    pub(super) streams: u64,
    pub(super) open: BTreeSet<StreamId>,
    /// The number of streams that are being opened.
    pub(super) coming: usize,
    /// The server from which jobs are taken now.
    pub(super) present_server: Option<Arc<Client>>,
    /// The number of runs that may still begin, or `None` without a limit.
    pub(super) runs_left: Option<u64>,
    /// The number of prefetch slots that each open stream has lost to jobs that this worker does not report.
    pub(super) lost_places: BTreeMap<StreamId, usize>,
    /// The number of parked outcomes that were evicted because the limit `max_kept` was reached.
    pub(super) evicted: usize,
}

#[derive(Debug)]
pub(super) struct LedgerEntry {
    pub(super) attempts: Option<u32>,
    pub(super) delivery: Delivery,
    pub(super) stream: StreamId,
    pub(super) source: Arc<StreamSettings>,
    /// Whether the server has the job in flight for this worker, over `stream`.
    pub(super) is_held: bool,
    /// The stream that delivered the job before `stream` did, and that still holds the job if the delivery over `stream` was
    /// stale.
    pub(super) earlier: Option<StreamId>,
    /// Whether the outcome is parked although the server may still have the job in flight over `stream`.
    pub(super) is_released: bool,
    pub(super) state: EntryState,
}

#[derive(Debug)]
pub(super) enum EntryState {
    Waiting,
    Running,
    Reporting(Kind),
    Parked(Report),
    Settled(Kind),
}

impl LedgerEntry {
    /// Records a redelivery of the job. Returns the next step.
    pub(super) fn redeliver(&mut self, mut new: Self) -> Arrival {
        let same = self.attempts == new.attempts;
        // A different attempt number shows that no earlier stream still holds the job.
        let may_be_stale = self.is_held && self.stream != new.stream && same && new.attempts.is_some();
        new.earlier = may_be_stale.then_some(self.stream);
        match &self.state {
            // The new delivery replaces the waiting one, for example because another worker has reported the earlier attempt.
            EntryState::Waiting => {
                *self = new;
                Arrival::New
            }
            // The server has counted the failure of the earlier attempt, so this delivery is the next attempt.
            EntryState::Settled(Kind::Failure)
            | EntryState::Reporting(Kind::Failure)
            | EntryState::Parked(Report::Failure(_))
                if !same =>
            {
                *self = new;
                Arrival::New
            }
            // The current run also serves as the run of the new attempt.
            EntryState::Running => {
                *self = Self { state: EntryState::Running, ..new };
                Arrival::UnderWay
            }
            // The report keeps the attempt number that it began with.
            EntryState::Reporting(kind) => {
                *self = Self { state: EntryState::Reporting(*kind), attempts: self.attempts, ..new };
                Arrival::UnderWay
            }
            // The server sent this delivery before the report arrived, and no longer has the job in flight.
            EntryState::Settled(_) => Arrival::UnderWay,
            EntryState::Parked(report) => {
                let report = report.clone();
                *self = Self { state: EntryState::Reporting(Kind::of(&report)), ..new };
                Arrival::Ended(report)
            }
        }
    }

    /// Reports whether the job waits to be started, and `delivery` is its latest delivery.
    pub(super) fn waits_since(&self, delivery: Delivery) -> bool {
        self.delivery == delivery && matches!(self.state, EntryState::Waiting)
    }

    /// Reports whether the attempt has ended in this worker and its outcome is not settled.
    pub(super) fn is_unsettled(&self) -> bool {
        matches!(self.state, EntryState::Reporting(_) | EntryState::Parked(_))
    }
}

impl Entries {
    /// Returns the server to which a job is reported. This is the server that delivered the job. If calls to that server fail and
    /// no stream holds the job, the job is reported to the present server instead, because both urls may refer to the same
    /// server.
    pub(super) fn server_of(&self, entry: &LedgerEntry) -> Arc<Client> {
        let own = &entry.source.client;
        match &self.present_server {
            // Use the present client, because a reload may have given it newer certificates without a change of the url.
            Some(present) if present.url() == own.url() => Arc::clone(present),
            Some(present) if !entry.is_held && own.health().is_failing() => Arc::clone(present),
            _ => Arc::clone(own),
        }
    }

    pub(super) fn arrive(&mut self, id: &JobId, new: LedgerEntry) -> Arrival {
        let Some(entry) = self.by_id.get_mut(id) else {
            self.by_id.insert(id.clone(), new);
            return Arrival::New;
        };
        let was_kept = matches!(entry.state, EntryState::Settled(_) | EntryState::Parked(_));
        let arrival = entry.redeliver(new);
        if matches!(entry.state, EntryState::Settled(_)) {
            self.by_id.remove(id);
        }
        if was_kept {
            self.kept.retain(|kept| kept != id);
        }
        arrival
    }

    /// Returns the entry of an attempt that has ended in this worker and is not settled. A `Waiting` or `Running` entry belongs
    /// to another attempt of the job.
    pub(super) fn ended(&mut self, attempt: &Attempt) -> Option<&mut LedgerEntry> {
        self.by_id.get_mut(&attempt.id).filter(|entry| entry.attempts == attempt.attempts && entry.is_unsettled())
    }

    /// Adds a job to the parked and settled jobs as the newest one, and evicts jobs beyond the limit.
    pub(super) fn keep(&mut self, id: &JobId) {
        self.kept.retain(|kept| kept != id);
        self.kept.push_back(id.clone());
        while self.kept.len() > self.max_kept {
            self.evict();
        }
    }

    /// Evicts the oldest settled entry, or the oldest parked entry if no entry is settled.
    fn evict(&mut self) {
        let is_settled =
            |id: &JobId| matches!(self.by_id.get(id), Some(LedgerEntry { state: EntryState::Settled(_), .. }));
        let oldest = self.kept.iter().position(is_settled).unwrap_or_default();
        let Some(id) = self.kept.remove(oldest) else { return };
        if let Some(LedgerEntry { state: EntryState::Parked(_), .. }) = self.by_id.remove(&id) {
            self.evicted += 1;
            let error = "too many outcomes are kept until their jobs are redelivered";
            error!(job.id = id.as_str(), error, "report dropped");
        }
    }

    pub(super) fn remove(&mut self, id: &JobId) {
        self.by_id.remove(id);
        self.kept.retain(|kept| kept != id);
    }
}
