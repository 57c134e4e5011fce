//! [`Log`]: pretty, compact or JSON lines on stderr. On a terminal, a status line below them is updated in place ([`LiveLine`]).

use std::ffi::OsStr;
use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind, IsTerminal, Write, stderr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::fstat;
use rustix::termios::tcgetwinsize;
use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::field::MakeExt;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::format::{JsonFields, Writer, debug_fn};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter, layer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::chain::is_unruly;
use crate::config::{ConfigError, LogConfig, LogFormat, LogLevel, LogLevels, Source};

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
        let lines = Lines { have_priorities: is_journal(config.journal_stream.as_deref()) };
        let plain = layer().log_internal_errors(false).with_target(false).with_ansi(is_terminal && !config.no_color);
        let writing = match (format, &live) {
            (LogFormat::Json, _) => {
                let json = layer().log_internal_errors(false).with_ansi(false).fmt_fields(JsonFields::new());
                json.event_format(JsonLine).with_writer(JsonLines(lines)).boxed()
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
    match &config.filter {
        Some(directives) => {
            let filter = directives.parse().map_err(|error: ParseError| wrong_filter(directives, &error))?;
            let nothing = format!("the worker would log nothing; add a level, like {directives},info");
            if says_how_to_log_the_worker(&filter) { Ok(filter) } else { Err(wrong_filter(directives, &nothing)) }
        }
        None => Ok(filter_of(&config.level)),
    }
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

/// A factory for writers that write plain events to stderr.
#[derive(Debug, Clone, Copy)]
struct Lines {
    have_priorities: bool,
}

/// A writer that writes one event to stderr. It puts the priority, if any, before each line.
#[derive(Debug)]
struct Line {
    priority: Option<&'static str>,
}

impl MakeWriter<'_> for Lines {
    type Writer = Line;

    fn make_writer(&self) -> Line {
        Line { priority: None }
    }

    fn make_writer_for(&self, event: &Metadata<'_>) -> Line {
        Line { priority: self.have_priorities.then(|| priority(*event.level())) }
    }
}

impl Write for Line {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        let Some(priority) = self.priority else { return Stderr.write(event) };
        let lines = event.split_inclusive(|byte| *byte == b'\n').flat_map(|line| [priority.as_bytes(), line]);
        // Use one write, otherwise a line of another process could come between the lines of this event.
        Stderr.write_all(&lines.collect::<Vec<_>>().concat())?;
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Stderr.flush()
    }
}

/// A factory for writers that write JSON events to stderr.
#[derive(Debug, Clone, Copy)]
struct JsonLines(Lines);

impl MakeWriter<'_> for JsonLines {
    type Writer = JsonWriter<Line>;

    fn make_writer(&self) -> JsonWriter<Line> {
        JsonWriter(self.0.make_writer())
    }

    fn make_writer_for(&self, event: &Metadata<'_>) -> JsonWriter<Line> {
        JsonWriter(self.0.make_writer_for(event))
    }
}

/// A formatter that writes events as flat JSON objects, with the fields of the job under `job`.
#[derive(Debug)]
struct JsonLine;

impl<S: Subscriber + for<'a> LookupSpan<'a>> FormatEvent<S, JsonFields> for JsonLine {
    fn format_event(
        &self,
        context: &FmtContext<'_, S, JsonFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        writer.write_str("{\"timestamp\":\"")?;
        SystemTime.format_time(&mut writer)?;
        write!(writer, "\",\"level\":\"{}\"", event.metadata().level())?;
        let mut members = Members::default();
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            let fields = extensions.get::<FormattedFields<JsonFields>>().map_or("", |fields| fields.as_str());
            members.push_all(fields, span.name() == "job");
        }
        event.record(&mut members);
        let Members { event, job } = &members;
        writer.write_str(event)?;
        if let Some(job) = job.strip_prefix(',') {
            write!(writer, ",\"job\":{{{job}}}")?;
        }
        writer.write_str("}\n")
    }
}

/// The members of a line's JSON object, and of its `job` object. A comma precedes each member.
#[derive(Debug, Default)]
struct Members {
    event: String,
    job: String,
}

impl Members {
    /// Adds the members of the JSON object `object`: to `job` if `are_of_job`, else to `event`.
    fn push_all(&mut self, object: &str, are_of_job: bool) {
        let fields = object.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or_default();
        if !fields.is_empty() {
            let members = if are_of_job { &mut self.job } else { &mut self.event };
            members.push(',');
            members.push_str(fields);
        }
    }

