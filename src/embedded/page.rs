//! Pages of lists: the request for a page, with a limit, a direction and a cursor, and the links to the next and the
//! previous page.
//!
//! A cursor is the key of an item, not an offset. Jobs can be added and removed between two requests, so an offset would
//! skip some jobs and repeat others.

use std::fmt;
use std::str::FromStr;

use serde::Serialize;

use super::answer::Rejection;
use super::query::Fields;

/// The real server's default for `limit`.
const DEFAULT_LIMIT: u16 = 50;
/// The real server's maximum for `limit`.
const MAX_LIMIT: u16 = 2000;

/// The order of a list: oldest first or newest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Direction {
    #[default]
    Asc,
    Desc,
}

impl Direction {
    /// Returns the opposite direction, for the link to the previous page.
    fn reverse(self) -> Self {
        match self {
            Self::Asc => Self::Desc,
            Self::Desc => Self::Asc,
        }
    }
}

impl FromStr for Direction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "asc" => Ok(Self::Asc),
            "desc" => Ok(Self::Desc),
            _ => Err(format!("unknown variant `{text}`, expected `asc` or `desc`")),
        }
    }
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Asc => "asc",
            Self::Desc => "desc",
        })
    }
}

/// A request for one page of a list. The page starts after the item at the cursor.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageRequest<C> {
    /// The key of the last item before the page. `None` for the first page.
    pub(super) cursor: Option<C>,
    pub(super) direction: Direction,
    pub(super) limit: u16,
}

/// The links to the page itself, to the next page and to the previous page.
#[derive(Debug, Serialize, PartialEq)]
pub(super) struct Links {
    #[serde(rename = "self")]
    this: String,
    /// Null on the last page, so that a client knows where to stop.
    next: Option<String>,
    /// Null on the first page, and on an empty page.
    prev: Option<String>,
}

impl<C: Copy + fmt::Display> PageRequest<C> {
    /// Parses `order` and `limit`. The caller has parsed the cursor.
    pub(super) fn parse(fields: &mut Fields, cursor: Option<C>) -> Result<Self, Rejection> {
        let direction = fields.value("order")?.unwrap_or_default();
        let limit = fields.value("limit")?.unwrap_or(DEFAULT_LIMIT);
        if !(1..=MAX_LIMIT).contains(&limit) {
            return Err(Rejection::BadRequest(format!("limit must be between 1 and {MAX_LIMIT}")));
        }
        Ok(Self { cursor, direction, limit })
    }

    /// Returns the number of items to fetch: one more than the page's limit, to detect a next page.
    pub(super) fn reach(&self) -> usize {
        usize::from(self.limit) + 1
    }

    /// Truncates `items` to the page's limit, and returns the page's links. `filters` is appended to every link.
    pub(super) fn cut<T>(&self, items: &mut Vec<T>, cursor_of: impl Fn(&T) -> C, path: &str, filters: &str) -> Links {
        let has_more = items.len() > usize::from(self.limit);
        items.truncate(self.limit.into());
        let link = |cursor: Option<C>, direction: Direction| {
            let from = cursor.map(|cursor| format!("from={cursor}&")).unwrap_or_default();
            format!("{path}?{from}order={direction}&limit={}{filters}", self.limit)
        };
        let next = items.last().filter(|_| has_more).map(&cursor_of);
        let prev = items.first().filter(|_| self.cursor.is_some()).map(&cursor_of);
        Links {
            this: link(self.cursor, self.direction),
            next: next.map(|cursor| link(Some(cursor), self.direction)),
            prev: prev.map(|cursor| link(Some(cursor), self.direction.reverse())),
        }
    }
}
