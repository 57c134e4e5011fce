//! [`Ledger`]: which jobs are here, so that none is run twice because a connection was lost.
//!
//! The server hands a job out again as soon as the stream that took it is gone, while its run goes on here. What is known
//! of a job is kept from its arrival until its report has been accepted; what has ended and could not be reported then is
//! kept for the case that it comes again.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use tracing::warn;

use crate::job::{JobId, Outcome};

/// A job, and which of its attempts. The server goes by the id alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attempt {
    pub(crate) id: JobId,
    /// How many attempts had failed before; unknown for what could not be read.
    pub(crate) attempts: Option<u32>,
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

/// What is known of the jobs that are here.
#[derive(Debug)]
pub(crate) struct Ledger {
    entries: Mutex<Entries>,
    /// Changes when a job is here no longer, or its outcome has been kept, or is wanted again.
    moved: watch::Sender<()>,
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

#[derive(Debug)]
struct Entries {
    by_id: HashMap<JobId, Entry>,
    /// The jobs that are parked or settled, oldest first.
    kept: VecDeque<JobId>,
    max_kept: usize,
    deliveries: u64,
    /// How many runs may still begin, where that is limited.
    runs_left: Option<u64>,
    /// Every delivery up to this one came over a stream that is lost.
    lost: u64,
}

#[derive(Debug)]
struct Entry {
    attempts: Option<u32>,
    delivery: Delivery,
    state: State,
}

#[derive(Debug)]
enum State {
    /// In the dispatch queue.
    Waiting,
    /// In a worker loop.
    Running,
    /// In the ack queue.
    Reporting { failed: bool },
    /// Ended; the server did not hold the job for us when it was reported.
    Parked(Outcome),
    /// Reported; but when the server took the report it may have handed the job out again, by a line that is under way.
    Settled { failed: bool },
}

impl Ledger {
    /// An empty ledger that remembers at most `max_kept` ended jobs for the case that they come again, and lets at most
    /// `max_runs` begin.
    pub(crate) fn new(max_kept: usize, max_runs: Option<u64>) -> Self {
        let (by_id, kept) = (HashMap::new(), VecDeque::new());
        let entries = Entries { by_id, kept, max_kept, deliveries: 0, runs_left: max_runs, lost: 0 };
        Self { entries: Mutex::new(entries), moved: watch::Sender::default() }
    }

    fn entries(&self) -> MutexGuard<'_, Entries> {
        // No entry is half written when a thread panics: each is replaced as a whole.
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a job has come over the stream.
    pub(crate) fn arrive(&self, attempt: &Attempt) -> (Arrival, Delivery) {
        let mut entries = self.entries();
        entries.deliveries += 1;
        let delivery = Delivery(entries.deliveries);
        let arrival = entries.arrive(attempt, delivery);
        if matches!(arrival, Arrival::Ended(_)) {
            self.moved.send_replace(());
        }
        (arrival, delivery)
    }