    /// Adds a field of the event: to `job` if the field's name begins with `job.`, else to `event`.
    fn push(&mut self, field: &Field, value: &impl Serialize) {
        let (members, name) = match field.name().strip_prefix("job.") {
            Some(name) => (&mut self.job, name),
            None => (&mut self.event, field.name()),
        };
        let name = name.strip_prefix("r#").unwrap_or(name);
        let value = serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned());
        let _ = write!(members, ",\"{name}\":{value}");
    }
}

impl Visit for Members {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.push(field, &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.push(field, &value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.push(field, &format_args!("{value:?}"));
    }
}

/// A line below the log that is rewritten in place. Clones share the line.
#[derive(Clone, Default)]
pub struct LiveLine(Arc<Mutex<String>>);

impl fmt::Debug for LiveLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LiveLine")
    }
}

/// Terminal sequence that moves to the line's start and clears the line.
const CLEAR: &str = "\r\x1b[K";

impl LiveLine {
    /// Replaces the line's text. An empty text removes the line.
    pub fn show(&self, text: &str) {
        let mut shown = self.lock();
        if !(shown.is_empty() && text.is_empty()) {
            // Cut the text to one row, because `CLEAR` clears only the last row of a wrapped line.
            *shown = text.chars().take(width().saturating_sub(1)).collect();
            // Ignore a failed write, which means that the terminal is closed.
            let _ = write!(Stderr, "{CLEAR}{shown}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the terminal's width in characters, or `usize::MAX` if the width is unknown.
fn width() -> usize {
    let columns = tcgetwinsize(stderr()).map_or(0, |size| usize::from(size.ws_col));
    if columns == 0 { usize::MAX } else { columns }
}

impl<'a> MakeWriter<'a> for LiveLine {
    type Writer = AboveLiveLine<'a>;

    fn make_writer(&'a self) -> AboveLiveLine<'a> {
        AboveLiveLine(self.lock())
    }
}

/// A writer that overwrites the live line with an event, and shows the live line again below the event.
#[derive(Debug)]
pub struct AboveLiveLine<'a>(MutexGuard<'a, String>);

impl Write for AboveLiveLine<'_> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        if self.0.is_empty() {
            Stderr.write_all(event)?;
        } else {
            // Use one write, so that the terminal never shows the event without the live line.
            Stderr.write_all(&[CLEAR.as_bytes(), event, self.0.as_bytes()].concat())?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Stderr.flush()
    }
}

/// This process's stderr. A write waits for the reader even if the descriptor is non-blocking, because a handler with
/// `output = "inherit"` shares the open file description, and can set `O_NONBLOCK` on it.
#[derive(Debug, Clone, Copy)]
pub struct Stderr;

impl Write for Stderr {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        loop {
            match stderr().write(text) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => wait_for_room()?,
                ended => return ended,
            }
        }
    }

    fn write_all(&mut self, mut text: &[u8]) -> io::Result<()> {
        // Hold the lock until all parts are written, otherwise a line of another thread could come between them.
        let _whole = stderr().lock();
        while !text.is_empty() {
            match self.write(text) {
                Ok(0) => return Err(ErrorKind::WriteZero.into()),
                Ok(written) => text = &text[written..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        stderr().flush()
    }
}

/// Waits until stderr accepts more bytes, or its reader has closed it.
fn wait_for_room() -> io::Result<()> {
    match poll(&mut [PollFd::new(&stderr(), PollFlags::OUT)], None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// A writer that escapes characters that JSON allows unescaped but a terminal interprets: control characters from
/// U+007F upwards, and Unicode's separators and controls of direction. In JSON, these characters occur only within strings,
/// where an escape is valid.
struct JsonWriter<W>(W);

impl<W: Write> Write for JsonWriter<W> {
    fn write(&mut self, json: &[u8]) -> io::Result<usize> {
        let is_foreign = |char: char| !matches!(char, '\0'..='~') && is_unruly(char);
        match std::str::from_utf8(json) {
            Ok(text) if text.contains(is_foreign) => {
                let mut escaped = String::with_capacity(text.len());
                for char in text.chars() {
                    if is_foreign(char) {
                        let _ = write!(escaped, "\\u{:04x}", u32::from(char));
                    } else {
                        escaped.push(char);
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
