//! The deadlines of a process: the timeout of the handler, and the last wait for a process that survives SIGKILL.

use std::time::Duration;

use tokio::time::Instant;

use super::outcome::Cause;
use crate::handler::Handler;
use crate::lifecycle::{Lifecycle, Phase};

/// The longest wait for a process that survives SIGKILL while the worker is being killed. Afterwards the worker ends, and the
/// server redelivers the job even if the process still runs.
const LAST_WAIT: Duration = Duration::from_secs(10);

/// Waits until the worker gives up on a process that survives SIGKILL: `LAST_WAIT` after the lifecycle reaches `Phase::Killing`,
/// or as soon as it reaches `Phase::Forcing`.
pub(super) async fn last_wait(lifecycle: &Lifecycle) {
    lifecycle.reached(Phase::Killing).await;
    tokio::select! {
        () = lifecycle.reached(Phase::Forcing) => {}
        () = tokio::time::sleep(LAST_WAIT) => {}
    }
}

/// Waits until the timeout of a job that began at `since`. Never returns if the handler has no timeout.
pub(super) async fn time_is_up(handler: &Handler, since: Instant) {
    match handler.timeout {
        Some(timeout) => tokio::time::sleep_until(since + timeout).await,
        None => std::future::pending().await,
    }
}

/// Waits until a job that began at `since` must end.
pub(super) async fn cause_to_terminate(handler: &Handler, lifecycle: &Lifecycle, since: Instant) -> Cause {
    tokio::select! {
        biased;
        () = lifecycle.reached(Phase::Killing) => Cause::Killing,
        () = time_is_up(handler, since) => Cause::Timeout,
    }
}
