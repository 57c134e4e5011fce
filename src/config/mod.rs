//! [`Config`]: all settings, resolved and checked. A flag overrides an environment variable, the variable overrides the file,
//! and the file overrides the `DEFAULT_*` constants.

mod admin;
mod declared;
#[cfg(feature = "embedded")]
mod embedded;
mod error;
mod file;
pub mod handler;
mod handlers;
mod layers;
mod log;
mod settings;
mod tls;
mod value;
mod variable;
mod warning;
mod worker;

use crate::cli::Args;
use file::ConfigFile;
use handlers::Handlers;
use layers::{Layers, Sources};

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
        let handlers = handlers::resolve(&layers)?;
        let Layers { found, warnings, .. } = layers;
        Ok(Self {
            worker,
            handlers,
            log,
            admin,
            #[cfg(feature = "embedded")]
            embedded,
            sources: found.into_inner(),
            found_warnings: warnings.into_inner(),
        })
    }
}
