//! [`Ledger`]: the jobs here, so that none runs twice because a connection was lost.
//!
//! The server requeues a job as soon as the stream that took it is gone, while its run goes on here. An entry lives from a job's
//! arrival until its report is accepted. An outcome that cannot be reported is parked until its job is redelivered.
//!
//! | state | the job | held over an open stream |
//! | --- | --- | --- |
//! | Waiting | is in the dispatch queue | always |
//! | Running | is in a worker loop | until its stream is lost |
//! | Reporting | has ended, and its report is in flight | until its stream is lost |
//! | Parked | has ended, and its outcome waits for a redelivery | never |
//! | Settled | is reported; a stale line of the same attempt may still arrive | never |

mod entries;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::client::{Client, StreamSettings};
use crate::fate::{Hold, Kind};
use crate::job::{JobId, Report};
use crate::watch;
use entries::{Entries, EntryState, LedgerEntry};

/// One attempt of a job. The server identifies a job by the id alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) id: JobId,
    /// The number of failures before this attempt. Unknown for a malformed job.
    pub(crate) attempts: Option<u32>,
}

/// The number of a take stream. Later streams have greater numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StreamId(u64);

/// A stream that is being opened. The guard is kept until the stream is noted as open.
#[derive(Debug)]
pub(crate) struct ComingStream(Arc<Ledger>);

impl Drop for ComingStream {
    fn drop(&mut self) {
        self.0.entries().coming -= 1;
    }
}

/// The number of one delivery of a job by the server. Later deliveries have greater numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Delivery(u64);

/// The next step for a job that has arrived.
#[derive(Debug, PartialEq)]
pub(crate) enum Arrival {
    /// Start the job.
    New,
    /// Do nothing: a run, a report in flight, or an accepted report answers for the job.
    UnderWay,
    /// Report the parked outcome.
    Ended(Report),
}

/// The jobs here, and the streams that hold them.
#[derive(Debug)]
pub(crate) struct Ledger {
    entries: Mutex<Entries>,
    /// Changes when a job leaves, is redelivered, or is parked, and when a stream is lost.
    moved: watch::Sender<()>,
    /// Changes when a report is dropped while the server still holds its job for this worker.
    place_lost: watch::Sender<()>,
    /// Changes when an outcome is parked.
    parkings: watch::Sender<()>,
}

/// The answer to whether a run may begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// The run has begun.
    Begun {
        /// Whether no further run may begin.
        is_last: bool,
    },
    /// The delivery is stale: the server has the job again.
    NotOurs,
    /// The limit of runs is reached.
    NoneLeft,
}

/// A job that runs or has ended here, and that no stream holds.
#[derive(Debug, Clone)]
pub(crate) struct Unheld {
    pub(crate) id: JobId,
    /// The settings of the stream that delivered the job.
    pub(crate) source: Arc<StreamSettings>,
    pub(crate) has_ended: bool,
}

/// A parked outcome.
#[derive(Debug, Clone)]
pub(crate) struct Parked {
    pub(crate) attempt: Attempt,
    pub(crate) kind: Kind,
    /// `Same` if the job is released, and its stream still open.
    pub(crate) hold: Hold,
    pub(crate) client: Arc<Client>,
}

impl Ledger {
    /// Returns an empty ledger that keeps at most `max_kept` parked and settled jobs, and lets at most `max_runs` runs begin.
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
        // A panic leaves no entry half written, because each is replaced as a whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises the limit of parked and settled jobs. The limit never shrinks, because the jobs of an old stream may still need it.
    pub(crate) fn make_room(&self, max_kept: usize) {
        let mut entries = self.entries();
        entries.max_kept = entries.max_kept.max(max_kept);
    }

    /// Notes that a stream is being opened: the server may deliver jobs before the stream is known to be open.
    pub(crate) fn expect_stream(self: &Arc<Self>) -> ComingStream {
        self.entries().coming += 1;
        ComingStream(Arc::clone(self))
    }

