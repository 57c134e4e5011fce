//! [`StreamSettings`]: the settings that a take stream is opened with.

use std::sync::Arc;

use super::{Client, ClientError, Connector, Tls};
use crate::config::WorkerConfig;
use crate::job::Job;
use crate::stream::{StreamLimits, TakeStream};

/// The server, queues, prefetch and limits of a take stream.
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
    /// The settings in `config`. The client of the `previous` settings serves again if it leads to the same server.
    pub(crate) fn of(config: &WorkerConfig, previous: Option<&Self>) -> Self {
        // More jobs than may be started would only be given back.
        let most = config.max_jobs.map_or(usize::MAX, |most| usize::try_from(most.get()).unwrap_or(usize::MAX));
        let same_server = |previous: &&Self| {
            *previous.client.url() == config.url && previous.tls == config.tls && previous.connector == config.connector
        };
        Self {
            client: previous
                .filter(same_server)
                .map_or_else(|| client(config), |previous| Arc::clone(&previous.client)),
            queues: config.queues.clone(),
            prefetch: config.prefetch.get().min(most),
            limits: config.stream_limits,
            tls: config.tls.clone(),
            connector: config.connector.clone(),
        }
    }

    /// Whether a stream by these settings is as good as one by the others.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        let Self { client, queues, prefetch, limits, tls, connector } = self;
        client.url() == other.client.url()
            && *queues == other.queues
            && *prefetch == other.prefetch
            && *limits == other.limits
            && *tls == other.tls
            && *connector == other.connector
    }

    /// Whether a job that came by the `other` settings may be run by these.
    pub(crate) fn fits(&self, job: &Job, other: &Self) -> bool {
        self.client.url() == other.client.url() && (self.queues.is_empty() || self.queues.contains(&job.queue))
    }

    /// Whether everything that came by the `other` settings is redelivered by these, too.
    pub(crate) fn covers(&self, other: &Self) -> bool {
        let of_these = |queue: &String| self.queues.contains(queue);
        self.client.url() == other.client.url()
            && (self.queues.is_empty() || (!other.queues.is_empty() && other.queues.iter().all(of_these)))
    }

    /// Opens a stream by these settings, over which at most `prefetch` unreported jobs are held.
    pub(crate) async fn open(&self, prefetch: usize) -> Result<TakeStream, ClientError> {
        self.client.take(&self.queues, prefetch, self.limits).await
    }
}

fn client(config: &WorkerConfig) -> Arc<Client> {
    let WorkerConfig { url, worker_id, tls, connector, .. } = config;
    Arc::new(Client::new(url.clone(), worker_id.clone(), tls, connector))
}
