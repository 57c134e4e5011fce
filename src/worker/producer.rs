//! [`Producer`]: decides which take streams there are and what each of them is for, and keeps the one open that takes.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::intake::{self, Intake};
use super::opening::{Opening, Unopened, open, seconds};
use super::search::{Found, Search};
use super::session::{Closed, sleep_until_if};
use super::streams::{Lost, Streams};
use super::{Run, Taken, WorkerError, max_kept};
use crate::backoff::{Backoff, Waits};
use crate::chain::Chain;
use crate::client::StreamSettings;
use crate::ledger::{ComingStream, StreamId};
use crate::lifecycle::{self, Lifecycle, Phase};
use crate::stream::{StreamError, TakeStream};
use crate::watch;

pub(super) struct Producer {
    pub(super) intake: Intake,
    pub(super) backoff: Backoff,
    pub(super) dispatch_queue: async_channel::Sender<Taken>,
    /// Its other end, for jobs that are not to be started any more.
    pub(super) waiting: async_channel::Receiver<Taken>,
    pub(super) run: Run,
    /// The number of jobs that run at once.
    pub(super) concurrency: usize,
}

type Searching = Pin<Box<dyn Future<Output = (Search, Option<Found>)> + Send>>;

/// The streams of one run, and those that are being opened.
struct State {
    streams: Streams,
    /// The stream that is to take, while it is being opened.
    opening: Option<(Arc<StreamSettings>, Opening)>,
    /// The wait before the next one is opened, after a loss, and the waits after that one.
    pause: Option<(Duration, Waits)>,
    search: Option<Search>,
    searching: Option<Searching>,
    /// The settings at the start, until a stream has been open: a refusal of them is final.
    first: Option<Arc<StreamSettings>>,
    /// The waits between streams that lose places of their prefetch.
    renewals: Waits,
    /// The moment at which such a stream was last replaced.
    renewed: Option<Instant>,
    /// The moment at which the present one is to be.
    renewal_due: Option<Instant>,
    /// The prefetch that the ack queue has room for.
    prefetch: usize,
}

/// What has happened.
enum Event {
    /// A phase, a setting, a job or a place: everything is to be decided anew.
    Changed,
    Closed(StreamId, Result<Closed, StreamError>),
    Opened(Arc<StreamSettings>, Result<(TakeStream, ComingStream), Unopened>),
    Searched(Search, Option<Found>),
}

impl Producer {
    /// Runs until the lifecycle is stopped, through any number of streams. However it ends, it does not leave the worker
    /// running without it.
    pub(super) async fn run(self) -> Result<(), WorkerError> {
        let _stop = StopOnDrop(self.run.lifecycle.clone());
        let mut state = State {
            streams: Streams::new(self.run.clone(), self.intake.clone(), self.dispatch_queue.clone()),
            opening: None,
            pause: None,
            search: None,
            searching: None,
            first: Some(self.intake.settings()),
            renewals: self.backoff.waits(),
            renewed: None,
            renewal_due: None,
            prefetch: 0,
        };
        let mut changes = Changes::of(&self.run, &self.intake);
        while self.run.lifecycle.phase() < Phase::Stopped {
            self.decide(&mut state);
            match next_event(&mut state, &mut changes).await {
                Event::Changed => {}
                Event::Closed(id, ended) => self.closed(&mut state, id, ended),
                Event::Opened(settings, opened) => self.opened(&mut state, settings, opened)?,
                Event::Searched(search, found) => searched(&mut state, search, found),
            }
        }
        state.streams.close_all().await;
        Ok(())
    }

    /// Gives each stream its purpose, and sees to it that the one is being opened that is missing.
    fn decide(&self, state: &mut State) {
        let settings = self.intake.settings();
        self.run.ledger.set_present_server(&settings.client);
        self.make_room(state, settings.prefetch);
        self.renew_if_due(state);
        let (phase, is_paused) = (self.run.lifecycle.phase(), self.intake.is_paused());
        let is_taking = state.streams.assign(phase, is_paused, &settings);
        self.run.activity.set_connected(is_taking, state.streams.is_any_open());
        let takes = phase == Phase::Running && !is_paused;
        if !takes || is_taking {
            state.opening = None;
        } else if state.opening.as_ref().is_none_or(|(opening, _)| !Arc::ptr_eq(opening, &settings)) {
            // The pause is for the server whose stream was lost, not for another one.
            let pause = state.pause.take().filter(|_| state.opening.is_none());
            let (wait, waits) = pause.unwrap_or_else(|| (Duration::ZERO, self.backoff.waits()));
            let is_first = state.first.as_ref().is_some_and(|first| Arc::ptr_eq(first, &settings));
            let opening = open(&self.run, Arc::clone(&settings), is_first, wait, waits);
            state.opening = Some((Arc::clone(&settings), opening));
        }
        self.search_if_needed(state, takes.then_some(&settings));
    }

    /// Gives the ack queue and the ledger the size that the prefetch needs.
    fn make_room(&self, state: &mut State, prefetch: usize) {
        if std::mem::replace(&mut state.prefetch, prefetch) != prefetch {
            let capacity = prefetch.saturating_mul(2);
            self.run.acks.resize(capacity);
            self.run.ledger.make_room(max_kept(capacity, self.concurrency));
        }
    }

    /// Replaces a stream that has lost places of its prefetch. The stream takes on with the places that are left until another
    /// one is due: a job whose report is refused again and again would otherwise run without pause.
    fn renew_if_due(&self, state: &mut State) {
        if !state.streams.is_taking_one_spent() {
            state.renewal_due = None;
            return;
        }
        let now = Instant::now();
        let due =
            *state.renewal_due.get_or_insert_with(|| next_renewal(state.renewed, &mut state.renewals, &self.backoff));
        if now >= due {
            state.streams.retire_spent();
            (state.renewed, state.renewal_due) = (Some(now), None);
            info!("opening another stream: the server still holds jobs whose reports were dropped");
        }
    }

