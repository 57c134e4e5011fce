//! [`Declared`]: the declaration of a setting. [`SETTINGS`]: the declarations of all settings. The declarations are the single
//! source for the flags and the help, the keys of the file, `--check`, the reload, the man page, the table of settings in the docs,
//! and the commented configuration file (`config/zizq-worker.toml`).

use std::time::Duration;

use bytesize::ByteSize;
use humantime::format_duration;
use signal_hook::low_level::signal_name;

use super::Config;
use super::handler::{
    DEFAULT_KILL_GRACE, DEFAULT_START_TIMEOUT, Handler, MODE_NAMES, Mode, OUTPUT_NAMES, PoolSettings, STDIN_NAMES,
};
use super::log::{LogFormat, LogLevel};
use super::value::{name_in, names};
use super::worker::{DEFAULT_FIBERS, DEFAULT_SHUTDOWN_DEADLINE, DEFAULT_THREADS};
use crate::backoff::{DEFAULT_RETRY_MAX_WAIT, DEFAULT_RETRY_MIN_WAIT, DEFAULT_RETRY_MULTIPLIER};
use crate::client::DEFAULT_URL;
use crate::stream::{DEFAULT_MAX_JOB_SIZE, DEFAULT_STREAM_IDLE_TIMEOUT};

/// The declaration of one setting.
#[derive(Debug)]
pub struct Declared {
    /// The key in the file, with its table: `worker.threads`. A key in `[handler]` also stands for the same key in each
    /// `[handlers.TYPE]`.
    pub key: &'static str,
    /// The flag. The name of the environment variable is derived from the flag's name. `None` if the setting can only be given in
    /// the file.
    pub flag: Option<Flag>,
    /// The default, in words.
    pub default: fn() -> String,
    /// The explanation in the commented configuration file. It names the default unless the example is the default. Empty if the
    /// preceding setting's comment also explains this setting.
    pub comment: &'static str,
    /// The value in the commented configuration file.
    pub example: Example,
    /// The effect of a changed value on a running worker.
    pub reload: Reload,
    /// The way to show the effective value to people.
    pub(super) shown: Shown,
}

/// A flag of the command line.
#[derive(Debug)]
pub struct Flag {
    /// The flag without its dashes.
    pub name: &'static str,
    pub(crate) short: Option<char>,
    pub(crate) alias: Option<&'static str>,
    pub(crate) value_name: &'static str,
    pub(crate) heading: Heading,
    pub(crate) help: &'static str,
    /// The words that shell completions offer. Empty if they offer none.
    pub(crate) words: fn() -> Vec<&'static str>,
    pub(crate) is_repeatable: bool,
}

/// A group of flags in the help.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Heading {
    Server,
    Handler,
    Worker,
    Retries,
    Operations,
    Logging,
}

/// A value in the commented configuration file.
#[derive(Debug, Clone, Copy)]
pub enum Example {
    /// The default itself.
    Default(&'static str),
    /// A value other than the default, commented out.
    Other(&'static str),
}

/// The effect of a changed value on a running worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reload {
    /// The next job or log line obeys the new value.
    AtOnce,
    /// The worker opens a new stream with the new value.
    NewStream,
    /// The value takes effect after a restart.
    Restart,
}

/// The way to show the effective value.
#[derive(Debug)]
pub(super) enum Shown {
    Worker(fn(&Config) -> String),
    Handler(fn(&Handler) -> String),
    /// A setting of warm handlers.
    Warm(fn(&PoolSettings) -> String),
    /// A handler setting whose value can contain a secret. The second function returns the text that the admin server shows.
    Private(fn(&Handler) -> String, fn(&Handler) -> String),
    /// The names of a handler's variables, and the files that hold their values. The admin server shows only the number of
    /// variables.
    Variables,
    Never,
}

impl Declared {
    /// Returns the declaration of a handler setting that has no flag.
    const fn of_handlers(key: &'static str, example: Example) -> Self {
        Self {
            key,
            flag: None,
            default: || NONE.to_owned(),
            comment: "",
            example,
            reload: Reload::AtOnce,
            shown: Shown::Never,
        }
    }

