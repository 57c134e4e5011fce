//! [`Log`]: pretty, compact or JSON lines on stderr. On a terminal, a status line below them is updated in place ([`LiveLine`]).

mod json;
mod live_line;
mod stderr;

use std::ffi::OsStr;
use std::fmt;
use std::io::{self, IsTerminal, Write, stderr};

use rustix::fs::fstat;
use tracing::field::Field;
use tracing::{Level, Metadata};
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{JsonFields, Writer, debug_fn};
use tracing_subscriber::fmt::{FormatFields, MakeWriter, layer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::config::{ConfigError, LogConfig, LogFormat, LogLevel, LogLevels, SPAN_TARGET, Source};
use json::JsonLine;
pub use live_line::{AboveLiveLine, LiveLine};
pub use stderr::Stderr;

/// The log of this process.
#[derive(Debug)]
pub struct Log {
    filter: reload::Handle<Targets, Registry>,
    live: Option<LiveLine>,
}

impl Log {
    /// Starts the log.
    ///
    /// # Errors
    /// If `RUST_LOG` is not a valid filter.
    pub fn start(config: &LogConfig) -> Result<Self, ConfigError> {
        let (filtering, filter) = reload::Layer::new(filter(config)?);
        let is_terminal = stderr().is_terminal();
        let format = config.format.unwrap_or(if is_terminal { LogFormat::Pretty } else { LogFormat::Compact });
        let live = (is_terminal && format != LogFormat::Json).then(LiveLine::default);
        let lines = EventWriters { have_priorities: is_journal(config.journal_stream.as_deref()) };
        let plain = layer().log_internal_errors(false).with_target(false).with_ansi(is_terminal && !config.no_color);
        let writing = match (format, &live) {
            (LogFormat::Json, _) => {
                let json = layer().log_internal_errors(false).with_ansi(false).fmt_fields(JsonFields::new());
                json.event_format(JsonLine).with_writer(lines).boxed()
            }
            (LogFormat::Compact, Some(live)) => plain.with_ansi(false).compact().with_writer(live.clone()).boxed(),
            (LogFormat::Compact, None) => plain.compact().fmt_fields(unstyled()).with_writer(lines).boxed(),
            (LogFormat::Pretty, Some(live)) => plain.with_writer(live.clone()).boxed(),
            (LogFormat::Pretty, None) => plain.fmt_fields(unstyled()).with_writer(lines).boxed(),
        };
        tracing_subscriber::registry().with(filtering).with(writing).init();
        Ok(Self { filter, live })
    }

    /// Replaces the log's filter. The format in `config` has no effect.
    ///
    /// # Errors
    /// If `RUST_LOG` is not a valid filter.
    pub fn refilter(&self, config: &LogConfig) -> Result<(), ConfigError> {
        let filter = filter(config)?;
        // Ignore the error: a reload of the filter fails only if the subscriber has been dropped.
        let _ = self.filter.reload(filter);
        Ok(())
    }

    /// Returns the live line, if the log writes text to a terminal.
    pub fn live_line(&self) -> Option<&LiveLine> {
        self.live.as_ref()
    }
}

/// Returns a field formatter without styles. The default formatter of `tracing_subscriber` would double the cost of a job's span.
/// Unlike the default, this one does not escape messages, so each message must be a fixed text.
fn unstyled() -> impl for<'writer> FormatFields<'writer> + Send + Sync + 'static {
    let field = |writer: &mut Writer<'_>, field: &Field, value: &dyn fmt::Debug| match field.name() {
        "message" => write!(writer, "{value:?}"),
        name => write!(writer, "{}={value:?}", name.strip_prefix("r#").unwrap_or(name)),
    };
    debug_fn(field).delimited(" ")
}