    pub(crate) fn open_stream(&self) -> StreamId {
        let mut entries = self.entries();
        entries.streams += 1;
        let stream = StreamId(entries.streams);
        entries.open.insert(stream);
        stream
    }

    /// Notes that a stream is closed or lost, so that the server requeues its jobs. The jobs that wait here are forgotten.
    pub(crate) fn lose_stream(&self, stream: StreamId) {
        let mut entries = self.entries();
        let Entries { by_id, kept, open, coming, lost_places, .. } = &mut *entries;
        open.remove(&stream);
        let is_last = open.is_empty() && *coming == 0;
        lost_places.remove(&stream);
        by_id.retain(|_, entry| {
            let is_of_stream = entry.stream == stream;
            if is_of_stream {
                (entry.is_held, entry.is_released) = (false, false);
                let earlier = entry.earlier.take().filter(|earlier| open.contains(earlier));
                match (earlier, &entry.state) {
                    // The stream's line was stale, and replaced the one that waited. That place is lost until its stream closes.
                    (Some(earlier), EntryState::Waiting) => *lost_places.entry(earlier).or_default() += 1,
                    (Some(earlier), _) => (entry.stream, entry.is_held) = (earlier, true),
                    (None, _) => {}
                }
            }
            // Undelivered lines are lost with their stream.
            let is_stale = matches!(entry.state, EntryState::Waiting) && is_of_stream
                || matches!(entry.state, EntryState::Settled(_)) && is_last;
            !is_stale
        });
        kept.retain(|id| by_id.contains_key(id));
        drop(entries);
        self.place_lost.send_replace(());
        self.moved.send_replace(());
    }

    /// Notes that a job has arrived over a stream.
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
            earlier: None,
            is_released: false,
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

    /// Begins a run if one may begin. A job beyond the limit of runs is forgotten; the server requeues it when the stream closes.
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

    /// Forgets a job that is not started here. The server requeues the job when the stream closes.
    pub(crate) fn give_back(&self, id: &JobId, delivery: Delivery) {
        let mut entries = self.entries();
        if entries.by_id.get(id).is_some_and(|entry| entry.waits_since(delivery)) {
            entries.by_id.remove(id);
            self.moved.send_replace(());
        }
    }

    /// Notes that a run has ended. Returns the attempt to report: the job may have been redelivered since the run began.
    pub(crate) fn end(&self, id: &JobId, report: &Report) -> Option<Attempt> {
        let mut entries = self.entries();
        let entry = entries.by_id.get_mut(id)?;
        entry.state = EntryState::Reporting(Kind::of(report));
        Some(Attempt { id: id.clone(), attempts: entry.attempts })
    }

    /// Forgets a job whose run was interrupted. The server requeues the job when the stream closes.
    pub(crate) fn interrupt(&self, id: &JobId) {
        self.entries().by_id.remove(id);
        self.moved.send_replace(());
    }

    /// Sets the server from which jobs are taken from now on.
    pub(crate) fn set_present_server(&self, client: &Arc<Client>) {
        self.entries().present_server = Some(Arc::clone(client));
    }

    /// Returns the server for an attempt's report, or none once no report is in flight.
    pub(crate) fn destination(&self, attempt: &Attempt) -> Option<Arc<Client>> {
        let entries = self.entries();
        let entry = entries.by_id.get(&attempt.id).filter(|entry| entry.attempts == attempt.attempts)?;
        matches!(entry.state, EntryState::Reporting(_)).then(|| entries.server_of(entry))
    }

    /// Returns the delivery by which the server holds this attempt for this worker, if it does.
    pub(crate) fn held(&self, attempt: &Attempt) -> Option<Delivery> {
        let entries = self.entries();
        let entry = entries.by_id.get(&attempt.id)?;
        (entry.attempts == attempt.attempts && entry.is_held).then_some(entry.delivery)
    }