    fn search_if_needed(&self, state: &mut State, taking: Option<&Arc<StreamSettings>>) {
        if Search::wanted(&self.run, taking).is_empty() {
            (state.search, state.searching) = (None, None);
        } else if state.searching.is_none() && !state.streams.is_searching() {
            let mut search = state.search.take().unwrap_or_else(|| Search::new(&self.backoff));
            let (run, taking) = (self.run.clone(), taking.cloned());
            state.searching = Some(Box::pin(async move {
                let found = search.round(&run, taking.as_ref()).await;
                (search, found)
            }));
        }
    }

    fn opened(
        &self,
        state: &mut State,
        settings: Arc<StreamSettings>,
        opened: Result<(TakeStream, ComingStream), Unopened>,
    ) -> Result<(), WorkerError> {
        state.opening = None;
        match opened {
            Ok((stream, _coming)) => {
                info!("connected, listening for jobs");
                (state.first, state.pause) = (None, None);
                state.streams.add(settings, stream);
                Ok(())
            }
            Err(Unopened::Refused(error)) => Err(WorkerError::Refused(error)),
            // The worker drains.
            Err(Unopened::Unreachable(_)) => Ok(()),
        }
    }

    fn closed(&self, state: &mut State, id: StreamId, ended: Result<Closed, StreamError>) {
        let lost = state.streams.remove(id);
        self.drop_waiting(id);
        match (ended, lost) {
            (Ok(Closed::Finished), _) => info!("stream closed, everything taken over it has been reported"),
            (Ok(Closed::NotFound { prefetch, is_full }), _) => {
                debug!(prefetch, is_full, "stream closed, it has brought none of the jobs that are here");
                if let Some(search) = state.search.as_mut().filter(|_| is_full) {
                    search.missed(&self.run, prefetch);
                }
            }
            (Err(error), _) if self.run.lifecycle.phase() >= Phase::Killing => {
                warn!(error = %Chain(&error), "stream lost while killing, interrupted jobs may run elsewhere before they end here");
            }
            (Err(error), Lost::WhileTaking) => {
                let mut waits = self.backoff.waits();
                let wait = waits.next_wait();
                state.pause = Some((wait, waits));
                self.run.metrics.reconnecting();
                log_lost(&error, wait);
            }
            (Err(error), Lost::WhileFinishing) => {
                warn!(error = %Chain(&error), "stream lost while its last jobs were finished");
            }
        }
    }

    /// The stream is gone, and the server has its jobs again. Those that wait in the queue would be in the way of the others.
    fn drop_waiting(&self, stream: StreamId) {
        // Nothing can be put back into a closed queue. The loops refuse the jobs of a lost stream by themselves.
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
                // Once the queue is closed, the job goes back with its stream.
                let _ = self.dispatch_queue.try_send(taken);
            }
        }
    }
}

/// The first loss of a place is mended at once, and those that follow soon after each wait longer.
fn next_renewal(renewed: Option<Instant>, renewals: &mut Waits, backoff: &Backoff) -> Instant {
    match renewed {
        Some(renewed) if renewed.elapsed() <= backoff.max_wait() * 2 => renewed + renewals.next_wait(),
        _ => {
            renewals.reset();
            Instant::now()
        }
    }
}

fn searched(state: &mut State, search: Search, found: Option<Found>) {
    (state.search, state.searching) = (Some(search), None);
    if let Some(Found { settings, stream, coming: _coming, prefetch }) = found {
        state.streams.add_search(settings, stream, prefetch);
    }
}

/// Waits for the next thing that may change which streams there are to be.
async fn next_event(state: &mut State, changes: &mut Changes) -> Event {
    let State { streams, opening, search, searching, renewal_due, .. } = state;
    let with_movements = !streams.is_any_taking() || search.is_some() || searching.is_some();
    let opened = async {
        match opening {
            Some((settings, opening)) => (Arc::clone(settings), opening.await),
            None => std::future::pending().await,
        }
    };
    let searched = async {
        match searching {
            Some(searching) => searching.await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        () = changes.next(with_movements) => Event::Changed,
        (id, ended) = streams.next_closed() => Event::Closed(id, ended),
        (settings, opened) = opened => Event::Opened(settings, opened),
        (search, found) = searched => Event::Searched(search, found),
        () = sleep_until_if(*renewal_due) => Event::Changed,
    }
}

/// Hears of everything that decides which streams there are.
struct Changes {
    lifecycle: watch::Receiver<lifecycle::State>,
    intake: watch::Receiver<intake::State>,
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

    /// Waits for the next change. The movements of jobs count only if asked for: otherwise each job would wake the producer.
    async fn next(&mut self, with_movements: bool) {
        // Each fails only once its sender is gone, and the producer has all of them.
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
        // Neither a network nor a restart makes such a line, and the next stream may bring the same.
        StreamError::NotAJob(_) => error!(error = %Chain(error), reconnect_in, "stream lost, reconnecting"),
        StreamError::Ended => warn!(reconnect_in, "server ended the stream, reconnecting"),
        StreamError::Broken(_) | StreamError::Silent(_) => {
            warn!(error = %Chain(error), reconnect_in, "stream lost, reconnecting");
        }
    }
}

/// Without a producer no jobs are taken any more, and the worker must not wait for signals for ever.
struct StopOnDrop(Lifecycle);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.stop_because("no more jobs can be taken");
    }
}
