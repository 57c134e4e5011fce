//! [`ConfigFile`]: the parsed TOML file, with its keys checked. The values stay TOML values until `Layers` parses them.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;
use std::path::PathBuf;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::{Spanned, Value};

use super::declared::{Declared, SETTINGS};
use super::value::Raw;
use super::{ConfigError, Source};
use crate::cli::{Given, nearest};
use crate::client::url::without_user;

/// A value with its position in the file. `None` if the file does not have the key.
type Field = Option<Spanned<Value>>;

/// A configuration file. Empty if the user names no file.
#[derive(Debug, Default)]
pub(super) struct ConfigFile {
    path: PathBuf,
    text: String,
    tables: Tables,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Tables {
    url: Field,
    tls: Table<Keys>,
    worker: Table<Keys>,
    handler: Table<Keys>,
    /// The `[handlers.TYPE]` tables, by job type.
    handlers: Table<BTreeMap<Spanned<String>, Table<Keys, true>>, true>,
    log: Table<Keys>,
    admin: Table<Keys>,
}

/// The keys of one table, and their values.
pub(super) type Keys = BTreeMap<Spanned<String>, Spanned<Value>>;

/// A wrapper that accepts only a TOML table. For any other value, such as an array from `[[worker]]`, the error describes the
/// correct form. `OF_TYPES` is true for `[handlers]` and for each `[handlers.TYPE]`.
#[derive(Debug, Default)]
struct Table<T, const OF_TYPES: bool = false>(T);

impl<'de, T: Deserialize<'de>, const OF_TYPES: bool> Deserialize<'de> for Table<T, OF_TYPES> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(TableVisitor::<T, OF_TYPES>(PhantomData)).map(Self)
    }
}

struct TableVisitor<T, const OF_TYPES: bool>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const OF_TYPES: bool> Visitor<'de> for TableVisitor<T, OF_TYPES> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if OF_TYPES {
            "a table for each job type, as under a line like [handlers.TYPE]; [handler] is the table of all others"
        } else {
            "one table, as under a line like [worker]"
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

impl ConfigFile {
    /// Reads the file that `--config` or `ZIZQ_CONFIG` names. Returns an empty `ConfigFile` if neither names a file.
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
        let file = match toml::from_str(&text) {
            Ok(tables) => Self { path, text, tables },
            Err(error) => {
                let line = error.span().map_or(1, |span| line_of(&text, span.start));
                let problem = match unknown_field(error.message()) {
                    Some(key) => unknown_key(key, &TABLES),
                    None => error.message().replace('\n', ", "),
                };
                return Err(ConfigError::new(Source::File(path, line), without_user(&problem)));
            }
        };
        file.check_keys()?;
        Ok(file)
    }

    /// Returns an error for the first key that belongs to no declared setting.
    fn check_keys(&self) -> Result<(), ConfigError> {
        for (table, keys) in self.tables().into_iter().chain(self.routes().map(|(_, keys)| ("handler", keys))) {
            let known: Vec<&str> = keys_of(table).collect();
            if let Some(unknown) = keys.keys().find(|key| !known.contains(&key.get_ref().as_str())) {
                let problem = unknown_key(unknown.get_ref(), &known);
                return Err(ConfigError::new(self.source_at(unknown.span().start), problem));
            }
        }
        Ok(())
    }

    fn tables(&self) -> [(&'static str, &Keys); 5] {
        let Tables { tls, worker, handler, log, admin, .. } = &self.tables;
        [("tls", &tls.0), ("worker", &worker.0), ("handler", &handler.0), ("log", &log.0), ("admin", &admin.0)]
    }

    /// Returns the value of a setting, with its line. For a setting of handlers, returns the value in `[handler]`.
    pub(super) fn value(&self, declared: &Declared) -> Option<(Raw, Source)> {
        let (table, key) = declared.table_and_key();
        match self.tables().into_iter().find(|(name, _)| *name == table) {
            Some((_, keys)) => self.value_in(keys, key),
            None => self.tables.url.as_ref().map(|value| self.located(value)),
        }
    }

    /// Returns the value of `key`, with its line, if the table has it.
    pub(super) fn value_in(&self, keys: &Keys, key: &str) -> Option<(Raw, Source)> {
        keys.iter().find(|(found, _)| found.get_ref() == key).map(|(_, value)| self.located(value))
    }

    fn located(&self, value: &Spanned<Value>) -> (Raw, Source) {
        (Raw::Toml(value.get_ref().clone()), self.source_at(value.span().start))
    }

    /// Returns the `[handlers.TYPE]` tables, each with its job type.
    pub(super) fn routes(&self) -> impl Iterator<Item = (&Spanned<String>, &Keys)> {
        self.tables.handlers.0.iter().map(|(job_type, Table(keys))| (job_type, keys))
    }

    /// Returns the keys of `[handler]`.
    pub(super) fn default_handler(&self) -> &Keys {
        &self.tables.handler.0
    }

    /// Returns the error for a file without a handler. The error names the line where the user can add a handler. Returns
    /// `None` if the user names no file.
    pub(super) fn without_handler(&self) -> Option<ConfigError> {
        if self.path.as_os_str().is_empty() {
            return None;
        }
        let find = |is_wanted: fn(&str) -> bool| self.text.lines().position(is_wanted).map(|index| index + 1);
        let commented = find(is_commented_exec).map(|line| (line, "take the # off this line and name"));
        let table = || {
            find(|line| line.trim() == "[handler]")
                .map(|line| (line, "add exec = [\"CMD\", \"ARG\"] below this line for"))
        };
        let end = || (self.text.lines().count().max(1), "add [handler], and exec = [\"CMD\", \"ARG\"] below it, for");
        let (line, advice) = commented.or_else(table).unwrap_or_else(end);
        let problem =
            format!("no handler given; {advice} the command to run for each job, or give it with --exec or ZIZQ_EXEC");
        Some(ConfigError::new(Source::File(self.path.clone(), line), problem))
    }

    /// Returns the `Source` for the line of this file that contains the byte at `offset`.
    pub(super) fn source_at(&self, offset: usize) -> Source {
        Source::File(self.path.clone(), line_of(&self.text, offset))
    }
}

/// Returns the valid keys of a table.
fn keys_of(table: &str) -> impl Iterator<Item = &'static str> {
    let keys = SETTINGS.iter().map(|declared| declared.table_and_key());
    keys.filter(move |(found, _)| *found == table).map(|(_, key)| key)
}

