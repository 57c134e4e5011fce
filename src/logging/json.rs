//! [`JsonLine`]: the log as one flat JSON object per line.

use std::fmt::{self, Write};

use serde::Serialize;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{JsonFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormattedFields};
use tracing_subscriber::registry::LookupSpan;

use crate::chain::is_unruly;

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
        let mut members = JsonMembers::default();
        for span in context.event_scope().into_iter().flatten() {
            let extensions = span.extensions();
            let fields = extensions.get::<FormattedFields<JsonFields>>().map_or("", |fields| fields.as_str());
            members.push_all(fields, span.name() == "job");
        }
        event.record(&mut members);
        let JsonMembers { event, job } = &members;
        write_escaped(&mut writer, event)?;
        if let Some(job) = job.strip_prefix(',') {
            writer.write_str(",\"job\":{")?;
            write_escaped(&mut writer, job)?;
            writer.write_char('}')?;
        }
        writer.write_str("}\n")
    }
}

/// The members of a line's JSON object, and of its `job` object. A comma precedes each member.
#[derive(Debug, Default)]
struct JsonMembers {
    event: String,
    job: String,
}

impl JsonMembers {
    /// Adds the members of the JSON object `object` to `self.job` if `are_of_job` is true, and to `self.event` otherwise.
    fn push_all(&mut self, object: &str, are_of_job: bool) {
        let fields = object.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).unwrap_or_default();
        if !fields.is_empty() {
            let members = if are_of_job { &mut self.job } else { &mut self.event };
            members.push(',');
            members.push_str(fields);
        }
    }

    /// Adds a field of a log event to `self.job` if the field's name begins with `job.`, and to `self.event` otherwise.
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

impl Visit for JsonMembers {
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

/// Writes JSON, and escapes characters that JSON allows unescaped but a terminal interprets: control characters from U+007F up,
/// and Unicode separators and direction controls. In JSON, these characters occur only within strings, where an escape is valid.
fn write_escaped(writer: &mut Writer<'_>, mut json: &str) -> fmt::Result {
    let is_foreign = |char: char| !matches!(char, '\0'..='~') && is_unruly(char);
    while let Some((start, char)) = json.char_indices().find(|(_, char)| is_foreign(*char)) {
        write!(writer, "{}\\u{:04x}", &json[..start], u32::from(char))?;
        json = &json[start + char.len_utf8()..];
    }
    writer.write_str(json)
}