    /// Notes that the stream is lost: the server has its jobs again. Those that wait are forgotten, and so are those that
    /// could only have come again over this stream.
    pub(crate) fn lose_stream(&self) {
        let mut entries = self.entries();
        let Entries { by_id, kept, deliveries, lost, .. } = &mut *entries;
        *lost = *deliveries;
        by_id.retain(|_, entry| !matches!(entry.state, State::Waiting | State::Settled { .. }));
        kept.retain(|id| by_id.contains_key(id));
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

    /// Notes that a run has ended. Returns the attempt that is to be reported, if any is: the job may have been handed
    /// over anew since the run began.
    pub(crate) fn end(&self, id: &JobId, outcome: &Outcome) -> Option<Attempt> {
        let mut entries = self.entries();
        if *outcome == Outcome::Interrupted {
            entries.by_id.remove(id);
            self.moved.send_replace(());
            return None;
        }
        let entry = entries.by_id.get_mut(id)?;
        entry.state = State::Reporting { failed: matches!(outcome, Outcome::Failure(_)) };
        Some(Attempt { id: id.clone(), attempts: entry.attempts })
    }

    /// Whether an attempt's report is under way.
    pub(crate) fn is_reporting(&self, attempt: &Attempt) -> bool {
        let entries = self.entries();
        entries
            .by_id
            .get(&attempt.id)
            .is_some_and(|entry| entry.attempts == attempt.attempts && matches!(entry.state, State::Reporting { .. }))
    }

    /// The delivery by which the server holds this attempt for us, if it does.
    pub(crate) fn held(&self, attempt: &Attempt) -> Option<Delivery> {
        let entries = self.entries();
        let entry = entries.by_id.get(&attempt.id)?;
        (entry.attempts == attempt.attempts && entry.delivery.0 > entries.lost).then_some(entry.delivery)
    }

    /// Notes that an attempt's report has arrived.
    pub(crate) fn settle(&self, attempt: &Attempt) {
        let mut entries = self.entries();
        let lost = entries.lost;
        let Some(entry) = entries.ended(attempt) else { return };
        // Held over the stream that is open, it cannot have been handed out again: no other line is under way. And what has
        // no number cannot be told from its next attempt.
        if entry.delivery.0 > lost || attempt.attempts.is_none() {
            entries.remove(&attempt.id);
        } else {
            let failed = matches!(entry.state, State::Reporting { failed: true } | State::Parked(Outcome::Failure(_)));
            entry.state = State::Settled { failed };
            entries.keep(&attempt.id);
        }
        self.moved.send_replace(());
    }

    /// Forgets an attempt whose report was given up.
    pub(crate) fn forget(&self, attempt: &Attempt) {
        let mut entries = self.entries();
        if entries.ended(attempt).is_some() {
            entries.remove(&attempt.id);
            self.moved.send_replace(());
        }
    }

    /// Keeps the outcome of an attempt that the server did not hold for us when it was reported. Gives it back when the
    /// job has come again since the delivery `seen`: then it can be reported at once.
    pub(crate) fn park(&self, attempt: &Attempt, seen: Option<Delivery>, outcome: Outcome) -> Option<Outcome> {
        let mut entries = self.entries();
        let lost = entries.lost;
        let entry = entries.by_id.get_mut(&attempt.id).filter(|entry| entry.attempts == attempt.attempts)?;
        if entry.delivery.0 > lost && seen != Some(entry.delivery) {
            return Some(outcome);
        }
        entry.state = State::Parked(outcome);
        entries.keep(&attempt.id);
        self.moved.send_replace(());
        None
    }

    /// The attempts whose outcome waits for their jobs to come again, and whether it is a success.
    pub(crate) fn parked(&self) -> Vec<(Attempt, bool)> {
        let entries = self.entries();
        let parked = entries.kept.iter().filter_map(|id| match entries.by_id.get(id) {
            Some(Entry { attempts, state: State::Parked(outcome), .. }) => {
                Some((Attempt { id: id.clone(), attempts: *attempts }, *outcome == Outcome::Success))
            }
            _ => None,
        });
        parked.collect()
    }

    /// The jobs that have ended, and whose outcome is not settled.
    pub(crate) fn ended(&self) -> Vec<JobId> {
        let entries = self.entries();
        entries.by_id.iter().filter(|(_, entry)| entry.is_unsettled()).map(|(id, _)| id.clone()).collect()
    }

    /// How many jobs wait here, run, or are being reported. What is parked is not: the server has it.
    pub(crate) fn under_way(&self) -> usize {
        let is_under_way =
            |entry: &&Entry| matches!(entry.state, State::Waiting | State::Running | State::Reporting { .. });
        self.entries().by_id.values().filter(is_under_way).count()
    }

    /// Changes whenever a job is here no longer, or its outcome has been kept, or is wanted again.
    pub(crate) fn movements(&self) -> watch::Receiver<()> {
        self.moved.subscribe()
    }

    /// Whether anything here may still have to be told to the server.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries().by_id.values().all(|entry| matches!(entry.state, State::Settled { .. }))
    }
}

impl Entry {
    /// Notes that its job has come again.
    fn come_again(&mut self, new: Self) -> Arrival {
        let same = self.attempts == new.attempts;
        match &self.state {
            // The one that waits is out of date: somebody else has reported it meanwhile.
            State::Waiting => {
                *self = new;
                Arrival::New
            }
            // The failure that was, is being, or is to be reported has been counted already: this is the next attempt.
            State::Settled { failed: true }
            | State::Reporting { failed: true }
            | State::Parked(Outcome::Failure(_))
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
            State::Reporting { .. } => {
                self.delivery = new.delivery;
                Arrival::UnderWay
            }
            // This line was sent before the report arrived: the server does not hold the job any more.
            State::Settled { .. } => Arrival::UnderWay,
            State::Parked(outcome) => {
                let outcome = outcome.clone();
                *self = Self { state: State::Reporting { failed: matches!(outcome, Outcome::Failure(_)) }, ..new };
                Arrival::Ended(outcome)
            }
        }
    }

