//! [`Args`]: what was typed or set in the environment, not yet resolved. The only room that knows clap.

use std::ffi::OsString;
use std::fmt::{self, Write as _};
use std::io::Write as _;
use std::process::ExitCode;

use bytesize::ByteSize;
use clap::builder::styling::{AnsiColor, Styles};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};

use crate::chain::OneLine;
use crate::client::url::{without_secrets, without_user};
use crate::config::{
    ConfigError, DEFAULT_FIBERS, DEFAULT_MAX_JOB_SIZE, DEFAULT_RETRY_MAX_WAIT, DEFAULT_RETRY_MIN_WAIT,
    DEFAULT_RETRY_MULTIPLIER, DEFAULT_SHUTDOWN_DEADLINE, DEFAULT_STREAM_IDLE_TIMEOUT, DEFAULT_THREADS, DEFAULT_URL,
    Source,
};

/// A paragraph is one line: clap breaks lines where the terminal ends.
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

Exit status: 0 stopped as asked, 1 jobs had to be stopped or could not be reported, or the server refused the worker, 2 a \
mistake on the command line or in a variable, 78 a mistake in the configuration file, or a handler or certificate that \
cannot be used.

Try it without a server:
  zizq-worker --embedded --jobs config/demo-jobs.ndjson --exec config/handle.sh --exit-when-idle 1s";

/// What was given for one setting, and where.
#[derive(Debug, Clone)]
pub(crate) struct Given {
    pub(crate) values: Vec<String>,
    pub(crate) source: Source,
}

/// The command line and the environment.
#[derive(Debug)]
pub struct Args {
    matches: ArgMatches,
    /// `RUST_LOG`, which wins over the log level.
    pub(crate) rust_log: Option<String>,
    /// `PATH`, on which handlers are looked up.
    pub(crate) path_list: Option<OsString>,
    /// Everything that handlers may inherit.
    pub(crate) environment: Vec<(OsString, OsString)>,
    /// `NO_COLOR` (<https://no-color.org>).
    pub(crate) no_color: bool,
    /// `JOURNAL_STREAM`, see systemd.exec(5).
    pub(crate) journal_stream: Option<OsString>,
}

/// Reads `JOURNAL_STREAM`, which names the stream that systemd's journal reads.
#[expect(clippy::disallowed_methods, reason = "this is the room that reads the environment")]
pub fn journal_stream() -> Option<OsString> {
    std::env::var_os("JOURNAL_STREAM")
}

/// A command line that asks for something else than work: for help, or for another try. Says so when printed.
#[derive(Debug)]
pub struct Usage(clap::Error);

impl Usage {
    /// Prints it where it belongs, a mistake after `prefix`, and says how the process should end.
    pub fn report(&self, prefix: &str) -> ExitCode {
        // Nobody is left to tell when even this cannot be printed.
        let _ = match self.0.use_stderr() {
            true => writeln!(std::io::stderr(), "{prefix}zizq-worker: {self}"),
            false => self.0.print(),
        };
        u8::try_from(self.0.exit_code()).map_or(ExitCode::FAILURE, ExitCode::from)
    }
}

/// A mistake takes one line, like every other; what was asked for takes as many as it has.
impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.0.use_stderr() {
            return self.0.fmt(f);
        }
        let text = self.0.to_string();
        let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
        // A word that is no flag is hardly meant as the handler.
        let idle = ["For more information", "tip: to pass"];
        let telling: Vec<&str> =
            lines.filter(|line| !line.is_empty() && !idle.iter().any(|start| line.starts_with(start))).collect();
        let problem = telling.join("; ");
        write!(OneLine(f), "{}; see --help", without_user(problem.trim_start_matches("error: ")))
    }
}

impl Args {
    /// Reads a command line, program name first, and the environment.
    ///
    /// # Errors
    /// When it does not fit, or asks for help or the version.
    #[expect(clippy::disallowed_methods, reason = "this is the room that reads the environment")]
    pub fn try_parse_from(argv: impl IntoIterator<Item = OsString>) -> Result<Self, Usage> {
        let matches = command().try_get_matches_from(argv).map_err(Usage)?;
        let rust_log = std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
        let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
        let (path_list, environment) = (std::env::var_os("PATH"), std::env::vars_os().collect());
        Ok(Self { matches, rust_log, path_list, environment, no_color, journal_stream: journal_stream() })
    }

    /// What was given for the setting of that name. An empty variable counts as not set.
    ///
    /// # Errors
    /// When it is no text.
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

    /// The words after `--`.
    pub(crate) fn trailing_command(&self) -> Option<Vec<OsString>> {
        Some(self.matches.get_many::<OsString>("command")?.cloned().collect())
    }

    /// Whether the settings are to be shown, and nothing is to be run.
    pub fn is_check(&self) -> bool {
        self.is_set("check")
    }

    /// Whether whoever started this process wants to be told how it does.
    pub fn is_supervised(&self) -> bool {
        self.environment.iter().any(|(name, value)| name == "NOTIFY_SOCKET" && !value.is_empty())
    }

    /// Whether a flag without a value was given.
    pub(crate) fn is_set(&self, name: &str) -> bool {
        self.matches.get_flag(name)
    }
}

/// The environment variable of a setting.
fn variable(name: &str) -> String {
    format!("ZIZQ_{}", name.to_uppercase().replace('-', "_"))
}

