//! [`Setting`]: a setting with its effective value and its source, for display.

use std::borrow::Cow;
use std::collections::BTreeSet;

use super::declared::{Declared, Reload, SETTINGS, Shown, list};
use super::handler::{Handler, Mode};
use super::handlers::table_of;
use super::variable::variable_of;
use super::{Config, Source};

/// A setting with its effective value and its source.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The key in the configuration file.
    pub name: String,
    /// The effective value.
    pub value: String,
    /// The value that the admin server shows instead of `value`, if `value` can contain a secret.
    pub public_value: Option<String>,
    /// The value's source. `None` for a default.
    pub source: Option<Source>,
    /// The point at which a changed value takes effect: at once, with a new stream, or after a restart.
    pub reload: Reload,
}

impl Config {
    /// Returns every setting with its effective value. The settings of handlers come last.
    pub fn settings(&self) -> Vec<Setting> {
        let own = SETTINGS.iter().filter_map(|declared| match declared.shown {
            Shown::Worker(show) => Some(self.setting(declared, declared.key.to_owned(), show(self))),
            _ => None,
        });
        let mut handlers: Vec<_> = self.handlers.by_type().collect();
        handlers.sort_by_key(|(job_type, _)| *job_type);
        let handlers = handlers.into_iter().flat_map(|(job_type, handler)| self.handler_settings(job_type, handler));
        own.chain(handlers).collect()
    }

    fn setting(&self, declared: &Declared, name: String, value: String) -> Setting {
        let by_rust_log = declared.key == "log.level" && self.log.filter.is_some();
        let written = self.sources.get(&name).map(|(source, _)| source.clone());
        let source = if by_rust_log { Some(Source::Variable("RUST_LOG".to_owned())) } else { written };
        Setting { name, value, public_value: None, source, reload: declared.reload }
    }

    fn handler_settings(&self, job_type: Option<&str>, handler: &Handler) -> Vec<Setting> {
        let table = table_of(job_type);
        let settings = SETTINGS.iter().filter_map(|declared| {
            let (value, public_value) = match (&declared.shown, &handler.mode) {
                (Shown::Handler(show), _) => (show(handler), None),
                (Shown::Private(show, show_others), _) => (show(handler), Some(show_others(handler))),
                (Shown::Warm(show), Mode::Warm(pool)) => (show(pool), None),
                (Shown::Variables, _) => {
                    let variables = self.variables(&table, handler);
                    let public = format!("{} variables", variables.len());
                    (list(variables), Some(public))
                }
                _ => return None,
            };
            let (_, key) = declared.table_and_key();
            Some(Setting { public_value, ..self.setting(declared, format!("{table}.{key}"), value) })
        });
        settings.collect()
    }

    /// Returns the names of a handler's environment variables, each with the file that holds its value, if any.
    fn variables(&self, table: &str, handler: &Handler) -> Vec<String> {
        let names: BTreeSet<_> = handler.env.iter().map(|(name, _)| name.to_string_lossy()).collect();
        let shown = |name: Cow<'_, str>| match self.sources.get(&variable_of(table, &name)) {
            Some((_, path)) if !path.is_empty() => format!("{name} (from {path})"),
            _ => name.into_owned(),
        };
        names.into_iter().map(shown).collect()
    }

    /// Returns the path that the user gave for the setting `key`, or `none` if the setting is not given.
    pub(super) fn file(&self, key: &str) -> String {
        self.sources.get(key).map_or("none".to_owned(), |(_, path)| path.clone())
    }
}