    /// Whether it waits to be run since that delivery.
    fn waits_since(&self, delivery: Delivery) -> bool {
        self.delivery == delivery && matches!(self.state, State::Waiting)
    }

    /// Whether it is an attempt that has ended here, and whose outcome is not settled.
    fn is_unsettled(&self) -> bool {
        matches!(self.state, State::Reporting { .. } | State::Parked(_))
    }
}

impl Entries {
    fn arrive(&mut self, attempt: &Attempt, delivery: Delivery) -> Arrival {
        let new = Entry { attempts: attempt.attempts, delivery, state: State::Waiting };
        let Some(entry) = self.by_id.get_mut(&attempt.id) else {
            self.by_id.insert(attempt.id.clone(), new);
            return Arrival::New;
        };
        let was_kept = matches!(entry.state, State::Settled { .. } | State::Parked(_));
        let arrival = entry.come_again(new);
        if matches!(entry.state, State::Settled { .. }) {
            self.by_id.remove(&attempt.id);
        }
        if was_kept {
            self.kept.retain(|id| *id != attempt.id);
        }
        arrival
    }

    /// An attempt that has ended here, and whose outcome is not settled. What waits or runs under its name is another one.
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
    use crate::job::Failure;

    fn attempt(id: &str, attempts: u32) -> Attempt {
        Attempt { id: id.into(), attempts: Some(attempts) }
    }

    fn failure() -> Outcome {
        Outcome::Failure(Failure::new("ExitStatus", "no"))
    }

    /// A job that has arrived and is running.
    fn running(ledger: &Ledger, attempt: &Attempt) {
        let (arrival, delivery) = ledger.arrive(attempt);
        assert_eq!(arrival, Arrival::New);
        assert_eq!(ledger.begin(&attempt.id, delivery), Beginning::Begun { is_last: false });
    }

    #[test]
    fn a_job_that_comes_again_while_it_runs_is_not_started_and_its_report_counts_again() {
        let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
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
        let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
        running(&ledger, &job);
        ledger.lose_stream();
        assert_eq!(ledger.arrive(&attempt("a", 1)).0, Arrival::UnderWay);
        assert_eq!(ledger.end(&job.id, &failure()), Some(attempt("a", 1)));
    }

    #[test]
    fn what_waits_when_the_stream_is_lost_is_not_started() {
        let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
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
        let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
        running(&ledger, &job);
        let seen = ledger.held(&job);
        ledger.end(&job.id, &failure());
        ledger.lose_stream();
        assert_eq!(ledger.park(&job, seen, failure()), None);
        assert_eq!(ledger.arrive(&job).0, Arrival::Ended(failure()));
    }

    #[test]
    fn a_job_that_has_come_again_is_not_parked_unless_the_server_denied_that_very_delivery() {
        let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
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
        let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
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
        let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
        running(&ledger, &job);
        ledger.end(&job.id, &Outcome::Success);
        ledger.lose_stream();
        ledger.park(&job, None, Outcome::Success);
        assert_eq!(ledger.arrive(&attempt("a", 3)).0, Arrival::Ended(Outcome::Success));
    }

    #[test]
    fn a_success_that_is_being_reported_is_kept_whatever_attempt_comes_meanwhile() {
        let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
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
        let ledger = Ledger::new(8, None);
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
        let ledger = Ledger::new(2, None);
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
        assert_eq!(ledger.parked(), [(attempt("a", 0), true), (attempt("b", 0), true)]);
        ledger.forget(&attempt("a", 0));
        assert_eq!(ledger.parked(), [(attempt("b", 0), true)]);
    }

    #[test]
    fn a_line_that_was_sent_before_the_report_arrived_starts_nothing() {
        for (outcome, next) in [(Outcome::Success, Arrival::UnderWay), (failure(), Arrival::New)] {
            let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
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
        let (ledger, job) = (Ledger::new(8, None), attempt("a", 0));
        running(&ledger, &job);
        ledger.end(&job.id, &Outcome::Success);
        ledger.settle(&job);
        assert!(ledger.entries().by_id.is_empty() && ledger.entries().kept.is_empty());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let ledger = Ledger::new(2, None);
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
}