    /// Compares the present hold of an attempt with the delivery `seen` that held it before.
    pub(crate) fn hold(&self, attempt: &Attempt, seen: Option<Delivery>) -> Hold {
        match self.held(attempt) {
            None => Hold::Lost,
            held if held == seen => Hold::Same,
            Some(_) => Hold::Anew,
        }
    }

    /// Returns a check of whether an attempt is still held by the delivery `seen`.
    pub(crate) fn watch_hold(
        self: &Arc<Self>,
        attempt: &Attempt,
        seen: Option<Delivery>,
    ) -> impl Fn() -> bool + Send + Sync + use<> {
        let (ledger, attempt) = (Arc::clone(self), attempt.clone());
        move || ledger.hold(&attempt, seen) == Hold::Same
    }

    /// Notes that the server has accepted the report of an attempt, which the delivery `seen` held. Returns false if the report
    /// must be sent again: attempts without a number look the same, and a later one has been delivered since.
    pub(crate) fn settle(&self, attempt: &Attempt, seen: Option<Delivery>) -> bool {
        let mut entries = self.entries();
        let is_only_stream = entries.open.len() + entries.coming <= 1;
        let Some(entry) = entries.ended(attempt) else { return true };
        let kind = match &entry.state {
            EntryState::Parked(report) => Kind::of(report),
            EntryState::Reporting(kind) => *kind,
            EntryState::Waiting | EntryState::Running | EntryState::Settled(_) => return true,
        };
        if attempt.attempts.is_none() && entry.is_held && seen != Some(entry.delivery) {
            return false;
        }
        // The server has not redelivered a job that the only stream holds, so no stale line can arrive. And an attempt without a
        // number cannot be told from the next one.
        if (entry.is_held && is_only_stream) || attempt.attempts.is_none() {
            entries.remove(&attempt.id);
        } else {
            entry.is_held = false;
            entry.state = EntryState::Settled(kind);
            entries.keep(&attempt.id);
        }
        self.moved.send_replace(());
        true
    }

    /// Notes that a parked outcome is obsolete, unless its job has been redelivered since.
    pub(crate) fn settle_parked(&self, attempt: &Attempt) {
        let mut entries = self.entries();
        let Some(entry) = entries.ended(attempt) else { return };
        if let EntryState::Parked(report) = &entry.state {
            entry.state = EntryState::Settled(Kind::of(report));
            self.moved.send_replace(());
        }
    }

    /// Forgets an attempt whose report was dropped. If the server still holds the job for this worker, the stream loses that
    /// place of its prefetch.
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

    /// Parks an outcome until its job is redelivered. Returns the outcome if a redelivery came after the delivery `seen`: the
    /// report can leave at once then. With `may_be_held`, the server may still hold the job over an open stream, which then
    /// counts as one with a lost place: once it is replaced and closes, the job is redelivered.
    pub(crate) fn park(
        &self,
        attempt: &Attempt,
        seen: Option<Delivery>,
        report: Report,
        may_be_held: bool,
    ) -> Option<Report> {
        let mut entries = self.entries();
        let Entries { by_id, lost_places, .. } = &mut *entries;
        let entry = by_id.get_mut(&attempt.id).filter(|entry| entry.attempts == attempt.attempts)?;
        if entry.is_held && seen != Some(entry.delivery) {
            return Some(report);
        }
        if entry.is_held && may_be_held {
            entry.is_released = true;
            *lost_places.entry(entry.stream).or_default() += 1;
            self.place_lost.send_replace(());
        }
        entry.is_held = false;
        entry.state = EntryState::Parked(report);
        entries.keep(&attempt.id);
        self.parkings.send_replace(());
        self.moved.send_replace(());
        None
    }

    pub(crate) fn parked(&self) -> Vec<Parked> {
        let entries = self.entries();
        let parked = entries.kept.iter().filter_map(|id| match entries.by_id.get(id) {
            Some(entry @ LedgerEntry { attempts, state: EntryState::Parked(report), .. }) => Some(Parked {
                attempt: Attempt { id: id.clone(), attempts: *attempts },
                kind: Kind::of(report),
                hold: if entry.is_released { Hold::Same } else { Hold::Lost },
                client: entries.server_of(entry),
            }),
            _ => None,
        });
        parked.collect()
    }

