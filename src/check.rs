//! `--check`: prints every setting with its origin, the start-up warnings, and the server's version.

use std::fmt::{self, Write as _};
use std::io::{self, ErrorKind, Write};
use std::time::Duration;

use humantime::format_duration;
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
use tracing::subscriber::NoSubscriber;

use crate::admin::AdminServer;
use crate::chain::{Chain, OneLine};
use crate::cli::Reach;
use crate::client::Client;
use crate::config::{Config, ConfigError, Setting};
use crate::dispatch::ExecDispatcher;
use crate::lifecycle::{Lifecycle, Phase, WorkerSignals};
use crate::process::{OpenFiles, StartMethod, TOO_FEW_DESCRIPTORS, TooFewDescriptors, Trial};
use crate::version::misfit;

/// The reason why a check failed.
#[derive(Debug)]
pub enum CheckError {
    /// A mistake in the settings. The worker would fail to start with the same error.
    Mistake(ConfigError),
    /// The server did not report its version. The text names the reason.
    Server(String),
    /// No process can be started.
    Process(io::Error),
    /// One or more warm handlers did not connect. The text names the reasons.
    Handler(String),
    /// The output cannot be written.
    Output(io::Error),
    /// A signal ended the check.
    Interrupted,
}

impl From<io::Error> for CheckError {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// Prints every setting in force with its origin, and every start-up warning, and checks the addresses on which the worker would
/// listen. Unless `reach` is `Offline`, also starts a test process and one process of each warm handler, and asks the server for
/// its version.
///
/// If the reader of `out` closes its end, the check continues without output.
///
/// # Errors
/// If the worker would fail to start, the server does not report its version, the output cannot be written, or a signal asks for
/// a stop.
pub async fn check(config: &Config, reach: Reach, out: &mut impl Write) -> Result<(), CheckError> {
    let lifecycle = Lifecycle::new();
    let (asking, _requests) = mpsc::unbounded_channel();
    let _obeying = AbortOnDropHandle::new(tokio::spawn(WorkerSignals::listen()?.obey(lifecycle.clone(), asking)));
    // A warm handler leads its own process group, so Ctrl-C in a terminal does not reach it. An interruption drops the
    // dispatcher in `check_all`, and that drop kills the handler.
    let mut out = UntilClosed(out);
    tokio::select! {
        checked = check_all(config, reach, &mut out) => checked,
        () = lifecycle.reached(Phase::Draining) => Err(CheckError::Interrupted),
    }
}

async fn check_all(config: &Config, reach: Reach, out: &mut impl Write) -> Result<(), CheckError> {
    print_table(&config.settings(), out)?;
    // No check is needed here, because `config` could not have been resolved if the file of a handler could not be run.
    writeln!(out, "\nhandlers: their files can be run")?;
    for warning in config.warnings() {
        say(out, format_args!("warning: {warning}"))?;
    }
    // Keep the admin server until the end of the check, so that the embedded server cannot listen at the same address.
    let _admin_server = check_admin_address(config, out).await?;
    #[cfg(feature = "embedded")]
    check_embedded(config, out).await?;
    let trial = Trial::of_this_machine();
    check_open_files(config, trial.way(), out)?;
    check_processes(trial, out)?;
    if reach == Reach::Offline {
        dispatcher(config)?;
        return Ok(writeln!(out, "server: not asked")?);
    }
    check_warm_handlers(&dispatcher(config)?, out).await?;
    #[cfg(feature = "embedded")]
    if config.embedded.is_some() {
        return Ok(writeln!(out, "server: the embedded one")?);
    }
    check_server(config, out).await
}

/// Prints text as one line, because values of settings and of the server can contain line breaks.
fn say(out: &mut impl Write, text: fmt::Arguments<'_>) -> io::Result<()> {
    let mut line = String::new();
    // Writing to a string never fails.
    let _ = OneLine(&mut line).write_fmt(text);
    writeln!(out, "{line}")
}

/// Checks that the admin server can listen. If the address is in use, only prints a warning, because a worker with these settings
/// may already be running.
async fn check_admin_address(config: &Config, out: &mut impl Write) -> Result<Option<AdminServer>, CheckError> {
    let Some(admin) = &config.admin else { return Ok(None) };
    match AdminServer::bind(admin.address).await.map_err(|error| admin.error(&error)) {
        Ok(server) => {
            writeln!(out, "admin server: can listen on {admin}")?;
            Ok(Some(server))
        }
        Err(passing) if passing.may_pass() => {
            say(out, format_args!("warning: {passing}"))?;
            Ok(None)
        }
        Err(mistake) => Err(CheckError::Mistake(mistake)),
    }
}

/// Checks that the embedded server can listen, and that each line of its jobs file is a valid job. If the address is in
/// use, only prints a warning, because a worker with these settings may already be running. Jobs from stdin are not read.
#[cfg(feature = "embedded")]
async fn check_embedded(config: &Config, out: &mut impl Write) -> Result<(), CheckError> {
    let Some(embedded) = &config.embedded else { return Ok(()) };
    match crate::embedded::prepare(&embedded.without_stdin(), &config.worker.url).await {
        Ok(_) => writeln!(out, "embedded server: can listen on {}", config.worker.url)?,
        Err(passing) if passing.may_pass() => say(out, format_args!("warning: {passing}"))?,
        Err(mistake) => return Err(CheckError::Mistake(mistake)),
    }
    Ok(())
}

/// Creates a dispatcher and its directory for result files, as the worker does at its start.
fn dispatcher(config: &Config) -> Result<ExecDispatcher, CheckError> {
    let worker_id = config.worker.worker_id.to_string();
    let (handlers, concurrency) = (config.handlers.clone(), config.worker.concurrency().get());
    // Suppress the warnings that a dispatcher logs, because the check itself prints them.
    let made = tracing::subscriber::with_default(NoSubscriber::new(), || {
        ExecDispatcher::new(handlers, concurrency, worker_id, &std::env::temp_dir())
    });
    made.map_err(|error| CheckError::Mistake(ConfigError::no_room_for_results(&error)))
}

/// Warns of a limit on open files that is too low for the configured number of processes.
fn check_open_files(config: &Config, way: StartMethod, out: &mut impl Write) -> Result<(), CheckError> {
    let processes = config.handlers.max_processes(config.worker.concurrency().get());
    let (_, enough) = OpenFiles::ensure(processes, way);
    if let Err(TooFewDescriptors { limit, needed }) = enough {
        writeln!(out, "warning: {TOO_FEW_DESCRIPTORS} (limit {limit}, needed {needed})")?;
    }
    Ok(())
}

fn check_processes(trial: Trial, out: &mut impl Write) -> Result<(), CheckError> {
    match trial {
        Trial::Usual => writeln!(out, "processes: can be started")?,
        Trial::Slow(error) => {
            let problem = "processes are started in a slower way, the system refuses the usual one";
            writeln!(out, "warning: {problem}: {error}")?;
        }
        Trial::Impossible(error) => return Err(CheckError::Process(error)),
    }
    Ok(())
}

async fn check_warm_handlers(dispatcher: &ExecDispatcher, out: &mut impl Write) -> Result<(), CheckError> {
    let mut problems = Vec::new();
    for (handler, connected) in dispatcher.start_each_warm().await {
        match connected {
            Ok(took) => {
                let took = format_duration(Duration::from_millis(took.as_millis().try_into().unwrap_or(u64::MAX)));
                writeln!(out, "warm handler {handler}: connects {took} after its start")?;
            }
            Err(problem) => problems.push(problem),
        }
    }
    if problems.is_empty() { Ok(()) } else { Err(CheckError::Handler(problems.join("; "))) }
}

async fn check_server(config: &Config, out: &mut impl Write) -> Result<(), CheckError> {
    let worker = &config.worker;
    let client = Client::new(worker.url.clone(), worker.worker_id.clone(), &worker.tls, &worker.connector);
    let version = client.version().await;
    let version = version
        .map_err(|error| CheckError::Server(format!("cannot ask the server at {}: {}", worker.url, Chain(&error))))?;
    say(out, format_args!("server: {} is version {version}", worker.url))?;
    if let Some(misfit) = misfit(&version) {
        writeln!(out, "warning: {misfit}")?;
    }
    Ok(())
}

/// Prints the settings as columns of names, values and origins.
fn print_table(settings: &[Setting], out: &mut impl Write) -> io::Result<()> {
    let longest = |length: fn(&Setting) -> usize| settings.iter().map(length).max().unwrap_or_default();
    let names = longest(|setting| setting.name.chars().count());
    // Cap the width of the column of values, otherwise one long value would push all origins off the screen.
    let values = longest(|setting| setting.value.chars().count()).min(40);
    for Setting { name, value, source, .. } in settings {
        let source = source.as_ref().map_or("default".to_owned(), ToString::to_string);
        say(out, format_args!("{name:names$}  {value:values$}  {source}"))?;
    }
    Ok(())
}

/// A writer that silently drops all output once the reader of the pipe, for example `head`, has closed it.
struct UntilClosed<W>(W);

impl<W: Write> Write for UntilClosed<W> {
    fn write(&mut self, text: &[u8]) -> io::Result<usize> {
        match self.0.write(text) {
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(text.len()),
            written => written,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
