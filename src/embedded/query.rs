//! Queries: the fields after the `?` of a URL, and the job filters among them.
//!
//! An unknown field is an error, as on the real server. Otherwise `DELETE /jobs` with a misspelt filter would delete all jobs.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display};
use std::num::ParseIntError;
use std::ops::RangeInclusive;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::answer::Rejection;
use super::id::StoredJobId;
use super::job::{JobStatus, StoredJob};

/// The names of the fields that filter jobs.
pub(super) const FILTERS: [&str; 8] = ["id", "status", "queue", "type", "priority", "ready_at", "attempts", "filter"];

/// The characters that are escaped in a link: all except the unreserved characters and the comma, which separates list
/// elements. The real server does not escape names, so its link for a queue with a space in the name is broken.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b',');

/// The fields of a query. Each field is known, and occurs at most once.
#[derive(Debug)]
pub(super) struct Fields(BTreeMap<String, String>);

impl Fields {
    /// Parses a query. A field that is not in `known`, or occurs twice, is an error.
    pub(super) fn parse(query: &str, known: &[&str]) -> Result<Self, Rejection> {
        let mut fields = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = decode(name);
            if !known.contains(&name.as_str()) {
                return Err(Rejection::bad_query(format!("unknown field `{name}`")));
            }
            if fields.insert(name.clone(), decode(value)).is_some() {
                return Err(Rejection::bad_query(format!("duplicate field `{name}`")));
            }
        }
        Ok(Self(fields))
    }

    /// Removes a field and returns its text.
    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    /// Removes a field and parses it as a single value.
    pub(super) fn value<T: FromStr<Err: Display>>(&mut self, name: &str) -> Result<Option<T>, Rejection> {
        self.text(name).map(|text| parse(name, &text)).transpose()
    }

    /// Removes a field and parses it as a comma-separated list, without empty elements. The list can
    /// be split after percent-decoding, because no element can contain a comma.
    pub(super) fn list<T: FromStr<Err: Display> + Ord>(&mut self, name: &str) -> Result<BTreeSet<T>, Rejection> {
        // As on the real server, an empty field such as `status=` is the same as no field.
        let text = self.text(name).unwrap_or_default();
        let elements = text.split(',').filter(|element| !element.is_empty());
        elements.map(|element| parse(name, element)).collect()
    }

    /// Removes a field and parses it as a range of numbers up to `max`. An empty field is the same as no field.
    fn range(&mut self, name: &str, max: impl Into<u64>) -> Result<Option<Range>, Rejection> {
        let text = self.text(name).filter(|text| !text.is_empty());
        let range = text.map(|text| Range::parse(&text, max.into())).transpose();
        range.map_err(|error| Rejection::bad_query(format!("{name}: {error}")))
    }
}

fn parse<T: FromStr<Err: Display>>(name: &str, text: &str) -> Result<T, Rejection> {
    text.parse().map_err(|error| Rejection::bad_query(format!("{name}: {error}")))
}

/// A range of numbers that includes both ends: `5`, `5..9`, `5..` or `..9`.
#[derive(Debug, Clone, PartialEq)]
struct Range {
    numbers: RangeInclusive<u64>,
    /// The largest number of the field's type, which is also the upper end of a range such as `5..`.
    max: u64,
}

impl Range {
    /// Parses a range. Neither end may exceed `max`.
    fn parse(text: &str, max: u64) -> Result<Self, String> {
        let number = |text: &str, default: u64| {
            let number = if text.is_empty() { Ok(default) } else { text.parse() };
            let number = number.map_err(|error: ParseIntError| error.to_string())?;
            (number <= max).then_some(number).ok_or_else(|| "number too large to fit in target type".to_owned())
        };
        let (low, high) = text.split_once("..").unwrap_or((text, text));
        let numbers = number(low, u64::MIN)?..=number(high, max)?;
        if numbers.is_empty() {
            return Err("range lower bound exceeds upper bound".to_owned());
        }
        Ok(Self { numbers, max })
    }
}

/// Writes the shortest form, as in the real server's links.
impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.numbers.clone().into_inner() {
            (low, high) if low == high => write!(f, "{low}"),
            (u64::MIN, high) => write!(f, "..{high}"),
            (low, high) if high == self.max => write!(f, "{low}.."),
            (low, high) => write!(f, "{low}..{high}"),
        }
    }
}

/// Decodes form-encoded text, in which a plus sign is a space. Invalid UTF-8 is replaced with U+FFFD.
fn decode(text: &str) -> String {
    let text = text.replace('+', " ");
    percent_decode_str(&text).decode_utf8_lossy().into_owned()
}

/// The filters of a query. A job matches if it passes every filter. A filter without values lets all jobs pass.
#[derive(Debug, Default)]
pub(super) struct Filter {
    /// The ids as text, so that the error for an invalid id can quote it.
    ids: BTreeSet<String>,
    statuses: BTreeSet<JobStatus>,
    /// The exact names of queues. Patterns are not supported.
    queues: BTreeSet<String>,
    /// The field `type` of the API.
    kinds: BTreeSet<String>,
    priority: Option<Range>,
    ready_at: Option<Range>,
    attempts: Option<Range>,
}

