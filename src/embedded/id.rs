//! Job ids: strings of 25 characters that sort in the order of enqueueing.
//!
//! Ids are opaque to clients, but have the same length and alphabet as the real server's ids. `GET /jobs?id=` rejects any
//! other text.

use std::fmt;

use serde::{Serialize, Serializer};

const LENGTH: usize = 25;
const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";

/// The id of a job. Ids sort in the order of enqueueing, which is also the order of ready jobs with the same priority.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct StoredJobId([u8; LENGTH]);

impl StoredJobId {
    /// Parses an id. Returns `None` unless `text` consists of exactly 25 lower-case ASCII letters and digits.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let bytes: [u8; LENGTH] = text.as_bytes().try_into().ok()?;
        let is_digit = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
        bytes.iter().all(is_digit).then_some(Self(bytes))
    }

    pub(super) fn as_str(&self) -> &str {
        // Cannot fail, because both constructors allow only ASCII digits and letters.
        std::str::from_utf8(&self.0).unwrap_or_default()
    }

    /// Returns `number` in base 36 as an id. Every `u128` fits into 25 digits.
    fn from_number(mut number: u128) -> Self {
        let mut bytes = [b'0'; LENGTH];
        for byte in bytes.iter_mut().rev() {
            *byte = DIGITS[(number % 36) as usize];
            number /= 36;
        }
        Self(bytes)
    }
}

impl fmt::Display for StoredJobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for StoredJobId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for StoredJobId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

/// The source of new ids. An id consists, from the most significant bit, of 48 bits of time, 48 bits of a counter and 32
/// random bits.
#[derive(Debug, Default)]
pub(super) struct IdSource {
    latest: u64,
    count: u64,
}

impl IdSource {
    /// Returns the next id. If the clock has stepped back, uses the latest time seen so far, because the new job would
    /// otherwise sort before older ones.
    pub(super) fn next(&mut self, now: u64) -> StoredJobId {
        self.latest = self.latest.max(now);
        self.count += 1;
        let time = u128::from(self.latest) << 80;
        let count = u128::from(self.count) << 32;
        StoredJobId::from_number(time | count | u128::from(fastrand::u32(..)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_rise_even_when_the_clock_steps_back() {
        let mut source = IdSource::default();
        let ids = [source.next(1_000), source.next(1_000), source.next(5), source.next(2_000)];
        assert!(ids.is_sorted());
        assert_eq!(StoredJobId::parse(ids[0].as_str()), Some(ids[0]));
    }

    #[test]
    fn only_25_lower_case_letters_and_digits_are_an_id() {
        assert_eq!(StoredJobId::parse("short"), None);
        assert_eq!(StoredJobId::parse(&"A".repeat(25)), None);
        assert!(StoredJobId::parse(&"z".repeat(25)).is_some());
    }
}
