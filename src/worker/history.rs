//! [`History`]: the counts of jobs that ended in the last ten minutes, in buckets. [`Failures`]: the last failures.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use super::controls::seconds;
use super::status::{EndedJobs, LastFailure};
use crate::job::{Failure, Job, Outcome};
use crate::lock::lock;

/// Width of a bucket. Narrow enough to show a burst, and wide enough to cover ten minutes with few buckets.
const BUCKET: Duration = Duration::from_secs(5);

/// Number of buckets, which together cover ten minutes.
const BUCKETS: usize = 120;

/// Number of failures kept.
const MAX_FAILURES: usize = 20;

/// Maximum number of characters kept of each text in a failure, because a message, a type or a queue can be long.
const MAX_CHARS: usize = 500;

/// The counts of jobs that ended in the last ten minutes.
#[derive(Debug)]
pub(super) struct History {
    started: Instant,
    buckets: Mutex<Buckets>,
}

#[derive(Debug)]
struct Buckets {
    /// The number of the newest bucket, counted from `History::started`.
    newest: u64,
    /// The counts of succeeded and failed jobs, oldest first. Never empty.
    counts: VecDeque<[u32; 2]>,
}

impl Buckets {
    /// Adds empty buckets up to the bucket with the number `to`. Adds no more than `BUCKETS`, so that a call after a long idle
    /// time is cheap.
    fn advance(&mut self, to: u64) {
        let missing = to.saturating_sub(self.newest).min(BUCKETS as u64);
        for _ in 0..missing {
            if self.counts.len() == BUCKETS {
                self.counts.pop_front();
            }
            self.counts.push_back([0; 2]);
        }
        self.newest = self.newest.max(to);
    }
}

impl History {
    pub(super) fn new(started: Instant) -> Self {
        Self { started, buckets: Mutex::new(Buckets { newest: 0, counts: [[0; 2]].into() }) }
    }

    fn buckets(&self) -> MutexGuard<'_, Buckets> {
        lock(&self.buckets)
    }

    /// Counts an ended job, unless the job was interrupted.
    pub(super) fn count(&self, outcome: &Outcome) {
        let kind = match outcome {
            Outcome::Success => 0,
            Outcome::Failure(_) => 1,
            Outcome::Interrupted => return,
        };
        self.add(kind, self.started.elapsed());
    }

    fn add(&self, kind: usize, after: Duration) {
        let mut buckets = self.buckets();
        buckets.advance(number_of_bucket(after));
        if let Some(newest) = buckets.counts.back_mut() {
            newest[kind] = newest[kind].saturating_add(1);
        }
    }

    /// Returns the counts in all buckets up to now.
    pub(super) fn list(&self) -> EndedJobs {
        self.list_at(self.started.elapsed())
    }

    fn list_at(&self, after: Duration) -> EndedJobs {
        let mut buckets = self.buckets();
        buckets.advance(number_of_bucket(after));
        let of_kind = |kind: usize| buckets.counts.iter().map(|counts| counts[kind]).collect();
        EndedJobs {
            bucket_seconds: BUCKET.as_secs(),
            newest_bucket_seconds: after.as_secs_f64() % BUCKET.as_secs_f64(),
            succeeded: of_kind(0),
            failed: of_kind(1),
        }
    }
}

fn number_of_bucket(after: Duration) -> u64 {
    after.as_secs() / BUCKET.as_secs()
}

/// The last failures of a worker.
#[derive(Debug, Default)]
pub(super) struct Failures(Mutex<VecDeque<(Instant, LastFailure)>>);

impl Failures {
    /// Adds a failure without its backtrace, and drops the oldest failure if the list is full.
    pub(super) fn push(&self, job: &Job, failure: &Failure) {
        let kept = LastFailure {
            id: cut(job.id.as_str()),
            r#type: cut(&job.job_type),
            queue: cut(&job.queue),
            attempt: job.attempts.saturating_add(1),
            error_type: failure.error_type.as_deref().map(cut),
            message: cut(&failure.message),
            ago_seconds: 0.0,
        };
        let mut all = lock(&self.0);
        all.truncate(MAX_FAILURES - 1);
        all.push_front((Instant::now(), kept));
    }

    /// Returns the failures, newest first.
    pub(super) fn list(&self) -> Vec<LastFailure> {
        let all = lock(&self.0);
        let aged = |(at, failure): &(Instant, LastFailure)| LastFailure {
            ago_seconds: seconds(at.elapsed()),
            ..failure.clone()
        };
        all.iter().map(aged).collect()
    }
}

/// Returns the first `MAX_CHARS` characters of a text. A job's type and queue can be of any length.
pub(super) fn beginning(text: &str) -> &str {
    text.char_indices().nth(MAX_CHARS).map_or(text, |(end, _)| &text[..end])
}

/// Returns the first `MAX_CHARS` characters of a text, followed by `…` if the text is longer.
fn cut(text: &str) -> String {
    let kept = beginning(text);
    if kept.len() < text.len() { format!("{kept}…") } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> History {
        History::new(Instant::now())
    }

    fn after(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    #[test]
    fn jobs_are_counted_in_the_bucket_of_their_end() {
        let history = history();
        history.add(0, after(0.0));
        history.add(0, after(4.9));
        history.add(1, after(5.0));
        history.add(0, after(11.0));
        let listed = history.list_at(after(21.5));
        assert_eq!(listed.succeeded, [2, 0, 1, 0, 0]);
        assert_eq!(listed.failed, [0, 1, 0, 0, 0]);
        assert_eq!((listed.bucket_seconds, listed.newest_bucket_seconds), (5, 1.5));
    }

    #[test]
    fn the_first_bucket_is_that_of_the_start() {
        assert_eq!(history().list_at(after(12.0)).succeeded, [0; 3]);
    }

    #[test]
    fn the_history_is_ten_minutes_long_after_any_idle_time() {
        let history = history();
        history.add(0, after(1.0));
        history.add(0, after(3e9));
        let listed = history.list_at(after(3e9));
        assert_eq!((listed.succeeded.len(), listed.succeeded.iter().sum::<u32>()), (BUCKETS, 1));
        assert_eq!(history.list_at(after(3e9 + 599.0)).succeeded[0], 1);
        assert_eq!(history.list_at(after(3e9 + 600.0)).succeeded, [0; BUCKETS]);
    }

    #[test]
    fn the_last_failures_are_kept_newest_first_and_cut() {
        let line = r#"{"id":"a","type":"t","queue":"q","priority":1,"attempts":0,"ready_at":1,"payload":null}"#;
        let (job, failures) = (Job::from_line(&line.into()).unwrap(), Failures::default());
        for number in 0..30 {
            failures.push(&job, &Failure::new("ExitStatus", number.to_string()));
        }
        failures.push(&job, &Failure::new("ExitStatus", "ä".repeat(9000)));
        let listed = failures.list();
        assert_eq!(listed.len(), MAX_FAILURES);
        assert_eq!(listed[0].message, format!("{}…", "ä".repeat(MAX_CHARS)));
        assert_eq!((listed[1].message.as_str(), listed[19].message.as_str()), ("29", "11"));
        assert_eq!((listed[1].attempt, listed[1].error_type.as_deref()), (1, Some("ExitStatus")));
    }
}
