//! [`Skimmer`]: extracts the short top-level fields of a JSON object, without buffering the rest. The server sends a job together
//! with its payload, which may be of any size.

/// The maximum length of a string that is kept.
const MAX_STRING_BYTES: usize = 256;

/// A filter that keeps the top-level names, numbers, literals and short strings of a JSON object. Long strings become empty, and
/// nested objects and arrays lose their contents. Truncated input gives invalid output.
#[derive(Debug, Default)]
pub(super) struct Skimmer {
    depth: usize,
    /// The index in `kept` at which the current string starts, or `usize::MAX - MAX_STRING_BYTES` once the string is too long.
    /// `None` outside strings.
    string: Option<usize>,
    is_escaped: bool,
    kept: Vec<u8>,
}

impl Skimmer {
    /// Filters the next piece of the JSON text.
    pub(super) fn push(&mut self, piece: &[u8]) {
        piece.iter().for_each(|byte| self.push_byte(*byte));
    }

    /// Returns the kept text.
    pub(super) fn kept(&self) -> &[u8] {
        &self.kept
    }

    fn push_byte(&mut self, byte: u8) {
        match (self.string, byte) {
            (Some(start), _) => self.push_in_string(start, byte),
            (None, b'{' | b'[') => {
                self.depth += 1;
                if self.depth <= 2 {
                    self.kept.push(byte);
                }
            }
            (None, b'}' | b']') => {
                if self.depth <= 2 {
                    self.kept.push(byte);
                }
                self.depth = self.depth.saturating_sub(1);
            }
            (None, b'"') => {
                self.string = Some(self.kept.len());
                self.keep(byte);
            }
            (None, _) => self.keep(byte),
        }
    }

    fn push_in_string(&mut self, start: usize, byte: u8) {
        let is_end = byte == b'"' && !self.is_escaped;
        self.is_escaped = byte == b'\\' && !self.is_escaped;
        if is_end {
            self.string = None;
        } else if self.kept.len() > start + MAX_STRING_BYTES {
            // Keep only the opening quote. The rest of the string is skipped up to the closing quote.
            self.kept.truncate(start + 1);
            self.string = Some(usize::MAX - MAX_STRING_BYTES);
            return;
        } else if start >= usize::MAX - MAX_STRING_BYTES {
            return;
        }
        self.keep(byte);
    }

    fn keep(&mut self, byte: u8) {
        if self.depth <= 1 {
            self.kept.push(byte);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn skimmed(text: &str) -> String {
        let mut skimmer = Skimmer::default();
        // Pieces of three bytes split strings and escapes. The result must be the same as without a split.
        text.as_bytes().chunks(3).for_each(|piece| skimmer.push(piece));
        String::from_utf8(skimmer.kept().to_vec()).unwrap()
    }

    #[test]
    fn short_values_on_the_top_level_are_kept() {
        let text = r#"{"id":"a\"}\\","n":-1.5e3,"ok":true,"x":null}"#;
        assert_eq!(skimmed(text), text);
    }

    #[test]
    fn nested_values_are_left_out() {
        let text = r#"{"a":{"status":"x","b":[1,{"c":"}"}]},"l":["]",[]],"status":"ready"}"#;
        assert_eq!(skimmed(text), r#"{"a":{},"l":[],"status":"ready"}"#);
    }

    #[test]
    fn long_strings_become_empty_and_the_rest_is_kept() {
        let long = r#"ü\"\\\u00e9"#.repeat(100_000);
        let mut skimmer = Skimmer::default();
        skimmer.push(format!(r#"{{"payload":"{long}","attempts":3,"p":{{"x":"{long}"}}}}"#).as_bytes());
        assert_eq!(skimmer.kept(), br#"{"payload":"","attempts":3,"p":{}}"#);
        assert!(skimmer.kept.capacity() < 4096);
    }
}
