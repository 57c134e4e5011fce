//! [`ConfigFile`]: the TOML file as it is written. Values are read and checked together with the command line's.

use std::path::PathBuf;

use serde::Deserialize;
use toml::{Spanned, Value};

use super::{ConfigError, Source};
use crate::cli::Given;

/// A value and where it stands, or nothing.
pub(super) type Field = Option<Spanned<Value>>;

/// A configuration file, or an empty one where none was named.
#[derive(Debug, Default)]
pub(super) struct ConfigFile {
    path: PathBuf,
    text: String,
    pub(super) table: FileTable,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct FileTable {
    pub(super) url: Field,
    pub(super) worker: WorkerTable,
    pub(super) handler: HandlerTable,
    pub(super) log: LogTable,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, as in [worker]")]
pub(super) struct WorkerTable {
    pub(super) queues: Field,
    pub(super) threads: Field,
    pub(super) fibers: Field,
    pub(super) prefetch: Field,
    pub(super) retry_min_wait: Field,
    pub(super) retry_max_wait: Field,
    pub(super) retry_multiplier: Field,
    pub(super) shutdown_deadline: Field,
    pub(super) exit_when_idle: Field,
    pub(super) worker_id: Field,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, as in [handler]")]
pub(super) struct HandlerTable {
    pub(super) exec: Field,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, expecting = "a table, as in [log]")]
pub(super) struct LogTable {
    pub(super) level: Field,
    pub(super) format: Field,
}

impl ConfigFile {
    /// Reads the file that was named, if one was.
    pub(super) fn load(named: Option<&Given>) -> Result<Self, ConfigError> {
        let Some((given, name)) = named.and_then(|given| Some((given, given.values.last()?))) else {
            return Ok(Self::default());
        };
        let text = std::fs::read_to_string(name).map_err(|error| {
            ConfigError::unusable(given.source.clone(), format!("cannot read the configuration file {name}: {error}"))
        })?;
        Self::parse(PathBuf::from(name), text)
    }

    fn parse(path: PathBuf, text: String) -> Result<Self, ConfigError> {
        match toml::from_str(&text) {
            Ok(table) => Ok(Self { path, text, table }),
            Err(error) => {
                let line = error.span().map_or(1, |span| line_of(&text, span.start));
                let problem = error.message().replace('\n', ", ");
                Err(ConfigError::new(Source::File(path, line), problem))
            }
        }
    }

    /// Where a field of this file stands.
    pub(super) fn source(&self, field: &Spanned<Value>) -> Source {
        Source::File(self.path.clone(), line_of(&self.text, field.span().start))
    }
}

/// Lines count from 1.
fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}
