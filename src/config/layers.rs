//! [`Layers`]: the lookup of a setting on the command line, in the environment and in the file. [`Source`]: the origin of a
//! setting's value.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

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
    pub(super) found: RefCell<Sources>,
    /// The warnings so far.
    pub(super) warnings: RefCell<Vec<Warning>>,
}

/// The source of each given setting, and the text that the user wrote, by key. For a variable in `env`, the text is the path of
/// the file that holds the variable's value, or empty if the value is given directly.
pub(super) type Sources = BTreeMap<String, (Source, String)>;

/// A parser of a raw value. The second argument is the setting's name, for messages.
pub(super) type Parse<T> = fn(&Raw, &str) -> Result<T, String>;

impl<'a> Layers<'a> {
    pub(super) fn new(args: &'a Args, file: &'a ConfigFile) -> Self {
        Self { args, file, found: RefCell::default(), warnings: RefCell::new(args.unknown_variables()) }
    }

    /// Adds a warning.
    pub(super) fn warn(&self, warning: Warning) {
        self.warnings.borrow_mut().push(warning);
    }

    /// Records the source of a setting, and the text that the user wrote.
    pub(super) fn note(&self, name: &str, source: &Source, written: impl ToString) {
        self.found.borrow_mut().insert(name.to_owned(), (source.clone(), written.to_string()));
    }

    /// Returns the value of a setting, if the command line, the environment or the file has it.
    pub(super) fn pick<T>(&self, declared: &Declared, parse: Parse<T>) -> Result<Option<T>, ConfigError> {
        Ok(self.locate(declared, parse)?.map(|(value, _)| value))
    }

    /// Returns the value of a setting as [`pick`](Self::pick) does, together with the value's source.
    pub(super) fn locate<T>(&self, declared: &Declared, parse: Parse<T>) -> Result<Option<(T, Source)>, ConfigError> {
        let given = declared.flag.as_ref().map(|flag| self.args.given(flag.name)).transpose()?.flatten();
        let given = given.map(|given| (Raw::Text(given.values), given.source));
        let Some((raw, source)) = given.or_else(|| self.file.value(declared)) else { return Ok(None) };
        let value = read(declared, &raw, &source, parse)?;
        self.note(declared.key, &source, raw);
        Ok(Some((value, source)))
    }
}

/// Parses the value of a setting.
pub(super) fn read<T>(declared: &Declared, raw: &Raw, source: &Source, parse: Parse<T>) -> Result<T, ConfigError> {
    parse(raw, &declared.name()).map_err(|problem| ConfigError::new(source.clone(), problem))
}
