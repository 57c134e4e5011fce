//! [`ConfigFile`]: the TOML file as it is written. Values are read and checked together with the command line's.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::{Spanned, Value};

use super::{ConfigError, Source};
use crate::cli::Given;
use crate::client::url::without_user;

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
    pub(super) tls: Table<TlsTable>,
    pub(super) worker: Table<WorkerTable>,
    pub(super) handler: Table<HandlerTable>,
    /// By job type.
    pub(super) handlers: BTreeMap<Spanned<String>, Table<HandlerTable>>,
    pub(super) log: Table<LogTable>,
    pub(super) admin: Table<AdminTable>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct TlsTable {
    pub(super) ca: Field,
    pub(super) client_cert: Field,
    pub(super) client_key: Field,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct WorkerTable {
    pub(super) queues: Field,
    pub(super) threads: Field,
    pub(super) fibers: Field,
    pub(super) prefetch: Field,
    pub(super) retry_min_wait: Field,
    pub(super) retry_max_wait: Field,
    pub(super) retry_multiplier: Field,
    pub(super) stream_idle_timeout: Field,
    pub(super) max_job_size: Field,
    pub(super) shutdown_deadline: Field,
    pub(super) max_jobs: Field,
    pub(super) max_time: Field,
    pub(super) exit_when_idle: Field,
    pub(super) worker_id: Field,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct HandlerTable {
    pub(super) exec: Field,
    pub(super) mode: Field,
    pub(super) min_processes: Field,
    pub(super) max_processes: Field,
    pub(super) start_timeout: Field,
    pub(super) max_jobs: Field,
    pub(super) max_age: Field,
    pub(super) max_memory: Field,
    pub(super) idle_timeout: Field,
    pub(super) stdin: Field,
    pub(super) output: Field,
    pub(super) env: Field,
    pub(super) env_clear: Field,
    pub(super) pass_env: Field,
    pub(super) cwd: Field,
    pub(super) success_exit_codes: Field,
    pub(super) kill_exit_codes: Field,
    pub(super) timeout: Field,
    pub(super) kill_grace: Field,
    pub(super) drain_signal: Field,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct LogTable {
    pub(super) level: Field,
    pub(super) format: Field,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct AdminTable {
    pub(super) listen: Field,
}

/// Takes a table only. A derived struct would take the elements of an array for its fields, `[[worker]]` included.
#[derive(Debug, Default)]
pub(super) struct Table<T>(pub(super) T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Table<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TableVisitor(PhantomData)).map(Self)
    }
}

struct TableVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for TableVisitor<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("one table, as under a line like [worker]")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
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
                // serde says field where TOML says key.
                let problem = error.message().replace('\n', ", ").replace("unknown field", "unknown key");
                Err(ConfigError::new(Source::File(path, line), without_user(&problem)))
            }
        }
    }

    /// Where that byte of this file stands.
    pub(super) fn source_at(&self, offset: usize) -> Source {
        Source::File(self.path.clone(), line_of(&self.text, offset))
    }
}

/// Lines count from 1.
fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}