/// A setting: `--name`, or its variable. Values are kept as text, so that every mistake is reported in one way.
fn setting(name: &'static str, value_name: &'static str, help: impl Into<String>) -> Arg {
    Arg::new(name)
        .long(name)
        .value_name(value_name)
        .env(variable(name))
        .hide_env_values(true)
        .value_parser(clap::value_parser!(OsString))
        .allow_negative_numbers(true)
        .help(help.into())
}

/// The whole command line, also for whoever makes documents of it.
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
    let command = command.next_help_heading("Server").args(server_args());
    let command = command.next_help_heading("Handler").args(handler_args());
    let command = command.next_help_heading("Worker").args(worker_args());
    let command = command.next_help_heading("Retries").args(retry_args());
    let command = command.next_help_heading("Operations").args(operations_args());
    let command = command.next_help_heading("Logging").args(log_args());
    command.next_help_heading("Trying it out").args(embedded_args())
}

fn server_args() -> Vec<Arg> {
    let idle = humantime::format_duration(DEFAULT_STREAM_IDLE_TIMEOUT);
    let size = ByteSize(DEFAULT_MAX_JOB_SIZE as u64);
    vec![
        setting("url", "URL", format!("Where the server is; a path prefix is kept [default: {DEFAULT_URL}]")),
        setting("tls-ca", "FILE", "Trust the certificates in this file (PEM) [default: those that the system trusts]"),
        setting("tls-client-cert", "FILE", "Show this certificate chain (PEM) to the server; needs its key"),
        setting("tls-client-key", "FILE", "The private key of that certificate (PEM)"),
        setting(
            "stream-idle-timeout",
            "DURATION",
            format!("Reconnect when nothing came for that long, heartbeats included [default: {idle}]"),
        ),
        setting("max-job-size", "SIZE", format!("The longest job that is accepted, like 64MiB [default: {size}]")),
        setting("worker-id", "ID", "What the server calls this worker in its log [default: HOSTNAME-PID]"),
    ]
}

fn handler_args() -> Vec<Arg> {
    vec![
        setting(
            "exec",
            "CMD",
            "The command to run for each job, split into words as a shell would, but run without one [required, here or elsewhere]",
        ),
        setting(
            "mode",
            "MODE",
            "spawn: start the command for each job; warm: keep it running, and hand it one job after another over a socket [default: spawn]",
        ),
        Arg::new("command")
            .value_name("CMD")
            .num_args(1..)
            .last(true)
            .value_parser(clap::value_parser!(OsString))
            .help("The same as separate words, after --; wins over ZIZQ_EXEC and the file"),
    ]
}

fn worker_args() -> Vec<Arg> {
    let deadline = humantime::format_duration(DEFAULT_SHUTDOWN_DEADLINE);
    vec![
        setting("queues", "A,B", "The queues to take jobs from; may be repeated [default: all queues]")
            .short('q')
            .visible_alias("queue")
            .action(ArgAction::Append),
        setting("threads", "N", format!("Worker threads [default: {DEFAULT_THREADS}]")).short('t'),
        setting(
            "fibers",
            "N",
            format!("Jobs at once in each thread; threads x fibers run at once [default: {DEFAULT_FIBERS}]"),
        )
        .short('f'),
        setting(
            "prefetch",
            "N",
            "Unreported jobs that the server may hand to this worker [default: 2 x threads x fibers]",
        )
        .short('p'),
        setting(
            "shutdown-deadline",
            "DURATION",
            format!("How long finishing may take after a signal [default: {deadline}]"),
        )
        .visible_alias("shutdown-timeout"),
        setting("max-jobs", "N", "Exit after starting exactly that many jobs [default: no limit]"),
        setting("max-time", "DURATION", "Exit after that long, when running jobs have finished [default: no limit]"),
        setting("exit-when-idle", "DURATION", "Exit once connected and without a job for that long [default: never]"),
        setting("config", "FILE", "The configuration file (TOML) [default: none]").short('c'),
    ]
}

fn retry_args() -> Vec<Arg> {
    let (min, max) = (DEFAULT_RETRY_MIN_WAIT, DEFAULT_RETRY_MAX_WAIT);
    let (min, max) = (humantime::format_duration(min), humantime::format_duration(max));
    vec![
        setting(
            "retry-min-wait",
            "DURATION",
            format!("The first wait before reconnecting or reporting again [default: {min}]"),
        ),
        setting("retry-max-wait", "DURATION", format!("The longest such wait [default: {max}]")),
        setting(
            "retry-multiplier",
            "X",
            format!("How much longer each wait is than the last [default: {DEFAULT_RETRY_MULTIPLIER}]"),
        ),
    ]
}

fn operations_args() -> Vec<Arg> {
    vec![
        setting(
            "admin-listen",
            "ADDRESS:PORT",
            "Serve /live, /ready, /status and /metrics over HTTP there, like 127.0.0.1:9290 [default: off]",
        ),
        Arg::new("check").long("check").action(ArgAction::SetTrue).help(
            "Check and print every setting with its origin, ask the server for its version, and exit without taking a job",
        ),
    ]
}

fn log_args() -> Vec<Arg> {
    vec![
        setting(
            "log-level",
            "LEVEL",
            "error, warn, info, debug or trace, and others by target, like info,zizq_worker::jobs=warn; RUST_LOG wins [default: info]",
        ),
        setting(
            "log-format",
            "FORMAT",
            "pretty, compact or json, on stderr [default: pretty on a terminal, else compact]",
        ),
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

#[cfg(not(feature = "embedded"))]
fn embedded_args() -> Vec<Arg> {
    Vec::new()
}