    /// Returns the name that messages use for the setting: the name of the flag with underscores, or the key without its table.
    pub(super) fn name(&self) -> String {
        self.flag.as_ref().map_or(self.table_and_key().1.to_owned(), |flag| flag.name.replace('-', "_"))
    }

    /// Splits the key into the table and the key within the table. The table is empty for a key at the top level.
    pub fn table_and_key(&self) -> (&'static str, &'static str) {
        self.key.split_once('.').unwrap_or(("", self.key))
    }
}

impl Flag {
    pub(crate) const fn new(
        name: &'static str,
        value_name: &'static str,
        heading: Heading,
        help: &'static str,
    ) -> Self {
        Self { name, short: None, alias: None, value_name, heading, help, words: Vec::new, is_repeatable: false }
    }
}

/// Declares each setting as a static, and all of them as a list.
macro_rules! declare {
    ($($name:ident = $declared:expr;)*) => {
        $(pub(super) static $name: Declared = $declared;)*

        /// Every setting, in the order of the commented configuration file.
        pub static SETTINGS: &[&Declared] = &[$(&$name),*];
    };
}

declare! {
    URL = Declared {
        key: "url",
        flag: Some(Flag::new("url", "URL", Heading::Server, "The server's url; a path prefix is kept")),
        default: || DEFAULT_URL.to_owned(),
        shown: Shown::Worker(|config| config.worker.url.to_string()),
        reload: Reload::NewStream,
        comment: "The server's url: http or https, with a host; a path prefix is kept.",
        example: Example::Default("\"http://localhost:7890\""),
    };

    TLS_CA = Declared {
        key: "tls.ca",
        flag: Some(Flag::new("tls-ca", "FILE", Heading::Server, "Trust the certificates in this file (PEM)")),
        default: || "those that the system trusts".to_owned(),
        shown: Shown::Worker(|config| config.file("tls.ca")),
        reload: Reload::NewStream,
        comment: "Trust the certificates in this file. Default: those that the system trusts.",
        example: Example::Other("\"/etc/zizq/ca.pem\""),
    };

    TLS_CLIENT_CERT = Declared {
        key: "tls.client_cert",
        flag: Some(Flag::new("tls-client-cert", "FILE", Heading::Server, "Show this certificate chain (PEM) to the server; needs its key")),
        default: || "none".to_owned(),
        shown: Shown::Worker(|config| config.file("tls.client_cert")),
        reload: Reload::NewStream,
        comment: "Show this certificate chain to the server, with its private key; both or neither. Default: none.",
        example: Example::Other("\"/etc/zizq/worker.pem\""),
    };

    TLS_CLIENT_KEY = Declared {
        key: "tls.client_key",
        flag: Some(Flag::new("tls-client-key", "FILE", Heading::Server, "The private key of that certificate (PEM)")),
        default: || "none".to_owned(),
        shown: Shown::Worker(|config| config.file("tls.client_key")),
        reload: Reload::NewStream,
        comment: "The private key of that certificate. Default: none.",
        example: Example::Other("\"/etc/zizq/worker.key\""),
    };

    QUEUES = Declared {
        key: "worker.queues",
        flag: Some(Flag { short: Some('q'), alias: Some("queue"), is_repeatable: true, ..Flag::new("queues", "A,B", Heading::Worker, "The queues to take jobs from; may be repeated") }),
        default: || "all queues".to_owned(),
        shown: Shown::Worker(|config| queues(&config.worker.queues)),
        reload: Reload::NewStream,
        comment: "The queues to take jobs from: a list, or a string with commas. An empty list means all queues; an empty name is an error.",
        example: Example::Default("[]"),
    };

    THREADS = Declared {
        key: "worker.threads",
        flag: Some(Flag { short: Some('t'), ..Flag::new("threads", "N", Heading::Worker, "The number of jobs at once") }),
        default: || DEFAULT_THREADS.to_string(),
        shown: Shown::Worker(|config| config.worker.threads.to_string()),
        reload: Reload::Restart,
        comment: "How many jobs run at once: threads x fibers, each at least 1. Both only multiply: a job is a process either way.",
        example: Example::Default("1"),
    };

    FIBERS = Declared {
        key: "worker.fibers",
        flag: Some(Flag { short: Some('f'), ..Flag::new("fibers", "N", Heading::Worker, "Multiplies threads: threads x fibers jobs run at once") }),
        default: || DEFAULT_FIBERS.to_string(),
        shown: Shown::Worker(|config| config.worker.fibers.to_string()),
        reload: Reload::Restart,
        comment: "",
        example: Example::Default("1"),
    };

    PREFETCH = Declared {
        key: "worker.prefetch",
        flag: Some(Flag { short: Some('p'), ..Flag::new("prefetch", "N", Heading::Worker, "Unreported jobs that the server may hand to this worker") }),
        default: || "2 x threads x fibers".to_owned(),
        shown: Shown::Worker(|config| config.worker.prefetch.to_string()),
        reload: Reload::NewStream,
        comment: "How many unreported jobs the server may hand to this worker. With fewer than threads x fibers, some slots stay idle. Default: 2 x threads x fibers.",
        example: Example::Other("2"),
    };

    RETRY_MIN_WAIT = Declared {
        key: "worker.retry_min_wait",
        flag: Some(Flag::new("retry-min-wait", "DURATION", Heading::Retries, "The first wait before reconnecting or reporting again")),
        default: || duration(DEFAULT_RETRY_MIN_WAIT),
        shown: Shown::Worker(|config| duration(config.worker.backoff.parts().0)),
        reload: Reload::Restart,
        comment: "The wait before the first try to reconnect, or to report again. Longer than 0, and with up to a quarter on top by chance.",
        example: Example::Default("\"1s\""),
    };

    RETRY_MAX_WAIT = Declared {
        key: "worker.retry_max_wait",
        flag: Some(Flag::new("retry-max-wait", "DURATION", Heading::Retries, "The longest wait before reconnecting or reporting again")),
        default: || duration(DEFAULT_RETRY_MAX_WAIT),
        shown: Shown::Worker(|config| duration(config.worker.backoff.parts().1)),
        reload: Reload::Restart,
        comment: "The longest such wait; not shorter than the first.",
        example: Example::Default("\"30s\""),
    };

    RETRY_MULTIPLIER = Declared {
        key: "worker.retry_multiplier",
        flag: Some(Flag::new("retry-multiplier", "X", Heading::Retries, "The factor by which each wait is longer than the last")),
        default: || DEFAULT_RETRY_MULTIPLIER.to_string(),
        shown: Shown::Worker(|config| config.worker.backoff.parts().2.to_string()),
        reload: Reload::Restart,
        comment: "How many times longer each wait is than the one before; at least 1.",
        example: Example::Default("2.0"),
    };

    STREAM_IDLE_TIMEOUT = Declared {
        key: "worker.stream_idle_timeout",
        flag: Some(Flag::new("stream-idle-timeout", "DURATION", Heading::Server, "Reconnect after this time without a byte, heartbeats included")),
        default: || duration(DEFAULT_STREAM_IDLE_TIMEOUT),
        shown: Shown::Worker(|config| duration(config.worker.stream_limits.idle_timeout)),
        reload: Reload::NewStream,
        comment: "The time without a byte on the take stream after which the worker reconnects. The server sends a heartbeat every 3 s.",
        example: Example::Default("\"30s\""),
    };

    MAX_JOB_SIZE = Declared {
        key: "worker.max_job_size",
        flag: Some(Flag::new("max-job-size", "SIZE", Heading::Server, "The largest job that is accepted, like 64MiB")),
        default: || size(DEFAULT_MAX_JOB_SIZE as u64),
        shown: Shown::Worker(|config| size(config.worker.stream_limits.max_job_size as u64)),
        reload: Reload::NewStream,
        comment: "The longest job that is accepted, as it comes over the wire; a longer one is reported failed (MalformedJob).",
        example: Example::Default("\"64MiB\""),
    };

    SHUTDOWN_DEADLINE = Declared {
        key: "worker.shutdown_deadline",
        flag: Some(Flag { alias: Some("shutdown-timeout"), ..Flag::new("shutdown-deadline", "DURATION", Heading::Worker, "The time that running jobs have to finish after a signal") }),
        default: || duration(DEFAULT_SHUTDOWN_DEADLINE),
        shown: Shown::Worker(|config| duration(config.worker.shutdown_deadline)),
        reload: Reload::Restart,
        comment: "How long the running jobs may take to finish after SIGTERM or SIGINT. Those that take longer are stopped, and the server hands them out again.",
        example: Example::Default("\"30s\""),
    };

    MAX_JOBS = Declared {
        key: "worker.max_jobs",
        flag: Some(Flag::new("max-jobs", "N", Heading::Worker, "Exit after exactly N started jobs")),
        default: || "no limit".to_owned(),
        shown: Shown::Worker(|config| or(config.worker.max_jobs, &MAX_JOBS)),
        reload: Reload::Restart,
        comment: "The number of started jobs after which the worker stops, for a fresh start now and then. Default: no limit.",
        example: Example::Other("10000"),
    };

    MAX_TIME = Declared {
        key: "worker.max_time",
        flag: Some(Flag::new("max-time", "DURATION", Heading::Worker, "Take no more jobs after this time, and exit when running jobs have finished")),
        default: || "no limit".to_owned(),
        shown: Shown::Worker(|config| or(config.worker.max_time.map(duration), &MAX_TIME)),
        reload: Reload::Restart,
        comment: "The time after which the worker takes no more jobs, and stops when its jobs are finished. Default: no limit.",
        example: Example::Other("\"6h\""),
    };

    EXIT_WHEN_IDLE = Declared {
        key: "worker.exit_when_idle",
        flag: Some(Flag::new("exit-when-idle", "DURATION", Heading::Worker, "Exit after this time without a job, once connected")),
        default: || "never".to_owned(),
        shown: Shown::Worker(|config| or(config.worker.exit_when_idle.map(duration), &EXIT_WHEN_IDLE)),
        reload: Reload::Restart,
        comment: "The time without a job after which a connected worker stops. Default: never.",
        example: Example::Other("\"10m\""),
    };

    WORKER_ID = Declared {
        key: "worker.worker_id",
        flag: Some(Flag::new("worker-id", "ID", Heading::Server, "The name of this worker in the server's log")),
        default: || "HOSTNAME-PID".to_owned(),
        shown: Shown::Worker(|config| config.worker.worker_id.to_string()),
        reload: Reload::Restart,
        comment: "The worker's name in the server's log, and ZIZQ_WORKER_ID for the handler: printable ASCII. Default: HOSTNAME-PID.",
        example: Example::Other("\"mailer-1\""),
    };

    EXEC = Declared {
        flag: Some(Flag::new("exec", "CMD", Heading::Handler, "The command to run for each job, split into words as a shell would, but run without one")),
        default: || "required".to_owned(),
        shown: Shown::Private(|handler| handler.program.to_string(), |handler| handler.program.path().display().to_string()),
        comment: "The command to run for each job, with the payload on its stdin: a list of words, or a string that is split into words as a shell would. It is run without a shell, and found on PATH unless it has a slash. Required, here or there.",
        ..Declared::of_handlers("handler.exec", Example::Other("[\"cat\"]"))
    };

    MODE = Declared {
        flag: Some(Flag { words: || names(&MODE_NAMES), ..Flag::new("mode", "MODE", Heading::Handler, "spawn: start the command for each job; warm: keep it running, and send it one job after another over a socket") }),
        default: || "spawn".to_owned(),
        shown: Shown::Handler(|handler| name_in(&MODE_NAMES, &matches!(handler.mode, Mode::Warm(_))).to_owned()),
        comment: "How often the command is started: \"spawn\" (once for each job) or \"warm\" (once for many jobs, which come over the socket that ZIZQ_SOCKET names). docs/warm-handlers.md says how such a handler is written.",
        ..Declared::of_handlers("handler.mode", Example::Default("\"spawn\""))
    };

    STDIN = Declared {
        default: || "payload".to_owned(),
        shown: Shown::Handler(|handler| name_in(&STDIN_NAMES, &handler.stdin).to_owned()),
        comment: "The contents of stdin: \"payload\", \"job\" (the whole job as JSON) or \"none\".",
        ..Declared::of_handlers("handler.stdin", Example::Default("\"payload\""))
    };

    OUTPUT = Declared {
        default: || "log".to_owned(),
        shown: Shown::Handler(|handler| name_in(&OUTPUT_NAMES, &handler.output).to_owned()),
        comment: "The destination of output: \"log\" (an event a line), \"inherit\" (the worker's own stdout and stderr) or \"null\". Only with \"log\" is the end of stderr part of a failure's report.",
        ..Declared::of_handlers("handler.output", Example::Default("\"log\""))
    };

    ENV_CLEAR = Declared {
        default: || "false".to_owned(),
        comment: "The environment: the worker's without its ZIZQ_* variables, or, with env_clear, nothing but the variables that pass_env names, like [\"PATH\", \"HOME\", \"LANG\"]; and then env on top.",
        ..Declared::of_handlers("handler.env_clear", Example::Default("false"))
    };

    PASS_ENV = Declared::of_handlers("handler.pass_env", Example::Default("[]"));

    ENV = Declared {
        shown: Shown::Variables,
        comment: "A value is a string, or { file = \"PATH\" } for the contents of a file without the newline at the end, like a credential of systemd or a secret of Kubernetes. The file is read at the start and at each reload.",
        ..Declared::of_handlers("handler.env", Example::Other("{ MAIL_HOST = \"smtp.example.org\" }"))
    };

    CWD = Declared {
        default: || "the worker's".to_owned(),
        shown: Shown::Handler(|handler| or(handler.cwd.as_ref().map(|cwd| cwd.display()), &CWD)),
        comment: "The working directory. Default: the worker's.",
        ..Declared::of_handlers("handler.cwd", Example::Other("\"/tmp\""))
    };

    SUCCESS_EXIT_CODES = Declared {
        shown: Shown::Handler(|handler| list(&handler.success_exit_codes)),
        comment: "Exit statuses that count as success, besides 0; and those after which a job is dead at once, without another try.",
        ..Declared::of_handlers("handler.success_exit_codes", Example::Default("[]"))
    };

    KILL_EXIT_CODES = Declared {
        shown: Shown::Handler(|handler| list(&handler.kill_exit_codes)),
        ..Declared::of_handlers("handler.kill_exit_codes", Example::Default("[]"))
    };

    TIMEOUT = Declared {
        shown: Shown::Handler(|handler| or(handler.timeout.map(duration), &TIMEOUT)),
        comment: "The time limit of a job. Then its process group gets SIGTERM, and SIGKILL after kill_grace, and the job has failed. Default: none.",
        ..Declared::of_handlers("handler.timeout", Example::Other("\"10m\""))
    };

    KILL_GRACE = Declared {
        default: || duration(DEFAULT_KILL_GRACE),
        shown: Shown::Handler(|handler| duration(handler.kill_grace)),
        ..Declared::of_handlers("handler.kill_grace", Example::Default("\"5s\""))
    };

    DRAIN_SIGNAL = Declared {
        shown: Shown::Handler(|handler| or(handler.drain_signal.and_then(|signal| signal_name(signal.as_raw())), &DRAIN_SIGNAL)),
        comment: "A signal that is sent to running handlers when the worker is told to stop, so that they save their work. Default: none.",
        ..Declared::of_handlers("handler.drain_signal", Example::Other("\"USR1\""))
    };

    MIN_PROCESSES = Declared {
        default: || "0".to_owned(),
        shown: Shown::Warm(|pool| pool.min_processes.to_string()),
        comment: "For mode = \"warm\": how many processes stay when they are idle, and how many there are at most. Default of max_processes: threads x fibers. With fewer, jobs wait for a process in their loops, and jobs of other types wait behind them.",
        ..Declared::of_handlers("handler.min_processes", Example::Default("0"))
    };

    MAX_PROCESSES = Declared {
        default: || "threads x fibers".to_owned(),
        shown: Shown::Warm(|pool| or(pool.max_processes, &MAX_PROCESSES)),
        ..Declared::of_handlers("handler.max_processes", Example::Other("4"))
    };

    START_TIMEOUT = Declared {
        default: || duration(DEFAULT_START_TIMEOUT),
        shown: Shown::Warm(|pool| duration(pool.start_timeout)),
        comment: "How long a process may take from its start until it connects.",
        ..Declared::of_handlers("handler.start_timeout", Example::Default("\"1m\""))
    };

    PROCESS_MAX_JOBS = Declared {
        default: || "off".to_owned(),
        shown: Shown::Warm(|pool| or(pool.max_jobs, &PROCESS_MAX_JOBS)),
        comment: "The limits after which a process is replaced, checked after each job. max_jobs and max_age are raised by up to a quarter at random. max_memory is the resident size of the process itself. max_jobs in [worker] limits a whole run instead. Default: never.",
        ..Declared::of_handlers("handler.max_jobs", Example::Other("1000"))
    };

    MAX_AGE = Declared {
        default: || "off".to_owned(),
        shown: Shown::Warm(|pool| or(pool.max_age.map(duration), &MAX_AGE)),
        ..Declared::of_handlers("handler.max_age", Example::Other("\"6h\""))
    };

    MAX_MEMORY = Declared {
        default: || "off".to_owned(),
        shown: Shown::Warm(|pool| or(pool.max_memory.map(ByteSize), &MAX_MEMORY)),
        ..Declared::of_handlers("handler.max_memory", Example::Other("\"512MiB\""))
    };

    IDLE_TIMEOUT = Declared {
        default: || "off".to_owned(),
        shown: Shown::Warm(|pool| or(pool.idle_timeout.map(duration), &IDLE_TIMEOUT)),
        comment: "How long a process may be idle. Default: for ever.",
        ..Declared::of_handlers("handler.idle_timeout", Example::Other("\"10m\""))
    };

    ADMIN_LISTEN = Declared {
        key: "admin.listen",
        flag: Some(Flag::new("admin-listen", "ADDRESS:PORT", Heading::Operations, "Serve a page, /live, /ready, /status and /metrics at this address, like 127.0.0.1:9290")),
        default: || "off".to_owned(),
        shown: Shown::Worker(|config| or(config.admin.as_ref(), &ADMIN_LISTEN)),
        reload: Reload::Restart,
        comment: "The address at which the worker answers GET /live, /ready, /status and /metrics over HTTP, without a password: ADDRESS:PORT. Default: off.",
        example: Example::Other("\"127.0.0.1:9290\""),
    };

    LOG_LEVEL = Declared {
        key: "log.level",
        flag: Some(Flag { words: || names(&LogLevel::NAMES), ..Flag::new("log-level", "LEVEL", Heading::Logging, "error, warn, info, debug or trace; more per target, like info,zizq_worker::jobs=warn; RUST_LOG wins") }),
        default: || "info".to_owned(),
        shown: Shown::Worker(|config| config.log.filter.clone().unwrap_or_else(|| config.log.level.to_string())),
        reload: Reload::AtOnce,
        comment: "error, warn, info, debug or trace, and others by target, like \"info,zizq_worker::jobs=warn\". The variable RUST_LOG wins, and may be a filter like zizq_worker=debug.",
        example: Example::Default("\"info\""),
    };

    LOG_FORMAT = Declared {
        key: "log.format",
        flag: Some(Flag { words: || names(&LogFormat::NAMES), ..Flag::new("log-format", "FORMAT", Heading::Logging, "pretty, compact or json, on stderr") }),
        default: || "pretty on a terminal, else compact".to_owned(),
        shown: Shown::Worker(|config| or(config.log.format, &LOG_FORMAT)),
        reload: Reload::Restart,
        comment: "pretty, compact or json. Default: pretty on a terminal, else compact.",
        example: Example::Other("\"compact\""),
    };
}

const NONE: &str = "none";

/// Returns the value, or the text of the default.
fn or(value: Option<impl ToString>, declared: &Declared) -> String {
    value.map_or_else(declared.default, |value| value.to_string())
}

pub(super) fn duration(value: Duration) -> String {
    format_duration(value).to_string()
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

pub(super) fn list(values: impl IntoIterator<Item = impl ToString>) -> String {
    let values: Vec<String> = values.into_iter().map(|value| value.to_string()).collect();
    if values.is_empty() { NONE.to_owned() } else { values.join(", ") }
}

fn queues(queues: &[String]) -> String {
    if queues.is_empty() { "all".to_owned() } else { list(queues) }
}
