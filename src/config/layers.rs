//! [`Layers`]: the command line and the file, and which of them a value comes from.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::file::{ConfigFile, Field};
use super::value::Raw;
use super::{ConfigError, Source};
use crate::cli::Args;

/// The command line and the file, one over the other.
pub(super) struct Layers<'a> {
    pub(super) args: &'a Args,
    pub(super) file: &'a ConfigFile,
    /// Where each setting that was given has been found, by the name under which it was looked up.
    found: RefCell<Sources>,
}

/// Where settings were written, and what, by name.
pub(super) type Sources = BTreeMap<String, (Source, String)>;

impl<'a> Layers<'a> {
    pub(super) fn new(args: &'a Args, file: &'a ConfigFile) -> Self {
        Self { args, file, found: RefCell::default() }
    }

    /// Where everything was found.
    pub(super) fn into_sources(self) -> Sources {
        self.found.into_inner()
    }

    /// Notes where a setting was found, and what was written there.
    pub(super) fn note(&self, name: &str, source: &Source, written: impl ToString) {
        self.found.borrow_mut().insert(name.to_owned(), (source.clone(), written.to_string()));
    }

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
        let parse = |raw: &Raw<'_>| parse(raw).map(|value| (value, raw.to_string()));
        let found = match self.args.given(name)? {
            Some(given) => read(&Raw::Text(&given.values), given.source.clone(), parse),
            None => self.locate_in_file(in_file, parse),
        }?;
        Ok(found.map(|((value, written), source)| {
            self.note(name, &source, written);
            (value, source)
        }))
    }

    /// The value of a setting that only the file can have.
    pub(super) fn locate_in_file<T>(
        &self,
        in_file: &Field,
        parse: impl Fn(&Raw<'_>) -> Result<T, String>,
    ) -> Result<Option<(T, Source)>, ConfigError> {
        match in_file {
            Some(field) => read(&Raw::Toml(field.get_ref()), self.file.source_at(field.span().start), parse),
            None => Ok(None),
        }
    }
}

fn read<T>(
    raw: &Raw<'_>,
    source: Source,
    parse: impl Fn(&Raw<'_>) -> Result<T, String>,
) -> Result<Option<(T, Source)>, ConfigError> {
    match parse(raw) {
        Ok(value) => Ok(Some((value, source))),
        Err(problem) => Err(ConfigError::new(source, problem)),
    }
}
