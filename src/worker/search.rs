//! [`Search`]: asks the server for wanted jobs. A wanted job runs or has ended in this worker, its stream is lost, and no taking
//! stream will redeliver it.
//!
//! The server redelivers a wanted job to any worker. If this worker gets the job, the job does not run a second time. The protocol
//! cannot request a particular job, only the next few jobs of some queues. A requeued job keeps its position in the queue, so the
//! job is near the front of the queue, behind jobs of higher priority.
//!
//! Each round of a search opens a stream. In the first round, the prefetch is the number of wanted jobs. If a stream brings its
//! full prefetch and no wanted job, it is closed, and the server requeues its jobs without counting an attempt. The next round
//! follows at once with twice the prefetch. After a round with the maximum prefetch, the search waits before the next round,
//! because no other worker can take the jobs of a search stream while it is open. From the second round on, only jobs that are
//! ready on the server are searched for, because a job that another worker runs cannot be delivered.

use std::sync::Arc;

use tracing::{debug, info};

use super::Run;
use crate::backoff::{Backoff, Waits};
use crate::chain::Chain;
use crate::client::StreamSettings;
use crate::ledger::{ComingStream, Unheld};
use crate::lifecycle::Phase;
use crate::stream::TakeStream;

/// The maximum prefetch of a search: half of the server's default limit on jobs in flight, which all workers share.
pub(super) const MAX_PREFETCH: usize = 512;

/// The number of doublings from a prefetch of one to `MAX_PREFETCH`.
const MAX_DOUBLINGS: u32 = MAX_PREFETCH.ilog2();

/// The state of one search, which consists of rounds.
#[derive(Debug)]
pub(super) struct Search {
    waits: Waits,
    round: u32,
    /// Whether the next round starts without a wait.
    is_urgent: bool,
    /// The settings of the previous round.
    last: Option<Arc<StreamSettings>>,
}

/// An open stream that may redeliver wanted jobs.
pub(super) struct SearchStream {
    pub(super) settings: Arc<StreamSettings>,
    pub(super) stream: TakeStream,
    pub(super) coming: ComingStream,
    pub(super) prefetch: usize,
}

impl Search {
    pub(super) fn new(backoff: &Backoff) -> Self {
        Self { waits: backoff.waits(), round: 0, is_urgent: false, last: None }
    }

    /// Returns the jobs that no open stream holds, except those that the stream with the settings `taking` will redeliver. Returns
    /// none once the worker is being killed.
    pub(super) fn wanted(run: &Run, taking: Option<&Arc<StreamSettings>>) -> Vec<Unheld> {
        if run.lifecycle.phase() > Phase::Draining {
            return Vec::new();
        }
        let mut unheld = run.ledger.unheld();
        unheld.retain(|unheld| !taking.is_some_and(|taking| taking.covers(&unheld.source)));
        unheld
    }

    /// Records that a round has brought its full prefetch and no wanted job. The next round starts without a wait if its prefetch
    /// can be larger.
    pub(super) fn missed(&mut self, run: &Run, prefetch: usize) {
        let Some(settings) = &self.last else { return };
        let mut wanted = run.ledger.unheld();
        wanted.retain(|unheld| unheld.source.is_same(settings));
        self.is_urgent = prefetch < greatest_prefetch(&wanted, settings);
    }

    /// Runs one round, after a wait if one is due. Returns `None` if there is no job to search for, or if no stream can be
    /// opened.
    pub(super) async fn round(&mut self, run: &Run, taking: Option<&Arc<StreamSettings>>) -> Option<SearchStream> {
        let settings = self.next_settings(&Self::wanted(run, taking))?;
        if !std::mem::take(&mut self.is_urgent) {
            let mut parkings = run.ledger.parkings();
            tokio::select! {
                biased;
                () = tokio::time::sleep(self.waits.next_wait()) => {}
                () = settings.client.health().recovered() => self.waits.reset(),
                // Search at once for a job whose outcome has just been parked. `changed` fails only after the ledger is dropped,
                // and `run` keeps the ledger alive.
                _ = parkings.changed() => self.waits.reset(),
            }
        }
        let mut wanted = Self::wanted(run, taking);
        wanted.retain(|unheld| unheld.source.is_same(&settings));
        let wanted = self.to_be_had(&settings, wanted).await;
        if wanted.is_empty() {
            return None;
        }
        let (jobs, prefetch) = (wanted.len(), self.prefetch(&wanted, &settings));
        info!(jobs, prefetch, "opening a stream for jobs that are here, and whose stream was lost");
        let coming = run.ledger.expect_stream();
        match settings.open(prefetch).await {
            Ok(stream) => {
                self.round += 1;
                Some(SearchStream { settings, stream, coming, prefetch })
            }
            Err(error) => {
                debug!(error = %Chain(&error), "no stream for jobs that are here");
                None
            }
        }
    }

    /// Returns the settings of the next round. If the wanted jobs were taken under different settings, the rounds alternate
    /// between these settings.
    fn next_settings(&mut self, wanted: &[Unheld]) -> Option<Arc<StreamSettings>> {
        let mut all: Vec<&Arc<StreamSettings>> = Vec::new();
        for Unheld { source, .. } in wanted {
            if !all.iter().any(|settings| settings.is_same(source)) {
                all.push(source);
            }
        }
        let last = self.last.as_ref().and_then(|last| all.iter().position(|settings| settings.is_same(last)));
        let next = last.map_or(0, |last| if self.is_urgent { last } else { last + 1 }) % all.len().max(1);
        if last != Some(next) {
            self.round = 0;
        }
        self.last = all.get(next).map(|settings| Arc::clone(settings));
        self.last.clone()
    }

    /// Returns the prefetch of the next round.
    fn prefetch(&self, wanted: &[Unheld], settings: &StreamSettings) -> usize {
        let doubled = wanted.len().saturating_mul(1 << self.round.min(MAX_DOUBLINGS));
        doubled.min(greatest_prefetch(wanted, settings))
    }

    /// Returns the wanted jobs that the server can deliver now. For the first round, assumes that it can deliver all of them.
    async fn to_be_had(&self, settings: &StreamSettings, wanted: Vec<Unheld>) -> Vec<Unheld> {
        if self.round == 0 {
            return wanted;
        }
        let mut to_be_had = Vec::new();
        for unheld in wanted {
            match settings.client.job(&unheld.id).await {
                Ok(state) => to_be_had.extend(state.is_some_and(|state| state.is_ready()).then_some(unheld)),
                // A proxy may refuse this request. Search for the job anyway. At worst, the search does not find the job.
                Err(error) if error.is_refusal() => to_be_had.push(unheld),
                Err(error) => {
                    debug!(error = %Chain(&error), "cannot look at a job whose stream was lost");
                    break;
                }
            }
        }
        to_be_had
    }
}

/// Returns the maximum prefetch of a search. If all wanted jobs have ended, the maximum is large, because the stream closes as
/// soon as the jobs are reported. A stream that brings a running job stays open while the job runs, and no other worker can take
/// the stream's other jobs during that time. So the maximum is smaller if some of the wanted jobs are running. If all of them are
/// running, the maximum is the number of wanted jobs.
fn greatest_prefetch(wanted: &[Unheld], settings: &StreamSettings) -> usize {
    let ended = wanted.iter().filter(|unheld| unheld.has_ended).count();
    let deep = match ended {
        0 => 0,
        _ if ended == wanted.len() => MAX_PREFETCH,
        _ => settings.prefetch,
    };
    deep.max(wanted.len())
}