fn filter(config: &LogConfig) -> Result<Targets, ConfigError> {
    let filter = match &config.filter {
        Some(directives) => {
            let filter = directives.parse().map_err(|error: ParseError| wrong_filter(directives, &error))?;
            if !says_how_to_log_the_worker(&filter) {
                let nothing = format!("the worker would log nothing; add a level, like {directives},info");
                return Err(wrong_filter(directives, &nothing));
            }
            filter
        }
        None => filter_of(&config.level),
    };
    // Keep the spans of jobs and processes enabled, because they add the job or the process to each line.
    Ok(filter.with_target(SPAN_TARGET, Level::ERROR))
}

fn filter_of(levels: &LogLevels) -> Targets {
    let targets = levels.targets.iter().map(|(target, of_target)| (*target, level(*of_target)));
    Targets::new().with_default(Level::WARN).with_target("zizq_worker", level(levels.level)).with_targets(targets)
}

fn wrong_filter(directives: &str, problem: &dyn fmt::Display) -> ConfigError {
    let problem = format!("must be a level, or a filter like zizq_worker=debug (got {directives}: {problem})");
    ConfigError::new(Source::Variable("RUST_LOG".to_owned()), problem)
}

/// Reports whether a filter sets a level for the worker's own events, `off` included. A mistyped level is parsed as a module
/// name, and a filter that names only that module would silence the worker.
fn says_how_to_log_the_worker(filter: &Targets) -> bool {
    const OWN: &str = "zizq_worker";
    let is_own = |target: &str| OWN.starts_with(target) || target.starts_with("zizq_worker::");
    filter.default_level().is_some() || filter.iter().any(|(target, _)| is_own(target))
}

fn level(level: LogLevel) -> Level {
    match level {
        LogLevel::Error => Level::ERROR,
        LogLevel::Warn => Level::WARN,
        LogLevel::Info => Level::INFO,
        LogLevel::Debug => Level::DEBUG,
        LogLevel::Trace => Level::TRACE,
    }
}

/// Returns the prefix of the error line that the process prints before it ends: the priority if systemd's journal reads stderr,
/// else nothing.
pub fn complaint_prefix(journal_stream: Option<&OsStr>) -> &'static str {
    if is_journal(journal_stream) { priority(Level::ERROR) } else { "" }
}

/// Reports whether stderr is the stream that `JOURNAL_STREAM` names by device and inode. The comparison is needed because the
/// variable is inherited even by a process whose stderr is redirected.
fn is_journal(journal_stream: Option<&OsStr>) -> bool {
    let named = journal_stream.and_then(OsStr::to_str).and_then(|name| name.split_once(':'));
    let Some((device, inode)) = named else { return false };
    fstat(stderr()).is_ok_and(|ours| device.parse() == Ok(ours.st_dev) && inode.parse() == Ok(ours.st_ino))
}

/// Returns the syslog(3) priority of a level, in the notation of sd-daemon(3).
fn priority(level: Level) -> &'static str {
    match level {
        Level::ERROR => "<3>",
        Level::WARN => "<4>",
        Level::INFO => "<6>",
        _ => "<7>",
    }
}

/// A factory for writers that write events to stderr when there is no live line.
#[derive(Debug, Clone, Copy)]
struct EventWriters {
    have_priorities: bool,
}

/// A writer that writes one event to stderr. It puts the priority, if any, before each line.
#[derive(Debug)]
struct EventWriter {
    priority: Option<&'static str>,
}

impl MakeWriter<'_> for EventWriters {
    type Writer = EventWriter;

    fn make_writer(&self) -> EventWriter {
        EventWriter { priority: None }
    }

    fn make_writer_for(&self, event: &Metadata<'_>) -> EventWriter {
        EventWriter { priority: self.have_priorities.then(|| priority(*event.level())) }
    }
}

impl Write for EventWriter {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let Some(priority) = self.priority else { return Stderr.write(event) };
        let lines = event.split_inclusive(|byte| *byte == b'\n').flat_map(|line| [priority.as_bytes(), line]);
        // Use one write, so that no line of another process comes between the lines of this event.
        Stderr.write_all(&lines.collect::<Vec<_>>().concat())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Stderr.flush()
    }
}
