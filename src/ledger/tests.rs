use super::*;
use crate::config::WorkerConfig;
use crate::job::Failure;

/// A ledger, and the stream over which its jobs arrive.
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

    /// Loses the stream, and opens another one.
    fn lose_stream(&self) {
        self.ledger.lose_stream(self.stream.get());
        self.stream.set(self.ledger.open_stream());
    }

    /// Reports whether all jobs in the ledger are settled.
    fn is_empty(&self) -> bool {
        self.entries().by_id.values().all(|entry| matches!(entry.state, EntryState::Settled(_)))
    }

    fn parked(&self) -> Vec<(Attempt, Kind)> {
        self.ledger.parked().into_iter().map(|parked| (parked.attempt, parked.kind)).collect()
    }
}

fn attempt(id: &str, attempts: u32) -> Attempt {
    Attempt { id: id.into(), attempts: Some(attempts) }
}

fn failure() -> Report {
    Report::Failure(Failure::new("ExitStatus", "no"))
}

/// Delivers a job, and begins its run.
fn running(ledger: &Here, attempt: &Attempt) {
    let (arrival, delivery) = ledger.arrive(attempt);
    assert_eq!(arrival, Arrival::New);
    assert_eq!(ledger.begin(&attempt.id, delivery), Beginning::Begun { is_last: false });
}

/// Delivers a job, and runs it to its end.
fn ended(ledger: &Here, attempt: &Attempt, report: &Report) {
    running(ledger, attempt);
    ledger.end(&attempt.id, report);
}

#[test]
fn a_job_redelivered_while_it_runs_is_not_started_again() {
    let (ledger, job) = (Here::new(8), attempt("a", 0));
    running(&ledger, &job);
    ledger.lose_stream();
    assert_eq!(ledger.held(&job), None);
    assert_eq!(ledger.arrive(&job).0, Arrival::UnderWay);
    assert_eq!(ledger.end(&job.id, &Report::Success), Some(job.clone()));
    assert!(ledger.held(&job).is_some());
    ledger.forget(&job);
    assert!(ledger.is_empty());
}

#[test]
fn a_run_answers_for_the_attempt_that_was_redelivered() {
    let (ledger, job) = (Here::new(8), attempt("a", 0));
    running(&ledger, &job);
    ledger.lose_stream();
    assert_eq!(ledger.arrive(&attempt("a", 1)).0, Arrival::UnderWay);
    assert_eq!(ledger.end(&job.id, &failure()), Some(attempt("a", 1)));
}

