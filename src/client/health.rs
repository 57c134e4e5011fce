//! [`Health`]: tracks whether calls to a server fail, and wakes waiters when calls succeed again.

use std::sync::Mutex;
use std::time::Duration;

use tokio::time::Instant;

use super::ClientError;
use crate::lock::lock;
use crate::watch;

/// The minimum duration of a run of failed calls before a success counts as a recovery. Without a minimum, a call that always
/// fails would be retried at every success of another call.
const DISTURBANCE: Duration = Duration::from_secs(1);

/// The health of the calls to one server: the start of the current run of failed calls, and the waiters for a recovery.
#[derive(Debug, Default)]
pub(crate) struct Health {
    failing_since: Mutex<Option<Instant>>,
    recoveries: watch::Sender<()>,
    /// The mutex that lets failed calls probe the server one at a time.
    probe: tokio::sync::Mutex<()>,
}

impl Health {
    /// Records the result of a call, and returns the result. Only a retryable error counts as a failure. A withdrawn call is not
    /// recorded.
    pub(super) fn observe<T>(&self, called: Result<T, ClientError>) -> Result<T, ClientError> {
        if matches!(called, Err(ClientError::Withdrawn)) {
            return called;
        }
        let failed = called.as_ref().is_err_and(ClientError::is_retryable);
        let mut failing_since = lock(&self.failing_since);
        if failed {
            failing_since.get_or_insert_with(Instant::now);
        } else if failing_since.take().is_some_and(|since| since.elapsed() >= DISTURBANCE) {
            self.recoveries.send_replace(());
        }
        called
    }

    /// Reports whether the latest call failed.
    pub(crate) fn is_failing(&self) -> bool {
        lock(&self.failing_since).is_some()
    }

    /// Records that a take stream has been opened. If the latest call failed, this counts as a recovery, however short the run of
    /// failed calls was.
    pub(super) fn connected(&self) {
        let failing_since = lock(&self.failing_since).take();
        if failing_since.is_some() {
            self.recoveries.send_replace(());
        }
    }

    /// Waits for the next recovery: a call that succeeds after a run of failed calls.
    pub(crate) async fn recovered(&self) {
        // The wait fails only after the sender is dropped, and `self` owns the sender.
        let _ = self.recoveries.subscribe().changed().await;
    }

    /// Waits for the caller's turn to probe the server. Waiting callers get their turns one at a time, in the order in which they
    /// called, each after its own `pause`.
    pub(crate) async fn probe_turn(&self, pause: Duration) {
        let _turn = self.probe.lock().await;
        tokio::time::sleep(pause).await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn failure() -> Result<(), ClientError> {
        Err(ClientError::TimedOut(Duration::ZERO))
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_success_after_a_disturbance_is_a_recovery() {
        let health = Health::default();
        let mut waiting = Box::pin(health.recovered());
        assert!(waiting.as_mut().now_or_never().is_none());
        health.observe(failure()).unwrap_err();
        tokio::time::advance(DISTURBANCE).await;
        health.observe(failure()).unwrap_err();
        assert!(waiting.as_mut().now_or_never().is_none());
        health.observe(Ok(())).unwrap();
        assert!(waiting.now_or_never().is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_that_always_fails_among_others_is_no_disturbance() {
        let health = Health::default();
        let mut waiting = Box::pin(health.recovered());
        assert!(waiting.as_mut().now_or_never().is_none());
        for _ in 0..10 {
            health.observe(failure()).unwrap_err();
            tokio::time::advance(DISTURBANCE / 2).await;
            health.observe(Ok(())).unwrap();
        }
        assert!(waiting.now_or_never().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn probes_take_turns() {
        let (health, begun) = (Health::default(), Instant::now());
        let pause = Duration::from_secs(1);
        let turn = || async {
            health.probe_turn(pause).await;
            begun.elapsed().as_secs()
        };
        assert_eq!(tokio::join!(turn(), turn(), turn()), (1, 2, 3));
    }
}
