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

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tracing::warn;

use crate::client::{Client, StreamSettings};
use crate::fate::{Hold, Kind};
use crate::job::{JobId, Outcome};

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
    /// Changes when a job is here no longer, or its outcome has been parked, or is wanted again.
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

/// A parked outcome.
#[derive(Debug, Clone)]
pub(crate) struct Parked {
    pub(crate) attempt: Attempt,
    pub(crate) kind: Kind,
    pub(crate) client: Arc<Client>,
}

#[derive(Debug)]
struct Entries {
    by_id: BTreeMap<JobId, Entry>,
    /// The jobs that are parked or settled, oldest first.
    kept: VecDeque<JobId>,
    max_kept: usize,
    deliveries: u64,
    streams: u64,
    open: BTreeSet<StreamId>,
    /// The server that jobs are taken from now.
    present_server: Option<Arc<Client>>,
    /// The number of runs that may still begin, where that is limited.
    runs_left: Option<u64>,
    /// The places of each open stream that are lost to jobs whose reports were given up.
    lost_places: BTreeMap<StreamId, usize>,
}

#[derive(Debug)]
struct Entry {
    attempts: Option<u32>,
    delivery: Delivery,
    stream: StreamId,
    source: Arc<StreamSettings>,
    /// Whether the server holds the job for us, over `stream`.
    is_held: bool,
    state: State,
}

#[derive(Debug)]
enum State {
    Waiting,
    Running,
    Reporting(Kind),
    Parked(Outcome),
    Settled(Kind),
}

