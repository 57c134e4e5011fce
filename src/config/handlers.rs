//! [`Handlers`]: the handlers by job type, from `[handler]`, `[handlers.TYPE]`, `--exec` and the command after `--`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::num::NonZeroUsize;
use std::time::Duration;

use super::declared::{self, Declared, Example, SETTINGS, Shown};
use super::handler::{Handler, Mode, Scope, is_warm};
use super::layers::Layers;
use super::value::Raw;
use super::{ConfigError, Source, Warning};

/// The handlers by job type, and the default one.
#[derive(Debug, Clone, Default)]
pub struct Handlers {
    /// The handlers by exact job type.
    pub routes: HashMap<String, Handler>,
    /// The handler for all other types.
    pub default: Option<Handler>,
}

impl Handlers {
    fn all(&self) -> impl Iterator<Item = &Handler> {
        self.routes.values().chain(&self.default)
    }

    /// Reports whether any handler is warm.
    pub(crate) fn is_any_warm(&self) -> bool {
        self.all().any(|handler| matches!(handler.mode, Mode::Warm(_)))
    }

    /// Returns the number of simultaneous processes to expect if up to `concurrency` jobs run at once: the sum of the sizes of all
    /// warm pools, but at least `concurrency`.
    pub(crate) fn max_processes(&self, concurrency: usize) -> usize {
        let warm = self.all().filter_map(|handler| match &handler.mode {
            Mode::Spawn => None,
            Mode::Warm(pool) => Some(pool.max_processes.map_or(concurrency, NonZeroUsize::get)),
        });
        warm.sum::<usize>().max(concurrency)
    }

    /// Returns each handler with its job type, `None` for the default handler.
    pub(crate) fn by_type(&self) -> impl Iterator<Item = (Option<&str>, &Handler)> {
        let routes = self.routes.iter().map(|(job_type, handler)| (Some(job_type.as_str()), handler));
        self.default.iter().map(|handler| (None, handler)).chain(routes)
    }

    /// Returns the longest time that a job can take, including the kill grace. `None` if a handler has no time limit.
    pub(crate) fn longest_job(&self) -> Option<Duration> {
        self.all().try_fold(Duration::ZERO, |longest, handler| Some(longest.max(handler.timeout? + handler.kill_grace)))
    }

    /// Returns the longest `kill_grace` of all handlers.
    pub(crate) fn longest_grace(&self) -> Duration {
        self.all().map(|handler| handler.kill_grace).max().unwrap_or_default()
    }
}

/// Returns all handlers, checked as far as possible without starting a process.
pub(super) fn resolve(layers: &Layers<'_>) -> Result<Handlers, ConfigError> {
    let command = default_command(layers)?;
    // Check the mode on the command line even if each handler in the file has a mode of its own.
    layers.pick(&declared::MODE, is_warm)?;
    let mut handlers = Handlers::default();
    for (job_type, route) in layers.file.routes() {
        let name = table_of(Some(job_type.get_ref()));
        let scope = Scope { layers, name, route: Some(route) };
        let Some(command) = scope.own(&declared::EXEC, Raw::command)?.or_else(|| command.clone()) else {
            let problem = format!("handlers.{} has no exec, and there is no default one", job_type.get_ref());
            return Err(ConfigError::new(layers.file.source_at(job_type.span().start), problem));
        };
        handlers.routes.insert(job_type.get_ref().clone(), scope.handler(command)?);
    }
    let scope = Scope { layers, name: table_of(None), route: None };
    handlers.default = command.map(|command| scope.handler(command)).transpose()?;
    if handlers.default.is_none() && handlers.routes.is_empty() {
        let in_file = layers.file.without_handler();
        return Err(in_file.unwrap_or_else(|| ConfigError::new(Source::Missing, NO_HANDLER)));
    }
    warn_of_unused_settings(layers, &handlers);
    Ok(handlers)
}

/// Warns of settings of warm handlers in a table that applies only to spawned handlers.
fn warn_of_unused_settings(layers: &Layers<'_>, handlers: &Handlers) {
    // Skip settings whose example is the default: the package's configuration file contains them, although its handler is spawned.
    let is_of_warm = |declared: &Declared| {
        matches!(declared.shown, Shown::Warm(_)) && !matches!(declared.example, Example::Default(_))
    };
    let is_spawned = |job_type: &str| handlers.routes.get(job_type).is_some_and(|handler| handler.mode == Mode::Spawn);
    let spawned = layers.file.routes().filter(|(job_type, _)| is_spawned(job_type.get_ref()));
    let tables = spawned.map(|(job_type, keys)| (table_of(Some(job_type.get_ref())), keys));
    let default = (!handlers.is_any_warm()).then(|| (table_of(None), layers.file.default_handler()));
    for (handler, keys) in tables.chain(default) {
        let of_warm =
            SETTINGS.iter().filter(|declared| is_of_warm(declared)).map(|declared| declared.table_and_key().1);
        let settings: Vec<&str> = of_warm.filter(|key| layers.file.value_in(keys, key).is_some()).collect();
        if !settings.is_empty() {
            layers.warn(Warning::NotWarm { handler, settings: settings.join(", ") });
        }
    }
}

const NO_HANDLER: &str = "no handler given; say what to run with --exec \"CMD ARGS\", -- CMD ARGS, ZIZQ_EXEC, or exec in the \
     file's [handler] or [handlers.TYPE]";

/// The words of a command, and the source of the setting that has them.
pub(super) type WrittenCommand = (Vec<OsString>, Source);

fn default_command(layers: &Layers<'_>) -> Result<Option<WrittenCommand>, ConfigError> {
    let flag = layers.args.given("exec")?.map(|given| given.source);
    match layers.args.trailing_command() {
        Some(_) if matches!(flag, Some(Source::Flag(_))) => {
            Err(ConfigError::new(Source::TrailingCommand, "give the handler once: with --exec or after --, not both"))
        }
        Some(words) => Ok(Some((words, Source::TrailingCommand))),
        None => layers.locate(&declared::EXEC, Raw::command),
    }
}

/// Returns the name of a handler's table in the file. For the default handler, `job_type` is `None`.
pub(super) fn table_of(job_type: Option<&str>) -> String {
    let is_bare = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
    match job_type {
        None => "handler".to_owned(),
        Some(job_type) if is_bare(job_type) => format!("handlers.{job_type}"),
        Some(job_type) => format!("handlers.{job_type:?}"),
    }
}
