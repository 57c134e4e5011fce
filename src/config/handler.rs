//! The handlers: the file's `[handler]` and `[handlers.TYPE]` tables, and `--exec`, found and ready to run.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::num::NonZeroU64;
use std::path::PathBuf;

use signal_hook::low_level::signal_name;

use super::file::{Field, HandlerTable};
use super::layers::Layers;
use super::value::Raw;
use super::{ConfigError, Source};
use crate::handler::{DEFAULT_KILL_GRACE, DEFAULT_START_TIMEOUT, Handler, Handlers, Mode, Pool, Stdin};
use crate::process::{Output, Program, Signal};

/// The words of `stdin`.
pub(super) const STDIN_NAMES: [(&str, Stdin); 3] =
    [("payload", Stdin::Payload), ("job", Stdin::Job), ("none", Stdin::None)];

/// A mode without its settings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ModeName {
    Spawn,
    Warm,
}

impl ModeName {
    pub(super) fn of(mode: &Mode) -> Self {
        match mode {
            Mode::Spawn => Self::Spawn,
            Mode::Warm(_) => Self::Warm,
        }
    }
}

/// The words of `mode`.
pub(super) const MODE_NAMES: [(&str, ModeName); 2] = [("spawn", ModeName::Spawn), ("warm", ModeName::Warm)];

/// The words of `output`.
pub(super) const OUTPUT_NAMES: [(&str, Output); 3] =
    [("log", Output::Log), ("inherit", Output::Inherit), ("null", Output::Null)];

/// Every handler, checked as far as that can be done without running it.
pub(super) fn resolve(layers: &Layers<'_>) -> Result<Handlers, ConfigError> {
    let tables = &layers.file.table;
    let command = default_command(layers)?;
    let mode = layers.locate("mode", &tables.handler.0.mode, |raw| raw.one_of("mode", &MODE_NAMES))?;
    let mut handlers = Handlers::default();
    for (job_type, table) in &tables.handlers {
        let name = table_of(Some(job_type.get_ref()));
        let scope = Scope { layers, name, route: Some(&table.0), default: &tables.handler.0, mode: &mode };
        let command = match layers.locate_in_file(&table.0.exec, |raw| raw.command("exec"))?.or_else(|| command.clone())
        {
            Some(command) => command,
            None => {
                let problem = format!("handlers.{} has no exec, and there is no default one", job_type.get_ref());
                return Err(ConfigError::new(layers.file.source_at(job_type.span().start), problem));
            }
        };
        handlers.routes.insert(job_type.get_ref().clone(), scope.handler(command)?);
    }
    let scope = Scope { layers, name: table_of(None), route: None, default: &tables.handler.0, mode: &mode };
    handlers.default = command.map(|command| scope.handler(command)).transpose()?;
    match handlers.default.is_none() && handlers.routes.is_empty() {
        true => Err(ConfigError::new(Source::Missing, NO_HANDLER)),
        false => Ok(handlers),
    }
}

const NO_HANDLER: &str = "no handler given; say what to run with --exec \"CMD ARGS\", -- CMD ARGS, ZIZQ_EXEC, or exec in the \
     file's [handler] or [handlers.TYPE]";

/// The words of a command, and where they were written.
type Written = (Vec<OsString>, Source);

fn default_command(layers: &Layers<'_>) -> Result<Option<Written>, ConfigError> {
    let flag = layers.args.given("exec")?.map(|given| given.source);
    match layers.args.trailing_command() {
        Some(_) if matches!(flag, Some(Source::Flag(_))) => {
            Err(ConfigError::new(Source::TrailingCommand, "give the handler once: with --exec or after --, not both"))
        }
        Some(words) => Ok(Some((words, Source::TrailingCommand))),
        None => layers.locate("exec", &layers.file.table.handler.0.exec, |raw| raw.command("exec")),
    }
}

/// The name of a handler's table in the file.
pub(super) fn table_of(job_type: Option<&str>) -> String {
    let is_bare = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c));
    match job_type {
        None => "handler".to_owned(),
        Some(job_type) if is_bare(job_type) => format!("handlers.{job_type}"),
        Some(job_type) => format!("handlers.{job_type:?}"),
    }
}

