//! `zizq-worker`: arguments, settings, log, runtime, run, exit status.

use std::fmt::Display;
use std::io::Write;
use std::process::ExitCode;

use zizq_worker::chain::Chain;
use zizq_worker::cli::Args;
use zizq_worker::config::Source;
use zizq_worker::{Config, ConfigError, ExecDispatcher, Lifecycle, StopSignals, Summary, Worker, logging};

fn main() -> ExitCode {
    let args = match Args::try_parse_from(std::env::args_os()) {
        Ok(args) => args,
        Err(usage) => return usage.report(),
    };
    let config = match Config::resolve(&args).and_then(|config| logging::init(&config.log).map(|()| config)) {
        Ok(config) => config,
        Err(error) => return complain(&error, error.exit_status()),
    };
    match start(config) {
        Ok(Summary { killed: false, .. }) => ExitCode::SUCCESS,
        Ok(Summary { killed: true, .. }) => ExitCode::FAILURE,
        Err(error) => match error.downcast_ref::<ConfigError>() {
            Some(mistake) => complain(&error, mistake.exit_status()),
            None => complain(&Chain(error.as_ref()), 1),
        },
    }
}

type Fatal = Box<dyn std::error::Error>;

fn start(config: Config) -> Result<Summary, Fatal> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let ended = runtime.block_on(run(config));
    // Not waited for: a name that is still being looked up, which cannot be called off, would hold up the exit.
    runtime.shutdown_background();
    ended
}

async fn run(config: Config) -> Result<Summary, Fatal> {
    let lifecycle = Lifecycle::new();
    #[cfg(feature = "embedded")]
    let _server = match &config.embedded {
        Some(embedded) => Some(zizq_worker::embedded::start(embedded, &config.worker.url).await?),
        None => None,
    };
    let signals = StopSignals::listen()?;
    let obeying = lifecycle.clone();
    tokio::spawn(async move { signals.obey(&obeying).await });
    let concurrency = config.worker.concurrency().get();
    let dispatcher =
        ExecDispatcher::new(config.handlers, concurrency, config.worker.worker_id.to_string(), &std::env::temp_dir())
            .map_err(|error| no_room_for_results(&error))?;
    Ok(Worker::new(config.worker, dispatcher).run(&lifecycle).await?)
}

fn no_room_for_results(error: &std::io::Error) -> ConfigError {
    let problem = format!(
        "cannot make a directory for result files in {}: {error}; name one that can be written",
        std::env::temp_dir().display()
    );
    ConfigError::unusable(Source::Variable("TMPDIR".to_owned()), problem)
}

/// The one line in which the process says why it ends.
fn complain(problem: &dyn Display, status: u8) -> ExitCode {
    // A closed stderr leaves nobody to tell.
    let _ = writeln!(std::io::stderr(), "zizq-worker: {problem}");
    ExitCode::from(status)
}
