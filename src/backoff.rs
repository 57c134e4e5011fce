//! [`Backoff`]: the waits between retries. `retry`: the loop that all retries share.

use std::time::Duration;

use tokio::time::Instant;

use crate::lifecycle::{Lifecycle, Phase};

/// The default first wait. It is short, so that a restart of the server causes little delay.
pub const DEFAULT_RETRY_MIN_WAIT: Duration = Duration::from_secs(1);

/// The default maximum wait. It is long enough not to burden an overloaded server, and short enough for a worker to reconnect
/// soon after the server recovers.
pub const DEFAULT_RETRY_MAX_WAIT: Duration = Duration::from_secs(30);

/// The default ratio of each wait to the previous one.
pub const DEFAULT_RETRY_MULTIPLIER: f64 = 2.0;

/// The maximum random extension of each wait, as a fraction of the wait. Without the extension, all workers that lose the server
/// at the same moment would also reconnect at the same moment.
const JITTER: f64 = 0.25;

/// Waits that grow by a fixed factor from a minimum to a maximum, each extended by up to 25 % at random.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    min_wait: Duration,
    max_wait: Duration,
    multiplier: f64,
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            min_wait: DEFAULT_RETRY_MIN_WAIT,
            max_wait: DEFAULT_RETRY_MAX_WAIT,
            multiplier: DEFAULT_RETRY_MULTIPLIER,
        }
    }
}

impl Backoff {
    /// Returns a backoff whose first wait is `min_wait`, and whose longest wait is `max_wait`, both plus jitter.
    ///
    /// # Errors
    /// When `min_wait` is zero, `max_wait` is less than `min_wait`, or `multiplier` is below 1 or not finite. The error is a
    /// sentence that names the problem.
    pub fn try_new(min_wait: Duration, max_wait: Duration, multiplier: f64) -> Result<Self, String> {
        if min_wait.is_zero() {
            return Err("retry_min_wait must be greater than 0s".to_owned());
        }
        if max_wait < min_wait {
            return Err(format!(
                "retry_max_wait must be at least retry_min_wait ({}) (got {})",
                humantime::format_duration(min_wait),
                humantime::format_duration(max_wait)
            ));
        }
        if !(multiplier >= 1.0 && multiplier.is_finite()) {
            return Err(format!("retry_multiplier must be at least 1 (got {multiplier})"));
        }
        Ok(Self { min_wait, max_wait, multiplier })
    }

    /// Returns `min_wait`, `max_wait` and `multiplier`.
    pub(crate) fn parts(&self) -> (Duration, Duration, f64) {
        (self.min_wait, self.max_wait, self.multiplier)
    }

    /// Returns the first wait with the maximum jitter.
    pub(crate) fn longest_first_wait(&self) -> Duration {
        self.min_wait.mul_f64(1.0 + JITTER)
    }

    /// Returns the wait before the first retry, without its jitter.
    pub fn min_wait(&self) -> Duration {
        self.min_wait
    }

    /// Returns the maximum wait, without its jitter.
    pub fn max_wait(&self) -> Duration {
        self.max_wait
    }

    /// Returns a fresh sequence of waits.
    pub fn waits(&self) -> Waits {
        Waits { policy: *self, next: self.min_wait }
    }
}

/// One sequence of waits under a [`Backoff`].
#[derive(Debug)]
pub struct Waits {
    policy: Backoff,
    next: Duration,
}

impl Waits {
    /// Resets the sequence, so that the next wait is the shortest again.
    pub fn reset(&mut self) {
        self.next = self.policy.min_wait;
    }

    /// Returns the next wait, jitter included.
    pub fn next_wait(&mut self) -> Duration {
        let wait = self.next;
        let grown = wait.as_secs_f64() * self.policy.multiplier;
        self.next =
            Duration::try_from_secs_f64(grown).map_or(self.policy.max_wait, |wait| wait.min(self.policy.max_wait));
        wait.mul_f64(1.0 + JITTER * fastrand::f64())
    }
}

/// An error that [`retry`] can handle.
pub(crate) trait Retryable {
    /// Reports whether a retry may succeed.
    fn is_retryable(&self) -> bool;

