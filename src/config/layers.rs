//! [`Layers`]: the command line and the file, and which of them a value comes from.

use super::file::{ConfigFile, Field};
use super::value::Raw;
use super::{ConfigError, Source};
use crate::cli::Args;

/// The command line and the file, one over the other.
pub(super) struct Layers<'a> {
    pub(super) args: &'a Args,
    pub(super) file: &'a ConfigFile,
}

impl Layers<'_> {
    /// The value of one setting, read by `parse`, from the uppermost layer that has one.
    pub(super) fn pick<T>(
        &self,
        name: &'static str,
        in_file: &Field,
        parse: impl Fn(&Raw<'_>) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        self.locate(name, in_file, parse).map(|found| found.map(|(value, _)| value))
    }

    /// The same, with the place where it was found.
    pub(super) fn locate<T>(
        &self,
        name: &'static str,
        in_file: &Field,
        parse: impl Fn(&Raw<'_>) -> Result<T, String>,
    ) -> Result<Option<(T, Source)>, ConfigError> {
        let given = self.args.given(name)?;
        let (raw, source) = match (&given, in_file) {
            (Some(given), _) => (Raw::Text(&given.values), given.source.clone()),
            (None, Some(field)) => (Raw::Toml(field.get_ref()), self.file.source(field)),
            (None, None) => return Ok(None),
        };
        match parse(&raw) {
            Ok(value) => Ok(Some((value, source))),
            Err(problem) => Err(ConfigError::new(source, problem)),
        }
    }
}
