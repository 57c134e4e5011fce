//! [`Intake`]: what a worker takes jobs by, and whether it does. It may change while the worker runs.

use std::sync::Arc;

use tokio::sync::watch;

use crate::client::{Client, Connector, Tls};
use crate::config::WorkerConfig;
use crate::stream::StreamLimits;

/// Clones are of one intake.
#[derive(Debug, Clone)]
pub(super) struct Intake(watch::Sender<State>);

#[derive(Debug, Clone)]
struct State {
    paused: bool,
    tap: Arc<Tap>,
}

/// What a take stream is opened with.
#[derive(Debug)]
pub(super) struct Tap {
    pub(super) client: Arc<Client>,
    pub(super) queues: Vec<String>,
    pub(super) prefetch: usize,
    pub(super) limits: StreamLimits,
    tls: Tls,
    connector: Connector,
}

impl Tap {
    fn of(config: &WorkerConfig) -> Self {
        // More than may be started would only be given back.
        let most = config.max_jobs.map_or(usize::MAX, |most| usize::try_from(most.get()).unwrap_or(usize::MAX));
        Self {
            client: client(config),
            queues: config.queues.clone(),
            prefetch: config.prefetch.get().min(most),
            limits: config.stream_limits,
            tls: config.tls.clone(),
            connector: config.connector.clone(),
        }
    }

    fn is_same(&self, other: &Self) -> bool {
        let Self { client, queues, prefetch, limits, tls, connector } = self;
        client.url() == other.client.url()
            && *queues == other.queues
            && *prefetch == other.prefetch
            && *limits == other.limits
            && *tls == other.tls
            && *connector == other.connector
    }
}

fn client(config: &WorkerConfig) -> Arc<Client> {
    let WorkerConfig { url, worker_id, tls, connector, .. } = config;
    Arc::new(Client::new(url.clone(), worker_id.clone(), tls, connector))
}

impl Intake {
    pub(super) fn new(config: &WorkerConfig) -> Self {
        Self(watch::Sender::new(State { paused: false, tap: Arc::new(Tap::of(config)) }))
    }

    /// Pauses or resumes. Returns whether that changes anything.
    pub(super) fn set_paused(&self, paused: bool) -> bool {
        self.0.send_if_modified(|state| std::mem::replace(&mut state.paused, paused) != paused)
    }

    pub(super) fn is_paused(&self) -> bool {
        self.0.borrow().paused
    }

    /// Takes by these settings from now on. Returns whether that changes anything.
    pub(super) fn retap(&self, config: &WorkerConfig) -> bool {
        let tap = Tap::of(config);
        self.0.send_if_modified(|state| {
            let differs = !tap.is_same(&state.tap);
            if differs {
                state.tap = Arc::new(tap);
            }
            differs
        })
    }

    /// What to take by now, paused or not.
    pub(super) fn tap(&self) -> Arc<Tap> {
        Arc::clone(&self.0.borrow().tap)
    }

    /// Waits until jobs may be taken, and returns what to take them by.
    pub(super) async fn open(&self) -> Arc<Tap> {
        // It fails only once every sender is gone, and `self` is one.
        let _ = self.0.subscribe().wait_for(|state| !state.paused).await;
        self.tap()
    }

    /// Waits until something about it changes.
    pub(super) async fn changed(&self) {
        let _ = self.0.subscribe().changed().await;
    }

    /// Waits until jobs may not be taken by `tap` any more.
    pub(super) async fn shut(&self, tap: &Arc<Tap>) {
        let _ = self.0.subscribe().wait_for(|state| state.paused || !Arc::ptr_eq(&state.tap, tap)).await;
    }

    /// Waits until jobs may be taken by `tap` again.
    pub(super) async fn open_again(&self, tap: &Arc<Tap>) {
        let _ = self.0.subscribe().wait_for(|state| !state.paused && Arc::ptr_eq(&state.tap, tap)).await;
    }
}
