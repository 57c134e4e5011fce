//! [`Names`]: the queues or types that have a label of their own in the metrics.

use std::collections::HashSet;
use std::sync::{Mutex, MutexGuard};

use crate::lock::lock;

/// Label shared by all names without a label of their own. The number of labels is limited, because each label costs memory, here
/// and in Prometheus.
pub(super) const OTHER: &str = "(other)";

/// Maximum number of queues with a label of their own. A separate limit of the same size applies to job types. Configured queues
/// and types always have a label of their own. Configured queues count towards the limit, and configured types do not.
pub(super) const MAX_NAMES: usize = 100;

/// Maximum length in bytes of a name with a label of its own, unless the name is configured.
pub(super) const MAX_NAME_LENGTH: usize = 200;

/// The first names seen, each with a label of its own.
#[derive(Debug, Default)]
pub(super) struct Names(Mutex<HashSet<String>>);

impl Names {
    pub(super) fn of(names: &[String]) -> Self {
        Self(Mutex::new(names.iter().cloned().collect()))
    }

    pub(super) fn known(&self) -> MutexGuard<'_, HashSet<String>> {
        lock(&self.0)
    }

    /// Returns the label of a name, and whether the label is new.
    pub(super) fn label<'a>(&self, name: &'a str) -> (&'a str, bool) {
        let mut known = self.known();
        if known.contains(name) {
            return (name, false);
        }
        if known.len() >= MAX_NAMES || name.len() > MAX_NAME_LENGTH {
            return (OTHER, false);
        }
        known.insert(name.to_owned());
        (name, true)
    }
}
