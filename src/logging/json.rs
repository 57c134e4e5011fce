//! [`JsonLines`]: the log as one flat JSON object per line.

use std::fmt::{self, Write as _};
use std::io::{self, Write};

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormattedFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use super::{Line, Lines};
use crate::chain::is_unruly;

/// A factory for writers that write JSON events to stderr.
#[derive(Debug, Clone, Copy)]
pub(super) struct JsonLines(pub(super) Lines);

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
pub(super) struct JsonLine;

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

/// A writer that escapes characters that JSON allows unescaped but a terminal interprets: control characters from
/// U+007F upwards, and Unicode's separators and controls of direction. In JSON, these characters occur only within strings,
/// where an escape is valid.
pub(super) struct JsonWriter<W>(W);

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
