//! [`Config`]: all settings, resolved and checked. A flag overrides an environment variable, the variable overrides the file,
//! and the file overrides the `DEFAULT_*` constants.

mod admin;
mod declared;
#[cfg(feature = "embedded")]
mod embedded;
mod error;
mod file;
mod handler;
mod layers;
mod log;
mod settings;
mod tls;
mod value;
mod variable;
mod warning;
mod worker;

use crate::cli::Args;
use crate::handler::Handlers;
use file::ConfigFile;
use layers::{Layers, Sources};
use worker::default_prefetch;

pub use crate::backoff::{DEFAULT_RETRY_MAX_WAIT, DEFAULT_RETRY_MIN_WAIT, DEFAULT_RETRY_MULTIPLIER};
pub use crate::client::DEFAULT_URL;
pub use crate::stream::{DEFAULT_MAX_JOB_SIZE, DEFAULT_STREAM_IDLE_TIMEOUT};
pub use admin::AdminAddress;
pub(crate) use declared::Heading;
pub use declared::{Declared, Example, Flag, Reload, SETTINGS};
#[cfg(feature = "embedded")]
pub use embedded::{EmbeddedConfig, JobsSource};
pub use error::ConfigError;
pub use layers::Source;
pub(crate) use log::{JOBS_TARGET, OUTPUT_TARGET, SPAN_TARGET};
pub use log::{LogConfig, LogFormat, LogLevel, LogLevels};
pub use settings::Setting;
pub use warning::Warning;
pub use worker::{DEFAULT_FIBERS, DEFAULT_SHUTDOWN_DEADLINE, DEFAULT_THREADS, WorkerConfig};

/// All settings of the program.
#[derive(Debug)]
pub struct Config {
    /// The settings of the worker.
    pub worker: WorkerConfig,
    /// The default handler, and the handlers for specific job types.
    pub handlers: Handlers,
    /// The settings of the log.
    pub log: LogConfig,
    /// The address of the admin server, if there is one.
    pub admin: Option<AdminAddress>,
    /// The settings of the embedded server, if there is one.
    #[cfg(feature = "embedded")]
    pub embedded: Option<EmbeddedConfig>,
    sources: Sources,
    /// The warnings that were found while the settings were read.
    found_warnings: Vec<Warning>,
}

impl Config {
    /// Resolves and checks every setting.
    ///
    /// # Errors
    /// If a setting is invalid. Only the first mistake found is returned.
    pub fn resolve(args: &Args) -> Result<Self, ConfigError> {
        let file = ConfigFile::load(args.given("config")?.as_ref())?;
        let layers = Layers::new(args, &file);
        let worker = WorkerConfig::resolve(&layers)?;
        let log = LogConfig::resolve(&layers)?;
        let admin = AdminAddress::resolve(&layers)?;
        #[cfg(feature = "embedded")]
        let embedded = embedded::resolve(args, &worker.url)?;
        // Resolve handlers last, so that a missing handler does not hide a mistake in another setting.
        let handlers = handler::resolve(&layers)?;
        let (sources, found_warnings) = layers.into_parts();
        Ok(Self {
            worker,
            handlers,
            log,
            admin,
            #[cfg(feature = "embedded")]
            embedded,
            sources,
            found_warnings,
        })
    }

    /// Turns a reloaded configuration into one for the running worker. Settings that need a restart keep their `running` values.
    pub fn take_over(&mut self, running: &WorkerConfig) {
        let WorkerConfig { url, tls, queues, prefetch, stream_limits, .. } = self.worker.clone();
        // Compute the default from the running threads and fibers, because new values of these settings need a restart.
        let is_given = self.sources.contains_key(declared::PREFETCH.key);
        let prefetch = if is_given { prefetch } else { default_prefetch(running.concurrency()) };
        self.worker = WorkerConfig { url, tls, queues, prefetch, stream_limits, ..running.clone() };
    }
}
