//! [`Skimmer`]: what is at the top of a JSON object, without what makes it long. A job comes with its payload, of any size.

/// Longer strings are of no interest here.
const MAX_STRING_BYTES: usize = 256;

/// Passes an object's own names, numbers and short strings on; long strings become empty, and all that is nested is left
/// out but for its brackets. What is no JSON does not become any.
#[derive(Debug, Default)]
pub(super) struct Skimmer {
    depth: usize,
    /// Where the string that is being read began in what was kept.
    string: Option<usize>,
    is_escaped: bool,
    kept: Vec<u8>,
}

impl Skimmer {
    /// Reads on.
    pub(super) fn push(&mut self, piece: &[u8]) {
        piece.iter().for_each(|byte| self.push_byte(*byte));
    }

    /// What was kept.
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
            // Nothing more of it is kept from here on, so the place is told by its quote alone.
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
        // However it is cut.
        text.as_bytes().chunks(3).for_each(|piece| skimmer.push(piece));
        String::from_utf8(skimmer.kept().to_vec()).unwrap()
    }

    #[test]
    fn what_is_short_and_on_top_is_kept() {
        let text = r#"{"id":"a\"}\\","n":-1.5e3,"ok":true,"x":null}"#;
        assert_eq!(skimmed(text), text);
    }

    #[test]
    fn what_is_nested_is_left_out() {
        let text = r#"{"a":{"status":"x","b":[1,{"c":"}"}]},"l":["]",[]],"status":"ready"}"#;
        assert_eq!(skimmed(text), r#"{"a":{},"l":[],"status":"ready"}"#);
    }

    #[test]
    fn long_strings_become_empty_and_what_follows_is_kept() {
        let long = r#"ü\"\\\u00e9"#.repeat(100_000);
        let mut skimmer = Skimmer::default();
        skimmer.push(format!(r#"{{"payload":"{long}","attempts":3,"p":{{"x":"{long}"}}}}"#).as_bytes());
        assert_eq!(skimmer.kept(), br#"{"payload":"","attempts":3,"p":{}}"#);
        assert!(skimmer.kept.capacity() < 4096);
    }
}
