//! `--check`: every setting with its origin, a start of a process, and the server's version.

use std::fmt::Write as _;
#[cfg(feature = "embedded")]
use std::fs::File;
use std::io::{self, Write};
use std::time::Duration;

use humantime::format_duration;

use crate::chain::{Chain, OneLine};
use crate::client::Client;
#[cfg(feature = "embedded")]
use crate::config::JobsSource;
use crate::config::{Config, Setting};
use crate::dispatch::ExecDispatcher;
use crate::process::Trial;
use crate::version::misfit;

/// Why the check did not get to its end.
#[derive(Debug)]
pub enum CheckError {
    /// The jobs of the embedded server cannot be read, in a sentence.
    Jobs(String),
    /// The server, in a sentence.
    Server(String),
    /// No process can be started.
    Process(io::Error),
    /// A warm handler does not connect, in a sentence.
    Handler(String),
    /// There is nobody to tell.
    Output(io::Error),
}

impl From<io::Error> for CheckError {
    fn from(error: io::Error) -> Self {
        Self::Output(error)
    }
}

/// Prints every setting in force and where it was written, starts a process that ends at once, and asks the server for its
/// version.
///
/// # Errors
/// When no process can be started, or the server cannot be reached.
pub async fn check(config: &Config, out: &mut impl Write) -> Result<(), CheckError> {
    out.write_all(table(&config.settings()).as_bytes())?;
    // Or there would be no such configuration.
    writeln!(out, "\nhandlers: their files can be run")?;
    match Trial::of_this_machine() {
        Trial::Usual => writeln!(out, "processes: can be started")?,
        Trial::Slow(error) => {
            let problem = "processes are started in a slower way, the system refuses the usual one";
            writeln!(out, "warning: {problem}: {error}")?;
        }
        Trial::Impossible(error) => return Err(CheckError::Process(error)),
    }
    check_warm_handlers(config, out).await?;
    #[cfg(feature = "embedded")]
    if let Some(embedded) = &config.embedded {
        if let Some(JobsSource::File(path)) = &embedded.jobs {
            let opened = File::open(path);
            opened.map_err(|error| CheckError::Jobs(format!("--jobs: cannot read {}: {error}", path.display())))?;
        }
        return Ok(writeln!(out, "server: the embedded one")?);
    }
    check_server(config, out).await
}

async fn check_warm_handlers(config: &Config, out: &mut impl Write) -> Result<(), CheckError> {
    if !config.handlers.is_any_warm() {
        return Ok(());
    }
    let worker_id = config.worker.worker_id.to_string();
    let dispatcher = ExecDispatcher::new(config.handlers.clone(), 1, worker_id, &std::env::temp_dir());
    let tried = dispatcher.map_err(|error| CheckError::Handler(error.to_string()))?.start_each_warm().await;
    for (handler, connected) in tried {
        let took = connected.map_err(CheckError::Handler)?;
        let took = format_duration(Duration::from_millis(took.as_millis().try_into().unwrap_or(u64::MAX)));
        writeln!(out, "warm handler {handler}: connects {took} after its start")?;
    }
    Ok(())
}

async fn check_server(config: &Config, out: &mut impl Write) -> Result<(), CheckError> {
    let worker = &config.worker;
    let client = Client::new(worker.url.clone(), worker.worker_id.clone(), &worker.tls, &worker.connector);
    let version = client.version().await;
    let version = version
        .map_err(|error| CheckError::Server(format!("cannot ask the server at {}: {}", worker.url, Chain(&error))))?;
    let mut line = String::new();
    // Writing to a string does not fail.
    let _ = write!(OneLine(&mut line), "server: {} is version {version}", worker.url);
    writeln!(out, "{line}")?;
    if let Some(misfit) = misfit(&version) {
        writeln!(out, "warning: {misfit}")?;
    }
    Ok(())
}

/// Columns of names, values and origins.
fn table(settings: &[Setting]) -> String {
    let longest = |length: fn(&Setting) -> usize| settings.iter().map(length).max().unwrap_or_default();
    let names = longest(|setting| setting.name.chars().count());
    // One long value should not push all origins out of sight.
    let values = longest(|setting| setting.value.chars().count()).min(40);
    let mut text = String::new();
    for Setting { name, value, source, .. } in settings {
        let source = source.as_ref().map_or("default".to_owned(), ToString::to_string);
        let _ = write!(OneLine(&mut text), "{name:names$}  {value:values$}  {source}");
        text.push('\n');
    }
    text
}
