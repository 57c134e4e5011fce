//! [`Ledger`]: the jobs that are here, so that none is run twice because a connection was lost.
//!
//! The server redelivers a job as soon as the stream that took it is gone, while its run goes on here. An entry is kept from a
//! job's arrival until its report has been accepted. The outcome of a job that could not be reported is parked until the job
//! is redelivered.
//!
//! | state | the job | held over an open stream |
//! | --- | --- | --- |
//! | Waiting | is in the dispatch queue | always |
//! | Running | is in a worker loop | until its stream is lost |
//! | Reporting | has ended, and its report is on the way | until its stream is lost |
//! | Parked | has ended, and waits for its redelivery | never |
//! | Settled | is reported; a line of the same attempt may still be on the way | never |

mod entries;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::client::{Client, StreamSettings};
use crate::fate::{Hold, Kind};
use crate::job::{JobId, Outcome};
use crate::watch;
use entries::{Entries, EntryState, LedgerEntry, kind_of};

/// A job, and which of its attempts. The server goes by the id alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) id: JobId,
    /// The number of failures before this attempt; unknown for a line that is no job.
    pub(crate) attempts: Option<u32>,
}

/// One take stream of this worker. Later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StreamId(u64);

/// A stream that is being opened. To be kept until it is noted as open.
#[derive(Debug)]
pub(crate) struct ComingStream(Arc<Ledger>);

impl Drop for ComingStream {
    fn drop(&mut self) {
        self.0.entries().coming -= 1;
    }
}

/// One handing over of a job by the server. Later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Delivery(u64);

/// What to do with a job that has arrived.
#[derive(Debug, PartialEq)]
pub(crate) enum Arrival {
    /// Start it.
    New,
    /// Nothing: the run or the report that is under way answers for it, or a report that has arrived.
    UnderWay,
    /// Report how it ended.
    Ended(Outcome),
}

/// The jobs that are here, and the streams that hold them.
#[derive(Debug)]
pub(crate) struct Ledger {
    entries: Mutex<Entries>,
    /// Changes when a job is here no longer, or is here anew, or its outcome has been parked.
    moved: watch::Sender<()>,
    /// Changes when a report is given up whose job the server still holds for this worker.
    place_lost: watch::Sender<()>,
    /// Changes when an outcome is parked.
    parkings: watch::Sender<()>,
}

/// Whether a run may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// It has begun.
    Begun {
        /// Whether it is the last that may begin.
        is_last: bool,
    },
    /// The job is no longer ours to run.
    NotOurs,
    /// As many have begun as may.
    NoneLeft,
}

/// A job that runs here or has ended here, and that no stream holds.
#[derive(Debug, Clone)]
pub(crate) struct Unheld {
    pub(crate) id: JobId,
    /// The settings by which the job came.
    pub(crate) source: Arc<StreamSettings>,
    pub(crate) has_ended: bool,
}

/// A parked outcome.
#[derive(Debug, Clone)]
pub(crate) struct Parked {
    pub(crate) attempt: Attempt,
    pub(crate) kind: Kind,
    pub(crate) client: Arc<Client>,
}

