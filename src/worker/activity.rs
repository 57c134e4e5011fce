//! [`Activity`]: what a run of a worker is doing and has done, counted without locks in the jobs' way.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::sync::watch;
use tracing::info;

use super::Summary;
use crate::job::Outcome;
use crate::lifecycle::{Lifecycle, Phase};

/// Shared by the parts of one run; clones count together.
#[derive(Debug, Clone, Default)]
pub(super) struct Activity(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: watch::Sender<State>,
    running: AtomicUsize,
    succeeded: AtomicU64,
    failed: AtomicU64,
    interrupted: AtomicU64,
}

/// What decides whether the worker is idle.
#[derive(Debug, Default)]
struct State {
    connected: bool,
    unfinished: usize,
}

impl State {
    /// Without a stream nobody knows whether there are jobs, so that is not idleness.
    fn is_idle(&self) -> bool {
        self.connected && self.unfinished == 0
    }
}

/// Jobs at one moment.
#[derive(Debug)]
pub(super) struct Counts {
    pub(super) running: usize,
    pub(super) waiting: usize,
}

/// A job that has been taken and not handed on yet.
#[derive(Debug)]
pub(super) struct Unfinished(Activity);

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.0.0.state.send_modify(|state| state.unfinished -= 1);
    }
}

/// A job that is being done.
#[derive(Debug)]
pub(super) struct Running(Activity);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Activity {
    pub(super) fn set_connected(&self, connected: bool) {
        self.0.state.send_modify(|state| state.connected = connected);
    }

    pub(super) fn take_job(&self) -> Unfinished {
        self.0.state.send_modify(|state| state.unfinished += 1);
        Unfinished(self.clone())
    }

    pub(super) fn start_job(&self) -> Running {
        self.0.running.fetch_add(1, Ordering::Relaxed);
        Running(self.clone())
    }

    pub(super) fn count(&self, outcome: &Outcome) {
        let counter = match outcome {
            Outcome::Success => &self.0.succeeded,
            Outcome::Failure(_) => &self.0.failed,
            Outcome::Interrupted => &self.0.interrupted,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn counts(&self, waiting: usize) -> Counts {
        Counts { running: self.0.running.load(Ordering::Relaxed), waiting }
    }

    pub(super) fn summary(&self, killed: bool) -> Summary {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Summary {
            killed,
            succeeded: count(&self.0.succeeded),
            failed: count(&self.0.failed),
            interrupted: count(&self.0.interrupted),
        }
    }

    /// Drains once the worker has been connected and without a job for as long as `limit`.
    pub(super) async fn stop_when_idle(&self, lifecycle: &Lifecycle, limit: Duration) {
        let mut states = self.0.state.subscribe();
        while states.wait_for(State::is_idle).await.is_ok() {
            tokio::select! {
                () = lifecycle.reached(Phase::Draining) => return,
                // Any change, even one that is over by now, starts the time anew.
                _ = states.changed() => {}
                () = tokio::time::sleep(limit) => {
                    info!(?limit, "no job for that long: draining");
                    lifecycle.stop();
                    return;
                }
            }
        }
    }
}
