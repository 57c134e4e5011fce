//! The time limits after the end of faults, computed from the settings. The liveness checks use only these limits.

use std::time::Duration;

use tokio::time::Instant;
use zizq_worker::WorkerConfig;

use super::life::Life;
use super::network::MAX_LATENCY;
use super::script::End;
use super::server::{Record, longest_backoff};
use super::weather::Weather;

/// The client's time limit for an answer, including the connect.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// The time limit of all last tries of reports together, after a kill.
const LAST_TRIES: Duration = Duration::from_secs(10);

/// The factor by which jitter can lengthen a wait.
const JITTER: f64 = 1.25;

/// The extra time for a few round trips and the rounding of timers.
pub const SLACK: Duration = Duration::from_millis(1000);

/// Returns the time in which a worker recovers after the end of faults. A request or stream in flight fails within the
/// time limit of a request or the idle timeout of a stream. After one more wait, the next try succeeds.
pub fn recovery(config: &WorkerConfig, weather: &Weather) -> Duration {
    let notice = config.stream_limits.idle_timeout.max(REQUEST_TIMEOUT);
    notice + longest_wait(config).max(retry_after(weather)) + MAX_LATENCY * 8 + SLACK
}

/// Returns the longest wait between two tries.
pub fn longest_wait(config: &WorkerConfig) -> Duration {
    config.backoff.max_wait().mul_f64(JITTER)
}

/// Returns the longest wait before the first retry.
pub fn first_wait(config: &WorkerConfig) -> Duration {
    config.backoff.min_wait().mul_f64(JITTER)
}

/// Returns the time limit of a drain with a deadline, in any weather.
pub fn drain(config: &WorkerConfig, grace: Duration) -> Duration {
    config.shutdown_deadline + kill(grace)
}

/// Returns the time limit of a kill, in any weather.
pub fn kill(grace: Duration) -> Duration {
    grace + LAST_TRIES + SLACK
}

/// Returns the time limit of a stop without grace, in any weather.
pub fn force() -> Duration {
    SLACK
}

/// Returns the time limit of an idle worker's drain after the recovery. The worker may hold outcomes of jobs that are
/// already finished elsewhere. It drops such an outcome only after it has asked for the job twice.
pub fn idle_drain(config: &WorkerConfig) -> Duration {
    first_wait(config) * 3 + MAX_LATENCY * 8 + SLACK
}

/// Returns the rest of the longest `Retry-After`.
fn retry_after(weather: &Weather) -> Duration {
    weather.retry_after().map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
}

/// Returns the time limit of a drain without a deadline, after the recovery. In the worst case all taken jobs run one
/// after another, and a last wait precedes the check of their outcomes.
pub fn own_drain(life: &Life, held: &[Record]) -> Duration {
    let running = life.running().iter().map(|run| run.lasts).max().unwrap_or_default();
    runs(held) + running + longest_wait(&life.config) + SLACK
}

/// Returns the time limit of a worker for this many short jobs without faults. Each job arrives, runs and is reported
/// before the next job takes its place.
pub fn probe(config: &WorkerConfig, count: usize, lasts: Duration) -> Duration {
    let wide = config.prefetch.get().min(config.threads.get() * config.fibers.get());
    let rounds = u32::try_from(count.div_ceil(wide)).unwrap_or(u32::MAX);
    (lasts + MAX_LATENCY * 4) * rounds + MAX_LATENCY * 4 + SLACK
}

/// Returns the time of one run of each job, one after another.
pub fn runs(open: &[Record]) -> Duration {
    open.iter().map(|record| record.job.script.step(record.attempts).lasts()).sum()
}

/// Returns the time limit of all jobs after the recovery. In the worst case all runs follow one another, behind the
/// longest run of another job. To this adds the longest sequence of waits between the attempts of one job.
pub fn work(open: &[Record]) -> Duration {
    let rests: Vec<(Duration, Duration)> = open.iter().map(rest).collect();
    let runs: Duration = rests.iter().map(|(runs, _)| *runs).sum();
    let longest_waits = rests.iter().map(|(_, waits)| *waits).max().unwrap_or_default();
    runs + longest_waits + Duration::from_secs(100) + SLACK
}

/// Returns the time of a job's further runs, and of the waits between them.
fn rest(record: &Record) -> (Duration, Duration) {
    let Record { job, attempts, .. } = record;
    let (mut runs, mut waits) = (Duration::ZERO, longest_backoff(*attempts).max(Duration::from_secs(8)));
    // A snooze does not count towards the retry limit, but a script snoozes only a few times.
    for attempts in *attempts..*attempts + 30 {
        let step = job.script.step(attempts);
        if job.malformed.is_none() {
            runs += step.lasts();
        }
        match step.end {
            End::Good | End::Kill => break,
            End::Snooze(ms) => waits += Duration::from_millis(ms) + SLACK,
            End::Bad if attempts >= job.retry_limit => break,
            End::Bad => waits += longest_backoff(attempts + 1) + SLACK,
        }
    }
    (runs, waits)
}