    /// Returns the wait that the server has asked for, if any. In [`retry`], `early` does not end a wait sooner than that.
    fn retry_after(&self) -> Option<Duration> {
        None
    }
}

/// The reason why a wait ends early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Early {
    /// The fault seems to be repaired. After another error, the backoff starts over at its shortest wait.
    Recovery,
    /// One additional try is due during the wait. The backoff is not reset.
    Turn,
}

/// Calls `attempt` until it succeeds or fails with an error that is not retryable. Once the phase `until` is reached, a try in
/// progress is the last one. A wait in progress ends at once, and one last try follows. The first try always runs.
///
/// `on_error` receives each error after which `attempt` is called again, and the length of the wait if a new wait begins. A wait
/// also ends when `early` completes, but not before the error's `retry_after`. If a try after an [`Early::Turn`] fails, the rest of
/// the interrupted wait follows, unless the server asks for a wait.
pub(crate) async fn retry<T, E, F, S>(
    mut waits: Waits,
    lifecycle: &Lifecycle,
    until: Phase,
    mut attempt: impl FnMut() -> F,
    on_error: impl Fn(&E, Option<Duration>),
    early: impl Fn() -> S,
) -> Result<T, E>
where
    E: Retryable,
    F: Future<Output = Result<T, E>>,
    S: Future<Output = Early>,
{
    let mut end = Instant::now();
    loop {
        let error = match attempt().await {
            Err(error) if error.is_retryable() && lifecycle.phase() < until => error,
            ended => return ended,
        };
        let (asked, now) = (error.retry_after(), Instant::now());
        let wait = (asked.is_some() || end <= now).then(|| waits.next_wait().max(asked.unwrap_or_default()));
        on_error(&error, wait);
        end = wait.and_then(|wait| now.checked_add(wait)).unwrap_or(end);
        let asked_for = tokio::time::sleep(asked.unwrap_or_default());
        tokio::select! {
            biased;
            () = lifecycle.reached(until) => {}
            () = tokio::time::sleep_until(end) => {}
            (why, ()) = async { tokio::join!(early(), asked_for) } => if why == Early::Recovery {
                waits.reset();
                end = Instant::now();
            },
        }
    }
}