impl Ledger {
    /// An empty ledger that keeps at most `max_kept` ended jobs until they are redelivered, and lets at most `max_runs` begin.
    pub(crate) fn new(max_kept: usize, max_runs: Option<u64>) -> Self {
        let entries = Entries {
            by_id: BTreeMap::new(),
            kept: VecDeque::new(),
            max_kept,
            deliveries: 0,
            streams: 0,
            open: BTreeSet::new(),
            coming: 0,
            present_server: None,
            runs_left: max_runs,
            lost_places: BTreeMap::new(),
            evicted: 0,
        };
        Self {
            entries: Mutex::new(entries),
            moved: watch::Sender::default(),
            place_lost: watch::Sender::default(),
            parkings: watch::Sender::default(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // No entry is half written when a thread panics: each is replaced as a whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes room for that many ended jobs. The room never shrinks: the jobs of an old stream may still need it.
    pub(crate) fn make_room(&self, max_kept: usize) {
        let mut entries = self.entries();
        entries.max_kept = entries.max_kept.max(max_kept);
    }

    /// Notes that a stream is asked for: the server may hand jobs out over it before it is known to be open.
    pub(crate) fn expect_stream(self: &Arc<Self>) -> ComingStream {
        self.entries().coming += 1;
        ComingStream(Arc::clone(self))
    }

    /// Notes that a stream has been opened.
    pub(crate) fn open_stream(&self) -> StreamId {
        let mut entries = self.entries();
        entries.streams += 1;
        let stream = StreamId(entries.streams);
        entries.open.insert(stream);
        stream
    }

    /// Notes that a stream is closed or lost: its jobs are the server's again. Those that wait here are forgotten.
    pub(crate) fn lose_stream(&self, stream: StreamId) {
        let mut entries = self.entries();
        let Entries { by_id, kept, open, coming, lost_places, .. } = &mut *entries;
        open.remove(&stream);
        let is_last = open.is_empty() && *coming == 0;
        lost_places.remove(&stream);
        by_id.retain(|_, entry| {
            if entry.stream == stream {
                entry.is_held = false;
            }
            // A line that is on the way is lost with its stream.
            let is_of_no_use = matches!(entry.state, EntryState::Waiting) && entry.stream == stream
                || matches!(entry.state, EntryState::Settled(_)) && is_last;
            !is_of_no_use
        });
        kept.retain(|id| by_id.contains_key(id));
        drop(entries);
        self.moved.send_replace(());
    }

    /// Notes that a job has come over a stream.
    pub(crate) fn arrive(
        &self,
        attempt: &Attempt,
        stream: StreamId,
        source: &Arc<StreamSettings>,
    ) -> (Arrival, Delivery) {
        let mut entries = self.entries();
        entries.deliveries += 1;
        let delivery = Delivery(entries.deliveries);
        let new = LedgerEntry {
            attempts: attempt.attempts,
            delivery,
            stream,
            source: Arc::clone(source),
            is_held: true,
            state: EntryState::Waiting,
        };
        let before = entries.by_id.len();
        let arrival = entries.arrive(&attempt.id, new);
        let is_first = entries.by_id.len() > before;
        if !is_first {
            self.moved.send_replace(());
        }
        (arrival, delivery)
    }

    /// Notes that a run begins, if it may. A job that may not, because as many have begun as may, is forgotten: the server
    /// has it again when the stream closes.
    pub(crate) fn begin(&self, id: &JobId, delivery: Delivery) -> Beginning {
        let mut entries = self.entries();
        let Entries { by_id, runs_left, .. } = &mut *entries;
        let Some(entry) = by_id.get_mut(id).filter(|entry| entry.waits_since(delivery)) else {
            return Beginning::NotOurs;
        };
        match runs_left {
            Some(0) => {
                by_id.remove(id);
                self.moved.send_replace(());
                return Beginning::NoneLeft;
            }
            Some(left) => *left -= 1,
            None => {}
        }
        entry.state = EntryState::Running;
        Beginning::Begun { is_last: *runs_left == Some(0) }
    }

    /// Forgets a job that will not be started: the server has it again when the stream closes.
    pub(crate) fn give_back(&self, id: &JobId, delivery: Delivery) {
        let mut entries = self.entries();
        if entries.by_id.get(id).is_some_and(|entry| entry.waits_since(delivery)) {
            entries.by_id.remove(id);
            self.moved.send_replace(());
        }
    }

    /// Notes that a run has ended. Returns the attempt that is to be reported, if any is: the job may have been redelivered
    /// since the run began.
    pub(crate) fn end(&self, id: &JobId, outcome: &Outcome) -> Option<Attempt> {
        let mut entries = self.entries();
        if *outcome == Outcome::Interrupted {
            entries.by_id.remove(id);
            self.moved.send_replace(());
            return None;
        }
        let entry = entries.by_id.get_mut(id)?;
        entry.state = EntryState::Reporting(kind_of(outcome));
        Some(Attempt { id: id.clone(), attempts: entry.attempts })
    }

    /// Notes that jobs are taken from that server from now on.
    pub(crate) fn set_present_server(&self, client: &Arc<Client>) {
        self.entries().present_server = Some(Arc::clone(client));
    }

    /// The server that an attempt is to be reported to, while its report is under way.
    pub(crate) fn destination(&self, attempt: &Attempt) -> Option<Arc<Client>> {
        let entries = self.entries();
        let entry = entries.by_id.get(&attempt.id).filter(|entry| entry.attempts == attempt.attempts)?;
        matches!(entry.state, EntryState::Reporting(_)).then(|| entries.server_of(entry))
    }

    /// The delivery by which the server holds this attempt for us, if it does.
    pub(crate) fn held(&self, attempt: &Attempt) -> Option<Delivery> {
        let entries = self.entries();
        let entry = entries.by_id.get(&attempt.id)?;
        (entry.attempts == attempt.attempts && entry.is_held).then_some(entry.delivery)
    }

    /// How an attempt is held, compared with the delivery `seen` that it was held by before.
    pub(crate) fn hold(&self, attempt: &Attempt, seen: Option<Delivery>) -> Hold {
        match self.held(attempt) {
            None => Hold::Lost,
            held if held == seen => Hold::Same,
            Some(_) => Hold::Anew,
        }
    }

    /// Tells, whenever it is asked, whether an attempt is held by the delivery `seen`.
    pub(crate) fn watch_hold(
        self: &Arc<Self>,
        attempt: &Attempt,
        seen: Option<Delivery>,
    ) -> impl Fn() -> bool + Send + Sync + use<> {
        let (ledger, attempt) = (Arc::clone(self), attempt.clone());
        move || ledger.hold(&attempt, seen) == Hold::Same
    }

    /// Notes that an attempt's report has arrived.
    pub(crate) fn settle(&self, attempt: &Attempt) {
        let mut entries = self.entries();
        let is_only_stream = entries.open.len() + entries.coming <= 1;
        let Some(entry) = entries.ended(attempt) else { return };
        let kind = match &entry.state {
            EntryState::Parked(outcome) => kind_of(outcome),
            EntryState::Reporting(kind) => *kind,
            EntryState::Waiting | EntryState::Running | EntryState::Settled(_) => return,
        };
        // A job that is held by the only stream cannot have been handed out again: no other line of it is on the way. And an
        // attempt without a number cannot be told from the next one.
        if (entry.is_held && is_only_stream) || attempt.attempts.is_none() {
            entries.remove(&attempt.id);
        } else {
            entry.is_held = false;
            entry.state = EntryState::Settled(kind);
            entries.keep(&attempt.id);
        }
        self.moved.send_replace(());
    }

    /// Notes that a parked outcome is of no use any more, unless its job has been redelivered since.
    pub(crate) fn settle_parked(&self, attempt: &Attempt) {
        let mut entries = self.entries();
        let Some(entry) = entries.ended(attempt) else { return };
        if let EntryState::Parked(outcome) = &entry.state {
            entry.state = EntryState::Settled(kind_of(outcome));
            self.moved.send_replace(());
        }
    }

    /// Forgets an attempt whose report was given up. If the server holds its job for us, that place of the stream's prefetch
    /// is lost.
    pub(crate) fn forget(&self, attempt: &Attempt) {
        let mut entries = self.entries();
        let Some(entry) = entries.ended(attempt) else { return };
        let lost = entry.is_held.then_some(entry.stream);
        entries.remove(&attempt.id);
        if let Some(stream) = lost {
            *entries.lost_places.entry(stream).or_default() += 1;
            self.place_lost.send_replace(());
        }
        self.moved.send_replace(());
    }

    /// Parks the outcome of an attempt until its job is redelivered. Gives the outcome back if that has happened since the
    /// delivery `seen`: then the report can leave at once.
    pub(crate) fn park(&self, attempt: &Attempt, seen: Option<Delivery>, outcome: Outcome) -> Option<Outcome> {
        let mut entries = self.entries();
        let entry = entries.by_id.get_mut(&attempt.id).filter(|entry| entry.attempts == attempt.attempts)?;
        if entry.is_held && seen != Some(entry.delivery) {
            return Some(outcome);
        }
        // The server has denied that very delivery, so the job is not held, whatever its stream looks like.
        entry.is_held = false;
        entry.park(outcome);
        entries.keep(&attempt.id);
        self.parkings.send_replace(());
        self.moved.send_replace(());
        None
    }

    /// The outcomes that are parked.
    pub(crate) fn parked(&self) -> Vec<Parked> {
        let entries = self.entries();
        let parked = entries.kept.iter().filter_map(|id| match entries.by_id.get(id) {
            Some(entry @ LedgerEntry { attempts, state: EntryState::Parked(outcome), .. }) => Some(Parked {
                attempt: Attempt { id: id.clone(), attempts: *attempts },
                kind: kind_of(outcome),
                client: entries.server_of(entry),
            }),
            _ => None,
        });
        parked.collect()
    }

    /// The jobs that run here or have ended here, that are not settled, and that no stream holds.
    pub(crate) fn unheld(&self) -> Vec<Unheld> {
        let entries = self.entries();
        let is_unheld = |entry: &LedgerEntry| !entry.is_held && !matches!(entry.state, EntryState::Settled(_));
        let unheld = entries.by_id.iter().filter(|(_, entry)| is_unheld(entry));
        let unheld = unheld.map(|(id, entry)| Unheld {
            id: id.clone(),
            source: Arc::clone(&entry.source),
            has_ended: entry.is_unsettled(),
        });
        unheld.collect()
    }

    /// Whether all jobs that a stream holds for us wait to be started.
    pub(crate) fn is_all_waiting(&self, stream: StreamId) -> bool {
        let entries = self.entries();
        let mut held = entries.by_id.values().filter(|entry| entry.is_held && entry.stream == stream);
        held.all(|entry| matches!(entry.state, EntryState::Waiting))
    }

    /// The number of parked outcomes that were forgotten, because too many were parked.
    pub(crate) fn evicted(&self) -> usize {
        self.entries().evicted
    }

    /// Whether an attempt came from that server.
    pub(crate) fn came_from(&self, attempt: &Attempt, client: &Client) -> bool {
        self.entries().by_id.get(&attempt.id).is_none_or(|entry| std::ptr::eq(&*entry.source.client, client))
    }

    /// The jobs that have ended, and whose outcome is not settled.
    pub(crate) fn ended(&self) -> Vec<JobId> {
        let entries = self.entries();
        entries.by_id.iter().filter(|(_, entry)| entry.is_unsettled()).map(|(id, _)| id.clone()).collect()
    }

    /// Whether the only jobs here have ended, and are parked.
    pub(crate) fn is_all_parked(&self) -> bool {
        self.entries().by_id.values().all(|entry| matches!(entry.state, EntryState::Parked(_) | EntryState::Settled(_)))
    }

    /// The number of jobs that a stream holds for us. With `until`, only those that had come by that delivery count.
    pub(crate) fn under_way(&self, stream: StreamId, until: Option<Delivery>) -> usize {
        let counts = |entry: &&LedgerEntry| {
            entry.is_held && entry.stream == stream && until.is_none_or(|until| entry.delivery <= until)
        };
        self.entries().by_id.values().filter(counts).count()
    }

    /// The delivery that was the last, over all streams.
    pub(crate) fn last_delivery(&self) -> Delivery {
        Delivery(self.entries().deliveries)
    }

    /// Whether a stream has lost places of its prefetch.
    pub(crate) fn has_lost_places(&self, stream: StreamId) -> bool {
        self.entries().lost_places.contains_key(&stream)
    }

    /// Changes whenever a stream loses a place.
    pub(crate) fn lost_places(&self) -> watch::Receiver<()> {
        self.place_lost.subscribe()
    }

    /// Changes whenever an outcome is parked.
    pub(crate) fn parkings(&self) -> watch::Receiver<()> {
        self.parkings.subscribe()
    }

    /// Changes whenever a job is here no longer, or its outcome has been parked, or is wanted again, or a stream is lost.
    pub(crate) fn movements(&self) -> watch::Receiver<()> {
        self.moved.subscribe()
    }
}