#[test]
fn a_job_that_waits_when_its_stream_is_lost_is_not_started() {
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
fn a_parked_outcome_is_reported_when_its_job_is_redelivered() {
    let (ledger, job) = (Here::new(8), attempt("a", 0));
    running(&ledger, &job);
    let seen = ledger.held(&job);
    ledger.end(&job.id, &failure());
    ledger.lose_stream();
    assert_eq!(ledger.park(&job, seen, failure(), false), None);
    assert_eq!(ledger.arrive(&job).0, Arrival::Ended(failure()));
}

#[test]
fn only_a_denied_delivery_is_parked_after_a_redelivery() {
    let (ledger, job) = (Here::new(8), attempt("a", 0));
    running(&ledger, &job);
    let seen = ledger.held(&job);
    ledger.end(&job.id, &Report::Success);
    ledger.lose_stream();
    ledger.arrive(&job);
    assert_eq!(ledger.park(&job, seen, Report::Success, false), Some(Report::Success));
    let seen = ledger.held(&job);
    assert_eq!(ledger.park(&job, seen, Report::Success, false), None);
}

#[test]
fn a_counted_failure_is_not_reported_for_the_next_attempt() {
    let (ledger, job) = (Here::new(8), attempt("a", 0));
    ended(&ledger, &job, &failure());
    let (arrival, delivery) = ledger.arrive(&attempt("a", 1));
    assert_eq!(arrival, Arrival::New);
    assert_eq!(ledger.held(&job), None);
    ledger.forget(&job);
    let begun = ledger.begin(&job.id, delivery);
    assert_eq!(begun, Beginning::Begun { is_last: false }, "forgetting the old attempt spares the new one");
}

#[test]
fn a_success_answers_for_the_next_attempt_as_well() {
    let (ledger, job) = (Here::new(8), attempt("a", 0));
    ended(&ledger, &job, &Report::Success);
    ledger.lose_stream();
    ledger.park(&job, None, Report::Success, false);
    assert_eq!(ledger.arrive(&attempt("a", 3)).0, Arrival::Ended(Report::Success));
}

#[test]
fn a_success_in_flight_answers_for_any_redelivered_attempt() {
    let (ledger, job) = (Here::new(8), attempt("a", 0));
    ended(&ledger, &job, &Report::Success);
    ledger.lose_stream();
    assert_eq!(ledger.arrive(&attempt("a", 1)).0, Arrival::UnderWay);
    let seen = ledger.held(&job);
    assert!(seen.is_some());
    assert_eq!(ledger.park(&job, seen, Report::Success, false), None);
    assert_eq!(ledger.arrive(&attempt("a", 1)).0, Arrival::Ended(Report::Success));
    ledger.forget(&attempt("a", 1));
    assert!(ledger.is_empty());
}

#[test]
fn a_job_redelivered_while_it_waits_starts_once_as_the_new_one() {
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
fn an_outcome_that_is_parked_again_takes_one_place() {
    let ledger = Here::new(2);
    let keep = |name| {
        let job = attempt(name, 0);
        let (arrival, delivery) = ledger.arrive(&job);
        if arrival == Arrival::New {
            assert_eq!(ledger.begin(&job.id, delivery), Beginning::Begun { is_last: false });
            ledger.end(&job.id, &Report::Success);
        }
        assert_eq!(ledger.park(&job, Some(delivery), Report::Success, false), None);
    };
    ["a", "a", "a", "b"].into_iter().for_each(keep);
    assert_eq!(ledger.parked(), [(attempt("a", 0), Kind::Success), (attempt("b", 0), Kind::Success)]);
    ledger.forget(&attempt("a", 0));
    assert_eq!(ledger.parked(), [(attempt("b", 0), Kind::Success)]);
}

#[test]
fn a_stale_line_of_a_reported_job_starts_nothing() {
    for (report, next) in [(Report::Success, Arrival::UnderWay), (failure(), Arrival::New)] {
        let (ledger, job) = (Here::new(8), attempt("a", 0));
        let settled = || {
            ended(&ledger, &job, &report);
            ledger.lose_stream();
            ledger.settle(&job, ledger.held(&job));
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
fn a_job_held_when_its_report_arrives_is_forgotten() {
    let (ledger, job) = (Here::new(8), attempt("a", 0));
    ended(&ledger, &job, &Report::Success);
    ledger.settle(&job, ledger.held(&job));
    assert!(ledger.entries().by_id.is_empty() && ledger.entries().kept.is_empty());
}

#[test]
fn the_number_of_remembered_jobs_is_bounded() {
    let ledger = Here::new(2);
    for name in ["a", "b", "c"] {
        let job = attempt(name, 0);
        ended(&ledger, &job, &Report::Success);
        ledger.park(&job, ledger.held(&job), Report::Success, false);
    }
    ledger.lose_stream();
    assert_eq!(ledger.arrive(&attempt("a", 0)).0, Arrival::New);
    assert_eq!(ledger.arrive(&attempt("b", 0)).0, Arrival::Ended(Report::Success));
}

#[test]
fn only_the_jobs_of_a_lost_stream_are_held_no_more() {
    let (here, a, b) = (Here::new(8), attempt("a", 0), attempt("b", 0));
    running(&here, &a);
    let first = here.stream.replace(here.open_stream());
    running(&here, &b);
    here.ledger.lose_stream(first);
    assert_eq!((here.held(&a), here.held(&b).is_some()), (None, true));
    assert!(matches!(&here.unheld()[..], [unheld] if unheld.id == a.id && !unheld.has_ended));
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

/// A stale delivery over the first stream arrives after the delivery over the second one, and then the first stream is lost. The
/// second stream must still hold the job.
#[test]
fn the_loss_of_a_stale_line_gives_the_hold_back() {
    let (here, job) = (Here::new(8), attempt("a", 0));
    let first = here.stream.replace(here.open_stream());
    running(&here, &job);
    let second = here.stream.replace(first);
    assert_eq!(here.arrive(&job).0, Arrival::UnderWay);
    here.ledger.lose_stream(first);
    assert!(here.held(&job).is_some());
    assert_eq!(here.under_way(second, None), 1);
}

#[test]
fn a_later_attempt_gives_no_hold_back_to_the_stream_before() {
    let (here, job) = (Here::new(8), attempt("a", 0));
    ended(&here, &job, &failure());
    let first = here.stream.replace(here.open_stream());
    running(&here, &attempt("a", 1));
    here.lose_stream();
    assert_eq!(here.under_way(first, None), 0);
}

#[test]
fn a_waiting_job_of_a_stale_line_costs_a_place_of_its_stream() {
    let (here, job) = (Here::new(8), attempt("a", 0));
    here.arrive(&job);
    let first = here.stream.replace(here.open_stream());
    here.arrive(&job);
    here.lose_stream();
    assert!(here.is_empty() && here.has_lost_places(first));
}

#[test]
fn a_released_job_costs_its_stream_a_place() {
    let (here, job) = (Here::new(8), attempt("a", 0));
    running(&here, &job);
    let seen = here.held(&job);
    here.end(&job.id, &failure());
    assert_eq!(here.park(&job, seen, failure(), true), None);
    assert!(here.has_lost_places(here.stream.get()));
    assert_eq!(here.held(&job), None);
}

#[test]
fn an_answer_for_a_malformed_delivery_settles_no_later_one() {
    let (here, job) = (Here::new(8), Attempt { id: "a".into(), attempts: None });
    running(&here, &job);
    let seen = here.held(&job);
    here.end(&job.id, &failure());
    assert_eq!(here.arrive(&job).0, Arrival::UnderWay);
    assert!(!here.settle(&job, seen));
    assert!(here.settle(&job, here.held(&job)) && here.is_empty());
}

#[test]
fn a_stale_line_is_expected_until_all_streams_are_lost() {
    let (here, job) = (Here::new(8), attempt("a", 0));
    ended(&here, &job, &Report::Success);
    let second = here.open_stream();
    here.lose_stream();
    here.settle(&job, here.held(&job));
    let third = here.stream.replace(second);
    here.ledger.lose_stream(third);
    assert_eq!(here.arrive(&job).0, Arrival::UnderWay);
}

#[test]
fn a_denied_delivery_is_held_no_more() {
    let (here, job) = (Here::new(8), attempt("a", 0));
    running(&here, &job);
    let seen = here.held(&job);
    here.end(&job.id, &Report::Success);
    assert_eq!(here.park(&job, seen, Report::Success, false), None);
    assert_eq!((here.held(&job), here.under_way(here.stream.get(), None)), (None, 0));
    assert_eq!(here.unheld().len(), 1);
}

#[test]
fn a_report_given_up_loses_a_place_only_while_its_job_is_held() {
    let (here, a, b) = (Here::new(8), attempt("a", 0), attempt("b", 0));
    ended(&here, &a, &failure());
    here.lose_stream();
    here.forget(&a);
    assert!(!here.has_lost_places(here.stream.get()));
    ended(&here, &b, &failure());
    here.forget(&b);
    assert!(here.has_lost_places(here.stream.get()) && here.is_empty());
}

#[test]
fn a_parked_outcome_is_not_settled_once_its_job_is_redelivered() {
    let (here, job) = (Here::new(8), attempt("a", 0));
    ended(&here, &job, &failure());
    here.lose_stream();
    here.park(&job, None, failure(), false);
    assert_eq!(here.arrive(&job).0, Arrival::Ended(failure()));
    here.settle_parked(&job);
    assert_eq!(here.ended(), [job.id]);
}

/// The server has already noticed the end of the first stream, and has redelivered the job over the second one. The worker
/// receives the redelivery after the report of the job was accepted, and only then notices the end of the first stream.
#[test]
fn a_stale_line_over_another_stream_is_expected_of_a_held_job() {
    let (here, job) = (Here::new(8), attempt("a", 0));
    ended(&here, &job, &Report::Success);
    let first = here.stream.replace(here.open_stream());
    here.settle(&job, here.held(&job));
    assert_eq!(here.arrive(&job).0, Arrival::UnderWay);
    here.ledger.lose_stream(first);
    assert!(here.is_empty());
}

#[test]
fn settled_entries_leave_before_parked_ones() {
    let here = Here::new(2);
    let end = |name| {
        let job = attempt(name, 0);
        ended(&here, &job, &Report::Success);
        job
    };
    let parked = end("parked");
    here.park(&parked, here.held(&parked), Report::Success, false);
    here.open_stream();
    for name in ["a", "b", "c"] {
        let attempt = end(name);
        here.settle(&attempt, here.held(&attempt));
    }
    assert_eq!((here.parked(), here.evicted()), (vec![(parked, Kind::Success)], 0));
}
