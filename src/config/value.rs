//! [`Raw`]: a setting's value as the user wrote it, and its parsers. Each error names the setting and the rule. Most errors also
//! quote the value.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fmt;
use std::num::NonZeroUsize;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use toml::Value;

use super::variable::Variable;

/// The longest valid duration. A longer one is probably a typing mistake, and could overflow when added to an `Instant`.
const MAX_DURATION: Duration = Duration::from_secs(366 * 24 * 60 * 60);

/// A setting's value as the user wrote it.
#[derive(Debug, Clone)]
pub(super) enum Raw {
    /// The values of a flag, one per repetition, or the value of an environment variable.
    Text(Vec<String>),
    /// A value from the file.
    Toml(Value),
}

impl fmt::Display for Raw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Text(values) => f.write_str(values.last().map_or("", String::as_str)),
            Self::Toml(Value::String(text)) => f.write_str(text),
            Self::Toml(value) => value.fmt(f),
        }
    }
}

impl Raw {
    /// Returns the value as text. For a repeated flag, returns the last value. Rejects a TOML value that is not a string.
    pub(super) fn text(&self, name: &str) -> Result<String, String> {
        match self {
            Self::Toml(Value::String(_)) | Self::Text(_) => Ok(self.to_string()),
            Self::Toml(value) => Err(format!("{name} must be a string (got {value})")),
        }
    }

    /// Parses the value with the `FromStr` of `T`, whose error must be a complete message.
    pub(super) fn parsed<T: FromStr<Err = String>>(&self, name: &str) -> Result<T, String> {
        self.text(name)?.parse()
    }

    /// Parses one of `words`, ignoring case.
    pub(super) fn one_of<T: Copy>(&self, name: &str, words: &[(&str, T)]) -> Result<T, String> {
        let text = self.text(name)?;
        named(&text, words).ok_or_else(|| format!("{name} must be one of {} (got {text})", names(words).join(", ")))
    }

    /// Parses a whole number of at least 1.
    pub(super) fn count(&self, name: &str) -> Result<NonZeroUsize, String> {
        self.count_up_to(name, usize::MAX)
    }

    /// Parses a whole number of at least 0. Accepts 0 only as a TOML integer, because no setting that may be 0 has a flag.
    pub(super) fn count_from_0(&self, name: &str) -> Result<usize, String> {
        match self {
            Self::Toml(Value::Integer(0)) => Ok(0),
            _ => self.count(name).map(NonZeroUsize::get),
        }
    }

    /// Parses a whole number from 1 to `most`.
    pub(super) fn count_up_to(&self, name: &str, most: usize) -> Result<NonZeroUsize, String> {
        let number: i128 = match self {
            Self::Toml(Value::Integer(number)) => (*number).into(),
            _ => self
                .text(name)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .ok_or_else(|| format!("{name} must be a whole number, at least 1 (got {self})"))?,
        };
        if number < 1 {
            return Err(format!("{name} must be at least 1 (got {number})"));
        }
        let count = usize::try_from(number).ok().filter(|count| *count <= most).and_then(NonZeroUsize::new);
        count.ok_or_else(|| format!("{name} must be at most {most} (got {number})"))
    }

    /// Parses a number, with or without a fraction.
    pub(super) fn number(&self, name: &str) -> Result<f64, String> {
        match self {
            Self::Toml(Value::Float(number)) => Ok(*number),
            _ => self.to_string().trim().parse().map_err(|_| format!("{name} must be a number (got {self})")),
        }
    }

    /// Parses a duration: a number of seconds, or a text with units, like `1m 30s`.
    pub(super) fn duration(&self, name: &str) -> Result<Duration, String> {
        let wanted =
            || format!("{name} must be a duration like 30s, 500ms or 1m 30s; a bare number is seconds (got {self})");
        let text = self.to_string();
        let duration = match text.trim().parse::<f64>() {
            Ok(seconds) => Duration::try_from_secs_f64(seconds).map_err(|_| wanted())?,
            Err(_) => humantime::parse_duration(text.trim()).map_err(|_| wanted())?,
        };
        if duration > MAX_DURATION {
            return Err(format!("{name} must be at most {} (got {self})", humantime::format_duration(MAX_DURATION)));
        }
        Ok(duration)
    }

    /// Parses a duration longer than zero.
    pub(super) fn positive_duration(&self, name: &str) -> Result<Duration, String> {
        match self.duration(name)? {
            Duration::ZERO => Err(format!("{name} must be greater than 0s (got {self})")),
            duration => Ok(duration),
        }
    }

    /// Parses a size of at least 1 KiB, with or without a unit, and returns the number of bytes.
    pub(super) fn size(&self, name: &str) -> Result<usize, String> {
        let wanted =
            || format!("{name} must be a size like 64MiB or 500kB, at least 1KiB; a bare number is bytes (got {self})");
        let size: ByteSize = self.to_string().trim().parse().map_err(|_| wanted())?;
        usize::try_from(size.as_u64()).ok().filter(|size| *size >= 1024).ok_or_else(wanted)
    }

