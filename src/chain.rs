//! [`Chain`]: an error with its causes, on one line. [`OneLine`]: a writer that escapes characters that would break the line.

use std::error::Error;
use std::fmt::{self, Write};

/// An error, displayed on one line together with its causes, which are separated by colons.
#[derive(Debug, Clone, Copy)]
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = OneLine(f);
        write!(line, "{}", self.0)?;
        let mut cause = self.0.source();
        while let Some(error) = cause {
            write!(line, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

/// A writer that escapes the characters that could end the line, or move, colour or hide its text. Error messages quote text from
/// servers, files and arguments, which can contain these characters.
#[derive(Debug)]
pub struct OneLine<W>(pub W);

impl<W: Write> Write for OneLine<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.chars().try_for_each(|char| self.write_char(char))
    }

    fn write_char(&mut self, char: char) -> fmt::Result {
        if is_unruly(char) { write!(self.0, "{}", char.escape_default()) } else { self.0.write_char(char) }
    }
}

/// Reports whether a character is a control character, a Unicode line or paragraph separator, or a Unicode control that changes
/// the direction of text (an embedding, override or isolate).
pub(crate) fn is_unruly(char: char) -> bool {
    char.is_control() || matches!(char, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;

    use super::*;

    #[test]
    fn a_chain_names_its_causes() {
        let error = CString::new([0xff]).unwrap().into_string().unwrap_err();
        let text = "C string contained non-utf8 bytes: invalid utf-8 sequence of 1 bytes from index 0";
        assert_eq!(Chain(&error).to_string(), text);
    }

    #[test]
    fn a_chain_stays_on_its_line() {
        let error: Box<dyn Error> = "no\nerror: \u{1b}[31mforged\u{2028}".into();
        assert_eq!(Chain(error.as_ref()).to_string(), r"no\nerror: \u{1b}[31mforged\u{2028}");
    }

    #[test]
    fn ordinary_text_is_left_alone() {
        let mut line = String::new();
        OneLine(&mut line).write_str("Größe: \"5\" µm \\ 日本").unwrap();
        assert_eq!(line, "Größe: \"5\" µm \\ 日本");
    }
}
