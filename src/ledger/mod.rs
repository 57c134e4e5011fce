//! [`Ledger`]: records the jobs that this worker has taken, so that a lost connection does not make a job run twice.
//!
//! The server requeues a job as soon as the stream that took the job closes, even if the job still runs in this worker. A ledger
//! entry lives from the arrival of the job until its report is accepted, so a redelivered job is recognised. An outcome that
//! cannot be reported is parked until its job is redelivered. A job is held while the server has it in flight for this worker.
//!
//! | state | the job | held over an open stream |
//! | --- | --- | --- |
//! | Waiting | is in the dispatch queue | always |
//! | Running | is in a worker loop | until its stream is lost |
//! | Reporting | has ended, and its report is in flight | until its stream is lost |
//! | Parked | has ended, and its outcome waits for a redelivery | never |
//! | Settled | is reported, and a stale delivery of the same attempt may still arrive | never |

mod entries;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard};

use crate::client::{Client, StreamSettings};
use crate::fate::{Hold, Kind};
use crate::job::{JobId, Report};
use crate::lock::lock;
use crate::watch;
use entries::{Entries, EntryState, LedgerEntry};

/// One attempt of a job. A report to the server contains only the id of the job, not the number of the attempt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) id: JobId,
    /// The number of failures before this attempt, or `None` for a malformed job.
    pub(crate) attempts: Option<u32>,
}

/// The id of a take stream. Later streams have greater ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct StreamId(u64);

/// A guard for a stream that is being opened. The caller keeps the guard until `open_stream` has been called.
#[derive(Debug)]
pub(crate) struct ComingStream(Arc<Ledger>);

impl Drop for ComingStream {
    fn drop(&mut self) {
        self.0.entries().coming -= 1;
    }
}

/// The id of one delivery of a job by the server. Later deliveries have greater ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Delivery(u64);

/// The next step for a job that has arrived.
#[derive(Debug, PartialEq)]
pub(crate) enum Arrival {
    /// Start the job.
    New,
    /// Ignore the delivery: the job is running, its report is outstanding, or its report was accepted.
    UnderWay,
    /// Report the parked outcome.
    Ended(Report),
}

/// The jobs that this worker has taken, and the open streams that hold them.
#[derive(Debug)]
pub(crate) struct Ledger {
    entries: Mutex<Entries>,
    /// The signal that a job was removed, settled, redelivered, parked or reclaimed, or that a stream was lost.
    moved: watch::Sender<()>,
    /// The signal that a stream may have lost one of its prefetch slots.
    place_lost: watch::Sender<()>,
    /// The signal that an outcome was parked.
    parkings: watch::Sender<()>,
}

/// The result of `Ledger::begin`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Beginning {
    /// The run has begun.
    Begun {
        /// Whether this is the last run that may begin.
        is_last: bool,
    },
    /// The delivery is stale: its stream was lost, or the job was redelivered.
    NotOurs,
    /// The maximum number of runs has been reached.
    NoneLeft,
}

/// A job that runs or has ended in this worker, and that no open stream holds.
#[derive(Debug, Clone)]
pub(crate) struct Unheld {
    pub(crate) id: JobId,
    /// The settings of the stream that delivered the job.
    pub(crate) source: Arc<StreamSettings>,
    pub(crate) has_ended: bool,
}

/// A parked outcome, and the server to which it is reported.
#[derive(Debug, Clone)]
pub(crate) struct Parked {
    pub(crate) attempt: Attempt,
    pub(crate) kind: Kind,
    /// `Same` if the job was released and its stream is still open, otherwise `Lost`.
    pub(crate) hold: Hold,
    pub(crate) client: Arc<Client>,
}

impl Ledger {
    /// Returns an empty ledger that keeps at most `max_kept` parked and settled jobs, and lets at most `max_runs` runs begin.
    pub(crate) fn new(max_kept: usize, max_runs: Option<u64>) -> Self {
        let entries = Entries { max_kept, runs_left: max_runs, ..Entries::default() };
        Self {
            entries: Mutex::new(entries),
            moved: watch::Sender::default(),
            place_lost: watch::Sender::default(),
            parkings: watch::Sender::default(),
        }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // Ignore poisoning: no operation panics in the middle of a change, so the entries are consistent.
        lock(&self.entries)
    }

