//! [`open`]: opens the taking stream, with retries.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tracing::{error, info, warn};

use super::Run;
use crate::backoff::{Early, Retryable, Waits, retry};
use crate::chain::Chain;
use crate::client::{ClientError, StreamSettings};
use crate::ledger::ComingStream;
use crate::lifecycle::Phase;
use crate::stream::TakeStream;

/// The error of a stream that could not be opened.
pub(super) struct Unopened {
    pub(super) error: ClientError,
    /// Whether the server refused the very first request, so a retry would not help.
    pub(super) is_final: bool,
}

impl Retryable for Unopened {
    fn is_retryable(&self) -> bool {
        !self.is_final
    }

    fn retry_after(&self) -> Option<Duration> {
        self.error.retry_after()
    }
}

/// A stream that is being opened.
pub(super) type Opening = BoxFuture<'static, Result<(TakeStream, ComingStream), Unopened>>;

/// Opens a stream after `wait`, or earlier if the server recovers. Gives up once the worker drains. `is_first` means that no
/// stream has been open yet and the settings are the initial ones. A refusal then means a mistake in the settings, and is not
/// retried.
pub(super) fn open(run: &Run, settings: Arc<StreamSettings>, is_first: bool, wait: Duration, waits: Waits) -> Opening {
    let (ledger, lifecycle, metrics) = (Arc::clone(&run.ledger), run.lifecycle.clone(), run.metrics.clone());
    Box::pin(async move {
        let health = settings.client.health();
        tokio::select! {
            biased;
            () = tokio::time::sleep(wait) => {}
            () = health.recovered() => {}
        }
        let attempt = || async {
            info!(url = %settings.client.url(), "connecting");
            let coming = ledger.expect_stream();
            let opened = settings.open(settings.prefetch).await;
            let stream = opened.map_err(|error| Unopened { is_final: is_first && error.is_mistake(), error })?;
            Ok((stream, coming))
        };
        let on_error = |unopened: &Unopened, wait: Option<Duration>| {
            metrics.reconnecting();
            log_unopened(&unopened.error, wait.unwrap_or_default());
        };
        let early = || async {
            health.recovered().await;
            Early::Recovery
        };
        retry(waits, &lifecycle, Phase::Draining, attempt, on_error, early).await
    })
}

fn log_unopened(error: &ClientError, wait: Duration) {
    let reconnect_in = seconds(wait);
    if error.is_mistake() {
        error!(error = %Chain(error), reconnect_in, "server refuses the worker, reconnecting");
    } else {
        warn!(error = %Chain(error), reconnect_in, "server unreachable, reconnecting");
    }
}

/// Formats a wait for the log.
pub(super) fn seconds(wait: Duration) -> String {
    format!("{:.2}s", wait.as_secs_f64())
}
