//! [`Options`]: the settings of the real server's flags, with its defaults.

use std::time::Duration;

/// The real server's `--heartbeat-interval`.
const DEFAULT_HEARTBEAT_INTERVAL: Duration = Duration::from_secs(3);
/// The real server's `--global-in-flight-limit`.
const DEFAULT_IN_FLIGHT_LIMIT: usize = 1024;
/// The real server's `--default-retry-limit`.
const DEFAULT_RETRY_LIMIT: u32 = 25;
/// The real server's `--default-dead-job-retention`: a week to look into a failure.
const DEFAULT_DEAD_RETENTION: Duration = Duration::from_secs(7 * 24 * 60 * 60);

/// The settings for jobs without their own.
#[derive(Debug, Clone)]
pub struct Options {
    /// The silence of a take stream after which a heartbeat is sent.
    pub heartbeat_interval: Duration,
    /// How many jobs may be in flight over all connections; 0 means no limit.
    pub in_flight_limit: usize,
    /// A job whose `attempts` exceed this is dead.
    pub retry_limit: u32,
    /// How long a failed job waits for its next attempt.
    pub backoff: Backoff,
    /// How long a completed job stays visible; zero removes it at once.
    pub completed_retention: Duration,
    /// How long a dead job stays visible; zero removes it at once.
    pub dead_retention: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            heartbeat_interval: DEFAULT_HEARTBEAT_INTERVAL,
            in_flight_limit: DEFAULT_IN_FLIGHT_LIMIT,
            retry_limit: DEFAULT_RETRY_LIMIT,
            backoff: Backoff::default(),
            completed_retention: Duration::ZERO,
            dead_retention: DEFAULT_DEAD_RETENTION,
        }
    }
}

/// The wait before a retry: `base + attempts^exponent s + rand(0..jitter) × attempts`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    /// The least wait.
    pub base: Duration,
    /// The exponent of the number of failed attempts.
    pub exponent: f32,
    /// The random part, per attempt.
    pub jitter: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Self { base: Duration::from_secs(15), exponent: 4.0, jitter: Duration::from_secs(30) }
    }
}

impl Backoff {
    /// The wait after `attempts` failures, in milliseconds. `chance` is from 0 to 1, and an
    /// argument so that the state machine stays a pure function of what it is given.
    pub(super) fn delay_ms(&self, attempts: u32, chance: f64) -> u64 {
        let attempts = f64::from(attempts);
        let growth = attempts.powf(f64::from(self.exponent)) * 1000.0;
        let jitter = chance * millis(self.jitter) as f64 * attempts;
        // A float cast saturates, so an absurd exponent means "never" and not an overflow.
        (millis(self.base) as f64 + growth + jitter) as u64
    }
}

/// A duration in the protocol's unit.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_follows_the_servers_formula() {
        let backoff = Backoff::default();
        assert_eq!(backoff.delay_ms(1, 0.0), 16_000);
        assert_eq!(backoff.delay_ms(3, 0.0), 15_000 + 81_000);
        assert_eq!(backoff.delay_ms(3, 0.5), 15_000 + 81_000 + 45_000);
    }

    #[test]
    fn an_absurd_exponent_saturates() {
        let backoff = Backoff { exponent: 1e30, ..Backoff::default() };
        assert_eq!(backoff.delay_ms(2, 0.0), u64::MAX);
    }
}
