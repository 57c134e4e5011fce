//! Queries: the fields after the `?`, and the filters that they spell.
//!
//! A field that nobody knows is an error and not ignored, as in the real server: with a misspelt
//! filter, `DELETE /jobs` would delete everything.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;
use std::ops::RangeInclusive;
use std::str::FromStr;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use super::id::JobId;
use super::job::{Job, Status};

/// The fields by which jobs are chosen.
pub(super) const FILTERS: [&str; 8] = ["id", "status", "queue", "type", "priority", "ready_at", "attempts", "filter"];

/// What a link must escape: all but the unreserved characters and the comma of a list. The real
/// server leaves names as they are, and its links to a queue with a space in its name are broken.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'~').remove(b',');

/// A query's fields, each at most once and each of them known.
#[derive(Debug)]
pub(super) struct Fields(BTreeMap<String, String>);

impl Fields {
    /// Reads a query of which only the `known` fields make sense.
    pub(super) fn parse(query: &str, known: &[&str]) -> Result<Self, String> {
        let mut fields = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = decode(name);
            if !known.contains(&name.as_str()) {
                return Err(format!("unknown field `{name}`"));
            }
            if fields.insert(name.clone(), decode(value)).is_some() {
                return Err(format!("duplicate field `{name}`"));
            }
        }
        Ok(Self(fields))
    }

    /// A field as it is. Taken out, like all the others here, because each is read once.
    pub(super) fn text(&mut self, name: &str) -> Option<String> {
        self.0.remove(name)
    }

    /// A field that is one number or one word.
    pub(super) fn value<T: FromStr<Err: Display>>(&mut self, name: &str) -> Result<Option<T>, String> {
        let parse = |text: String| text.parse().map_err(|error| format!("{name}: {error}"));
        self.text(name).map(parse).transpose()
    }

    /// The elements of a comma list; empty ones don't count. No name can contain a comma, so the
    /// list can be split after its percent-decoding.
    pub(super) fn list<T: FromStr<Err: Display> + Ord>(&mut self, name: &str) -> Result<BTreeSet<T>, String> {
        // `status=` is the same as no status at all, as in the real server.
        let text = self.text(name).unwrap_or_default();
        let elements = text.split(',').filter(|element| !element.is_empty());
        let parse = |element: &str| element.parse().map_err(|error| format!("{name}: {error}"));
        elements.map(parse).collect()
    }

    /// A range of numbers; empty text is no range.
    fn range(&mut self, name: &str) -> Result<Option<RangeInclusive<u64>>, String> {
        match self.text(name).filter(|text| !text.is_empty()) {
            Some(text) => range(&text).map(Some).map_err(|error| format!("{name}: {error}")),
            None => Ok(None),
        }
    }
}

/// `5`, `5..9`, `5..` or `..9`, with both ends in it.
fn range(text: &str) -> Result<RangeInclusive<u64>, String> {
    let number = |text: &str, default: u64| match text {
        "" => Ok(default),
        text => text.parse().map_err(|error: std::num::ParseIntError| error.to_string()),
    };
    let (low, high) = text.split_once("..").unwrap_or((text, text));
    let range = number(low, u64::MIN)?..=number(high, u64::MAX)?;
    if range.is_empty() {
        return Err("range lower bound exceeds upper bound".to_owned());
    }
    Ok(range)
}

/// Form encoding, in which a plus is a space. Bad UTF-8 becomes a name that matches nothing.
fn decode(text: &str) -> String {
    let text = text.replace('+', " ");
    percent_decode_str(&text).decode_utf8_lossy().into_owned()
}

/// Which jobs are meant: those that pass every filter; an empty filter passes all.
#[derive(Debug, Default)]
pub(super) struct Filter {
    /// Text, so that one that is no id can be named in the error.
    ids: BTreeSet<String>,
    statuses: BTreeSet<Status>,
    /// Whole names; there are no patterns.
    queues: BTreeSet<String>,
    /// `type` on the wire.
    kinds: BTreeSet<String>,
    // All three are ranges of the widest type: a bound that no job can have is no mistake.
    priority: Option<RangeInclusive<u64>>,
    ready_at: Option<RangeInclusive<u64>>,
    attempts: Option<RangeInclusive<u64>>,
}

impl Filter {
    /// Reads the fields of [`FILTERS`] but for `filter`, which is up to the caller.
    pub(super) fn parse(fields: &mut Fields) -> Result<Self, String> {
        Ok(Self {
            ids: fields.list("id")?,
            statuses: fields.list("status")?,
            queues: fields.list("queue")?,
            kinds: fields.list("type")?,
            priority: fields.range("priority")?,
            ready_at: fields.range("ready_at")?,
            attempts: fields.range("attempts")?,
        })
    }

    /// The text of the error for something that cannot be the id of any job.
    pub(super) fn check_ids(&self) -> Result<(), String> {
        match self.ids.iter().find(|id| JobId::parse(id).is_none()) {
            Some(id) => Err(format!("invalid job ID: {id:?}")),
            None => Ok(()),
        }
    }

    /// The text of the error for statuses of jobs that no patch changes.
    pub(super) fn check_patchable(&self) -> Result<(), String> {
        match self.statuses.iter().find(|status| status.is_finished()) {
            Some(status) => Err(format!("cannot patch jobs in {status:?} status")),
            None => Ok(()),
        }
    }

    /// Whether a job passes.
    pub(super) fn matches(&self, job: &Job) -> bool {
        let within =
            |range: &Option<RangeInclusive<u64>>, value: u64| range.as_ref().is_none_or(|range| range.contains(&value));
        let among = |names: &BTreeSet<String>, name: &str| names.is_empty() || names.contains(name);
        (self.statuses.is_empty() || self.statuses.contains(&job.status))
            && among(&self.ids, job.id.as_str())
            && among(&self.queues, &job.spec.queue)
            && among(&self.kinds, &job.spec.kind)
            && within(&self.priority, job.spec.priority.into())
            && within(&self.ready_at, job.ready_at)
            && within(&self.attempts, job.attempts.into())
    }

    /// The same filter as the tail of a link.
    pub(super) fn to_query(&self) -> String {
        let lists = [
            ("status", join(&self.statuses)),
            ("queue", join(&self.queues)),
            ("type", join(&self.kinds)),
            ("id", join(&self.ids)),
        ];
        let ranges = [("priority", &self.priority), ("ready_at", &self.ready_at), ("attempts", &self.attempts)];
        let lists = lists.into_iter().filter(|(_, list)| !list.is_empty());
        let ranges = ranges.into_iter().filter_map(|(name, range)| {
            let (low, high) = range.as_ref()?.clone().into_inner();
            // The open end stays open, for the eye; reading it back gives the same range.
            let high = if high == u64::MAX { String::new() } else { high.to_string() };
            Some((name, format!("{low}..{high}")))
        });
        let field = |(name, value): (&str, String)| format!("&{name}={}", utf8_percent_encode(&value, ESCAPED));
        lists.chain(ranges).map(field).collect()
    }
}

/// A comma list again; the set has put its elements in order, so equal filters have equal links.
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
        assert_eq!(error("zz=1"), "unknown field `zz`");
        assert_eq!(error("queue=a&queue=b"), "duplicate field `queue`");
    }

    #[test]
    fn ranges_are_inclusive_and_may_be_open() {
        assert_eq!(range("5"), Ok(5..=5));
        assert_eq!(range("5..9"), Ok(5..=9));
        assert_eq!(range("..9"), Ok(0..=9));
        assert_eq!(range("5.."), Ok(5..=u64::MAX));
        assert!(range("9..5").is_err());
        assert!(range("a").is_err());
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