    /// Returns the parked outcomes of released jobs.
    pub(crate) fn released(&self) -> Vec<Parked> {
        let mut parked = self.parked();
        parked.retain(|parked| parked.hold == Hold::Same);
        parked
    }

    /// Returns the outcome of a released job that the server still holds over its stream, to be reported.
    pub(crate) fn reclaim(&self, attempt: &Attempt) -> Option<Report> {
        let mut entries = self.entries();
        let entry = entries.ended(attempt).filter(|entry| entry.is_released)?;
        let EntryState::Parked(report) = &entry.state else { return None };
        let (report, stream) = (report.clone(), entry.stream);
        (entry.is_held, entry.is_released) = (true, false);
        entry.state = EntryState::Reporting(Kind::of(&report));
        entries.kept.retain(|kept| kept != &attempt.id);
        if let Some(lost) = entries.lost_places.get_mut(&stream) {
            *lost -= 1;
            if *lost == 0 {
                entries.lost_places.remove(&stream);
            }
        }
        self.moved.send_replace(());
        Some(report)
    }

    /// Returns the jobs that run or have ended here, are not settled, and are held by no stream.
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

    /// Reports whether all jobs that the server holds over a stream still wait to be started.
    pub(crate) fn is_all_waiting(&self, stream: StreamId) -> bool {
        let entries = self.entries();
        let mut held = entries.by_id.values().filter(|entry| entry.is_held && entry.stream == stream);
        held.all(|entry| matches!(entry.state, EntryState::Waiting))
    }

    /// Returns the number of parked outcomes that were dropped for want of room.
    pub(crate) fn evicted(&self) -> usize {
        self.entries().evicted
    }

    /// Reports whether an attempt came from that server.
    pub(crate) fn came_from(&self, attempt: &Attempt, client: &Client) -> bool {
        self.entries().by_id.get(&attempt.id).is_none_or(|entry| entry.source.client.url() == client.url())
    }

    /// Returns the jobs that have ended and are not settled.
    pub(crate) fn ended(&self) -> Vec<JobId> {
        let entries = self.entries();
        entries.by_id.iter().filter(|(_, entry)| entry.is_unsettled()).map(|(id, _)| id.clone()).collect()
    }

    /// Reports whether all jobs here are parked or settled.
    pub(crate) fn is_all_parked(&self) -> bool {
        self.entries().by_id.values().all(|entry| matches!(entry.state, EntryState::Parked(_) | EntryState::Settled(_)))
    }

    /// Returns the number of jobs that the server holds over a stream. With `until`, later deliveries do not count.
    pub(crate) fn under_way(&self, stream: StreamId, until: Option<Delivery>) -> usize {
        let counts = |entry: &&LedgerEntry| {
            entry.is_held && entry.stream == stream && until.is_none_or(|until| entry.delivery <= until)
        };
        self.entries().by_id.values().filter(counts).count()
    }

    pub(crate) fn last_delivery(&self) -> Delivery {
        Delivery(self.entries().deliveries)
    }

    /// Reports whether a stream has lost places of its prefetch.
    pub(crate) fn has_lost_places(&self, stream: StreamId) -> bool {
        self.entries().lost_places.contains_key(&stream)
    }

    /// Returns a receiver that changes when a stream loses a place.
    pub(crate) fn lost_places(&self) -> watch::Receiver<()> {
        self.place_lost.subscribe()
    }

    /// Returns a receiver that changes when an outcome is parked.
    pub(crate) fn parkings(&self) -> watch::Receiver<()> {
        self.parkings.subscribe()
    }

    /// Returns a receiver that changes when a job leaves, is redelivered, or is parked, and when a stream is lost.
    pub(crate) fn movements(&self) -> watch::Receiver<()> {
        self.moved.subscribe()
    }
}
