//! [`LogConfig`]: the levels and the format of the log.

use std::ffi::OsString;
use std::fmt;

use super::layers::Layers;
use super::value::{Raw, name_in, named, names};
use super::{ConfigError, declared};

/// The tracing target of the log lines about ended jobs.
pub(crate) const JOBS_TARGET: &str = "zizq_worker::jobs";

/// The tracing target of the spans of jobs and of warm processes. No log line has this target.
pub(crate) const SPAN_TARGET: &str = "zizq_worker::span";

/// The tracing target of the log lines with the output of handlers.
pub(crate) const OUTPUT_TARGET: &str = "zizq_worker::output";

/// The targets that can have a level of their own.
const TARGETS: [&str; 2] = [JOBS_TARGET, OUTPUT_TARGET];

/// The settings of the log.
#[derive(Debug, Clone, Default)]
pub struct LogConfig {
    /// The minimum severity of logged events, in general and by target.
    pub level: LogLevels,
    /// The format. `None` means pretty if stderr is a terminal, and compact otherwise.
    pub format: Option<LogFormat>,
    /// `RUST_LOG`: a filter that overrides `level`.
    pub filter: Option<String>,
    /// Whether `NO_COLOR` disables colours.
    pub no_color: bool,
    /// `JOURNAL_STREAM`: the device and inode of the stream that systemd's journal reads.
    pub journal_stream: Option<OsString>,
}

/// The minimum severity of logged events, in general and for targets that have their own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LogLevels {
    /// The minimum severity for every target that is not in `targets`.
    pub level: LogLevel,
    /// The targets that have their own minimum severity.
    pub targets: Vec<(&'static str, LogLevel)>,
}

/// The severity of a log event.
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

/// The format of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// A line for each event, for people. Coloured on a terminal, unless `NO_COLOR` is set.
    Pretty,
    /// An uncoloured line for each event, for journals and log files.
    Compact,
    /// A JSON object for each event, for programs.
    Json,
}

impl LogConfig {
    pub(super) fn resolve(layers: &Layers<'_>) -> Result<Self, ConfigError> {
        Ok(Self {
            level: layers.pick(&declared::LOG_LEVEL, LogLevels::parse)?.unwrap_or_default(),
            format: layers.pick(&declared::LOG_FORMAT, |raw, name| raw.one_of(name, &LogFormat::NAMES))?,
            filter: layers.args.rust_log.clone(),
            no_color: layers.args.no_color,
            journal_stream: layers.args.journal_stream.clone(),
        })
    }
}

impl LogLevels {
    /// Parses a value like `info` or `info,zizq_worker::jobs=warn`.
    fn parse(raw: &Raw, setting: &str) -> Result<Self, String> {
        let text = &raw.text(setting)?;
        let mut general = None;
        let mut targets = Vec::new();
        for part in text.split(',').map(str::trim) {
            if let Some((target, level)) = part.split_once('=') {
                let known = TARGETS.into_iter().find(|known| known.eq_ignore_ascii_case(target.trim()));
                let Some(target) = known else {
                    let known = TARGETS.join(", ");
                    return Err(format!("log_level may have other levels for the targets {known} (got {text})"));
                };
                targets.push((target, level_named(level, text)?));
            } else if general.replace(level_named(part, text)?).is_some() {
                return Err(format!("log_level must have one level without a target (got {text})"));
            }
        }
        Ok(Self { level: general.unwrap_or_default(), targets })
    }
}

fn level_named(name: &str, text: &str) -> Result<LogLevel, String> {
    let levels = || names(&LogLevel::NAMES).join(", ");
    named(name, &LogLevel::NAMES).ok_or_else(|| format!("log_level must be one of {} (got {text})", levels()))
}

impl fmt::Display for LogLevels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.level)?;
        self.targets.iter().try_for_each(|(target, level)| write!(f, ",{target}={level}"))
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_in(&Self::NAMES, self))
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(name_in(&Self::NAMES, self))
    }
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
