//! [`LogConfig`]: the levels and the format of the log.

use std::ffi::OsString;
use std::fmt;

use super::layers::Layers;
use super::value::Raw;
use super::{ConfigError, declared};

/// The tracing target of the log lines about ended jobs.
pub(crate) const JOBS_TARGET: &str = "zizq_worker::jobs";

/// The target of the spans of jobs and of warm processes. No line has this target.
pub(crate) const SPAN_TARGET: &str = "zizq_worker::span";

/// The tracing target of the log lines with the output of handlers.
pub(crate) const OUTPUT_TARGET: &str = "zizq_worker::output";

/// The targets that can have a level of their own. Each target is a pair of the name and the value, which are equal, because
/// `word` needs pairs.
const TARGETS: [(&str, &str); 2] = [(JOBS_TARGET, JOBS_TARGET), (OUTPUT_TARGET, OUTPUT_TARGET)];

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
    /// A line for each event without colours, for journals and log files.
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
                let problem = "log_level may have other levels for the targets";
                let target = word(target, &TARGETS).ok_or_else(|| unknown(problem, &TARGETS, text))?;
                targets.push((target, level_named(level, text)?));
            } else if general.replace(level_named(part, text)?).is_some() {
                return Err(format!("log_level must have one level without a target (got {text})"));
            }
        }
        Ok(Self { level: general.unwrap_or_default(), targets })
    }
}

fn level_named(name: &str, text: &str) -> Result<LogLevel, String> {
    word(name, &LogLevel::NAMES).ok_or_else(|| unknown("log_level must be one of", &LogLevel::NAMES, text))
}

fn word<T: Copy>(text: &str, words: &[(&str, T)]) -> Option<T> {
    words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text.trim())).map(|(_, value)| *value)
}

fn unknown<T>(problem: &str, words: &[(&str, T)], text: &str) -> String {
    let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
    format!("{problem} {} (got {text})", words.join(", "))
}

impl fmt::Display for LogLevels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.level)?;
        self.targets.iter().try_for_each(|(target, level)| write!(f, ",{target}={level}"))
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
