//! [`start`]: the function that starts the server of `--embedded` in this process, at the worker's URL, with jobs from a
//! file or from stdin.

use std::io::ErrorKind;

use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use super::{EmbeddedServer, Options, Store};
use crate::client::ServerUrl;
use crate::config::{ConfigError, EmbeddedConfig, JobsSource, Source};

/// Starts the server. Dropping the returned guard stops the server.
///
/// # Errors
/// If the address cannot be bound, the jobs cannot be read, or a line is not a valid job.
pub async fn start(config: &EmbeddedConfig, url: &ServerUrl) -> Result<DropGuard, ConfigError> {
    let server = prepare(config, url).await?;
    warn!(address = %server.local_addr(), "embedded server started: nothing in it outlives this process");
    let stop = CancellationToken::new();
    tokio::spawn(server.run(stop.clone()));
    Ok(stop.drop_guard())
}

/// Enqueues the jobs and binds the address. The returned server does not serve requests until it is run.
pub(crate) async fn prepare(config: &EmbeddedConfig, url: &ServerUrl) -> Result<EmbeddedServer, ConfigError> {
    let store = Store::new(Options::default());
    if let Some(jobs) = &config.jobs {
        let count = enqueue(&store, jobs)?;
        info!(%jobs, count, "jobs enqueued");
    }
    EmbeddedServer::bind((url.host(), url.port()), store).await.map_err(|error| {
        let advice = match error.kind() {
            ErrorKind::AddrInUse => "another server may be there, choose another --url",
            _ => "choose another --url, with an address of this machine",
        };
        let problem = format!("cannot listen on {url}: {error}; {advice}");
        ConfigError::refused(Source::Flag("--embedded".to_owned()), &error, problem)
    })
}

fn enqueue(store: &Store, jobs: &JobsSource) -> Result<usize, ConfigError> {
    let flag = || Source::Flag("--jobs".to_owned());
    let text = match jobs {
        JobsSource::File(path) => std::fs::read_to_string(path),
        JobsSource::Stdin => std::io::read_to_string(std::io::stdin()),
    };
    let text = text.map_err(|error| ConfigError::unusable(flag(), format!("cannot read {jobs}: {error}")))?;
    let mut count = 0;
    for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        store
            .enqueue_line(line)
            .map_err(|problem| ConfigError::unusable(flag(), format!("{jobs}:{}: {problem}", index + 1)))?;
        count += 1;
    }
    Ok(count)
}