    /// Parses a list of names: comma-separated text from flags, a variable or the file, or a list in the file. Rejects an empty
    /// name, because it usually comes from an unset variable of a shell or a template. Only `[]` in the file yields an empty list.
    pub(super) fn list(&self, name: &str) -> Result<Vec<String>, String> {
        let names: Vec<String> = match self {
            Self::Text(values) => values.iter().flat_map(|value| value.split(',')).map(str::to_owned).collect(),
            Self::Toml(Value::String(text)) => text.split(',').map(str::to_owned).collect(),
            Self::Toml(value) => {
                strings(value).ok_or_else(|| format!("{name} must be a list of strings (got {value})"))?
            }
        };
        let names: Vec<String> = names.iter().map(|name| name.trim().to_owned()).collect();
        if names.iter().any(String::is_empty) {
            return Err(format!(
                "{name} must be names, none of them empty; to take from all {name}, leave the setting out (got {})",
                self.quoted()
            ));
        }
        Ok(names)
    }

    /// Returns the value in quotes, or in TOML syntax, for a message. The values of a repeated flag are joined with commas.
    fn quoted(&self) -> String {
        match self {
            Self::Text(values) => format!("{:?}", values.join(",")),
            Self::Toml(value) => value.to_string(),
        }
    }

    /// Parses a list of strings from the file.
    pub(super) fn strings(&self, name: &str) -> Result<Vec<String>, String> {
        let strings = if let Self::Toml(value) = self { strings(value) } else { None };
        strings.ok_or_else(|| format!("{name} must be a list of strings (got {self})"))
    }

    /// Parses a boolean from the file.
    pub(super) fn boolean(&self, name: &str) -> Result<bool, String> {
        match self {
            Self::Toml(Value::Boolean(value)) => Ok(*value),
            _ => Err(format!("{name} must be true or false (got {self})")),
        }
    }

    /// Parses a list of exit statuses from the file.
    pub(super) fn exit_codes(&self, name: &str) -> Result<BTreeSet<u8>, String> {
        let codes = match self {
            Self::Toml(Value::Array(items)) => {
                items.iter().map(|item| item.as_integer().and_then(|code| u8::try_from(code).ok())).collect()
            }
            _ => None,
        };
        codes.ok_or_else(|| format!("{name} must be a list of numbers from 0 to 255 (got {self})"))
    }

    /// Parses a table of environment variables from the file. Messages never quote a value, because it can be a secret.
    pub(super) fn variables(&self, name: &str) -> Result<Vec<(String, Variable)>, String> {
        let Self::Toml(Value::Table(table)) = self else {
            let kind = if let Self::Toml(value) = self { value.type_str() } else { "string" };
            return Err(format!("{name} must be a table of variable names and values (got a value of type {kind})"));
        };
        table.iter().map(|(variable, value)| Ok((variable.clone(), Variable::read(name, variable, value)?))).collect()
    }

    /// Parses the words of a command. A string is split as in a shell. A list is used as it is.
    pub(super) fn command(&self, name: &str) -> Result<Vec<OsString>, String> {
        let words = self.words(name)?;
        if words.iter().any(|word| word.contains('\0')) {
            return Err(format!("{name} must not have a zero byte"));
        }
        Ok(words.into_iter().map(OsString::from).collect())
    }

    fn words(&self, name: &str) -> Result<Vec<String>, String> {
        let wanted = || format!("{name} must be a string or a list of strings (got {self})");
        if let Self::Toml(value @ Value::Array(_)) = self {
            return strings(value).ok_or_else(wanted);
        }
        let text = self.text(name).map_err(|_| wanted())?;
        let split = shlex::split(&text);
        split.ok_or_else(|| format!("{name} has a quote or a backslash without its other half (got {text})"))
    }
}

/// Returns the value that `text` names, ignoring case.
pub(super) fn named<T: Copy>(text: &str, words: &[(&str, T)]) -> Option<T> {
    words.iter().find(|(word, _)| word.eq_ignore_ascii_case(text.trim())).map(|(_, value)| *value)
}

/// Returns the name of `value`.
pub(super) fn name_in<T: PartialEq>(words: &[(&'static str, T)], value: &T) -> &'static str {
    words.iter().find(|(_, named)| named == value).map_or("", |(word, _)| word)
}

pub(super) fn names<'a, T>(words: &[(&'a str, T)]) -> Vec<&'a str> {
    words.iter().map(|(word, _)| *word).collect()
}

fn strings(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed<T>(text: &str, read: impl Fn(&Raw) -> T) -> T {
        read(&Raw::Text(vec![text.to_owned()]))
    }

    #[test]
    fn a_bare_number_is_seconds_and_all_else_is_humantime() {
        let duration = |text| typed(text, |raw| raw.duration("d")).unwrap();
        assert_eq!(duration("90"), Duration::from_secs(90));
        assert_eq!(duration("0.5"), Duration::from_millis(500));
        assert_eq!(duration("1m 30s"), Duration::from_secs(90));
        assert_eq!(duration(" 500ms "), Duration::from_millis(500));
    }

    #[test]
    fn durations_that_make_no_sense_are_refused() {
        for bad in ["", "-1", "soon", "1 parsec", "NaN", "inf", "1e300", "400 days"] {
            assert!(typed(bad, |raw| raw.duration("d")).is_err(), "{bad}");
        }
        assert_eq!(typed("0", |raw| raw.positive_duration("d")).unwrap_err(), "d must be greater than 0s (got 0)");
    }
}
