//! The log: pretty, compact or JSON lines on stderr.

use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write, stderr};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::fmt;

use crate::chain::is_unruly;
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
        LogFormat::Json => {
            let log = log.with_writer(|| JsonWriter(stderr()));
            log.with_target(false).json().flatten_event(true).with_span_list(false).init();
        }
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

/// Escapes what JSON may hold as it is, but a terminal that shows it would obey: the control characters beyond ASCII,
/// and those that change the direction of a line. They can only be in strings.
struct JsonWriter<W>(W);

impl<W: Write> Write for JsonWriter<W> {
    fn write(&mut self, json: &[u8]) -> io::Result<usize> {
        let is_foreign = |char: char| !matches!(char, '\0'..='~') && is_unruly(char);
        match std::str::from_utf8(json) {
            Ok(text) if text.contains(is_foreign) => {
                let mut escaped = String::with_capacity(text.len());
                for char in text.chars() {
                    match is_foreign(char) {
                        true => _ = write!(escaped, "\\u{:04x}", u32::from(char)),
                        false => escaped.push(char),
                    }
                }
                self.0.write_all(escaped.as_bytes())?;
            }
            _ => self.0.write_all(json)?,
        }
        Ok(json.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
