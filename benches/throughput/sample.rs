//! [`Sample`]: the figures of one run. [`Spread`]: the spread of a figure over several runs.

use std::time::Duration;

use serde::Serialize;

/// The figures of one run of one contender. A figure that cannot be measured is `None`.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Sample {
    pub(crate) jobs_per_second: f64,
    /// The CPU time per job including children, in milliseconds.
    pub(crate) cpu: f64,
    /// The CPU time per job of the contender's process alone, in milliseconds.
    pub(crate) own_cpu: Option<f64>,
    /// The peak memory in bytes.
    pub(crate) peak_memory: Option<u64>,
}

/// The median, the minimum and the maximum of some values.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values = sorted(values);
        let (least, most) = (*values.first()?, *values.last()?);
        Some(Self { median: percentile(&values, 0.5), least, most })
    }
}

pub(crate) fn sorted(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.into_iter().collect();
    values.sort_by(f64::total_cmp);
    values
}

/// Returns the quantile `part` (0 to 1) of the sorted values, or NaN if there are none.
pub(crate) fn percentile(sorted: &[f64], part: f64) -> f64 {
    let last = sorted.len().saturating_sub(1);
    sorted.get((last as f64 * part).round() as usize).copied().unwrap_or(f64::NAN)
}

pub(crate) fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}
