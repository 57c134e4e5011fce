//! How long things may take once faults have stopped, from the settings. Liveness is held against these alone.

use std::time::Duration;

use tokio::time::Instant;
use zizq_worker::WorkerConfig;

use super::life::Life;
use super::network::MAX_LATENCY;
use super::script::End;
use super::server::{Record, longest_backoff};
use super::weather::Weather;

/// How long the client waits for an answer, the connection included.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// How long all last tries of reports may take together after a kill.
const LAST_TRIES: Duration = Duration::from_secs(10);

/// By how much chance may lengthen a wait.
const JITTER: f64 = 1.25;

/// A few round trips, and the rounding of timers.
pub const SLACK: Duration = Duration::from_millis(1000);

/// How long a worker needs to work again once faults have stopped. Whatever goes on at that moment fails within the time
/// limit of a request, or the silence that a stream may have; then comes one wait, and the next try succeeds.
pub fn recovery(config: &WorkerConfig, weather: &Weather) -> Duration {
    let notice = config.stream_limits.idle_timeout.max(REQUEST_TIMEOUT);
    notice + longest_wait(config).max(retry_after(weather)) + MAX_LATENCY * 8 + SLACK
}

/// The longest wait between two tries.
pub fn longest_wait(config: &WorkerConfig) -> Duration {
    config.backoff.max_wait().mul_f64(JITTER)
}

/// The wait before the first retry.
pub fn first_wait(config: &WorkerConfig) -> Duration {
    config.backoff.min_wait().mul_f64(JITTER)
}

/// How long a drain may take that somebody waits for, whatever the weather.
pub fn drain(config: &WorkerConfig, grace: Duration) -> Duration {
    config.shutdown_deadline + kill(grace)
}

/// How long a kill may take, whatever the weather.
pub fn kill(grace: Duration) -> Duration {
    grace + LAST_TRIES + SLACK
}

/// How long a stop without grace may take, whatever the weather.
pub fn force() -> Duration {
    SLACK
}

/// How long the drain of an idle worker may take after the recovery. It may have outcomes of jobs that others have
/// finished: it looks twice before it believes that.
pub fn idle_drain(config: &WorkerConfig) -> Duration {
    first_wait(config) * 3 + MAX_LATENCY * 8 + SLACK
}

/// How long a `Retry-After` may still keep a worker waiting.
fn retry_after(weather: &Weather) -> Duration {
    weather.retry_after().map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
}

/// How long a drain without a deadline may take after the recovery: all runs that were taken, one after another at
/// worst, one more wait before their outcomes are looked into, and a round trip for each.
pub fn own_drain(life: &Life, held: &[Record]) -> Duration {
    let running = life.running().iter().map(|run| run.lasts).max().unwrap_or_default();
    runs(held) + running + longest_wait(&life.config) + SLACK
}

/// How long a worker may take for so many short jobs when nothing is in its way: each goes there, comes back, and is
/// reported before the next can come into its place.
pub fn probe(config: &WorkerConfig, count: usize, lasts: Duration) -> Duration {
    let wide = config.prefetch.get().min(config.threads.get() * config.fibers.get());
    let rounds = u32::try_from(count.div_ceil(wide)).unwrap_or(u32::MAX);
    (lasts + MAX_LATENCY * 4) * rounds + MAX_LATENCY * 4 + SLACK
}

/// How long one run of each job takes, one after another.
pub fn runs(open: &[Record]) -> Duration {
    open.iter().map(|record| record.job.script.step(record.attempts).lasts()).sum()
}

/// How long jobs may take after the recovery: all their runs, one after another at worst, behind the longest run that may
/// be in their way; and the longest sequence of waits between the attempts of one of them.
pub fn work(open: &[Record]) -> Duration {
    let rests: Vec<(Duration, Duration)> = open.iter().map(rest).collect();
    let runs: Duration = rests.iter().map(|(runs, _)| *runs).sum();
    let longest_waits = rests.iter().map(|(_, waits)| *waits).max().unwrap_or_default();
    runs + longest_waits + Duration::from_secs(100) + SLACK
}

/// How long the runs of a job may still take, and the waits between them.
fn rest(record: &Record) -> (Duration, Duration) {
    let Record { job, attempts, .. } = record;
    let (mut runs, mut waits) = (Duration::ZERO, longest_backoff(*attempts).max(Duration::from_secs(8)));
    // A snooze is no matter of the limit, and each script snoozes a few times only.
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
