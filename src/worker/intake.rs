//! [`Intake`]: the settings that a worker takes jobs by, and whether it does. Both may change while the worker runs.

use std::sync::Arc;

use crate::client::StreamSettings;
use crate::config::WorkerConfig;
use crate::watch;

/// Clones are of one intake.
#[derive(Debug, Clone)]
pub(super) struct Intake(watch::Sender<IntakeState>);

/// Whether jobs are taken, and by which settings.
#[derive(Debug, Clone)]
pub(super) struct IntakeState {
    paused: bool,
    settings: Arc<StreamSettings>,
}

impl Intake {
    pub(super) fn new(config: &WorkerConfig) -> Self {
        Self(watch::Sender::new(IntakeState { paused: false, settings: Arc::new(StreamSettings::of(config, None)) }))
    }

    /// Pauses or resumes. Returns whether that changes anything.
    pub(super) fn set_paused(&self, paused: bool) -> bool {
        self.0.send_if_modified(|state| std::mem::replace(&mut state.paused, paused) != paused)
    }

    pub(super) fn is_paused(&self) -> bool {
        self.0.borrow().paused
    }

    /// Takes by the settings in `config` from now on. Returns whether that changes anything.
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

    /// Returns the settings to take by now, paused or not.
    pub(super) fn settings(&self) -> Arc<StreamSettings> {
        Arc::clone(&self.0.borrow().settings)
    }

    /// Changes whenever something about it does.
    pub(super) fn changes(&self) -> watch::Receiver<IntakeState> {
        self.0.subscribe()
    }
}
