//! The daemon: a worker with its signals, service manager, admin server and terminal.

mod attendant;

use std::io;
use std::sync::Arc;

use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_util::task::AbortOnDropHandle;
#[cfg(feature = "embedded")]
use tracing::info;

use crate::admin::{AdminServer, Inspector};
use crate::cli::Args;
use crate::config::{Config, ConfigError, Warning};
use crate::dispatch::ExecDispatcher;
use crate::lifecycle::{Lifecycle, WorkerSignals};
use crate::logging::Log;
use crate::supervisor::Supervisor;
use crate::worker::{Summary, Worker};
use attendant::Attendant;

/// An error that ends the process.
pub type Fatal = Box<dyn std::error::Error + Send + Sync>;

/// Returns the runtime of the daemon, which drives all jobs on one thread. Several threads would wake each other for work that
/// takes less time than the wake-up.
///
/// # Errors
/// If the operating system refuses the runtime's file descriptors.
pub fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread().enable_all().build()
}

/// Runs the worker until a signal or a limit stops it. Each reload resolves a new configuration from `args`.
///
/// # Errors
/// If the worker cannot start, or the server refuses it.
pub async fn run(args: Args, mut config: Config, log: Log) -> Result<Summary, Fatal> {
    let lifecycle = Lifecycle::new();
    // Start the embedded server before the signal handlers are registered, because Ctrl-C must end the process while the server
    // reads its jobs from a terminal.
    #[cfg(feature = "embedded")]
    let _server = match &config.embedded {
        Some(embedded) => Some(crate::embedded::start(embedded, &config.worker.url).await?),
        None => None,
    };
    let (asking, requests) = mpsc::unbounded_channel();
    tokio::spawn(WorkerSignals::listen()?.obey(lifecycle.clone(), asking));
    let admin = bind_admin(&config).await?;
    #[cfg(feature = "embedded")]
    if let (Some(admin), Some(_)) = (&admin, &config.embedded) {
        info!(page = admin.page_url()?, "open this page to watch the worker");
    }
    // Skip the warning about a low prefetch, because the worker itself logs it.
    let warnings = config.warnings().into_iter().filter(|warning| !matches!(warning, Warning::LowPrefetch { .. }));
    warnings.for_each(|warning| warning.log());

    let settings = config.settings();
    let (longest_grace, longest_job) = (config.handlers.longest_grace(), config.handlers.longest_job());
    let dispatcher = dispatcher(&mut config)?;
    let _orphans = AbortOnDropHandle::new(tokio::spawn(dispatcher.reap_orphans()));
    let worker = Worker::new(config.worker.clone(), dispatcher);
    let worker_id = config.worker.worker_id.to_string();
    let inspector = Arc::new(Inspector::new(worker.controls(), lifecycle.clone(), worker_id, settings));
    let _answering = admin.map(|admin| AbortOnDropHandle::new(tokio::spawn(admin.serve(Arc::clone(&inspector)))));
    let supervisor = args.is_supervised().then(Supervisor::of_this_process).transpose()?;
    let (args, running) = (Arc::new(args), config.worker);
    let attendant = Attendant { args, log, inspector, running, longest_grace, longest_job, supervisor, reading: None };
    let attending = AbortOnDropHandle::new(tokio::spawn(attendant.attend(requests)));

    let ended = worker.run(&lifecycle).await;
    // Wait for the attendant, which removes the live line from the terminal before it ends.
    attending.await?;
    Ok(ended?)
}

async fn bind_admin(config: &Config) -> Result<Option<AdminServer>, ConfigError> {
    match &config.admin {
        Some(admin) => AdminServer::bind(admin.address).await.map(Some).map_err(|error| admin.error(&error)),
        None => Ok(None),
    }
}

fn dispatcher(config: &mut Config) -> Result<ExecDispatcher, ConfigError> {
    let (worker, temp_dir) = (&config.worker, std::env::temp_dir());
    let (handlers, concurrency) = (std::mem::take(&mut config.handlers), worker.concurrency().get());
    ExecDispatcher::new(handlers, concurrency, worker.worker_id.to_string(), &temp_dir)
        .map_err(|error| ConfigError::no_room_for_results(&error))
}