/// What the settings of one handler are looked up in: its route, if it is one's, and then the default.
struct Scope<'a> {
    layers: &'a Layers<'a>,
    name: String,
    route: Option<&'a HandlerTable>,
    default: &'a HandlerTable,
    /// The default handler's mode, wherever it was written.
    mode: &'a Option<(ModeName, Source)>,
}

impl Scope<'_> {
    fn handler(&self, (words, source): Written) -> Result<Handler, ConfigError> {
        self.note("exec", &source);
        let mut words = words.into_iter();
        let Some(name) = words.next() else {
            return Err(ConfigError::new(source, "exec must name a command (got nothing)"));
        };
        let program = Program::find(name, words.collect(), self.layers.args.path_list.as_ref())
            .map_err(|problem| ConfigError::unusable(source, format!("handler cannot be run: {problem}")))?;
        let (success_exit_codes, kill_exit_codes) = self.exit_codes()?;
        Ok(Handler {
            mode: self.mode()?,
            env: self.env()?,
            cwd: self.cwd()?,
            stdin: self
                .pick("stdin", |table| &table.stdin, |raw| raw.one_of("stdin", &STDIN_NAMES))?
                .unwrap_or_default(),
            output: self
                .pick("output", |table| &table.output, |raw| raw.one_of("output", &OUTPUT_NAMES))?
                .unwrap_or_default(),
            success_exit_codes,
            kill_exit_codes,
            timeout: self.pick("timeout", |table| &table.timeout, |raw| raw.positive_duration("timeout"))?,
            kill_grace: self
                .pick("kill_grace", |table| &table.kill_grace, |raw| raw.duration("kill_grace"))?
                .unwrap_or(DEFAULT_KILL_GRACE),
            drain_signal: self.pick(
                "drain_signal",
                |table| &table.drain_signal,
                |raw| raw.text("drain_signal").and_then(parse_signal),
            )?,
            ..Handler::new(program)
        })
    }

    fn mode(&self) -> Result<Mode, ConfigError> {
        let own = match self.route {
            Some(route) => self.layers.locate_in_file(&route.mode, |raw| raw.one_of("mode", &MODE_NAMES))?,
            None => None,
        };
        let found = own.or_else(|| self.mode.clone());
        found.iter().for_each(|(_, source)| self.note("mode", source));
        let pool = self.pool()?;
        Ok(match found {
            Some((ModeName::Warm, _)) => Mode::Warm(pool),
            _ => Mode::Spawn,
        })
    }

    fn pool(&self) -> Result<Pool, ConfigError> {
        let max = self.pick("max_processes", |table| &table.max_processes, |raw| raw.count("max_processes"))?;
        let min =
            self.locate("min_processes", |table| &table.min_processes, |raw| raw.count_from_0("min_processes"))?;
        if let (Some((min, source)), Some(max)) = (&min, max)
            && *min > max.get()
        {
            let problem = format!("min_processes must be at most max_processes ({max}) (got {min})");
            return Err(ConfigError::new(source.clone(), problem));
        }
        let duration = |name: &'static str, field: fn(&HandlerTable) -> &Field| {
            self.pick(name, field, |raw| raw.positive_duration(name))
        };
        let max_jobs = self.pick("max_jobs", |table| &table.max_jobs, |raw| raw.count("max_jobs"))?;
        Ok(Pool {
            min_processes: min.map(|(min, _)| min).unwrap_or_default(),
            max_processes: max,
            start_timeout: duration("start_timeout", |table| &table.start_timeout)?.unwrap_or(DEFAULT_START_TIMEOUT),
            max_jobs: max_jobs.and_then(|count| NonZeroU64::new(count.get() as u64)),
            max_age: duration("max_age", |table| &table.max_age)?,
            max_memory: self
                .pick("max_memory", |table| &table.max_memory, |raw| raw.size("max_memory"))?
                .map(|bytes| bytes as u64),
            idle_timeout: duration("idle_timeout", |table| &table.idle_timeout)?,
        })
    }

    /// The setting of the route, or else the default's.
    fn pick<T>(
        &self,
        name: &str,
        field: impl Fn(&HandlerTable) -> &Field,
        parse: impl Fn(&Raw<'_>) -> Result<T, String>,
    ) -> Result<Option<T>, ConfigError> {
        self.locate(name, field, parse).map(|found| found.map(|(value, _)| value))
    }

    fn locate<T>(
        &self,
        name: &str,
        field: impl Fn(&HandlerTable) -> &Field,
        parse: impl Fn(&Raw<'_>) -> Result<T, String>,
    ) -> Result<Option<(T, Source)>, ConfigError> {
        let tables = self.route.into_iter().chain([self.default]);
        let Some(field) = tables.map(field).find(|field| field.is_some()) else { return Ok(None) };
        let found = self.layers.locate_in_file(field, parse)?;
        found.iter().for_each(|(_, source)| self.note(name, source));
        Ok(found)
    }

    fn note(&self, name: &str, source: &Source) {
        self.layers.note(&format!("{}.{name}", self.name), source, "");
    }

    /// The inherited environment without the worker's own settings, or what `pass_env` names of it; then `env`, key by
    /// key the route's or else the default's.
    fn env(&self) -> Result<Vec<(OsString, OsString)>, ConfigError> {
        let clear =
            self.pick("env_clear", |table| &table.env_clear, |raw| raw.boolean("env_clear"))?.unwrap_or_default();
        let pass = self.locate("pass_env", |table| &table.pass_env, |raw| raw.strings("pass_env"))?;
        if let Some((names, source)) = &pass
            && !names.is_empty()
            && !clear
        {
            return Err(ConfigError::new(
                source.clone(),
                "pass_env goes with env_clear = true: without it, everything is passed",
            ));
        }
        let pass = pass.map(|(names, _)| names).unwrap_or_default();
        let inherited = self.layers.args.environment.iter().filter(|(name, _)| match clear {
            true => pass.iter().any(|pass| name == pass.as_str()),
            false => !is_the_workers_own(name),
        });
        let mut env: Vec<(OsString, OsString)> = inherited.cloned().collect();
        for table in [Some(self.default), self.route].into_iter().flatten() {
            if let Some((added, source)) = self.layers.locate_in_file(&table.env, |raw| raw.variables("env"))? {
                self.note("env", &source);
                env.extend(added);
            }
        }
        Ok(env)
    }

    fn cwd(&self) -> Result<Option<PathBuf>, ConfigError> {
        let Some((cwd, source)) = self.locate("cwd", |table| &table.cwd, |raw| raw.text("cwd"))? else {
            return Ok(None);
        };
        match std::path::absolute(&cwd).ok().filter(|path| path.is_dir()) {
            Some(path) => Ok(Some(path)),
            None => Err(ConfigError::unusable(source, format!("cwd must be a directory that exists (got {cwd})"))),
        }
    }

    fn exit_codes(&self) -> Result<(BTreeSet<u8>, BTreeSet<u8>), ConfigError> {
        let success = self.pick(
            "success_exit_codes",
            |table| &table.success_exit_codes,
            |raw| raw.exit_codes("success_exit_codes"),
        )?;
        let success = success.unwrap_or_default();
        match self.locate("kill_exit_codes", |table| &table.kill_exit_codes, |raw| raw.exit_codes("kill_exit_codes"))? {
            None => Ok((success, BTreeSet::new())),
            Some((kill, source)) => match kill.iter().find(|code| **code == 0 || success.contains(code)) {
                Some(code) => {
                    Err(ConfigError::new(source, format!("kill_exit_codes must not name a success (got {code})")))
                }
                None => Ok((success, kill)),
            },
        }
    }
}

/// Its settings, and its line to the service manager: a handler that spoke there would speak for the worker.
fn is_the_workers_own(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"ZIZQ_")
        || ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"].iter().any(|own| name == *own)
}

/// By its name, with or without SIG. What no process can catch would tell it nothing.
fn parse_signal(name: String) -> Result<Signal, String> {
    let wanted = name.trim().to_uppercase();
    let named = |number: &i32| {
        signal_name(*number).is_some_and(|known| known == wanted || known.trim_start_matches("SIG") == wanted)
    };
    (1..32)
        .find(named)
        .and_then(Signal::from_named_raw)
        .filter(|signal| ![Signal::KILL, Signal::STOP].contains(signal))
        .ok_or_else(|| format!("drain_signal must be a signal that can be caught, like USR1 (got {name})"))
}