impl Filter {
    /// Parses all fields of [`FILTERS`] except `filter`, which the caller checks.
    pub(super) fn parse(fields: &mut Fields) -> Result<Self, Rejection> {
        Ok(Self {
            ids: fields.list("id")?,
            statuses: fields.list("status")?,
            queues: fields.list("queue")?,
            kinds: fields.list("type")?,
            priority: fields.range("priority", u16::MAX)?,
            ready_at: fields.range("ready_at", u64::MAX)?,
            attempts: fields.range("attempts", u32::MAX)?,
        })
    }

    pub(super) fn check_ids(&self) -> Result<(), Rejection> {
        self.ids.iter().try_for_each(|id| parse_id(id).map(drop))
    }

    /// Checks that no finished status is listed, because finished jobs cannot be patched.
    pub(super) fn check_patchable(&self) -> Result<(), Rejection> {
        match self.statuses.iter().find(|status| status.is_finished()) {
            Some(status) => Err(Rejection::Unprocessable(format!("cannot patch jobs in {status:?} status"))),
            None => Ok(()),
        }
    }

    pub(super) fn matches(&self, job: &StoredJob) -> bool {
        let within =
            |range: &Option<Range>, value: u64| range.as_ref().is_none_or(|range| range.numbers.contains(&value));
        let among = |names: &BTreeSet<String>, name: &str| names.is_empty() || names.contains(name);
        (self.statuses.is_empty() || self.statuses.contains(&job.status))
            && among(&self.ids, job.id.as_str())
            && among(&self.queues, &job.spec.queue)
            && among(&self.kinds, &job.spec.kind)
            && within(&self.priority, job.spec.priority.into())
            && within(&self.ready_at, job.ready_at)
            && within(&self.attempts, job.attempts.into())
    }

    /// Returns the filters as query fields, each after a `&`, to be appended to a link.
    pub(super) fn to_query(&self) -> String {
        let lists = [
            ("status", join(&self.statuses)),
            ("queue", join(&self.queues)),
            ("type", join(&self.kinds)),
            ("id", join(&self.ids)),
        ];
        let ranges = [("priority", &self.priority), ("ready_at", &self.ready_at), ("attempts", &self.attempts)];
        let lists = lists.into_iter().filter(|(_, list)| !list.is_empty());
        let ranges = ranges.into_iter().filter_map(|(name, range)| Some((name, range.as_ref()?.to_string())));
        let field = |(name, value): (&str, String)| format!("&{name}={}", utf8_percent_encode(&value, ESCAPED));
        lists.chain(ranges).map(field).collect()
    }
}

/// Parses an id in a filter or a cursor. The real server accepts an invalid cursor and finds no jobs. This server returns
/// an error, which is more helpful.
pub(super) fn parse_id(id: &str) -> Result<StoredJobId, Rejection> {
    StoredJobId::parse(id).ok_or_else(|| Rejection::BadRequest(format!("invalid job ID: {id:?}")))
}

/// Returns a comma-separated list. The set is sorted, so equal filters produce equal links.
fn join<T: Display>(elements: &BTreeSet<T>) -> String {
    let elements: Vec<String> = elements.iter().map(ToString::to_string).collect();
    elements.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(query: &str) -> Fields {
        Fields::parse(query, &FILTERS).unwrap()
    }

    #[test]
    fn names_and_values_are_decoded() {
        let mut fields = fields("queue=r+s%2F%C3%A9,b&type=");
        let queues = fields.list::<String>("queue").unwrap();
        assert_eq!(queues.into_iter().collect::<Vec<_>>(), ["b", "r s/é"]);
        assert!(fields.list::<String>("type").unwrap().is_empty());
    }

    #[test]
    fn unknown_and_repeated_fields_are_refused() {
        let error = |query| Fields::parse(query, &FILTERS).unwrap_err();
        assert_eq!(error("zz=1"), Rejection::bad_query("unknown field `zz`"));
        assert_eq!(error("queue=a&queue=b"), Rejection::bad_query("duplicate field `queue`"));
    }

    #[test]
    fn ranges_are_inclusive_and_written_as_they_were_read() {
        for (text, numbers) in [("5", 5..=5), ("5..9", 5..=9), ("..9", 0..=9), ("5..", 5..=99)] {
            let range = Range::parse(text, 99).unwrap();
            assert_eq!((range.to_string().as_str(), range.numbers), (text, numbers));
        }
        for text in ["9..5", "100", "a"] {
            assert!(Range::parse(text, 99).is_err(), "{text}");
        }
    }

    #[test]
    fn a_filter_survives_the_way_into_a_link_and_back() {
        let filter = Filter::parse(&mut fields("queue=r+s%26,b&status=ready&priority=1..")).unwrap();
        let link = filter.to_query();
        let again = Filter::parse(&mut fields(&link)).unwrap();
        assert_eq!(again.to_query(), link);
        assert_eq!(again.queues, BTreeSet::from(["b".to_owned(), "r s&".to_owned()]));
    }
}
