//! [`StreamSettings`]: the settings of a take stream.

use std::sync::Arc;

use super::{Client, ClientError, Connector, Tls};
use crate::config::WorkerConfig;
use crate::job::Job;
use crate::stream::{StreamLimits, TakeStream};

#[derive(Debug)]
pub(crate) struct StreamSettings {
    pub(crate) client: Arc<Client>,
    pub(crate) queues: Vec<String>,
    pub(crate) prefetch: usize,
    limits: StreamLimits,
    tls: Tls,
    connector: Connector,
}

impl StreamSettings {
    /// Extracts the stream settings from `config`. The client of the `previous` settings is reused if the url, the TLS settings
    /// and the connector are unchanged.
    pub(crate) fn of(config: &WorkerConfig, previous: Option<&Self>) -> Self {
        // Do not prefetch more than `max_jobs` jobs, because the worker would not start the excess jobs, and the server would
        // requeue them.
        let most = config.max_jobs.map_or(usize::MAX, |most| usize::try_from(most.get()).unwrap_or(usize::MAX));
        let same_server = |previous: &&Self| {
            *previous.client.url() == config.url && previous.tls == config.tls && previous.connector == config.connector
        };
        let client = previous.filter(same_server).map(|previous| Arc::clone(&previous.client));
        let WorkerConfig { url, worker_id, tls, connector, .. } = config;
        Self {
            client: client.unwrap_or_else(|| Arc::new(Client::new(url.clone(), worker_id.clone(), tls, connector))),
            queues: config.queues.clone(),
            prefetch: config.prefetch.get().min(most),
            limits: config.stream_limits,
            tls: tls.clone(),
            connector: connector.clone(),
        }
    }

    /// Reports whether these settings equal `other` in everything that a stream depends on.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let Self { client, queues, prefetch, limits, tls, connector } = self;
        client.url() == other.client.url()
            && *queues == other.queues
            && *prefetch == other.prefetch
            && *limits == other.limits
            && *tls == other.tls
            && *connector == other.connector
    }

    /// Reports whether a stream with these settings could deliver `job`, which was delivered under the `other` settings.
    pub(crate) fn fits(&self, job: &Job, other: &Self) -> bool {
        self.client.url() == other.client.url() && (self.queues.is_empty() || self.queues.contains(&job.queue))
    }

    /// Reports whether a stream with these settings could redeliver every job that was delivered under the `other` settings.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let of_these = |queue: &String| self.queues.contains(queue);
        self.client.url() == other.client.url()
            && (self.queues.is_empty() || (!other.queues.is_empty() && other.queues.iter().all(of_these)))
    }

    /// Opens a stream over which the server keeps at most `prefetch` unreported jobs in flight.
    pub(crate) async fn open(&self, prefetch: usize) -> Result<TakeStream, ClientError> {
        self.client.take(&self.queues, prefetch, self.limits).await
    }
}
