//! [`Entries`]: the state of each job that is here, and how it changes.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use tracing::error;

use super::{Arrival, Attempt, Delivery, StreamId};
use crate::client::{Client, StreamSettings};
use crate::fate::Kind;
use crate::job::{JobId, Outcome};

#[derive(Debug)]
pub(super) struct Entries {
    pub(super) by_id: BTreeMap<JobId, Entry>,
    /// The jobs that are parked or settled, oldest first.
    pub(super) kept: VecDeque<JobId>,
    pub(super) max_kept: usize,
    pub(super) deliveries: u64,
    pub(super) streams: u64,
    pub(super) open: BTreeSet<StreamId>,
    /// How many streams are being opened.
    pub(super) coming: usize,
    /// The server that jobs are taken from now.
    pub(super) present_server: Option<Arc<Client>>,
    /// The number of runs that may still begin, where that is limited.
    pub(super) runs_left: Option<u64>,
    /// The places of each open stream that are lost to jobs whose reports were given up.
    pub(super) lost_places: BTreeMap<StreamId, usize>,
    /// The parked outcomes that were forgotten for others.
    pub(super) evicted: usize,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) attempts: Option<u32>,
    pub(super) delivery: Delivery,
    pub(super) stream: StreamId,
    pub(super) source: Arc<StreamSettings>,
    /// Whether the server holds the job for us, over `stream`.
    pub(super) is_held: bool,
    pub(super) state: State,
}

#[derive(Debug)]
pub(super) enum State {
    Waiting,
    Running,
    Reporting(Kind),
    Parked(Outcome),
    Settled(Kind),
}

pub(super) fn kind_of(outcome: &Outcome) -> Kind {
    if matches!(outcome, Outcome::Failure(_)) { Kind::Failure } else { Kind::Success }
}

impl Entry {
    /// Notes that its job has been redelivered.
    pub(super) fn redeliver(&mut self, new: Self) -> Arrival {
        let same = self.attempts == new.attempts;
        match &self.state {
            // The one that waits is out of date: another worker has reported it meanwhile.
            State::Waiting => {
                *self = new;
                Arrival::New
            }
            // The failure that was, is being, or is to be reported has been counted already: this is the next attempt.
            State::Settled(Kind::Failure) | State::Reporting(Kind::Failure) | State::Parked(Outcome::Failure(_))
                if !same =>
            {
                *self = new;
                Arrival::New
            }
            // Whatever attempt it is by now, the work is being done.
            State::Running => {
                *self = Self { state: State::Running, ..new };
                Arrival::UnderWay
            }
            // The report goes by the attempt that it was given, whatever attempt it is by now.
            State::Reporting(kind) => {
                *self = Self { state: State::Reporting(*kind), attempts: self.attempts, ..new };
                Arrival::UnderWay
            }
            // This line was sent before the report arrived: the server does not hold the job any more.
            State::Settled(_) => Arrival::UnderWay,
            State::Parked(outcome) => {
                let outcome = outcome.clone();
                *self = Self { state: State::Reporting(kind_of(&outcome)), ..new };
                Arrival::Ended(outcome)
            }
        }
    }

    pub(super) fn park(&mut self, outcome: Outcome) {
        debug_assert!(!self.is_held, "a job that is held over an open stream is not redelivered");
        self.state = State::Parked(outcome);
    }

    /// Whether it waits to be run since that delivery.
    pub(super) fn waits_since(&self, delivery: Delivery) -> bool {
        self.delivery == delivery && matches!(self.state, State::Waiting)
    }

    /// Whether it is an attempt that has ended here, and whose outcome is not settled.
    pub(super) fn is_unsettled(&self) -> bool {
        matches!(self.state, State::Reporting(_) | State::Parked(_))
    }
}

impl Entries {
    /// The server that hears of a job: the one that it came from. A job that no stream holds any more may be at the present
    /// one, by another url, if its own does not answer.
    pub(super) fn server_of(&self, entry: &Entry) -> Arc<Client> {
        let own = &entry.source.client;
        match &self.present_server {
            Some(present) if !entry.is_held && own.health().is_failing() => Arc::clone(present),
            _ => Arc::clone(own),
        }
    }

    pub(super) fn arrive(&mut self, id: &JobId, new: Entry) -> Arrival {
        let Some(entry) = self.by_id.get_mut(id) else {
            self.by_id.insert(id.clone(), new);
            return Arrival::New;
        };
        let was_kept = matches!(entry.state, State::Settled(_) | State::Parked(_));
        let arrival = entry.redeliver(new);
        if matches!(entry.state, State::Settled(_)) {
            self.by_id.remove(id);
        }
        if was_kept {
            self.kept.retain(|kept| kept != id);
        }
        arrival
    }

    /// An attempt that has ended here, and whose outcome is not settled. A job that waits or runs under its name is another
    /// attempt.
    pub(super) fn ended(&mut self, attempt: &Attempt) -> Option<&mut Entry> {
        self.by_id.get_mut(&attempt.id).filter(|entry| entry.attempts == attempt.attempts && entry.is_unsettled())
    }

    /// Counts an entry to those that are kept, and forgets the oldest beyond the limit.
    pub(super) fn keep(&mut self, id: &JobId) {
        self.kept.retain(|kept| kept != id);
        self.kept.push_back(id.clone());
        while self.kept.len() > self.max_kept {
            self.evict();
        }
    }

    /// Forgets the oldest entry that is settled, or else the oldest outcome that is parked.
    fn evict(&mut self) {
        let is_settled = |id: &JobId| matches!(self.by_id.get(id), Some(Entry { state: State::Settled(_), .. }));
        let oldest = self.kept.iter().position(is_settled).unwrap_or_default();
        let Some(id) = self.kept.remove(oldest) else { return };
        if let Some(Entry { state: State::Parked(_), .. }) = self.by_id.remove(&id) {
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
