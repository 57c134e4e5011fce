//! [`Args`]: the command line and the environment, from which the settings are resolved. This is the only module that uses clap.

use std::ffi::{OsStr, OsString};
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::process::ExitCode;

use clap::builder::styling::{AnsiColor, Styles};
use clap::builder::{PossibleValue, TypedValueParser};
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::chain::OneLine;
use crate::client::url::{without_secrets, without_user};
use crate::config::{ConfigError, Flag, Heading, SETTINGS, Source, Warning};
use crate::dispatch::is_about_a_job;

/// The end of the help. Each paragraph is one line, because clap wraps lines at the terminal's width.
const AFTER_HELP: &str = "\
Each setting is taken from its flag, else its environment variable, else the configuration file, else its default. \
Durations are written like 500ms or \"1m 30s\"; a bare number is seconds.

A handler gets the job's payload (JSON) on stdin and ZIZQ_JOB_ID, ZIZQ_JOB_TYPE, ZIZQ_JOB_QUEUE, ZIZQ_JOB_PRIORITY, \
ZIZQ_JOB_ATTEMPTS, ZIZQ_JOB_READY_AT, ZIZQ_WORKER_ID and ZIZQ_RESULT_FILE in its environment; where there is such a limit, \
also ZIZQ_JOB_RETRY_LIMIT and ZIZQ_JOB_TIMEOUT. Exit status 0 acknowledges the job; any \
other status, or death by a signal, reports it as failed, and the server decides when it is tried again. With --mode warm, a handler \
gets ZIZQ_WORKER_ID and ZIZQ_SOCKET alone: it connects to that Unix socket, reads each job as a line of JSON, and replies with \
{\"id\": …, \"ok\": true}.

SIGTERM or SIGINT (Ctrl-C) finishes and reports the jobs that were taken, then exits. A second one stops running jobs; \
the server hands them out again, with no attempt counted. SIGHUP reads the configuration file again; when the terminal is closed, it \
finishes like SIGTERM. SIGUSR2 is quiet: nothing \
more is taken until SIGCONT. SIGUSR1 logs what the worker is doing.

Exit status: 0 stopped as asked, 1 jobs had to be stopped or could not be reported, the server refused the worker, or an \
address is taken, 2 a mistake on the command line or in a variable, 78 a mistake in the configuration file, or a handler or certificate that \
cannot be used.

Try it without a server:
  echo '{\"queue\":\"q\",\"type\":\"hello\",\"payload\":1}' |
    zizq-worker --embedded --jobs - --exit-when-idle 1s -- cat";

/// The values given for one setting, and their source.
#[derive(Debug, Clone)]
pub(crate) struct Given {
    pub(crate) values: Vec<String>,
    pub(crate) source: Source,
}

/// The scope of `--check`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// All checks, including those that start handlers or ask the server.
    Everything,
    /// Only settings, files and addresses of this machine. No handler is started, and no server is asked.
    Offline,
}

/// The command line and the environment.
#[derive(Debug)]
pub struct Args {
    matches: ArgMatches,
    /// `RUST_LOG`, which overrides the log level in the settings.
    pub(crate) rust_log: Option<String>,
    /// `PATH`, in which handlers are looked up.
    pub(crate) path_list: Option<OsString>,
    /// The whole environment, from which handlers inherit variables.
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// Whether `NO_COLOR` is set and not empty (<https://no-color.org>).
    pub(crate) no_color: bool,
    /// `JOURNAL_STREAM`, see systemd.exec(5).
    pub(crate) journal_stream: Option<OsString>,
}

/// Reads `JOURNAL_STREAM`, which identifies the stream that systemd's journal reads.
#[expect(clippy::disallowed_methods, reason = "this is the room that reads the environment")]
pub fn journal_stream() -> Option<OsString> {
    std::env::var_os("JOURNAL_STREAM")
}

/// A command line that does not run the worker: it asks for help or the version, or has a mistake.
#[derive(Debug)]
pub struct Usage(clap::Error);

impl Usage {
    /// Prints help to stdout, or the mistake to stderr after `prefix`, and returns the exit code.
    pub fn report(&self, prefix: &str) -> ExitCode {
        // Ignore a failed write, because there is no other place to report it.
        let _ = if self.0.use_stderr() {
            writeln!(std::io::stderr(), "{prefix}zizq-worker: {self}")
        } else {
            self.0.print()
        };
        u8::try_from(self.0.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
    }
}

/// Displays a mistake on one line, and help with its own line breaks.
impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.use_stderr() {
            return self.0.fmt(f);
        }
        let text = self.0.to_string();
        let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
        // Drop clap's tip to put a mistyped flag after `--`, because the worker would then run the flag as the handler.
        let idle = ["For more information", "tip: to pass"];
        let telling: Vec<&str> =
            lines.filter(|line| !line.is_empty() && !idle.iter().any(|start| line.starts_with(start))).collect();
        let problem = telling.join("; ").replace(":; ", ": ");
        let problem = without_user(problem.trim_start_matches("error: "));
        let is_word = self.0.kind() == ErrorKind::UnknownArgument && !problem.contains("argument '-");
        let advice = if is_word { "a handler follows --, or is quoted after --exec; " } else { "" };
        write!(OneLine(f), "{problem}; {advice}see --help")
    }
}

