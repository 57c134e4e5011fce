//! [`Layers`]: the lookup of a setting on the command line, in the environment and in the file. [`Source`]: the origin of its value.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use toml::{Spanned, Value};

use super::declared::Declared;
use super::file::ConfigFile;
use super::value::Raw;
use super::{ConfigError, Warning};
use crate::cli::Args;

/// The origin of a setting's value. A message about the setting begins with the origin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// A flag, with its dashes.
    Flag(String),
    /// The words after `--`.
    TrailingCommand,
    /// An environment variable.
    Variable(String),
    /// A line of the configuration file.
    File(PathBuf, usize),
    /// No origin, because the setting is not given.
    Missing,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Flag(name) | Self::Variable(name) => f.write_str(name),
            Self::TrailingCommand => f.write_str("the command after --"),
            Self::File(path, line) => write!(f, "{}:{line}", path.display()),
            Self::Missing => f.write_str("the command line"),
        }
    }
}

/// The sources of settings. The command line and the environment, both in `args`, override the file.
pub(super) struct Layers<'a> {
    pub(super) args: &'a Args,
    pub(super) file: &'a ConfigFile,
    /// The sources of the settings found so far.
    found: RefCell<Sources>,
    /// The warnings so far.
    warnings: RefCell<Vec<Warning>>,
}

/// The source of each given setting, and the text that the user wrote, by key. The settings of a handler have an empty text,
/// except for a variable in `env` whose value is in a file: its text is the path of the file.
pub(super) type Sources = BTreeMap<String, (Source, String)>;

impl<'a> Layers<'a> {
    pub(super) fn new(args: &'a Args, file: &'a ConfigFile) -> Self {
        Self { args, file, found: RefCell::default(), warnings: RefCell::new(args.unknown_variables()) }
    }

    /// Returns the sources of all given settings, and all warnings.
    pub(super) fn into_parts(self) -> (Sources, Vec<Warning>) {
        (self.found.into_inner(), self.warnings.into_inner())
    }

    /// Adds a warning.
    pub(super) fn warn(&self, warning: Warning) {
        self.warnings.borrow_mut().push(warning);
    }

    /// Records the source of a setting, and the text that the user wrote.
    pub(super) fn note(&self, name: &str, source: &Source, written: impl ToString) {
        self.found.borrow_mut().insert(name.to_owned(), (source.clone(), written.to_string()));
    }

    /// Returns the value of a setting, if the command line, the environment or the file has it. `parse` gets the raw value and
    /// the setting's name.
    pub(super) fn pick<T>(
        &self,
        declared: &Declared,
        parse: impl Fn(&Raw, &str) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        self.locate(declared, parse).map(|found| found.map(|(value, _)| value))
    }

    /// Returns the value of a setting, like [`pick`](Self::pick), with its source.
    pub(super) fn locate<T>(
        &self,
        declared: &Declared,
        parse: impl Fn(&Raw, &str) -> Result<T, String>,
    ) -> Result<Option<(T, Source)>, ConfigError> {
        let name = declared.name();
        let parse = |raw: &Raw| parse(raw, &name).map(|value| (value, raw.to_string()));
        let given = declared.flag.as_ref().map(|flag| self.args.given(flag.name)).transpose()?.flatten();
        let found = match given {
            Some(given) => Some(read(&Raw::Text(given.values), given.source, parse)?),
            None => self.file.value(declared).map(|value| self.read_in_file(value, parse)).transpose()?,
        };
        Ok(found.map(|((value, written), source)| {
            self.note(declared.key, &source, written);
            (value, source)
        }))
    }

    /// Parses a value from the file, and returns it with its source.
    pub(super) fn read_in_file<T>(
        &self,
        value: &Spanned<Value>,
        parse: impl Fn(&Raw) -> Result<T, String>,
    ) -> Result<(T, Source), ConfigError> {
        read(&Raw::Toml(value.get_ref().clone()), self.file.source_at(value.span().start), parse)
    }
}

fn read<T>(raw: &Raw, source: Source, parse: impl Fn(&Raw) -> Result<T, String>) -> Result<(T, Source), ConfigError> {
    match parse(raw) {
        Ok(value) => Ok((value, source)),
        Err(problem) => Err(ConfigError::new(source, problem)),
    }
}
