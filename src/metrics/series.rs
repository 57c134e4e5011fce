//! [`JobSeries`]: the metrics of one combination of queue and job type.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};

use prometheus::{Counter, Histogram, IntCounter, IntGauge};

use crate::lock::lock;

/// The series that count the jobs of one combination of queue and job type. The series are looked up only once for each job,
/// because a lookup by labels costs more than the counting itself.
#[derive(Debug)]
pub(crate) struct JobSeries {
    pub(super) type_label: String,
    pub(super) succeeded: IntCounter,
    pub(super) failed: IntCounter,
    pub(super) interrupted: IntCounter,
    pub(super) run_seconds: Histogram,
    pub(super) cpu_seconds: Counter,
    /// The counter of exits with status 0, created at the first such exit.
    pub(super) good_exits: OnceLock<IntCounter>,
    /// The gauge of the peak memory, created for the first process whose resource usage is known.
    pub(super) peak_memory: OnceLock<IntGauge>,
}

/// The series by queue and type.
#[derive(Debug, Default)]
pub(super) struct SeriesByNames(Mutex<HashMap<String, HashMap<String, Arc<JobSeries>>>>);

impl SeriesByNames {
    pub(super) fn get(&self, queue: &str, job_type: &str) -> Option<Arc<JobSeries>> {
        lock(&self.0).get(queue)?.get(job_type).cloned()
    }

    pub(super) fn insert(&self, queue: &str, job_type: &str, series: &Arc<JobSeries>) {
        lock(&self.0).entry(queue.to_owned()).or_default().insert(job_type.to_owned(), Arc::clone(series));
    }
}
