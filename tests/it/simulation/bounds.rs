//! Time limits for the liveness checks, computed from the worker's settings, the jobs, and the injected faults.

use std::time::Duration;

use tokio::time::Instant;
use zizq_worker::WorkerConfig;

use super::life::Life;
use super::network::MAX_LATENCY;
use super::script::End;
use super::server::{Record, longest_backoff};
use super::weather::Weather;

/// The client's time limit from the start of a request until the headers of the answer arrive.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

/// The time limit for a killed worker's last attempts to send its reports. The limit holds for all reports together.
const LAST_TRIES: Duration = Duration::from_secs(10);

/// The largest factor by which jitter lengthens a backoff wait.
const JITTER: f64 = 1.25;

/// The allowance for a few round trips and for the rounding of timers.
pub const SLACK: Duration = Duration::from_millis(1000);

/// Returns the time in which a worker recovers after the faults end. A broken request fails within `REQUEST_TIMEOUT`, and a
/// broken stream within its idle timeout. After one more backoff wait, the retry succeeds.
pub fn recovery(config: &WorkerConfig, weather: &Weather) -> Duration {
    let notice = config.stream_limits.idle_timeout.max(REQUEST_TIMEOUT);
    notice + longest_wait(config).max(retry_after(weather)) + MAX_LATENCY * 8 + SLACK
}

/// Returns the longest backoff wait, including jitter.
pub fn longest_wait(config: &WorkerConfig) -> Duration {
    config.backoff.max_wait().mul_f64(JITTER)
}

/// Returns the longest backoff wait before the first retry, including jitter.
pub fn first_wait(config: &WorkerConfig) -> Duration {
    config.backoff.min_wait().mul_f64(JITTER)
}

/// Returns the time limit for a drain. The shutdown deadline may cut the drain short. The limit holds with and without faults.
pub fn drain(config: &WorkerConfig, grace: Duration) -> Duration {
    config.shutdown_deadline + kill(grace)
}

/// Returns the time limit for the end of a killed worker. The limit holds with and without faults.
pub fn kill(grace: Duration) -> Duration {
    grace + LAST_TRIES + SLACK
}

/// Returns the time limit for a stop without a grace period. The limit holds with and without faults.
pub fn force() -> Duration {
    SLACK
}

/// Returns the time limit for the drain of an idle worker that has recovered from the faults. The worker may still hold outcomes
/// of jobs that another worker has finished. Before the worker drops such an outcome, it asks the server about the job, at most
/// twice.
pub fn idle_drain(config: &WorkerConfig) -> Duration {
    first_wait(config) * 3 + MAX_LATENCY * 8 + SLACK
}

/// Returns the time that is left until the last `Retry-After` ends, or zero if none is left.
fn retry_after(weather: &Weather) -> Duration {
    weather.retry_after().map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
}

/// Returns the time in which a draining worker ends once it has recovered from the faults, even without a shutdown deadline. In
/// the worst case, all taken jobs run one after another, and then a backoff wait passes before their outcomes are reported.
pub fn own_drain(life: &Life, held: &[Record]) -> Duration {
    let running = life.running().iter().map(|run| run.lasts).max().unwrap_or_default();
    runs(held) + running + longest_wait(&life.config) + SLACK
}

/// Returns the time in which a worker completes `count` jobs if there are no faults. The jobs run in rounds. In each round, the
/// worker runs as many jobs as its prefetch and its concurrency allow. A round ends when its jobs have been reported.
pub fn probe(config: &WorkerConfig, count: usize, lasts: Duration) -> Duration {
    let wide = config.prefetch.get().min(config.threads.get() * config.fibers.get());
    let rounds = u32::try_from(count.div_ceil(wide)).unwrap_or(u32::MAX);
    (lasts + MAX_LATENCY * 4) * rounds + MAX_LATENCY * 4 + SLACK
}

/// Returns the total duration of the jobs' next runs, one run per job.
pub fn runs(open: &[Record]) -> Duration {
    open.iter().map(|record| record.job.script.step(record.attempts).lasts()).sum()
}

/// Returns the time in which all jobs end once the workers have recovered from the faults. In the worst case, all runs follow one
/// another, and the first begins only after an earlier run of 100 s, the longest run that `Script::draw` draws. The returned time
/// also includes the longest total wait of any job.
pub fn work(open: &[Record]) -> Duration {
    let rests: Vec<(Duration, Duration)> = open.iter().map(rest).collect();
    let runs: Duration = rests.iter().map(|(runs, _)| *runs).sum();
    let longest_waits = rests.iter().map(|(_, waits)| *waits).max().unwrap_or_default();
    runs + longest_waits + Duration::from_secs(100) + SLACK
}

/// Returns the total duration of a job's remaining runs, and the total duration of the waits before these runs.
fn rest(record: &Record) -> (Duration, Duration) {
    let Record { job, attempts, .. } = record;
    let (mut runs, mut waits) = (Duration::ZERO, longest_backoff(*attempts).max(Duration::from_secs(8)));
    // Snoozes do not count toward the retry limit, but a script has only a few snoozes, so 30 attempts are enough.
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
