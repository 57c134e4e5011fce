//! [`Producer`]: opens and closes the take streams, assigns each its purpose, and replaces the stream that takes jobs if that
//! stream is lost.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, OptionFuture};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::activity::Connection;
use super::intake::{Intake, IntakeState};
use super::opening::{Opening, Unopened, open, seconds};
use super::search::{Search, SearchStream};
use super::session::CloseReason;
use super::streams::Streams;
use super::{Run, Taken, WorkerError, max_kept};
use crate::backoff::{Backoff, Waits, sleep_until_if};
use crate::chain::Chain;
use crate::client::StreamSettings;
use crate::config::WorkerConfig;
use crate::ledger::{ComingStream, StreamId};
use crate::lifecycle::{Lifecycle, LifecycleState, Phase};
use crate::stream::{StreamError, TakeStream};
use crate::watch;

/// The streams of one run, and the streams that are being opened.
pub(super) struct Producer {
    intake: Intake,
    backoff: Backoff,
    dispatch_queue: async_channel::Sender<Taken>,
    /// The receiving end of the dispatch queue, from which the jobs of a closed stream are removed.
    waiting: async_channel::Receiver<Taken>,
    run: Run,
    /// The maximum number of jobs that run at once.
    concurrency: usize,
    streams: Streams,
    /// The taking stream that is being opened, with its settings.
    opening: Option<(Arc<StreamSettings>, Opening)>,
    /// The wait before the next attempt to open a taking stream, and the backoff of later attempts. Set when a taking stream is
    /// lost.
    pause: Option<(Duration, Waits)>,
    search: Option<Search>,
    searching: Option<BoxFuture<'static, (Search, Option<SearchStream>)>>,
    /// The initial settings, until the first stream is open. If the server refuses them, the run ends.
    first: Option<Arc<StreamSettings>>,
    /// The backoff between replacements of streams that have lost prefetch slots. See `renew_if_due`.
    renewals: Waits,
    /// The time of the last replacement of a stream that had lost prefetch slots.
    renewed: Option<Instant>,
    /// The time at which the taking stream is to be replaced, if the stream has lost prefetch slots.
    renewal_due: Option<Instant>,
    /// The prefetch for which the ack queue and the ledger are sized.
    prefetch: usize,
}

/// An event that the producer handles.
enum Event {
    /// A phase, a setting, a job, or the usable prefetch of a stream has changed, or a replacement is due.
    Changed,
    CloseReason(StreamId, Result<CloseReason, StreamError>),
    Opened(Arc<StreamSettings>, Result<(TakeStream, ComingStream), Unopened>),
    Searched(Search, Option<SearchStream>),
}

impl Producer {
    pub(super) fn new(
        config: &WorkerConfig,
        intake: Intake,
        dispatch_queue: async_channel::Sender<Taken>,
        waiting: async_channel::Receiver<Taken>,
        run: Run,
    ) -> Self {
        Self {
            backoff: config.backoff,
            concurrency: config.concurrency().get(),
            streams: Streams::new(run.clone(), intake.clone(), dispatch_queue.clone()),
            opening: None,
            pause: None,
            search: None,
            searching: None,
            first: Some(intake.settings()),
            renewals: config.backoff.waits(),
            renewed: None,
            renewal_due: None,
            prefetch: 0,
            intake,
            dispatch_queue,
            waiting,
            run,
        }
    }

    /// Opens and closes streams until the lifecycle is stopped. If this task ends for another reason, the worker is stopped too.
    pub(super) async fn run(mut self) -> Result<(), WorkerError> {
        let _stop = StopOnDrop(self.run.lifecycle.clone());
        let mut changes = Changes::of(&self.run, &self.intake);
        while self.run.lifecycle.phase() < Phase::Stopped {
            self.decide();
            match self.next_event(&mut changes).await {
                Event::Changed => {}
                Event::CloseReason(id, ended) => self.closed(id, ended),
                Event::Opened(settings, opened) => self.opened(settings, opened)?,
                Event::Searched(search, found) => self.searched(search, found),
            }
        }
        self.streams.close_all().await;
        Ok(())
    }

