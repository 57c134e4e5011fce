//! [`Intake`]: the pause state and the stream settings of a worker. Both may change while the worker runs.

use std::sync::Arc;

use crate::client::StreamSettings;
use crate::config::WorkerConfig;
use crate::watch;

/// The pause state and the stream settings of one worker. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Intake(watch::Sender<IntakeState>);

/// The pause state and the stream settings.
#[derive(Debug, Clone)]
pub(super) struct IntakeState {
    paused: bool,
    settings: Arc<StreamSettings>,
}

impl Intake {
    pub(super) fn new(config: &WorkerConfig) -> Self {
        Self(watch::Sender::new(IntakeState { paused: false, settings: Arc::new(StreamSettings::of(config, None)) }))
    }

    /// Pauses or resumes the worker. Returns whether the state has changed.
    pub(super) fn set_paused(&self, paused: bool) -> bool {
        self.0.send_if_modified(|state| std::mem::replace(&mut state.paused, paused) != paused)
    }

    pub(super) fn is_paused(&self) -> bool {
        self.0.borrow().paused
    }

    /// Changes the stream settings to those of `config`. Returns false if they are the same as before.
    pub(super) fn change_settings(&self, config: &WorkerConfig) -> bool {
        let settings = StreamSettings::of(config, Some(&self.settings()));
        self.0.send_if_modified(|state| {
            let differs = !settings.is_same(&state.settings);
            if differs {
                state.settings = Arc::new(settings);
            }
            differs
        })
    }

    /// Returns the present stream settings. They do not depend on whether the worker is paused.
    pub(super) fn settings(&self) -> Arc<StreamSettings> {
        Arc::clone(&self.0.borrow().settings)
    }

    pub(super) fn changes(&self) -> watch::Receiver<IntakeState> {
        self.0.subscribe()
    }
}
