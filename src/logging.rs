//! The log: pretty, compact or JSON lines on stderr.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::fmt;

use crate::config::{ConfigError, LogConfig, LogFormat, LogLevel, Source};

/// Starts the log of this process.
///
/// # Errors
/// When `RUST_LOG` is not a filter.
pub fn init(config: &LogConfig) -> Result<(), ConfigError> {
    let log = fmt().with_env_filter(filter(config)?).with_writer(stderr).log_internal_errors(false);
    let is_terminal = stderr().is_terminal();
    match config.format.unwrap_or(if is_terminal { LogFormat::Pretty } else { LogFormat::Compact }) {
        LogFormat::Pretty => log.with_target(false).with_ansi(is_terminal).init(),
        LogFormat::Compact => log.with_target(false).with_ansi(false).compact().init(),
        LogFormat::Json => log.with_target(false).json().flatten_event(true).with_span_list(false).init(),
    }
    Ok(())
}

fn filter(config: &LogConfig) -> Result<EnvFilter, ConfigError> {
    match &config.filter {
        Some(directives) => EnvFilter::try_new(directives).map_err(|error| {
            let problem = format!("must be a filter like zizq_worker=debug (got {directives}: {error})");
            ConfigError::new(Source::Variable("RUST_LOG".to_owned()), problem)
        }),
        None => Ok(EnvFilter::new(format!("warn,zizq_worker={}", level_name(config.level)))),
    }
}

fn level_name(level: LogLevel) -> &'static str {
    match level {
        LogLevel::Error => "error",
        LogLevel::Warn => "warn",
        LogLevel::Info => "info",
        LogLevel::Debug => "debug",
        LogLevel::Trace => "trace",
    }
}