fn kind_of(outcome: &Outcome) -> Kind {
    if matches!(outcome, Outcome::Failure(_)) { Kind::Failure } else { Kind::Success }
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
            present_server: None,
            runs_left: max_runs,
            lost_places: BTreeMap::new(),
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

    /// Keeps at most that many ended jobs from now on.
    pub(crate) fn set_max_kept(&self, max_kept: usize) {
        self.entries().max_kept = max_kept;
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
        let Entries { by_id, kept, open, lost_places, .. } = &mut *entries;
        open.remove(&stream);
        lost_places.remove(&stream);
        by_id.retain(|_, entry| {
            if entry.stream == stream {
                entry.is_held = false;
            }
            // A line that is on the way is lost with its stream.
            let is_of_no_use = matches!(entry.state, State::Waiting) && entry.stream == stream
                || matches!(entry.state, State::Settled(_)) && open.is_empty();
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
        let new = Entry {
            attempts: attempt.attempts,
            delivery,
            stream,
            source: Arc::clone(source),
            is_held: true,
            state: State::Waiting,
        };
        let arrival = entries.arrive(&attempt.id, new);
        if matches!(arrival, Arrival::Ended(_)) {
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
        entry.state = State::Running;
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
        entry.state = State::Reporting(kind_of(outcome));
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
        matches!(entry.state, State::Reporting(_)).then(|| entries.server_of(entry))
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

    /// Notes that an attempt's report has arrived.
    pub(crate) fn settle(&self, attempt: &Attempt) {
        let mut entries = self.entries();
        let Some(entry) = entries.ended(attempt) else { return };
        let kind = match &entry.state {
            State::Parked(outcome) => kind_of(outcome),
            State::Reporting(kind) => *kind,
            State::Waiting | State::Running | State::Settled(_) => return,
        };
        // A job that is held cannot have been handed out again: no other line of it is on the way. And an attempt without a
        // number cannot be told from the next one.
        if entry.is_held || attempt.attempts.is_none() {
            entries.remove(&attempt.id);
        } else {
            entry.state = State::Settled(kind);
            entries.keep(&attempt.id);
        }
        self.moved.send_replace(());
    }

    /// Notes that a parked outcome is of no use any more, unless its job has been redelivered since.
    pub(crate) fn settle_parked(&self, attempt: &Attempt) {
        let mut entries = self.entries();
        let Some(entry) = entries.ended(attempt) else { return };
        if let State::Parked(outcome) = &entry.state {
            entry.state = State::Settled(kind_of(outcome));
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
            Some(entry @ Entry { attempts, state: State::Parked(outcome), .. }) => Some(Parked {
                attempt: Attempt { id: id.clone(), attempts: *attempts },
                kind: kind_of(outcome),
                client: entries.server_of(entry),
            }),
            _ => None,
        });
        parked.collect()
    }

    /// The jobs that run here or have ended here, that are not settled, and that no stream holds; with the settings by which
    /// each has come.
    pub(crate) fn unheld(&self) -> Vec<(JobId, Arc<StreamSettings>)> {
        let entries = self.entries();
        let is_unheld = |entry: &&Entry| !entry.is_held && !matches!(entry.state, State::Settled(_));
        let unheld = entries.by_id.iter().filter(|(_, entry)| is_unheld(entry));
        unheld.map(|(id, entry)| (id.clone(), Arc::clone(&entry.source))).collect()
    }

    /// The jobs that have ended, and whose outcome is not settled.
    pub(crate) fn ended(&self) -> Vec<JobId> {
        let entries = self.entries();
        entries.by_id.iter().filter(|(_, entry)| entry.is_unsettled()).map(|(id, _)| id.clone()).collect()
    }

    /// Whether the only jobs here have ended, and are parked.
    pub(crate) fn is_all_parked(&self) -> bool {
        self.entries().by_id.values().all(|entry| matches!(entry.state, State::Parked(_) | State::Settled(_)))
    }

    /// The number of jobs that a stream holds for us. With `until`, only those that had come by that delivery count.
    pub(crate) fn under_way(&self, stream: StreamId, until: Option<Delivery>) -> usize {
        let counts = |entry: &&Entry| {
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

impl Entry {
    /// Notes that its job has been redelivered.
    fn redeliver(&mut self, new: Self) -> Arrival {
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

    fn park(&mut self, outcome: Outcome) {
        debug_assert!(!self.is_held, "a job that is held over an open stream is not redelivered");
        self.state = State::Parked(outcome);
    }

    /// Whether it waits to be run since that delivery.
    fn waits_since(&self, delivery: Delivery) -> bool {
        self.delivery == delivery && matches!(self.state, State::Waiting)
    }

    /// Whether it is an attempt that has ended here, and whose outcome is not settled.
    fn is_unsettled(&self) -> bool {
        matches!(self.state, State::Reporting(_) | State::Parked(_))
    }
}

impl Entries {
    /// The server that hears of a job: the one that it came from. A job that no stream holds any more may be at the present
    /// one, by another url, if its own does not answer.
    fn server_of(&self, entry: &Entry) -> Arc<Client> {
        let own = &entry.source.client;
        match &self.present_server {
            Some(present) if !entry.is_held && own.health().is_failing() => Arc::clone(present),
            _ => Arc::clone(own),
        }
    }

    fn arrive(&mut self, id: &JobId, new: Entry) -> Arrival {
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
    fn ended(&mut self, attempt: &Attempt) -> Option<&mut Entry> {
        self.by_id.get_mut(&attempt.id).filter(|entry| entry.attempts == attempt.attempts && entry.is_unsettled())
    }

    /// Counts an entry to those that are kept, and forgets the oldest beyond the limit.
    fn keep(&mut self, id: &JobId) {
        self.kept.retain(|kept| kept != id);
        self.kept.push_back(id.clone());
        while self.kept.len() > self.max_kept
            && let Some(oldest) = self.kept.pop_front()
        {
            if let Some(Entry { state: State::Parked(_), .. }) = self.by_id.remove(&oldest) {
                warn!(id = oldest.as_str(), "outcome dropped: too many are kept for their jobs to come again");
            }
        }
    }

    fn remove(&mut self, id: &JobId) {
        self.by_id.remove(id);
        self.kept.retain(|kept| kept != id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::WorkerConfig;
    use crate::job::Failure;

    /// A ledger and the one stream over which its jobs come.
    struct Here {
        ledger: Ledger,
        source: Arc<StreamSettings>,
        stream: std::cell::Cell<StreamId>,
    }

    impl std::ops::Deref for Here {
        type Target = Ledger;

        fn deref(&self) -> &Ledger {
            &self.ledger
        }
    }

    impl Here {
        fn new(max_kept: usize) -> Self {
            let ledger = Ledger::new(max_kept, None);
            let source = Arc::new(StreamSettings::of(&WorkerConfig::default(), None));
            let stream = std::cell::Cell::new(ledger.open_stream());
            Self { ledger, source, stream }
        }

        fn arrive(&self, attempt: &Attempt) -> (Arrival, Delivery) {
            self.ledger.arrive(attempt, self.stream.get(), &self.source)
        }

        /// The stream is lost, and another one opened.
        fn lose_stream(&self) {
            self.ledger.lose_stream(self.stream.get());
            self.stream.set(self.ledger.open_stream());
        }

        /// Whether nothing here may still have to be told to the server.
        fn is_empty(&self) -> bool {
            self.entries().by_id.values().all(|entry| matches!(entry.state, State::Settled(_)))
        }

        fn parked(&self) -> Vec<(Attempt, Kind)> {
            self.ledger.parked().into_iter().map(|parked| (parked.attempt, parked.kind)).collect()
        }
    }

    fn attempt(id: &str, attempts: u32) -> Attempt {
        Attempt { id: id.into(), attempts: Some(attempts) }
    }

    fn failure() -> Outcome {
        Outcome::Failure(Failure::new("ExitStatus", "no"))
    }

    /// A job that has arrived and is running.
    fn running(ledger: &Here, attempt: &Attempt) {
        let (arrival, delivery) = ledger.arrive(attempt);
        assert_eq!(arrival, Arrival::New);
        assert_eq!(ledger.begin(&attempt.id, delivery), Beginning::Begun { is_last: false });
    }

    #[test]
    fn a_job_that_comes_again_while_it_runs_is_not_started_and_its_report_counts_again() {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        running(&ledger, &job);
        ledger.lose_stream();
        assert_eq!(ledger.held(&job), None);
        assert_eq!(ledger.arrive(&job).0, Arrival::UnderWay);
        assert_eq!(ledger.end(&job.id, &Outcome::Success), Some(job.clone()));
        assert!(ledger.held(&job).is_some());
        ledger.forget(&job);
        assert!(ledger.is_empty());
    }

    #[test]
    fn a_run_answers_for_the_attempt_that_the_server_has_come_to() {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        running(&ledger, &job);
        ledger.lose_stream();
        assert_eq!(ledger.arrive(&attempt("a", 1)).0, Arrival::UnderWay);
        assert_eq!(ledger.end(&job.id, &failure()), Some(attempt("a", 1)));
    }

    #[test]
    fn what_waits_when_the_stream_is_lost_is_not_started() {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        let (_, old) = ledger.arrive(&job);
        ledger.lose_stream();
        assert!(ledger.is_empty() && ledger.begin(&job.id, old) == Beginning::NotOurs);
        let (arrival, new) = ledger.arrive(&job);
        assert_eq!(arrival, Arrival::New);
        assert!(ledger.begin(&job.id, old) == Beginning::NotOurs);
        assert_eq!(ledger.begin(&job.id, new), Beginning::Begun { is_last: false });
        assert!(ledger.begin(&job.id, new) == Beginning::NotOurs);
    }

    #[test]
    fn an_outcome_that_could_not_be_reported_is_reported_when_its_job_comes_again() {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        running(&ledger, &job);
        let seen = ledger.held(&job);
        ledger.end(&job.id, &failure());
        ledger.lose_stream();
        assert_eq!(ledger.park(&job, seen, failure()), None);
        assert_eq!(ledger.arrive(&job).0, Arrival::Ended(failure()));
    }

    #[test]
    fn a_job_that_has_come_again_is_not_parked_unless_the_server_denied_that_very_delivery() {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        running(&ledger, &job);
        let seen = ledger.held(&job);
        ledger.end(&job.id, &Outcome::Success);
        ledger.lose_stream();
        ledger.arrive(&job);
        assert_eq!(ledger.park(&job, seen, Outcome::Success), Some(Outcome::Success));
        let seen = ledger.held(&job);
        assert_eq!(ledger.park(&job, seen, Outcome::Success), None);
    }

    #[test]
    fn a_failure_that_was_counted_is_not_told_to_the_next_attempt() {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        running(&ledger, &job);
        ledger.end(&job.id, &failure());
        let (arrival, delivery) = ledger.arrive(&attempt("a", 1));
        assert_eq!(arrival, Arrival::New);
        assert_eq!(ledger.held(&job), None);
        ledger.forget(&job);
        let begun = ledger.begin(&job.id, delivery);
        assert_eq!(begun, Beginning::Begun { is_last: false }, "forgetting the old attempt spares the new one");
    }

    #[test]
    fn work_that_is_done_is_done_whatever_attempt_comes_next() {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        running(&ledger, &job);
        ledger.end(&job.id, &Outcome::Success);
        ledger.lose_stream();
        ledger.park(&job, None, Outcome::Success);
        assert_eq!(ledger.arrive(&attempt("a", 3)).0, Arrival::Ended(Outcome::Success));
    }

    #[test]
    fn a_success_that_is_being_reported_is_kept_whatever_attempt_comes_meanwhile() {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        running(&ledger, &job);
        ledger.end(&job.id, &Outcome::Success);
        ledger.lose_stream();
        assert_eq!(ledger.arrive(&attempt("a", 1)).0, Arrival::UnderWay);
        let seen = ledger.held(&job);
        assert!(seen.is_some());
        assert_eq!(ledger.park(&job, seen, Outcome::Success), None);
        assert_eq!(ledger.arrive(&attempt("a", 1)).0, Arrival::Ended(Outcome::Success));
        ledger.forget(&attempt("a", 1));
        assert!(ledger.is_empty());
    }

    #[test]
    fn a_job_that_comes_again_while_it_waits_is_started_once_as_what_it_has_become() {
        let ledger = Here::new(8);
        let (_, old) = ledger.arrive(&attempt("a", 0));
        let (arrival, new) = ledger.arrive(&attempt("a", 1));
        assert_eq!(arrival, Arrival::New);
        assert_eq!(ledger.begin(&"a".into(), old), Beginning::NotOurs);
        ledger.give_back(&"a".into(), old);
        assert_eq!(ledger.begin(&"a".into(), new), Beginning::Begun { is_last: false });
        assert_eq!(ledger.end(&"a".into(), &failure()), Some(attempt("a", 1)));
    }

    #[test]
    fn an_outcome_that_is_kept_again_and_again_takes_one_place() {
        let ledger = Here::new(2);
        let keep = |name| {
            let job = attempt(name, 0);
            let (arrival, delivery) = ledger.arrive(&job);
            if arrival == Arrival::New {
                assert_eq!(ledger.begin(&job.id, delivery), Beginning::Begun { is_last: false });
                ledger.end(&job.id, &Outcome::Success);
            }
            assert_eq!(ledger.park(&job, Some(delivery), Outcome::Success), None);
        };
        ["a", "a", "a", "b"].into_iter().for_each(keep);
        assert_eq!(ledger.parked(), [(attempt("a", 0), Kind::Success), (attempt("b", 0), Kind::Success)]);
        ledger.forget(&attempt("a", 0));
        assert_eq!(ledger.parked(), [(attempt("b", 0), Kind::Success)]);
    }

    #[test]
    fn a_line_that_was_sent_before_the_report_arrived_starts_nothing() {
        for (outcome, next) in [(Outcome::Success, Arrival::UnderWay), (failure(), Arrival::New)] {
            let (ledger, job) = (Here::new(8), attempt("a", 0));
            let settled = || {
                running(&ledger, &job);
                ledger.end(&job.id, &outcome);
                ledger.lose_stream();
                ledger.settle(&job);
                assert!(ledger.is_empty() && ledger.ended().is_empty());
            };
            settled();
            assert_eq!(ledger.arrive(&job).0, Arrival::UnderWay);
            settled();
            assert_eq!(ledger.arrive(&attempt("a", 1)).0, next);
            ledger.lose_stream();
            settled();
            ledger.lose_stream();
            assert_eq!(ledger.arrive(&job).0, Arrival::New, "such a line is lost with its stream");
        }
    }

    #[test]
    fn nothing_is_remembered_of_a_job_that_was_held_when_its_report_arrived() {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        running(&ledger, &job);
        ledger.end(&job.id, &Outcome::Success);
        ledger.settle(&job);
        assert!(ledger.entries().by_id.is_empty() && ledger.entries().kept.is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let ledger = Here::new(2);
        for name in ["a", "b", "c"] {
            let job = attempt(name, 0);
            running(&ledger, &job);
            ledger.end(&job.id, &Outcome::Success);
            ledger.park(&job, ledger.held(&job), Outcome::Success);
        }
        ledger.lose_stream();
        assert_eq!(ledger.arrive(&attempt("a", 0)).0, Arrival::New);
        assert_eq!(ledger.arrive(&attempt("b", 0)).0, Arrival::Ended(Outcome::Success));
    }

    #[test]
    fn only_the_jobs_of_a_lost_stream_are_held_no_more() {
        let (here, a, b) = (Here::new(8), attempt("a", 0), attempt("b", 0));
        running(&here, &a);
        let first = here.stream.replace(here.open_stream());
        running(&here, &b);
        here.ledger.lose_stream(first);
        assert_eq!((here.held(&a), here.held(&b).is_some()), (None, true));
        assert!(matches!(&here.unheld()[..], [(id, _)] if *id == a.id));
        assert_eq!((here.under_way(first, None), here.under_way(here.stream.get(), None)), (0, 1));
    }

    #[test]
    fn a_job_is_held_by_the_stream_that_brought_it_last() {
        let (here, job) = (Here::new(8), attempt("a", 0));
        running(&here, &job);
        let first = here.stream.replace(here.open_stream());
        assert_eq!(here.arrive(&job).0, Arrival::UnderWay);
        here.ledger.lose_stream(first);
        assert!(here.held(&job).is_some());
    }

    #[test]
    fn a_line_under_way_over_another_stream_is_expected_until_all_are_lost() {
        let (here, job) = (Here::new(8), attempt("a", 0));
        running(&here, &job);
        here.end(&job.id, &Outcome::Success);
        let second = here.open_stream();
        here.lose_stream();
        here.settle(&job);
        let third = here.stream.replace(second);
        here.ledger.lose_stream(third);
        assert_eq!(here.arrive(&job).0, Arrival::UnderWay);
    }

    #[test]
    fn a_denied_delivery_is_held_no_more() {
        let (here, job) = (Here::new(8), attempt("a", 0));
        running(&here, &job);
        let seen = here.held(&job);
        here.end(&job.id, &Outcome::Success);
        assert_eq!(here.park(&job, seen, Outcome::Success), None);
        assert_eq!((here.held(&job), here.under_way(here.stream.get(), None)), (None, 0));
        assert_eq!(here.unheld().len(), 1);
    }

    #[test]
    fn a_report_given_up_loses_a_place_only_while_its_job_is_held() {
        let (here, a, b) = (Here::new(8), attempt("a", 0), attempt("b", 0));
        running(&here, &a);
        here.end(&a.id, &failure());
        here.lose_stream();
        here.forget(&a);
        assert!(!here.has_lost_places(here.stream.get()));
        running(&here, &b);
        here.end(&b.id, &failure());
        here.forget(&b);
        assert!(here.has_lost_places(here.stream.get()) && here.is_empty());
    }

    #[test]
    fn a_parked_outcome_is_not_settled_once_its_job_is_redelivered() {
        let (here, job) = (Here::new(8), attempt("a", 0));
        running(&here, &job);
        here.end(&job.id, &failure());
        here.lose_stream();
        here.park(&job, None, failure());
        assert_eq!(here.arrive(&job).0, Arrival::Ended(failure()));
        here.settle_parked(&job);
        assert_eq!(here.ended(), [job.id]);
    }
}
