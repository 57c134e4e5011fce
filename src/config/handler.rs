//! Resolves and checks the handlers from `[handler]`, `[handlers.TYPE]`, `--exec` and the command after `--`.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::io::ErrorKind;
use std::num::NonZeroU64;
use std::path::PathBuf;

use signal_hook::low_level::signal_name;

use super::declared::{self, Declared, Example, SETTINGS, Shown};
use super::file::Keys;
use super::layers::{Layers, Parse, read};
use super::value::Raw;
use super::variable::{Variable, variable_of};
use super::{ConfigError, Source, Warning};
use crate::cli::Reach;
use crate::handler::{DEFAULT_KILL_GRACE, DEFAULT_START_TIMEOUT, Handler, Handlers, Mode, Pool, Stdin};
use crate::process::{Output, Program, Signal};

/// The valid words for the setting `stdin`.
pub(super) const STDIN_NAMES: [(&str, Stdin); 3] =
    [("payload", Stdin::Payload), ("job", Stdin::Job), ("none", Stdin::None)];

/// The valid words for the setting `mode`, and whether the handler is then warm.
pub(super) const MODE_NAMES: [(&str, bool); 2] = [("spawn", false), ("warm", true)];

/// The valid words for the setting `output`.
pub(super) const OUTPUT_NAMES: [(&str, Output); 3] =
    [("log", Output::Log), ("inherit", Output::Inherit), ("null", Output::Null)];

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
    // The package's file contains the settings that have a default value, although its handler is spawned.
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
type Written = (Vec<OsString>, Source);