    /// Assigns each stream its purpose, and starts to open a taking stream or a search stream if one is needed.
    fn decide(&mut self) {
        let settings = self.intake.settings();
        self.run.ledger.set_present_server(&settings.client);
        self.make_room(settings.prefetch);
        self.renew_if_due();
        let (phase, is_paused) = (self.run.lifecycle.phase(), self.intake.is_paused());
        let is_taking = self.streams.assign(phase, is_paused, &settings);
        let takes = phase == Phase::Running && !is_paused;
        let finishing = if takes { self.streams.count_finishing() } else { 0 };
        let is_open = self.streams.is_any_open();
        self.run.activity.set_connection(Connection { is_taking, is_open, finishing });
        if !takes || is_taking {
            self.opening = None;
        } else if self.opening.as_ref().is_none_or(|(opening, _)| !Arc::ptr_eq(opening, &settings)) {
            // The pause is for the server whose stream was lost. If the settings have changed while a stream was being opened,
            // the stream with the new settings is opened without a pause.
            let pause = self.pause.take().filter(|_| self.opening.is_none());
            let (wait, waits) = pause.unwrap_or_else(|| (Duration::ZERO, self.backoff.waits()));
            let is_first = self.first.as_ref().is_some_and(|first| Arc::ptr_eq(first, &settings));
            let opening = open(&self.run, Arc::clone(&settings), is_first, wait, waits);
            self.opening = Some((Arc::clone(&settings), opening));
        }
        self.search_if_needed(takes.then_some(&settings));
    }

    /// Resizes the ack queue and the ledger if the prefetch has changed.
    fn make_room(&mut self, prefetch: usize) {
        if std::mem::replace(&mut self.prefetch, prefetch) != prefetch {
            let capacity = prefetch.saturating_mul(2);
            self.run.acks.resize(capacity);
            self.run.ledger.make_room(max_kept(capacity, self.concurrency));
        }
    }

    /// Replaces the taking stream if it has lost prefetch slots to jobs that this worker does not report, for example because a
    /// report was dropped. The server still counts these jobs as in flight. Replacements are spaced by the backoff, so that a job
    /// whose report is always refused is not run in a tight loop. Until the stream is replaced, it takes jobs with its remaining
    /// prefetch slots.
    fn renew_if_due(&mut self) {
        if !self.streams.is_taking_one_spent() {
            self.renewal_due = None;
            return;
        }
        let now = Instant::now();
        let due =
            *self.renewal_due.get_or_insert_with(|| next_renewal(self.renewed, &mut self.renewals, &self.backoff));
        if now >= due {
            self.streams.retire_spent();
            (self.renewed, self.renewal_due) = (Some(now), None);
            info!("opening another stream: the server still holds jobs whose reports were dropped");
        }
    }

    fn search_if_needed(&mut self, taking: Option<&Arc<StreamSettings>>) {
        if Search::wanted(&self.run, taking).is_empty() {
            (self.search, self.searching) = (None, None);
        } else if self.searching.is_none() && !self.streams.is_searching() {
            let mut search = self.search.take().unwrap_or_else(|| Search::new(&self.backoff));
            let (run, taking) = (self.run.clone(), taking.cloned());
            self.searching = Some(Box::pin(async move {
                let found = search.round(&run, taking.as_ref()).await;
                (search, found)
            }));
        }
    }

    fn opened(
        &mut self,
        settings: Arc<StreamSettings>,
        opened: Result<(TakeStream, ComingStream), Unopened>,
    ) -> Result<(), WorkerError> {
        self.opening = None;
        match opened {
            Ok((stream, _coming)) => {
                info!("connected, listening for jobs");
                (self.first, self.pause) = (None, None);
                self.streams.add(settings, stream);
                Ok(())
            }
            Err(Unopened { error, is_final: true }) => Err(WorkerError::Refused(error)),
            // `open` returns this error only once the worker drains.
            Err(Unopened { is_final: false, .. }) => Ok(()),
        }
    }

    fn closed(&mut self, id: StreamId, ended: Result<CloseReason, StreamError>) {
        let was_taking = self.streams.remove(id);
        self.drop_waiting(id);
        match ended {
            Ok(CloseReason::Finished) => info!("stream closed, everything taken over it has been reported"),
            Ok(CloseReason::NotFound { prefetch, is_full }) => {
                debug!(prefetch, is_full, "stream closed, it has brought none of the jobs that are here");
                if let Some(search) = self.search.as_mut().filter(|_| is_full) {
                    search.missed(&self.run, prefetch);
                }
            }
            Err(error) if self.run.lifecycle.phase() >= Phase::Killing => {
                warn!(error = %Chain(&error), "stream lost while killing, interrupted jobs may run elsewhere before they end here");
            }
            Err(error) if was_taking => {
                let mut waits = self.backoff.waits();
                let wait = waits.next_wait();
                self.pause = Some((wait, waits));
                self.run.metrics.reconnecting();
                log_lost(&error, wait);
            }
            Err(error) => {
                warn!(error = %Chain(&error), "stream lost while its last jobs were finished");
            }
        }
    }