impl Args {
    /// Parses a command line, program name first, and reads the environment.
    ///
    /// # Errors
    /// If the command line has a mistake, or asks for help or the version.
    #[expect(clippy::disallowed_methods, reason = "this is the room that reads the environment")]
    pub fn try_parse_from(argv: impl IntoIterator<Item = OsString>) -> Result<Self, Usage> {
        let matches = command().try_get_matches_from(argv).map_err(Usage)?;
        let rust_log = std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let (path_list, environment) = (std::env::var_os("PATH"), std::env::vars_os().collect());
        Ok(Self { matches, rust_log, path_list, environment, no_color, journal_stream: journal_stream() })
    }

    /// Returns the values given for a setting. An empty variable counts as not set.
    ///
    /// # Errors
    /// If a value is not UTF-8.
    pub(crate) fn given(&self, name: &'static str) -> Result<Option<Given>, ConfigError> {
        let Some(values) = self.matches.get_many::<OsString>(name) else { return Ok(None) };
        let source = match self.matches.value_source(name) {
            Some(ValueSource::EnvVariable) => Source::Variable(variable(name)),
            _ => Source::Flag(format!("--{name}")),
        };
        if matches!(source, Source::Variable(_)) && values.clone().all(|value| value.is_empty()) {
            return Ok(None);
        }
        match values.cloned().map(OsString::into_string).collect() {
            Ok(values) => Ok(Some(Given { values, source })),
            Err(value) => {
                let public = without_secrets(&value.to_string_lossy());
                Err(ConfigError::new(source, format!("must be valid UTF-8 (got {public})")))
            }
        }
    }

    /// Returns the words after `--`, if there are any.
    pub(crate) fn trailing_command(&self) -> Option<Vec<OsString>> {
        Some(self.matches.get_many::<OsString>("command")?.cloned().collect())
    }

    /// Returns the scope of the check if `--check` is given.
    pub fn check(&self) -> Option<Reach> {
        let reach = if self.is_set("offline") { Reach::Offline } else { Reach::Everything };
        self.is_set("check").then_some(reach)
    }

    /// Returns a warning for each environment variable that begins with `ZIZQ_` and belongs to no setting. The variables
    /// that a worker sets for its handlers give no warning, because a worker inherits them if it is started by a handler. An empty
    /// variable counts as not set.
    pub(crate) fn unknown_variables(&self) -> Vec<Warning> {
        let command = command();
        let known: Vec<&str> = command.get_arguments().filter_map(|arg| arg.get_env()?.to_str()).collect();
        let set = self.environment.iter().filter(|(name, value)| !value.is_empty() && !is_about_a_job(name));
        let set = set.map(|(name, _)| name.to_string_lossy().into_owned());
        let unknown = set.filter(|name| name.starts_with(PREFIX) && !known.contains(&name.as_str()));
        let mut names: Vec<String> = unknown.collect();
        names.sort();
        let warning = |variable: String| {
            let nearest = nearest(&variable, &known, MIN_LIKENESS).map(str::to_owned);
            Warning::UnknownVariable { variable, nearest }
        };
        names.into_iter().map(warning).collect()
    }

    /// Reports whether a service manager supervises this process.
    pub fn is_supervised(&self) -> bool {
        self.environment.iter().any(|(name, value)| name == "NOTIFY_SOCKET" && !value.is_empty())
    }

    /// Reports whether a flag that takes no value is given.
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.matches.get_flag(name)
    }
}

/// Prefix of each setting's environment variable.
const PREFIX: &str = "ZIZQ_";

/// Similarity (0 to 1) above which a known variable is suggested for a mistyped one. With a lower limit, unrelated variables would
/// be suggested for short names.
const MIN_LIKENESS: f64 = 0.8;

/// Returns the name of a setting's environment variable.
fn variable(name: &str) -> String {
    format!("{PREFIX}{}", name.to_uppercase().replace('-', "_"))
}

/// Returns the known name that is most similar to `name`, if the similarity is above `min_likeness`.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str], min_likeness: f64) -> Option<&'a str> {
    let likeness = |known: &str| strsim::jaro(name.trim_start_matches(PREFIX), known.trim_start_matches(PREFIX));
    let alike = known.iter().map(|known| (likeness(known), *known)).filter(|(likeness, _)| *likeness > min_likeness);
    alike.max_by(|(one, _), (other, _)| one.total_cmp(other)).map(|(_, known)| known)
}