fn default_command(layers: &Layers<'_>) -> Result<Option<Written>, ConfigError> {
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

/// The lookup of one handler's settings. A value in `route`, which is the table `[handlers.TYPE]`, overrides the value in
/// `[handler]`.
struct Scope<'a> {
    layers: &'a Layers<'a>,
    name: String,
    route: Option<&'a Keys>,
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
            stdin: self.pick(&declared::STDIN, |raw, name| raw.one_of(name, &STDIN_NAMES))?.unwrap_or_default(),
            output: self.pick(&declared::OUTPUT, |raw, name| raw.one_of(name, &OUTPUT_NAMES))?.unwrap_or_default(),
            success_exit_codes,
            kill_exit_codes,
            timeout: self.pick(&declared::TIMEOUT, Raw::positive_duration)?,
            kill_grace: self.pick(&declared::KILL_GRACE, Raw::duration)?.unwrap_or(DEFAULT_KILL_GRACE),
            drain_signal: self.pick(&declared::DRAIN_SIGNAL, |raw, name| raw.text(name).and_then(parse_signal))?,
            ..Handler::new(program)
        })
    }

    fn mode(&self) -> Result<Mode, ConfigError> {
        let is_warm = self.pick(&declared::MODE, is_warm)?.unwrap_or_default();
        // Check the settings of the pool even if the handler is spawned.
        let pool = self.pool()?;
        Ok(if is_warm { Mode::Warm(pool) } else { Mode::Spawn })
    }

    fn pool(&self) -> Result<Pool, ConfigError> {
        let max = self.pick(&declared::MAX_PROCESSES, Raw::count)?;
        let min = self.locate(&declared::MIN_PROCESSES, Raw::count_from_0)?;
        if let (Some((min, source)), Some(max)) = (&min, max)
            && *min > max.get()
        {
            let problem = format!("min_processes must be at most max_processes ({max}) (got {min})");
            return Err(ConfigError::new(source.clone(), problem));
        }
        let max_jobs = self.pick(&declared::PROCESS_MAX_JOBS, Raw::count)?;
        Ok(Pool {
            min_processes: min.map(|(min, _)| min).unwrap_or_default(),
            max_processes: max,
            start_timeout: self
                .pick(&declared::START_TIMEOUT, Raw::positive_duration)?
                .unwrap_or(DEFAULT_START_TIMEOUT),
            max_jobs: max_jobs.and_then(|count| NonZeroU64::new(count.get() as u64)),
            max_age: self.pick(&declared::MAX_AGE, Raw::positive_duration)?,
            max_memory: self.pick(&declared::MAX_MEMORY, Raw::size)?.map(|bytes| bytes as u64),
            idle_timeout: self.pick(&declared::IDLE_TIMEOUT, Raw::positive_duration)?,
        })
    }

    /// Returns the value in the route's table, or else the default handler's.
    fn pick<T>(&self, declared: &Declared, parse: Parse<T>) -> Result<Option<T>, ConfigError> {
        Ok(self.locate(declared, parse)?.map(|(value, _)| value))
    }

    fn locate<T>(&self, declared: &Declared, parse: Parse<T>) -> Result<Option<(T, Source)>, ConfigError> {
        let own = self.own(declared, parse)?;
        let found = if own.is_some() { own } else { self.layers.locate(declared, parse)? };
        found.iter().for_each(|(_, source)| self.note(declared.table_and_key().1, source));
        Ok(found)
    }

    /// Returns the value in the route's table.
    fn own<T>(&self, declared: &Declared, parse: Parse<T>) -> Result<Option<(T, Source)>, ConfigError> {
        let Some((raw, source)) = self.own_value(declared) else { return Ok(None) };
        Ok(Some((read(declared, &raw, &source, parse)?, source)))
    }

    fn own_value(&self, declared: &Declared) -> Option<(Raw, Source)> {
        self.layers.file.value_in(self.route?, declared.table_and_key().1)
    }

    fn note(&self, name: &str, source: &Source) {
        self.layers.note(&format!("{}.{name}", self.name), source, "");
    }

    /// Returns the handler's environment. Without `env_clear`, the handler inherits all variables of the worker's environment
    /// except those for which `is_the_workers_own` returns true. With `env_clear`, it inherits only the variables in `pass_env`.
    /// Variables in `env` override inherited ones, and the route's `env` overrides the default handler's.
    fn env(&self) -> Result<Vec<(OsString, OsString)>, ConfigError> {
        let clear = self.pick(&declared::ENV_CLEAR, Raw::boolean)?.unwrap_or_default();
        let pass = self.locate(&declared::PASS_ENV, Raw::strings)?;
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
        let is_passed = |name: &OsStr| {
            if clear { pass.iter().any(|pass| name == pass.as_str()) } else { !is_the_workers_own(name) }
        };
        let inherited = self.layers.args.environment.iter().filter(|(name, _)| is_passed(name));
        let mut env: Vec<(OsString, OsString)> = inherited.cloned().collect();
        let tables = [self.layers.file.value(&declared::ENV), self.own_value(&declared::ENV)];
        for (raw, source) in tables.into_iter().flatten() {
            self.note("env", &source);
            for (name, variable) in read(&declared::ENV, &raw, &source, Raw::variables)? {
                let value = self.value_of(&name, &variable, &source)?;
                self.layers.note(&variable_of(&self.name, &name), &source, variable.path());
                env.push((OsString::from(name), value));
            }
        }
        Ok(env)
    }

    /// Returns the value of a variable. An offline check does not need the permission to read a file, because systemd lets only
    /// the worker itself read its credentials, not a command of `ExecReload=`.
    fn value_of(&self, name: &str, variable: &Variable, source: &Source) -> Result<OsString, ConfigError> {
        variable.resolve().or_else(|problem| {
            let is_check = self.layers.args.check() == Some(Reach::Offline);
            if !is_check || problem.kind() != ErrorKind::PermissionDenied {
                return Err(ConfigError::unusable(source.clone(), format!("env.{name}: {problem}")));
            }
            let (handler, variable, problem) = (self.name.clone(), name.to_owned(), problem.to_string());
            self.layers.warn(Warning::UnreadableVariable { handler, variable, problem });
            Ok(OsString::new())
        })
    }

    fn cwd(&self) -> Result<Option<PathBuf>, ConfigError> {
        let Some((cwd, source)) = self.locate(&declared::CWD, Raw::text)? else {
            return Ok(None);
        };
        match std::path::absolute(&cwd).ok().filter(|path| path.is_dir()) {
            Some(path) => Ok(Some(path)),
            None => Err(ConfigError::unusable(source, format!("cwd must be a directory that exists (got {cwd})"))),
        }
    }

    fn exit_codes(&self) -> Result<(BTreeSet<u8>, BTreeSet<u8>), ConfigError> {
        let success = self.pick(&declared::SUCCESS_EXIT_CODES, Raw::exit_codes)?;
        let success = success.unwrap_or_default();
        match self.locate(&declared::KILL_EXIT_CODES, Raw::exit_codes)? {
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

/// Reports whether a variable starts with `ZIZQ_`, or is for messages to the service manager. A handler that inherited such a
/// variable could send messages to the service manager in the worker's name.
fn is_the_workers_own(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b"ZIZQ_")
        || ["NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"].iter().any(|own| name == *own)
}

fn is_warm(raw: &Raw, name: &str) -> Result<bool, String> {
    raw.one_of(name, &MODE_NAMES)
}

/// Parses a signal's name, with or without the prefix `SIG`. Rejects SIGKILL and SIGSTOP, which no process can catch.
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
