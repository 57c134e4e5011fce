//! [`Gauges`]: the values that are read when Prometheus scrapes the metrics.

use crate::dispatch::{HandlerProcess, HandlerStatus, ProcessStarts};

/// A job type that always has a label of its own.
#[derive(Debug, Clone)]
pub(crate) struct CountedType {
    pub(crate) name: String,
    /// The error types with which jobs of this type usually fail.
    pub(crate) failures: &'static [&'static str],
}

/// A running job's type and age.
#[derive(Debug, Clone)]
pub(crate) struct Age {
    pub(crate) job_type: String,
    /// Whether the type always has a label of its own.
    pub(crate) is_apart: bool,
    pub(crate) seconds: f64,
}

/// Values that are read when Prometheus scrapes the metrics.
#[derive(Debug, Clone)]
pub(crate) struct Gauges {
    pub(crate) running: usize,
    pub(crate) waiting: usize,
    pub(crate) loops: usize,
    pub(crate) connected: bool,
    pub(crate) state: &'static str,
    pub(crate) types: Vec<CountedType>,
    pub(crate) running_jobs: Vec<Age>,
    pub(crate) processes: Vec<HandlerProcess>,
    pub(crate) process_starts: Vec<ProcessStarts>,
    pub(crate) handlers: Vec<HandlerStatus>,
}
