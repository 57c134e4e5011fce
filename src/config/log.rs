//! [`LogConfig`]: what is logged, and how.

use std::fmt;

use super::layers::Layers;
use super::{ConfigError, declared};

/// The settings of the log.
#[derive(Debug, Clone, Default)]
pub struct LogConfig {
    /// From which severity on events are logged.
    pub level: LogLevel,
    /// How they are written; by whether stderr is a terminal when not given.
    pub format: Option<LogFormat>,
    /// `RUST_LOG`: a filter that wins over the level.
    pub filter: Option<String>,
    /// Whether the terminal's colours are left alone.
    pub no_color: bool,
}

/// The severities of the log, by their names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the documentation")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

/// The forms of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Coloured, for people at a terminal.
    Pretty,
    /// One plain line for each event, for journals.
    Compact,
    /// One JSON object for each event, for machines.
    Json,
}

impl LogConfig {
    pub(super) fn resolve(layers: &Layers<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            level: layers
                .pick(&declared::LOG_LEVEL, |raw, name| raw.one_of(name, &LogLevel::NAMES))?
                .unwrap_or_default(),
            format: layers.pick(&declared::LOG_FORMAT, |raw, name| raw.one_of(name, &LogFormat::NAMES))?,
            filter: layers.args.rust_log.clone(),
            no_color: layers.args.no_color,
        })
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        name_in(&Self::NAMES, self, f)
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        name_in(&Self::NAMES, self, f)
    }
}

fn name_in<T: PartialEq>(names: &[(&str, T)], value: &T, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let found = names.iter().find(|(_, named)| named == value);
    f.write_str(found.map_or("", |(name, _)| name))
}

impl LogLevel {
    pub(super) const NAMES: [(&'static str, Self); 5] = [
        ("error", Self::Error),
        ("warn", Self::Warn),
        ("info", Self::Info),
        ("debug", Self::Debug),
        ("trace", Self::Trace),
    ];
}

impl LogFormat {
    pub(super) const NAMES: [(&'static str, Self); 3] =
        [("pretty", Self::Pretty), ("compact", Self::Compact), ("json", Self::Json)];
}
