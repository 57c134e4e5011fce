//! [`Streams`]: the open take streams of one run.

use std::convert::Infallible;
use std::sync::Arc;

use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::intake::Intake;
use super::purpose::{Purpose, purpose};
use super::session::{CloseReason, Session};
use super::{Run, Taken};
use crate::chain::Chain;
use crate::client::{Client, StreamSettings};
use crate::ledger::StreamId;
use crate::lifecycle::Phase;
use crate::stream::{StreamError, TakeStream};
use crate::version::misfit;
use crate::watch;

pub(super) struct Streams {
    run: Run,
    intake: Intake,
    dispatch_queue: async_channel::Sender<Taken>,
    open: Vec<OpenStream>,
    sessions: JoinSet<(StreamId, Result<CloseReason, StreamError>)>,
    /// The server's version when a taking stream was last opened.
    seen_version: Arc<Mutex<Option<String>>>,
}

struct OpenStream {
    id: StreamId,
    settings: Arc<StreamSettings>,
    purpose: watch::Sender<Purpose>,
    /// Whether the stream takes no more jobs, because it has lost prefetch slots or is a search stream.
    only_finishes: bool,
    is_search: bool,
}

impl Streams {
    pub(super) fn new(run: Run, intake: Intake, dispatch_queue: async_channel::Sender<Taken>) -> Self {
        let (open, sessions, seen_version) = (Vec::new(), JoinSet::new(), Arc::default());
        Self { run, intake, dispatch_queue, open, sessions, seen_version }
    }

    /// Adds a taking stream.
    pub(super) fn add(&mut self, settings: Arc<StreamSettings>, stream: TakeStream) {
        let (client, seen) = (Arc::clone(&settings.client), Arc::clone(&self.seen_version));
        let session = self.session(settings, stream, None);
        self.sessions.spawn(async move {
            let id = session.id;
            tokio::select! {
                biased;
                ended = session.run() => (id, ended),
                never = warn_of_version(&client, &seen) => match never {},
            }
        });
    }

    /// Adds a search stream with its own prefetch.
    pub(super) fn add_search(&mut self, settings: Arc<StreamSettings>, stream: TakeStream, prefetch: usize) {
        let session = self.session(settings, stream, Some(prefetch));
        self.sessions.spawn(async move { (session.id, session.run().await) });
    }

    /// Adds a stream, and returns its session. `search` is the prefetch of a search stream.
    fn session(&mut self, settings: Arc<StreamSettings>, stream: TakeStream, search: Option<usize>) -> Session {
        let is_search = search.is_some();
        let (sender, purpose) = watch::channel(if is_search { Purpose::Finish } else { Purpose::Take });
        let (run, intake, dispatch_queue) = (self.run.clone(), self.intake.clone(), self.dispatch_queue.clone());
        let session = Session::new(run, intake, dispatch_queue, Arc::clone(&settings), stream, purpose, search);
        let id = session.id;
        self.open.push(OpenStream { id, settings, purpose: sender, only_finishes: is_search, is_search });
        session
    }

    /// Assigns each stream its purpose. Returns whether a stream takes jobs.
    pub(super) fn assign(&mut self, phase: Phase, is_paused: bool, in_force: &StreamSettings) -> bool {
        let mut is_any_taking = false;
        for open in &self.open {
            let is_in_force = !is_any_taking && !open.only_finishes && open.settings.is_same(in_force);
            let new = purpose(phase, is_paused, is_in_force);
            is_any_taking |= new == Purpose::Take;
            let before = *open.purpose.borrow();
            if before == new {
                continue;
            }
            if (before, new, phase) == (Purpose::Take, Purpose::Finish, Phase::Running) && !is_paused {
                let under_way = self.run.ledger.under_way(open.id, None);
                info!(under_way, "finishing what came over this stream, while another one takes");
            }
            open.purpose.send_replace(new);
        }
        is_any_taking
    }

    /// Reports whether the taking stream has lost prefetch slots to jobs that this worker does not report.
    pub(super) fn is_taking_one_spent(&self) -> bool {
        let mut taking = self.open.iter().filter(|open| *open.purpose.borrow() == Purpose::Take);
        taking.any(|open| self.run.ledger.has_lost_places(open.id))
    }

    /// Marks each stream that has lost prefetch slots as one that only finishes its jobs.
    pub(super) fn retire_spent(&mut self) {
        for open in &mut self.open {
            open.only_finishes |= self.run.ledger.has_lost_places(open.id);
        }
    }

    pub(super) fn is_any_taking(&self) -> bool {
        self.open.iter().any(|open| *open.purpose.borrow() == Purpose::Take)
    }

    /// Returns the number of streams that only finish the jobs that came over them. Search streams do not count.
    pub(super) fn count_finishing(&self) -> usize {
        self.open.iter().filter(|open| *open.purpose.borrow() == Purpose::Finish && !open.is_search).count()
    }

    pub(super) fn is_any_open(&self) -> bool {
        !self.open.is_empty()
    }

    /// Reports whether an open search stream has no job in flight. Such a stream has not found a wanted job yet, or is about to
    /// close.
    pub(super) fn is_searching(&self) -> bool {
        self.open.iter().any(|open| open.is_search && self.run.ledger.under_way(open.id, None) == 0)
    }

    /// Waits until a stream closes. Returns `None` if no stream is open.
    pub(super) async fn next_closed(&mut self) -> Option<(StreamId, Result<CloseReason, StreamError>)> {
        let closed = self.sessions.join_next().await?;
        Some(closed.unwrap_or_else(|died| std::panic::resume_unwind(died.into_panic())))
    }

    /// Removes a stream that has closed. Returns whether it was the taking stream.
    pub(super) fn remove(&mut self, id: StreamId) -> bool {
        let was_taking = self.open.iter().any(|open| open.id == id && *open.purpose.borrow() == Purpose::Take);
        self.open.retain(|open| open.id != id);
        was_taking
    }

    /// Closes all streams, and waits until they are closed.
    pub(super) async fn close_all(mut self) {
        for open in &self.open {
            open.purpose.send_replace(Purpose::Nothing);
        }
        while self.sessions.join_next().await.is_some() {}
    }
}

/// Logs a warning if the server's version does not fit this worker, but not twice in a row for the same version. Never returns.
async fn warn_of_version(client: &Client, seen: &Mutex<Option<String>>) -> Infallible {
    match client.version().await {
        Ok(version) => {
            debug!(version, "server version");
            let is_new = seen.lock().await.replace(version.clone()).is_none_or(|seen| seen != version);
            if let Some(misfit) = misfit(&version).filter(|_| is_new) {
                warn!(version, misfit, "the server's version does not fit this worker's");
            }
        }
        // Log no warning, because a proxy may block all requests except those that a worker needs.
        Err(error) => debug!(error = %Chain(&error), "the server does not tell its version"),
    }
    std::future::pending().await
}