/// A parser that accepts any text, and lists the valid words for shell completions. The text is checked when the settings are
/// resolved.
#[derive(Debug, Clone)]
struct Words(fn() -> Vec<&'static str>);

impl TypedValueParser for Words {
    type Value = OsString;

    fn parse_ref(&self, _: &Command, _: Option<&Arg>, value: &OsStr) -> Result<OsString, clap::Error> {
        Ok(value.to_owned())
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        let words = (self.0)();
        if words.is_empty() { None } else { Some(Box::new(words.into_iter().map(PossibleValue::new))) }
    }
}

/// Returns the clap argument for a setting's flag and environment variable. Clap does not parse the value, so that mistakes in
/// flags, variables and the file are all reported in the same way.
fn setting(flag: &Flag, help: String) -> Arg {
    let arg = Arg::new(flag.name)
        .long(flag.name)
        .value_name(flag.value_name)
        .env(variable(flag.name))
        .hide_env_values(true)
        .value_parser(Words(flag.words))
        .hide_possible_values(true)
        .allow_negative_numbers(true)
        .action(if flag.is_repeatable { ArgAction::Append } else { ArgAction::Set })
        .help(help);
    let arg = flag.short.into_iter().fold(arg, Arg::short);
    flag.alias.into_iter().fold(arg, Arg::visible_alias)
}

/// Returns the clap arguments of the declared settings under a heading.
fn settings(heading: Heading) -> impl Iterator<Item = Arg> {
    let flags = SETTINGS.iter().filter_map(move |declared| Some((declared, declared.flag.as_ref()?)));
    flags.filter(move |(_, flag)| flag.heading == heading).map(|(declared, flag)| {
        let default = match (declared.default)() {
            required if required == "required" => "[required, here or elsewhere]".to_owned(),
            default => format!("[default: {default}]"),
        };
        setting(flag, format!("{} {default}", flag.help))
    })
}

/// Returns the clap command. The man page and the completions are generated from it.
pub fn command() -> Command {
    let styles = Styles::styled().header(AnsiColor::Green.on_default().bold()).literal(AnsiColor::Cyan.on_default());
    let command = Command::new("zizq-worker")
        .about("Runs a command for each job of a Zizq queue server, and reports how it ended")
        .version(env!("CARGO_PKG_VERSION"))
        .styles(styles)
        .max_term_width(120)
        .disable_version_flag(true)
        .override_usage("zizq-worker [OPTIONS] --exec \"CMD ARGS\"\n       zizq-worker [OPTIONS] -- CMD ARGS...")
        .after_help(AFTER_HELP)
        .arg(
            Arg::new("version")
                .short('V')
                .visible_short_alias('v')
                .long("version")
                .action(ArgAction::Version)
                .help("Print version"),
        );
    let headings = [
        ("Server", Heading::Server, vec![]),
        ("Handler", Heading::Handler, vec![trailing_command()]),
        ("Worker", Heading::Worker, vec![config_file()]),
        ("Retries", Heading::Retries, vec![]),
        ("Operations", Heading::Operations, check()),
        ("Logging", Heading::Logging, vec![]),
    ];
    let command = headings.into_iter().fold(command, |command, (title, heading, more)| {
        command.next_help_heading(title).args(settings(heading).chain(more))
    });
    #[cfg(feature = "embedded")]
    let command = command.next_help_heading("Trying it out").args(embedded_args());
    command
}

fn trailing_command() -> Arg {
    Arg::new("command")
        .value_name("CMD")
        .num_args(1..)
        .last(true)
        .value_parser(clap::value_parser!(OsString))
        .help("The same as separate words, after --; wins over ZIZQ_EXEC and the file")
}

fn config_file() -> Arg {
    let flag =
        Flag { short: Some('c'), ..Flag::new("config", "FILE", Heading::Worker, "The configuration file (TOML)") };
    setting(&flag, format!("{} [default: none]", flag.help))
}

fn check() -> Vec<Arg> {
    let check =
        "Check and print every setting with its origin, ask the server for its version, and exit without taking a job";
    let offline = "With --check: ask no server and start no handler, as before a reload or in a build";
    vec![
        Arg::new("check").long("check").action(ArgAction::SetTrue).help(check),
        Arg::new("offline").long("offline").action(ArgAction::SetTrue).requires("check").help(offline),
    ]
}

#[cfg(feature = "embedded")]
fn embedded_args() -> Vec<Arg> {
    vec![
        Arg::new("embedded")
            .long("embedded")
            .action(ArgAction::SetTrue)
            .help("Start an in-memory server in this process, at --url; nothing in it outlives the process"),
        Arg::new("jobs")
            .long("jobs")
            .value_name("FILE")
            .value_parser(clap::value_parser!(OsString))
            .help("Enqueue the lines of FILE (- for stdin) in the embedded server: one JSON object with queue, type and payload each"),
    ]
}