/// Sleeps until `end`, or forever if `end` is `None`.
pub(crate) async fn sleep_until_if(end: Option<Instant>) {
    match end {
        Some(end) => tokio::time::sleep_until(end).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn backoff(min: u64, max: u64, multiplier: f64) -> Result<Backoff, String> {
        Backoff::try_new(Duration::from_secs(min), Duration::from_secs(max), multiplier)
    }

    #[test]
    fn waits_grow_to_the_greatest_and_start_over_after_a_reset() {
        let mut waits = backoff(1, 5, 2.0).unwrap().waits();
        let base = |wait: Duration, expected: f64| {
            let wait = wait.as_secs_f64();
            assert!((expected..=expected * 1.25).contains(&wait), "{wait} for {expected}");
        };
        for expected in [1.0, 2.0, 4.0, 5.0, 5.0] {
            base(waits.next_wait(), expected);
        }
        waits.reset();
        base(waits.next_wait(), 1.0);
    }

    #[test]
    fn a_multiplier_that_overflows_stays_at_the_greatest_wait() {
        let mut waits = backoff(1, 30, f64::MAX).unwrap().waits();
        waits.next_wait();
        assert!(waits.next_wait() <= Duration::from_millis(37_500));
    }

    #[test]
    fn impossible_policies_cannot_be_built() {
        assert_eq!(backoff(0, 1, 2.0).unwrap_err(), "retry_min_wait must be greater than 0s");
        assert_eq!(backoff(2, 1, 2.0).unwrap_err(), "retry_max_wait must be at least retry_min_wait (2s) (got 1s)");
        assert_eq!(backoff(1, 2, 0.5).unwrap_err(), "retry_multiplier must be at least 1 (got 0.5)");
        assert!(backoff(1, 2, f64::NAN).is_err());
    }

    #[derive(Debug)]
    struct Fault(bool);

    impl Retryable for Fault {
        fn is_retryable(&self) -> bool {
            self.0
        }
    }

    /// A fault with a `retry_after` of one minute.
    #[derive(Debug)]
    struct Busy;

    impl Retryable for Busy {
        fn is_retryable(&self) -> bool {
            true
        }

        fn retry_after(&self) -> Option<Duration> {
            Some(Duration::from_secs(60))
        }
    }

    /// Retries an attempt that fails `count` times, and returns the time until it succeeded.
    async fn took<E: Retryable>(count: usize, fault: impl Fn() -> E, early: Early) -> Duration {
        let (begun, mut tries) = (tokio::time::Instant::now(), 0);
        let attempt = || {
            tries += 1;
            std::future::ready(if tries > count { Ok(()) } else { Err(fault()) })
        };
        let backoff = backoff(10, 1000, 10.0).unwrap();
        let early = || async move {
            tokio::time::sleep(Duration::from_secs(1)).await;
            early
        };
        let ended = retry(backoff.waits(), &Lifecycle::new(), Phase::Killing, attempt, |_, _| {}, early).await;
        assert!(ended.is_ok());
        begun.elapsed()
    }

    #[tokio::test(start_paused = true)]
    async fn a_turn_that_fails_begins_no_new_wait() {
        let (waits, tries) = (std::cell::RefCell::new(Vec::new()), std::cell::Cell::new(0));
        let attempt = || {
            tries.set(tries.get() + 1);
            std::future::ready(if tries.get() > 6 { Ok(()) } else { Err(Fault(true)) })
        };
        let on_error = |_: &Fault, wait: Option<Duration>| waits.borrow_mut().push(wait.is_some());
        let early = || async {
            // Two of these sleeps fit into one wait of 10 to 12.5 s, and a third does not.
            tokio::time::sleep(Duration::from_millis(4500)).await;
            Early::Turn
        };
        let backoff = backoff(10, 10, 1.0).unwrap();
        retry(backoff.waits(), &Lifecycle::new(), Phase::Killing, attempt, on_error, early).await.unwrap();
        assert_eq!(waits.into_inner(), [true, false, false, true, false, false]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wait_ends_early_but_not_before_retry_after() {
        for early in [Early::Recovery, Early::Turn] {
            assert_eq!(took(3, || Fault(true), early).await, Duration::from_secs(3));
            assert_eq!(took(3, || Busy, early).await, Duration::from_secs(180));
        }
    }

    async fn tries(lifecycle: &Lifecycle, faults: &[bool]) -> (usize, Result<(), Fault>) {
        let mut faults = faults.iter();
        let mut count = 0;
        let ended = retry(
            backoff(1, 30, 2.0).unwrap().waits(),
            lifecycle,
            Phase::Killing,
            || {
                count += 1;
                std::future::ready(faults.next().map_or(Ok(()), |retryable| Err(Fault(*retryable))))
            },
            |_, _| {},
            std::future::pending,
        )
        .await;
        (count, ended)
    }

    #[tokio::test(start_paused = true)]
    async fn retries_until_it_succeeds() {
        let (count, ended) = tries(&Lifecycle::new(), &[true, true]).await;
        assert_eq!(count, 3);
        ended.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_final_error_is_not_retried() {
        let (count, ended) = tries(&Lifecycle::new(), &[true, false]).await;
        assert_eq!(count, 2);
        ended.unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn once_killing_the_first_try_runs_and_is_the_last() {
        let lifecycle = Lifecycle::new();
        lifecycle.kill();
        let (count, ended) = tries(&lifecycle, &[true, true]).await;
        assert_eq!(count, 1);
        ended.unwrap_err();
    }

    #[tokio::test(start_paused = true)]
    async fn a_kill_cuts_the_wait_short_for_one_last_try() {
        let lifecycle = Lifecycle::new();
        let killed = lifecycle.clone();
        let ((count, ended), ()) = tokio::join!(tries(&lifecycle, &[true, true, true]), async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            killed.kill();
        });
        assert_eq!(count, 2);
        ended.unwrap_err();
    }
}
