//! The program `zizq-worker`: resolves the settings, starts the log and the runtime, runs the worker, returns the exit status.

use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use zizq_worker::chain::Chain;
use zizq_worker::check::{CheckError, check};
use zizq_worker::cli::{Args, Reach, journal_stream};
use zizq_worker::daemon;
use zizq_worker::logging::{Log, Stderr, complaint_prefix};
use zizq_worker::{Config, ConfigError};

fn main() -> ExitCode {
    let args = match Args::try_parse_from(std::env::args_os()) {
        Ok(args) => args,
        Err(usage) => return usage.report(complaint_prefix(journal_stream().as_deref())),
    };
    let (config, log) = match Config::resolve(&args).and_then(|config| Log::start(&config.log).map(|log| (config, log)))
    {
        Ok(resolved) => resolved,
        Err(error) => return complain(&error, error.exit_status()),
    };
    if let Some(reach) = args.check() {
        return show(&config, reach);
    }
    match in_runtime(daemon::run(args, config, log)) {
        Ok(summary) if summary.is_clean() => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => match error.downcast_ref::<ConfigError>() {
            Some(mistake) => complain(&error, mistake.exit_status()),
            None => complain(&Chain(error.as_ref()), 1),
        },
    }
}

fn in_runtime<T, E: From<io::Error>>(work: impl Future<Output = Result<T, E>>) -> Result<T, E> {
    let runtime = daemon::runtime()?;
    let ended = runtime.block_on(work);
    // Do not wait for blocking tasks. A DNS lookup cannot be cancelled, and would delay the exit.
    runtime.shutdown_background();
    ended
}

fn show(config: &Config, reach: Reach) -> ExitCode {
    match in_runtime(check(config, reach, &mut io::stdout().lock())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(CheckError::Mistake(mistake)) => complain(&mistake, mistake.exit_status()),
        Err(CheckError::Server(problem) | CheckError::Handler(problem)) => complain(&problem, 1),
        Err(CheckError::Process(error)) => complain(&format!("no process can be started here: {error}"), 1),
        Err(CheckError::Output(error)) => complain(&error, 1),
        Err(CheckError::Interrupted) => complain(&"the check was interrupted", 1),
    }
}

/// Prints one line that says why the process ends, and returns the exit code.
fn complain(problem: &dyn Display, status: u8) -> ExitCode {
    // Ignore a failed write, because there is no other place to report it.
    let prefix = complaint_prefix(journal_stream().as_deref());
    let _ = writeln!(Stderr, "{prefix}zizq-worker: {problem}");
    ExitCode::from(status)
}