    /// Raises the limit of parked and settled jobs to `max_kept`. The limit is never lowered, because jobs of an earlier stream
    /// with a larger prefetch may still need the space.
    pub(crate) fn make_room(&self, max_kept: usize) {
        let mut entries = self.entries();
        entries.max_kept = entries.max_kept.max(max_kept);
    }

    /// Registers a stream that is being opened, because the server may send jobs over the stream before `open_stream` is called.
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

    /// Records that a stream was closed or lost. The server requeues the jobs of the stream, so those that have not been started
    /// are removed.
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
                    // The delivery over the lost stream was stale. It had replaced the delivery over the stream `earlier`, which
                    // still holds the job. The job is removed below, so one prefetch slot of `earlier` is lost until `earlier`
                    // closes.
                    (Some(earlier), EntryState::Waiting) => *lost_places.entry(earlier).or_default() += 1,
                    (Some(earlier), _) => (entry.stream, entry.is_held) = (earlier, true),
                    (None, _) => {}
                }
            }
            // A settled entry is needed only while an open stream may still bring a stale delivery of the job.
            let is_stale = matches!(entry.state, EntryState::Waiting) && is_of_stream
                || matches!(entry.state, EntryState::Settled(_)) && is_last;
            !is_stale
        });
        kept.retain(|id| by_id.contains_key(id));
        drop(entries);
        self.place_lost.send_replace(());
        self.moved.send_replace(());
    }

    /// Records the arrival of a job over a stream. Returns the next step, and the id of the delivery.
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

    /// Begins the run of a job if the delivery is not stale and the maximum number of runs has not been reached. A job beyond
    /// that maximum is removed, and the server requeues the job when the stream closes.
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

    /// Removes a waiting job that this worker does not start. The server requeues the job when the stream closes.
    pub(crate) fn give_back(&self, id: &JobId, delivery: Delivery) {
        let mut entries = self.entries();
        if entries.by_id.get(id).is_some_and(|entry| entry.waits_since(delivery)) {
            entries.by_id.remove(id);
            self.moved.send_replace(());
        }
    }

    /// Records that a run has ended. Returns the attempt to report. If the job was redelivered as a later attempt during the run,
    /// the later attempt is the one to report.
    pub(crate) fn end(&self, id: &JobId, report: &Report) -> Option<Attempt> {
        let mut entries = self.entries();
        let entry = entries.by_id.get_mut(id)?;
        entry.state = EntryState::Reporting(Kind::of(report));
        Some(Attempt { id: id.clone(), attempts: entry.attempts })
    }

    /// Removes a job whose run was interrupted. The server requeues the job when the stream closes.
    pub(crate) fn interrupt(&self, id: &JobId) {
        self.entries().by_id.remove(id);
        self.moved.send_replace(());
    }

    /// Sets the server from which jobs are taken from now on.
    pub(crate) fn set_present_server(&self, client: &Arc<Client>) {
        self.entries().present_server = Some(Arc::clone(client));
    }

    /// Returns the server to which an attempt is reported, or `None` if no report of the attempt is outstanding.
    pub(crate) fn destination(&self, attempt: &Attempt) -> Option<Arc<Client>> {
        let entries = self.entries();
        let entry = entries.by_id.get(&attempt.id).filter(|entry| entry.attempts == attempt.attempts)?;
        matches!(entry.state, EntryState::Reporting(_)).then(|| entries.server_of(entry))
    }

    /// Returns the delivery that holds this attempt over an open stream, if there is one.
    pub(crate) fn held(&self, attempt: &Attempt) -> Option<Delivery> {
        let entries = self.entries();
        let entry = entries.by_id.get(&attempt.id)?;
        (entry.attempts == attempt.attempts && entry.is_held).then_some(entry.delivery)
    }

    /// Compares the delivery that holds an attempt now with `seen`, the delivery that held the attempt before.
    pub(crate) fn hold(&self, attempt: &Attempt, seen: Option<Delivery>) -> Hold {
        match self.held(attempt) {
            None => Hold::Lost,
            held if held == seen => Hold::Same,
            Some(_) => Hold::Anew,
        }
    }

    /// Returns a closure that reports whether an attempt is still held by the delivery given in `seen`.
    pub(crate) fn watch_hold(
        self: &Arc<Self>,
        attempt: &Attempt,
        seen: Option<Delivery>,
    ) -> impl Fn() -> bool + Send + Sync + use<> {
        let (ledger, attempt) = (Arc::clone(self), attempt.clone());
        move || ledger.hold(&attempt, seen) == Hold::Same
    }

    /// Records that the server has accepted the report of an attempt. `seen` is the delivery that held the attempt at the time of
    /// the report. Returns false if the report must be sent again: an attempt without a number was redelivered after `seen`, and
    /// the redelivery may be a later attempt.
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
        // Remove the entry if the only stream holds the job, because no stale delivery of the job can then arrive. Also remove the
        // entry of an attempt without a number, because a settled entry would match the next attempt as well.
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

    /// Settles a parked outcome that no longer needs a report. Does nothing if its job has been redelivered since.
    pub(crate) fn settle_parked(&self, attempt: &Attempt) {
        let mut entries = self.entries();
        let Some(entry) = entries.ended(attempt) else { return };
        if let EntryState::Parked(report) = &entry.state {
            entry.state = EntryState::Settled(Kind::of(report));
            self.moved.send_replace(());
        }
    }

    /// Removes an attempt whose report was dropped. If a stream still holds the job, the job occupies a prefetch slot of that
    /// stream until the stream closes, so the slot is counted as lost.
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

    /// Parks an outcome until its job is redelivered. Returns the outcome instead if the job was redelivered after the delivery
    /// given in `seen`, because the report can then be sent at once. `may_be_held` means that the server may still hold the job
    /// over an open stream. A prefetch slot of that stream then counts as lost, so that the stream is replaced. The server
    /// redelivers the job when the old stream closes.
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

    /// Returns the parked outcomes of released jobs, which the server may still hold over an open stream.
    pub(crate) fn released(&self) -> Vec<Parked> {
        let mut parked = self.parked();
        parked.retain(|parked| parked.hold == Hold::Same);
        parked
    }

    /// Moves a released job back to the `Reporting` state, because a check has shown that the server still holds the job over its
    /// stream. Returns the outcome to report, or `None` if the job is no longer released.
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

    /// Returns the jobs that run or have ended in this worker, are not settled, and are held by no open stream.
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

    /// Returns the number of parked outcomes that were evicted because the limit `max_kept` was reached.
    pub(crate) fn evicted(&self) -> usize {
        self.entries().evicted
    }

    /// Reports whether the server of `client` delivered the job of an attempt. Also returns true if the ledger no longer has the
    /// job.
    pub(crate) fn came_from(&self, attempt: &Attempt, client: &Client) -> bool {
        self.entries().by_id.get(&attempt.id).is_none_or(|entry| entry.source.client.url() == client.url())
    }

    /// Returns the jobs that have ended and are not settled.
    pub(crate) fn ended(&self) -> Vec<JobId> {
        let entries = self.entries();
        entries.by_id.iter().filter(|(_, entry)| entry.is_unsettled()).map(|(id, _)| id.clone()).collect()
    }

    /// Reports whether all jobs in the ledger are parked or settled.
    pub(crate) fn is_all_parked(&self) -> bool {
        self.entries().by_id.values().all(|entry| matches!(entry.state, EntryState::Parked(_) | EntryState::Settled(_)))
    }

    /// Returns the number of jobs that the server holds over a stream. Ignores deliveries after `until`, if given.
    pub(crate) fn under_way(&self, stream: StreamId, until: Option<Delivery>) -> usize {
        let counts = |entry: &&LedgerEntry| {
            entry.is_held && entry.stream == stream && until.is_none_or(|until| entry.delivery <= until)
        };
        self.entries().by_id.values().filter(counts).count()
    }

    pub(crate) fn last_delivery(&self) -> Delivery {
        Delivery(self.entries().deliveries)
    }

    /// Reports whether a stream has lost prefetch slots to jobs that this worker does not report.
    pub(crate) fn has_lost_places(&self, stream: StreamId) -> bool {
        self.entries().lost_places.contains_key(&stream)
    }

    /// Returns a receiver that is notified when a stream may have lost one of its prefetch slots.
    pub(crate) fn lost_places(&self) -> watch::Receiver<()> {
        self.place_lost.subscribe()
    }

    /// Returns a receiver that is notified when an outcome is parked.
    pub(crate) fn parkings(&self) -> watch::Receiver<()> {
        self.parkings.subscribe()
    }

    /// Returns a receiver that is notified when a job is removed, settled, redelivered, parked or reclaimed, and when a stream is
    /// lost.
    pub(crate) fn movements(&self) -> watch::Receiver<()> {
        self.moved.subscribe()
    }
}
