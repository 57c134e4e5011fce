//! [`Log`]: pretty, compact or JSON lines on stderr, and on a terminal a last line that changes ([`LiveLine`]).

use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind, IsTerminal, Write, stderr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::tcgetwinsize;
use tracing::Level;
use tracing_subscriber::filter::ParseError;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::{MakeWriter, layer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

use crate::chain::is_unruly;
use crate::config::{ConfigError, LogConfig, LogFormat, LogLevel, Source};

/// The log of this process.
#[derive(Debug)]
pub struct Log {
    filter: reload::Handle<Targets, Registry>,
    live: Option<LiveLine>,
}

impl Log {
    /// Starts it.
    ///
    /// # Errors
    /// When `RUST_LOG` is not a filter.
    pub fn start(config: &LogConfig) -> Result<Self, ConfigError> {
        let (filtering, filter) = reload::Layer::new(filter(config)?);
        let is_terminal = stderr().is_terminal();
        let format = config.format.unwrap_or(if is_terminal { LogFormat::Pretty } else { LogFormat::Compact });
        let live = (is_terminal && format != LogFormat::Json).then(LiveLine::default);
        let plain = layer().log_internal_errors(false).with_target(false).with_ansi(is_terminal && !config.no_color);
        let writing = match (format, &live) {
            (LogFormat::Json, _) => {
                let json = layer().log_internal_errors(false).with_target(false).with_ansi(false).json();
                json.flatten_event(true).with_span_list(false).with_writer(|| JsonWriter(Stderr)).boxed()
            }
            (LogFormat::Compact, Some(live)) => plain.with_ansi(false).compact().with_writer(live.clone()).boxed(),
            (LogFormat::Compact, None) => plain.with_ansi(false).compact().with_writer(|| Stderr).boxed(),
            (LogFormat::Pretty, Some(live)) => plain.with_writer(live.clone()).boxed(),
            (LogFormat::Pretty, None) => plain.with_writer(|| Stderr).boxed(),
        };
        tracing_subscriber::registry().with(filtering).with(writing).init();
        Ok(Self { filter, live })
    }

    /// Logs from now on what these settings say; their format has no effect.
    ///
    /// # Errors
    /// When `RUST_LOG` is not a filter.
    pub fn refilter(&self, config: &LogConfig) -> Result<(), ConfigError> {
        let filter = filter(config)?;
        // It fails only when there is no log any more.
        let _ = self.filter.reload(filter);
        Ok(())
    }

    /// The last line of the terminal, if the log is on one.
    pub fn live_line(&self) -> Option<&LiveLine> {
        self.live.as_ref()
    }
}

fn filter(config: &LogConfig) -> Result<Targets, ConfigError> {
    match &config.filter {
        Some(directives) => {
            let filter = directives.parse().map_err(|error: ParseError| wrong_filter(directives, &error))?;
            let nothing = format!("the worker would log nothing; add a level, like {directives},info");
            if says_how_to_log_the_worker(&filter) { Ok(filter) } else { Err(wrong_filter(directives, &nothing)) }
        }
        None => Ok(Targets::new().with_default(Level::WARN).with_target("zizq_worker", level(config.level))),
    }
}

fn wrong_filter(directives: &str, problem: &dyn fmt::Display) -> ConfigError {
    let problem = format!("must be a level, or a filter like zizq_worker=debug (got {directives}: {problem})");
    ConfigError::new(Source::Variable("RUST_LOG".to_owned()), problem)
}

/// Returns whether a filter has a level for the worker's own events, be it `off`. A word that is no level is taken for the name of
/// a module, and would silence everything else.
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

/// A line below the log that is rewritten in place; clones are of one line.
#[derive(Clone, Default)]
pub struct LiveLine(Arc<Mutex<String>>);

impl fmt::Debug for LiveLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LiveLine")
    }
}

/// Back to the beginning of the line, which is then empty.
const CLEAR: &str = "\r\x1b[K";

impl LiveLine {
    /// Shows that text there; nothing takes the line away.
    pub fn show(&self, text: &str) {
        let mut shown = self.lock();
        if !(shown.is_empty() && text.is_empty()) {
            // What wraps would not be cleared.
            *shown = text.chars().take(width().saturating_sub(1)).collect();
            // A terminal that is gone shows nothing.
            let _ = write!(Stderr, "{CLEAR}{shown}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many characters fit into a line of the terminal. One that does not know has no limit.
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

/// Writes events where the live line was, and the live line below them again.
#[derive(Debug)]
pub struct AboveLiveLine<'a>(MutexGuard<'a, String>);

impl Write for AboveLiveLine<'_> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        if self.0.is_empty() {
            Stderr.write_all(event)?;
        } else {
            // At once, so that no half of it is seen.
            Stderr.write_all(&[CLEAR.as_bytes(), event, self.0.as_bytes()].concat())?;
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Stderr.flush()
    }
}

/// This process's stderr. A write waits until the reader has room, even if the descriptor does not block: a handler with
/// `output = "inherit"` shares the open file, and with it the flag `O_NONBLOCK`.
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
        // Held over all parts: a line of another thread would come between them otherwise.
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

/// Waits until stderr takes more, or its reader is gone.
fn wait_for_room() -> io::Result<()> {
    match poll(&mut [PollFd::new(&stderr(), PollFlags::OUT)], None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
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
