//! [`Options`]: the settings that the real server takes as flags, with the same defaults.

use std::time::Duration;

/// The default of the real server's `--heartbeat-interval`.
const DEFAULT_HEARTBEAT_INTERVAL: Duration = Duration::from_secs(3);
/// The default of the real server's `--global-in-flight-limit`.
const DEFAULT_IN_FLIGHT_LIMIT: usize = 1024;
/// The maximum number of retries of a job without a limit of its own: the default of the real server's
/// `--default-retry-limit`.
pub(super) const RETRY_LIMIT: u32 = 25;
/// The time in milliseconds for which a dead job without a retention of its own is kept: the default of the real server's
/// `--default-dead-job-retention`, which is one week. In this time, a failure can be investigated.
pub(super) const DEAD_RETENTION_MS: u64 = 7 * 24 * 60 * 60 * 1_000;

/// The settings of a server.
#[derive(Debug, Clone)]
pub struct Options {
    /// The time without a job after which a take stream sends a heartbeat.
    pub heartbeat_interval: Duration,
    /// The maximum number of jobs in flight over all connections; 0 means no limit.
    pub in_flight_limit: usize,
    /// The wait before a failed job's next attempt. A job's own backoff overrides this one.
    pub backoff: ServerBackoff,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            heartbeat_interval: DEFAULT_HEARTBEAT_INTERVAL,
            in_flight_limit: DEFAULT_IN_FLIGHT_LIMIT,
            backoff: ServerBackoff::default(),
        }
    }
}

/// The wait before a retry: `base + (attempts ^ exponent) seconds + random(0..jitter) × attempts`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ServerBackoff {
    /// The constant part of the wait.
    pub base: Duration,
    /// The power to which the number of failed attempts is raised.
    pub exponent: f32,
    /// The maximum of the random part, before its multiplication by the number of failed attempts.
    pub jitter: Duration,
}

impl Default for ServerBackoff {
    fn default() -> Self {
        Self { base: Duration::from_secs(15), exponent: 4.0, jitter: Duration::from_secs(30) }
    }
}

impl ServerBackoff {
    /// Returns the wait after `attempts` failures, in milliseconds. `chance`, from 0 to 1, is the random factor for the
    /// jitter. It is an argument so that tests can choose it.
    pub(super) fn delay_ms(&self, attempts: u32, chance: f64) -> u64 {
        let attempts = f64::from(attempts);
        let growth = attempts.powf(f64::from(self.exponent)) * 1000.0;
        let jitter = chance * millis(self.jitter) as f64 * attempts;
        // The cast saturates, so a huge exponent results in `u64::MAX` instead of an overflow.
        (millis(self.base) as f64 + growth + jitter) as u64
    }
}

/// Returns a duration in milliseconds, the protocol's unit.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_follows_the_servers_formula() {
        let backoff = ServerBackoff::default();
        assert_eq!(backoff.delay_ms(1, 0.0), 16_000);
        assert_eq!(backoff.delay_ms(3, 0.0), 15_000 + 81_000);
        assert_eq!(backoff.delay_ms(3, 0.5), 15_000 + 81_000 + 45_000);
    }

    #[test]
    fn an_absurd_exponent_saturates() {
        let backoff = ServerBackoff { exponent: 1e30, ..ServerBackoff::default() };
        assert_eq!(backoff.delay_ms(2, 0.0), u64::MAX);
    }
}
