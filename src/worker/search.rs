//! [`Search`]: brings back jobs that run here or have ended here, and whose stream is lost, while no stream takes.
//!
//! The server redelivers such a job to any worker. If that is this one, the job need not run a second time. The protocol has no
//! way to ask for a certain job, only for the next few of some queues. A redelivered job keeps its place in the order, so it is
//! among the first, behind jobs that are more urgent. Each round opens a stream with as little prefetch as the jobs need, and
//! at once another one with twice as much if that brings other jobs alone. Such a stream closes at once, and its jobs are the
//! server's again, with no attempt counted. A round of the greatest size is followed by a wait, because other workers cannot
//! have its jobs meanwhile. From the second round on, only jobs that the server says to be ready are searched for: a job that
//! another worker runs is not to be had.

use std::collections::BTreeSet;
use std::sync::Arc;

use tracing::{debug, info};

use super::Run;
use crate::backoff::{Backoff, Waits};
use crate::chain::Chain;
use crate::client::StreamSettings;
use crate::job::JobId;
use crate::lifecycle::Phase;
use crate::stream::TakeStream;

/// The most jobs that a search holds at once: half of the number that the server holds in flight for all workers by default.
pub(super) const MAX_PREFETCH: usize = 512;

/// From one job to the most.
const MAX_DOUBLINGS: u32 = MAX_PREFETCH.ilog2();

/// The rounds of one search.
#[derive(Debug)]
pub(super) struct Search {
    waits: Waits,
    round: u32,
    /// Whether the next round follows at once.
    is_urgent: bool,
}

/// A stream that may bring jobs back.
pub(super) struct Found {
    pub(super) settings: Arc<StreamSettings>,
    pub(super) stream: TakeStream,
    pub(super) prefetch: usize,
}

impl Search {
    pub(super) fn new(backoff: &Backoff) -> Self {
        Self { waits: backoff.waits(), round: 0, is_urgent: false }
    }

    /// The jobs that are to be searched for: those that no stream holds, and that the stream that takes will not bring.
    pub(super) fn wanted(run: &Run, taking: Option<&Arc<StreamSettings>>) -> Vec<(JobId, Arc<StreamSettings>)> {
        if run.lifecycle.phase() > Phase::Draining {
            return Vec::new();
        }
        let mut unheld = run.ledger.unheld();
        unheld.retain(|(_, source)| !taking.is_some_and(|taking| taking.covers(source)));
        unheld
    }

    /// Notes that the last round has brought as many jobs as it could, and none that is wanted.
    pub(super) fn missed(&mut self, prefetch: usize) {
        self.is_urgent = prefetch < MAX_PREFETCH;
    }

    /// Makes one round, after a wait if one is due. Returns nothing if there is no stream to be had, or no job to be searched for.
    pub(super) async fn round(&mut self, run: &Run, taking: Option<&Arc<StreamSettings>>) -> Option<Found> {
        let (_, settings) = Self::wanted(run, taking).first()?.clone();
        if !std::mem::take(&mut self.is_urgent) {
            tokio::select! {
                biased;
                () = tokio::time::sleep(self.waits.next_wait()) => {}
                () = settings.client.health().recovered() => self.waits.reset(),
            }
        }
        let wanted = Self::wanted(run, taking);
        let of_these = wanted.into_iter().filter(|(_, source)| source.is_same(&settings)).map(|(id, _)| id);
        let ids = self.to_be_had(&settings, of_these.collect()).await;
        if ids.is_empty() {
            return None;
        }
        let prefetch = ids.len().saturating_mul(1 << self.round.min(MAX_DOUBLINGS)).min(MAX_PREFETCH.max(ids.len()));
        info!(jobs = ids.len(), prefetch, "opening a stream for jobs that are here, and whose stream was lost");
        match settings.open(prefetch).await {
            Ok(stream) => {
                self.round += 1;
                Some(Found { settings, stream, prefetch })
            }
            Err(error) => {
                debug!(error = %Chain(&error), "no stream for jobs that are here");
                None
            }
        }
    }

    /// The jobs that the server may hand out.
    async fn to_be_had(&self, settings: &StreamSettings, ids: BTreeSet<JobId>) -> BTreeSet<JobId> {
        if self.round == 0 {
            return ids;
        }
        let mut ready = BTreeSet::new();
        for id in ids {
            match settings.client.job(&id).await {
                Ok(state) => ready.extend(state.is_some_and(|state| state.is_ready()).then_some(id)),
                Err(error) => {
                    debug!(error = %Chain(&error), "cannot look at a job whose stream was lost");
                    return ready;
                }
            }
        }
        ready
    }
}
