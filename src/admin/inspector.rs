//! [`Inspector`]: the state of the daemon that the admin server shows.

use std::collections::BTreeMap;
use std::sync::Mutex;

use serde::Serialize;

use crate::config::{Reload, Setting};
use crate::dispatch::ExecDispatcher;
use crate::lifecycle::Lifecycle;
use crate::lock::lock;
use crate::version::VERSION;
use crate::worker::{Controls, Status};

/// Version of the `/status` format. It increases when a field is removed or changes its meaning, but not when a field is added.
const FORMAT: u32 = 1;

/// The response body of `/status`.
#[derive(Serialize)]
struct StatusAnswer<'a> {
    format: u32,
    version: &'static str,
    worker_id: &'a str,
    unready: Vec<String>,
    #[serde(flatten)]
    worker: Status,
    settings: BTreeMap<String, ShownSetting>,
}

/// A setting in the `/status` response, without secrets.
#[derive(Serialize)]
struct ShownSetting {
    value: String,
    source: String,
}

/// The running worker, and the settings in force.
#[derive(Debug)]
pub(crate) struct Inspector {
    pub(crate) controls: Controls<ExecDispatcher>,
    pub(crate) lifecycle: Lifecycle,
    worker_id: String,
    settings: Mutex<Vec<Setting>>,
}

impl Inspector {
    pub(crate) fn new(
        controls: Controls<ExecDispatcher>,
        lifecycle: Lifecycle,
        worker_id: String,
        settings: Vec<Setting>,
    ) -> Self {
        Self { controls, lifecycle, worker_id, settings: Mutex::new(settings) }
    }

    pub(crate) fn worker(&self) -> Status {
        self.controls.status(&self.lifecycle)
    }

    /// Replaces the settings in force, except those that need a restart. `written` contains the settings as the reload has read
    /// them. Returns the names of the settings that need a restart and whose value in `written` differs from the value in force.
    pub(crate) fn renew(&self, settings: Vec<Setting>, written: &[Setting]) -> Vec<String> {
        let mut present = lock(&self.settings);
        let (kept, _): (Vec<Setting>, Vec<Setting>) =
            present.drain(..).partition(|setting| setting.reload == Reload::Restart);
        let differs = |kept: &&Setting| written.iter().any(|new| new.name == kept.name && new.value != kept.value);
        let differing = kept.iter().filter(differs).map(|setting| setting.name.clone()).collect();
        *present = settings.into_iter().filter(|setting| setting.reload != Reload::Restart).chain(kept).collect();
        differing
    }

    fn settings(&self) -> BTreeMap<String, ShownSetting> {
        let settings = lock(&self.settings);
        let shown = |setting: &Setting| {
            let value = setting.public_value.as_ref().unwrap_or(&setting.value).clone();
            let source = setting.source.as_ref().map_or("default".to_owned(), ToString::to_string);
            (setting.name.clone(), ShownSetting { value, source })
        };
        settings.iter().map(shown).collect()
    }

    /// Returns the reasons why the worker cannot run jobs now, or an empty list if it can.
    pub(super) fn unready(&self) -> Vec<String> {
        self.controls.unready(&self.lifecycle).iter().map(ToString::to_string).collect()
    }

    /// Returns the worker's status, as JSON.
    pub(super) fn status(&self) -> String {
        let answer = StatusAnswer {
            format: FORMAT,
            version: VERSION,
            worker_id: &self.worker_id,
            unready: self.unready(),
            worker: self.worker(),
            settings: self.settings(),
        };
        // Serialization fails only for maps with keys that are not strings, and the answer has no such map.
        serde_json::to_string(&answer).unwrap_or_default()
    }

    /// Returns the metrics, in the text format of Prometheus.
    pub(super) fn metrics(&self) -> String {
        self.controls.metrics_text(&self.lifecycle)
    }
}