/// The valid keys and tables at the top level of the file.
const TABLES: [&str; 7] = ["url", "tls", "worker", "handler", "handlers", "log", "admin"];

/// Returns the key in serde's message about an unknown field, or `None` for any other message.
fn unknown_field(message: &str) -> Option<&str> {
    message.strip_prefix("unknown field `")?.split_once('`').map(|(field, _)| field)
}

/// The Jaro similarity that a suggested key must exceed. Without a suggestion, the message lists all valid keys, which helps
/// more than a wrong suggestion.
const MIN_LIKENESS: f64 = 0.9;

/// Returns the message about a key that is not in `known`, with the likely correction or a list of the known keys.
fn unknown_key(key: &str, known: &[&str]) -> String {
    let with_key = |key: &str| -> Vec<String> {
        let found = SETTINGS.iter().map(|declared| declared.table_and_key()).filter(|(_, known)| *known == key);
        found
            .map(|(table, _)| if table.is_empty() { "the top level".to_owned() } else { format!("[{table}]") })
            .collect()
    };
    let by_flag = SETTINGS.iter().find(|declared| declared.name() == key).map(|declared| declared.table_and_key());
    let all: Vec<&str> = SETTINGS.iter().map(|declared| declared.table_and_key().1).collect();
    let (here, anywhere) = (nearest(key, known, MIN_LIKENESS), nearest(key, &all, MIN_LIKENESS));
    let correction = match (with_key(key), by_flag, here, anywhere) {
        (tables, ..) if !tables.is_empty() => format!("it is a key of {}", tables.join(" and of ")),
        (_, Some((table, key)), ..) => format!("it is `{key}` of [{table}]"),
        (_, _, Some(nearest), _) => format!("the nearest is `{nearest}`"),
        (_, _, _, Some(nearest)) => format!("the nearest is `{nearest}` of {}", with_key(nearest).join(" and of ")),
        _ => format!("expected {}", one_of(known)),
    };
    format!("unknown key `{key}`, {correction}")
}

fn one_of(keys: &[&str]) -> String {
    let quoted: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
    match &quoted[..] {
        [one, other] => format!("{one} or {other}"),
        [one] => one.clone(),
        many => format!("one of {}", many.join(", ")),
    }
}

/// Reports whether a line is a commented-out `exec = …`, as in the configuration file that the package installs.
fn is_commented_exec(line: &str) -> bool {
    let setting = line.trim_start().strip_prefix('#').map(str::trim_start);
    let value = setting.and_then(|setting| setting.strip_prefix("exec"));
    value.is_some_and(|value| value.trim_start().starts_with('='))
}

/// Returns the number of the line that contains the byte at `offset`, counted from 1.
fn line_of(text: &str, offset: usize) -> usize {
    text.bytes().take(offset).filter(|byte| *byte == b'\n').count() + 1
}
