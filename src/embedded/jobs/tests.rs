//! Tests of the state machine, with fixed times instead of a clock.

use super::*;
use crate::embedded::ServerBackoff;
use crate::embedded::order::EnqueueRequest;
use std::time::Duration;

const NOW: u64 = 1_000_000;

fn options() -> Options {
    let backoff = ServerBackoff { base: Duration::from_millis(100), exponent: 1.0, jitter: Duration::ZERO };
    Options { backoff, ..Options::default() }
}

fn state() -> Jobs {
    Jobs::new(options())
}

fn order(json: &str) -> Order {
    let request: EnqueueRequest = serde_json::from_str(json).unwrap();
    request.into_order().unwrap()
}

fn enqueue(state: &mut Jobs, extra: &str) -> StoredJobId {
    let json = format!(r#"{{"type":"t","queue":"q","payload":null{extra}}}"#);
    state.enqueue(NOW, order(&json)).job.id
}

fn failure(json: &str) -> FailureBody {
    serde_json::from_str(json).unwrap()
}

fn plain_failure() -> FailureBody {
    failure(r#"{"message":"no"}"#)
}

/// Opens a stream over all queues, with an unlimited prefetch.
fn open(state: &mut Jobs) -> LeaseId {
    state.open(0, Vec::new())
}

fn take(state: &mut Jobs, lease: LeaseId) -> Option<StoredJobId> {
    state.take(NOW, lease).map(|job| job.id)
}

fn status(state: &Jobs, id: StoredJobId) -> Option<JobStatus> {
    state.get(id).map(|job| job.status)
}

#[test]
fn a_stream_gets_jobs_of_its_queues_only() {
    let mut state = state();
    enqueue(&mut state, "");
    let mut other = |queue: &str| {
        let json = format!(r#"{{"type":"t","queue":"{queue}","payload":1}}"#);
        state.enqueue(NOW, order(&json)).job.id
    };
    let (a, b) = (other("a"), other("b"));
    let lease = state.open(0, vec!["b".to_owned(), "a".to_owned(), "none".to_owned()]);
    assert_eq!([(); 3].map(|()| take(&mut state, lease)), [Some(a), Some(b), None]);
}

#[test]
fn the_in_flight_limit_spans_all_streams() {
    let mut state = Jobs::new(Options { in_flight_limit: 1, ..options() });
    let ids = [(); 2].map(|()| enqueue(&mut state, ""));
    let (one, other) = (open(&mut state), open(&mut state));
    assert_eq!(take(&mut state, one), Some(ids[0]));
    assert_eq!(take(&mut state, other), None);
    state.close(one);
    assert_eq!(take(&mut state, other), Some(ids[0]));
}

#[test]
fn nothing_goes_out_between_the_halt_and_the_next_start() {
    let mut state = state();
    let id = enqueue(&mut state, "");
    let (one, other) = (open(&mut state), open(&mut state));
    take(&mut state, one);
    state.halt();
    state.close(one);
    assert_eq!(take(&mut state, other), None);
    state.start();
    assert_eq!(take(&mut state, other), None, "its server is gone");
    let lease = open(&mut state);
    assert_eq!(take(&mut state, lease), Some(id));
}

#[test]
fn a_completed_job_is_gone_unless_it_is_kept() {
    let mut state = state();
    let gone = enqueue(&mut state, "");
    let kept = enqueue(&mut state, r#","retention":{"completed_ms":50}"#);
    let lease = open(&mut state);
    while take(&mut state, lease).is_some() {}
    assert!(state.complete(NOW, gone) && state.complete(NOW, kept));
    assert_eq!(status(&state, gone), None);
    let job = state.get(kept).unwrap();
    assert_eq!((job.status, job.completed_at, job.purge_at), (JobStatus::Completed, Some(NOW), Some(NOW + 50)));
    state.advance(NOW + 49);
    assert!(status(&state, kept).is_some());
    state.advance(NOW + 50);
    assert_eq!(status(&state, kept), None);
    assert_eq!(state.next_due(), None);
}

#[test]
fn a_failed_job_waits_out_its_backoff() {
    let mut state = state();
    let id = enqueue(&mut state, "");
    let lease = open(&mut state);
    take(&mut state, lease);
    let job = state.fail(NOW, id, plain_failure(), 0.0).unwrap();
    assert_eq!((job.status, job.attempts, job.ready_at), (JobStatus::Scheduled, 1, NOW + 1_100));
    assert_eq!(job.failed_at, Some(NOW));
    assert_eq!(state.next_due(), Some(NOW + 1_100));
    state.advance(NOW + 1_099);
    assert_eq!(take(&mut state, lease), None);
    state.advance(NOW + 1_100);
    assert_eq!(take(&mut state, lease), Some(id));
}

#[test]
fn a_jobs_own_backoff_wins_over_the_servers() {
    let mut state = state();
    let id = enqueue(&mut state, r#","backoff":{"exponent":0,"base_ms":7,"jitter_ms":10}"#);
    let lease = open(&mut state);
    take(&mut state, lease);
    let job = state.fail(NOW, id, plain_failure(), 0.5).unwrap();
    assert_eq!(job.ready_at, NOW + 1_000 + 7 + 5);
}

#[test]
fn more_failures_than_the_retry_limit_are_death() {
    let mut state = state();
    let id = enqueue(&mut state, r#","retry_limit":1"#);
    let lease = open(&mut state);
    for expected in [JobStatus::Scheduled, JobStatus::Dead] {
        state.advance(NOW * 2);
        take(&mut state, lease);
        let job = state.fail(NOW, id, plain_failure(), 0.0).unwrap();
        assert_eq!(job.status, expected);
    }
    assert_eq!(state.errors(id).unwrap().len(), 2);
}

#[test]
fn retry_at_beats_the_retry_limit_and_kill_beats_both() {
    let mut state = state();
    let id = enqueue(&mut state, r#","retry_limit":0"#);
    let lease = open(&mut state);
    take(&mut state, lease);
    let report = failure(r#"{"message":"later","retry_at":5}"#);
    let job = state.fail(NOW, id, report, 0.0).unwrap();
    assert_eq!((job.status, job.ready_at), (JobStatus::Scheduled, 5));
    state.advance(NOW);
    take(&mut state, lease);
    let report = failure(r#"{"message":"never","retry_at":5,"kill":true}"#);
    let job = state.fail(NOW, id, report, 0.0).unwrap();
    assert_eq!((job.status, job.attempts), (JobStatus::Dead, 2));
}

#[test]
fn a_dead_job_is_kept_for_a_week_by_default() {
    let mut state = state();
    let [kept, gone] = ["", r#","retention":{"dead_ms":0}"#].map(|extra| enqueue(&mut state, extra));
    let lease = open(&mut state);
    for id in [kept, gone] {
        take(&mut state, lease);
        let job = state.fail(NOW, id, failure(r#"{"message":"no","kill":true}"#), 0.0).unwrap();
        assert_eq!(job.status, JobStatus::Dead);
    }
    assert_eq!(status(&state, gone), None);
    let week = 7 * 24 * 60 * 60 * 1_000;
    assert_eq!(state.get(kept).unwrap().purge_at, Some(NOW + week));
}

#[test]
fn a_job_for_later_becomes_ready_on_time() {
    let mut state = state();
    let id = enqueue(&mut state, &format!(r#","ready_at":{}"#, NOW + 5));
    assert_eq!(status(&state, id), Some(JobStatus::Scheduled));
    state.advance(NOW + 4);
    assert_eq!(status(&state, id), Some(JobStatus::Scheduled));
    assert!(!state.take_look_flag());
    state.advance(NOW + 5);
    assert_eq!(status(&state, id), Some(JobStatus::Ready));
    assert!(state.take_look_flag());
}

#[test]
fn an_error_record_keeps_both_ends_of_the_attempt() {
    let mut state = state();
    let id = enqueue(&mut state, "");
    let lease = open(&mut state);
    take(&mut state, lease);
    let report = failure(r#"{"message":"m","error_type":"E","backtrace":"b"}"#);
    state.fail(NOW + 9, id, report, 0.0);
    let record = serde_json::to_value(&state.errors(id).unwrap()[0]).unwrap();
    let expected = serde_json::json!({"attempt": 1, "message": "m", "error_type": "E",
        "backtrace": "b", "dequeued_at": NOW, "failed_at": NOW + 9});
    assert_eq!(record, expected);
}

#[test]
fn a_deleted_job_leaves_nothing_behind() {
    let mut state = state();
    let ready = enqueue(&mut state, "");
    let in_flight = enqueue(&mut state, r#","priority":0"#);
    let scheduled = enqueue(&mut state, r#","ready_at":99999999999"#);
    let lease = state.open(1, Vec::new());
    take(&mut state, lease);
    assert!(state.delete(ready) && state.delete(in_flight) && state.delete(scheduled));
    assert!(!state.delete(ready));
    assert_eq!(state.next_due(), None);
    let next = enqueue(&mut state, "");
    assert_eq!(take(&mut state, lease), Some(next));
}

#[test]
fn a_unique_key_admits_no_second_job_while_the_first_is_queued() {
    let mut state = state();
    let first = enqueue(&mut state, r#","unique_key":"k""#);
    assert_eq!(enqueue(&mut state, r#","unique_key":"k""#), first);
    let lease = open(&mut state);
    take(&mut state, lease);
    assert_eq!(enqueue(&mut state, r#","unique_key":"k","unique_while":"active""#), first);
    let second = enqueue(&mut state, r#","unique_key":"k""#);
    assert_ne!(second, first);
}

#[test]
fn a_unique_key_is_free_once_its_job_is_gone() {
    let mut state = state();
    let first = enqueue(&mut state, r#","unique_key":"k","unique_while":"exists""#);
    let lease = open(&mut state);
    take(&mut state, lease);
    state.complete(NOW, first);
    assert_ne!(enqueue(&mut state, r#","unique_key":"k","unique_while":"exists""#), first);
}
