//! [`Trace`]: a recording of all events and of the worker's log lines, each with its virtual time.

use std::fmt::{self, Write};
use std::sync::{Arc, Mutex};

use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber, span};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

/// The names of log fields with measured values. The trace omits these fields, because their values differ from run to run.
const REAL_TIME: [&str; 3] = ["seconds", "cpu_seconds", "peak_memory_bytes"];

/// The recorded lines of one simulation. Clones share them. `None` if the trace is off and records nothing.
#[derive(Clone)]
pub struct Trace(Option<Arc<Lines>>);

struct Lines {
    start: Instant,
    lines: Mutex<Vec<String>>,
}

impl Trace {
    /// Returns a trace that records nothing.
    pub fn off() -> Self {
        Self(None)
    }

    /// Returns a trace that begins now. Must be called inside the Tokio runtime, because the trace uses the runtime's clock.
    pub fn on() -> Self {
        Self(Some(Arc::new(Lines { start: Instant::now(), lines: Mutex::default() })))
    }

    /// Records a line.
    pub fn note(&self, who: &str, line: fmt::Arguments<'_>) {
        if let Some(lines) = &self.0 {
            let time = lines.start.elapsed().as_secs_f64();
            lines.lines.lock().unwrap().push(format!("{time:>9.3}  {who:<10} {line}"));
        }
    }

    /// Records the log lines of this thread until the returned guard is dropped. Returns `None` if the trace is off.
    pub fn listen(&self) -> Option<tracing::subscriber::DefaultGuard> {
        let layer = LogLines(self.clone());
        self.0.as_ref().map(|_| tracing::subscriber::set_default(tracing_subscriber::registry().with(layer)))
    }

    /// Returns the lines recorded so far.
    pub fn lines(&self) -> Vec<String> {
        self.0.as_ref().map_or_else(Vec::new, |lines| lines.lines.lock().unwrap().clone())
    }
}

/// A tracing layer that records the worker's log lines. A log line in the span of a job also shows the fields of the span.
struct LogLines(Trace);

/// The message and the other fields of an event or span, as text.
#[derive(Default)]
struct Text {
    message: String,
    fields: String,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            name if REAL_TIME.contains(&name) => {}
            name => write!(self.fields, " {name}={value:?}").unwrap(),
        }
    }
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LogLines {
    fn on_new_span(&self, attributes: &span::Attributes<'_>, id: &span::Id, context: Context<'_, S>) {
        let mut text = Text::default();
        attributes.record(&mut text);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(text);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        if !event.metadata().target().starts_with("zizq_worker") {
            return;
        }
        let mut text = Text::default();
        event.record(&mut text);
        let span = context.event_span(event);
        let job = span.and_then(|span| span.extensions().get::<Text>().map(|text| text.fields.clone()));
        let Text { message, fields } = text;
        let level = event.metadata().level();
        self.0.note(
            "log",
            format_args!("{level} {message}{fields}{}", job.map_or(String::new(), |job| format!(" in job{job}"))),
        );
    }
}