    fn searched(&mut self, search: Search, found: Option<SearchStream>) {
        (self.search, self.searching) = (Some(search), None);
        if let Some(SearchStream { settings, stream, coming: _coming, prefetch }) = found {
            self.streams.add_search(settings, stream, prefetch);
        }
    }

    /// Waits for the next event that may change which streams are needed.
    async fn next_event(&mut self, changes: &mut Changes) -> Event {
        let with_movements = !self.streams.is_any_taking() || self.search.is_some() || self.searching.is_some();
        let opening = self.opening.as_mut().map(async |(settings, opening)| (Arc::clone(settings), opening.await));
        tokio::select! {
            biased;
            () = changes.next(with_movements) => Event::Changed,
            Some((id, ended)) = self.streams.next_closed() => Event::CloseReason(id, ended),
            Some((settings, opened)) = OptionFuture::from(opening) => Event::Opened(settings, opened),
            Some((search, found)) = OptionFuture::from(self.searching.as_mut()) => Event::Searched(search, found),
            () = sleep_until_if(self.renewal_due) => Event::Changed,
        }
    }

    /// Drops the jobs of a closed stream from the dispatch queue, because the server has requeued them and they would delay other
    /// jobs.
    fn drop_waiting(&self, stream: StreamId) {
        // Leave a closed queue unchanged, because the jobs of other streams could not be put back into it. The worker loops skip
        // the jobs of a closed stream anyway.
        if self.waiting.is_closed() {
            return;
        }
        let waiting: Vec<Taken> = std::iter::from_fn(|| self.waiting.try_recv().ok()).collect();
        for taken in waiting {
            if taken.stream == stream {
                debug!(
                    job.id = taken.job.id.as_str(),
                    "job not started: its stream was lost, and the server has it again"
                );
            } else {
                // If the queue has been closed in the meantime, the server requeues the job when its stream closes.
                let _ = self.dispatch_queue.try_send(taken);
            }
        }
    }
}

/// Returns the time at which the taking stream is to be replaced. The first replacement is due at once. If replacements follow one
/// another closely, the wait grows.
fn next_renewal(renewed: Option<Instant>, renewals: &mut Waits, backoff: &Backoff) -> Instant {
    match renewed {
        Some(renewed) if renewed.elapsed() <= backoff.max_wait() * 2 => renewed + renewals.next_wait(),
        _ => {
            renewals.reset();
            Instant::now()
        }
    }
}

/// The receivers of all changes on which the streams depend.
struct Changes {
    lifecycle: watch::Receiver<LifecycleState>,
    intake: watch::Receiver<IntakeState>,
    lost_places: watch::Receiver<()>,
    movements: watch::Receiver<()>,
}

impl Changes {
    fn of(run: &Run, intake: &Intake) -> Self {
        Self {
            lifecycle: run.lifecycle.changes(),
            intake: intake.changes(),
            lost_places: run.ledger.lost_places(),
            movements: run.ledger.movements(),
        }
    }

    /// Waits for the next change. Ignores changes to jobs in the ledger unless `with_movements` is set, so that not every job
    /// wakes the producer.
    async fn next(&mut self, with_movements: bool) {
        // A wait fails only after its sender is dropped, and the producer keeps all senders alive.
        tokio::select! {
            biased;
            _ = self.lifecycle.changed() => {}
            _ = self.intake.changed() => {}
            _ = self.lost_places.changed() => {}
            _ = self.movements.changed(), if with_movements => {}
        }
    }
}

fn log_lost(error: &StreamError, wait: Duration) {
    let reconnect_in = seconds(wait);
    match error {
        // Log an error instead of a warning, because neither a network fault nor a restart causes a malformed line, and the next
        // stream may bring the line again.
        StreamError::NotAJob(_) => error!(error = %Chain(error), reconnect_in, "stream lost, reconnecting"),
        StreamError::Ended => warn!(reconnect_in, "server ended the stream, reconnecting"),
        StreamError::Broken(_) | StreamError::Silent(_) => {
            warn!(error = %Chain(error), reconnect_in, "stream lost, reconnecting");
        }
    }
}

/// A guard that stops the worker when the producer ends, because then no more jobs can be taken.
struct StopOnDrop(Lifecycle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop_because("no more jobs can be taken");
    }
}
