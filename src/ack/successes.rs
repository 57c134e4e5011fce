//! Reports of successes: many in one request, and one request at a time to each server.

use std::collections::HashSet;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Poll;

use futures_util::stream::{self, FuturesUnordered, StreamExt, TryStreamExt};
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio_util::sync::CancellationToken;

use super::{Reporter, Success};
use crate::client::{Client, ClientError};
use crate::fate::{Answer, Hold, Kind, Step, Told, fate};
use crate::job::{JobId, Outcome};
use crate::ledger::{Attempt, Delivery};

/// The most ids that one bulk request carries, so that its size stays far below the limits of servers and proxies.
const MAX_SUCCESSES_PER_REQUEST: usize = 1000;

/// The number of scheduler turns for which a bulk request waits for jobs that end at the same moment.
const TURNS: usize = 3;

/// The number of denied successes that are looked into at once: enough to hide the round trip, few enough to spare the server.
const MAX_LOOKS_UNDER_WAY: usize = 8;

/// The successes that wait for a request, by server.
#[derive(Default)]
struct Gathered {
    by_server: Mutex<Vec<Bulk>>,
    /// Whether a success waits for another server than before.
    is_rerouted: AtomicBool,
}

struct Bulk {
    client: Arc<Client>,
    waiting: Vec<Success>,
    is_under_way: bool,
}

impl Gathered {
    fn lock(&self) -> MutexGuard<'_, Vec<Bulk>> {
        self.by_server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, client: Arc<Client>, success: Success) {
        let mut bulks = self.lock();
        match bulks.iter_mut().find(|bulk| Arc::ptr_eq(&bulk.client, &client)) {
            Some(bulk) => bulk.waiting.push(success),
            None => bulks.push(Bulk { client, waiting: vec![success], is_under_way: false }),
        }
    }

    /// The servers to which a request may leave. Each is under way from here on.
    fn begin(&self) -> Vec<Arc<Client>> {
        let mut bulks = self.lock();
        let ready = bulks.iter_mut().filter(|bulk| !bulk.is_under_way && !bulk.waiting.is_empty());
        ready
            .map(|bulk| {
                bulk.is_under_way = true;
                Arc::clone(&bulk.client)
            })
            .collect()
    }

    /// Takes as many of a server's successes as there is room for in `batch`.
    fn take(&self, client: &Arc<Client>, batch: &mut Vec<Success>) {
        let mut bulks = self.lock();
        if let Some(bulk) = bulks.iter_mut().find(|bulk| Arc::ptr_eq(&bulk.client, client)) {
            let room = MAX_SUCCESSES_PER_REQUEST.saturating_sub(batch.len()).min(bulk.waiting.len());
            batch.extend(bulk.waiting.drain(..room));
        }
    }

    /// Waits until a success is rerouted. The requests that reroute are polled before this, in the same task.
    fn rerouted(&self) -> impl Future<Output = ()> {
        poll_fn(|_| if self.is_rerouted.swap(false, Ordering::Relaxed) { Poll::Ready(()) } else { Poll::Pending })
    }

    /// Notes that no request to that server is under way any more.
    fn end(&self, client: &Arc<Client>) {
        self.lock().retain_mut(|bulk| {
            if Arc::ptr_eq(&bulk.client, client) {
                bulk.is_under_way = false;
            }
            bulk.is_under_way || !bulk.waiting.is_empty()
        });
    }
}

impl Reporter {
    /// Sends one bulk request at a time to each server: while it is under way, the next one gathers. No timer holds a report
    /// back.
    pub(super) async fn report_successes(
        self,
        mut queue: mpsc::UnboundedReceiver<Success>,
        closing: CancellationToken,
    ) {
        let (gathered, mut under_way) = (Gathered::default(), FuturesUnordered::new());
        let (mut arrived, mut is_open) = (Vec::new(), true);
        let mut is_closing = pin!(closing.cancelled());
        while is_open || !under_way.is_empty() {
            tokio::select! {
                biased;
                Some(()) = under_way.next() => {}
                () = &mut is_closing, if !queue.is_closed() => queue.close(),
                () = gathered.rerouted() => {}
                count = queue.recv_many(&mut arrived, MAX_SUCCESSES_PER_REQUEST), if is_open => is_open = count > 0,
            }
            for success in arrived.drain(..) {
                self.gather(&gathered, success);
            }
            // In a box, so that a request is not moved as a whole for each job.
            under_way.extend(gathered.begin().into_iter().map(|client| Box::pin(self.report_batch(client, &gathered))));
        }
    }

    async fn report_batch(&self, client: Arc<Client>, gathered: &Gathered) {
        await_the_simultaneous().await;
        let mut batch = Vec::new();
        let attempt = || {
            self.keep_own(&client, &mut batch, gathered);
            // The successes that have gathered since the last try leave with this one.
            gathered.take(&client, &mut batch);
            self.try_successes(&client, batch.iter().map(|success: &Success| success.attempt.clone()).collect())
        };
        if let Err(error) = self.see_through(&client, attempt).await {
            let attempts = batch.iter().map(|success| &success.attempt);
            let unsettled: Vec<&Attempt> =
                attempts.filter(|attempt| self.ledger.destination(attempt).is_some()).collect();
            self.drop_reports(&unsettled, &error);
        }
        // What is left has another destination by now.
        batch.into_iter().for_each(|success| self.reroute(gathered, success));
        gathered.end(&client);
    }

    /// Lets a success wait for a request to the server that is to hear of it, if one is.
    fn gather(&self, gathered: &Gathered, success: Success) -> bool {
        let Some(client) = self.ledger.destination(&success.attempt) else { return false };
        gathered.add(client, success);
        true
    }

    fn reroute(&self, gathered: &Gathered, success: Success) {
        if self.gather(gathered, success) {
            gathered.is_rerouted.store(true, Ordering::Relaxed);
        }
    }

    /// Keeps the successes that are still to be reported to that server. A job that was redelivered by another server is
    /// reported to that one.
    fn keep_own(&self, client: &Arc<Client>, batch: &mut Vec<Success>, gathered: &Gathered) {
        for success in std::mem::take(batch) {
            if self.ledger.destination(&success.attempt).is_some_and(|server| Arc::ptr_eq(&server, client)) {
                batch.push(success);
            } else {
                self.reroute(gathered, success);
            }
        }
    }

    /// Sends one bulk request; another for those whose jobs were redelivered while it was under way; and if the server refuses
    /// many at once, one for each half of them, so that one bad id costs no other its report.
    async fn try_successes(&self, client: &Arc<Client>, attempts: Vec<Attempt>) -> Result<(), ClientError> {
        let mut batches = vec![attempts];
        while let Some(mut attempts) = batches.pop() {
            if attempts.is_empty() {
                continue;
            }
            let ids: Vec<JobId> = attempts.iter().map(|attempt| attempt.id.clone()).collect();
            let seen: Vec<Option<Delivery>> = attempts.iter().map(|attempt| self.ledger.held(attempt)).collect();
            match client.success(&ids).await {
                Ok(not_found) => {
                    let denied = self.settle_accepted(attempts, seen, &not_found);
                    batches.push(self.look_into_all(client, denied).await?);
                }
                Err(_) if self.is_for_another(client, &attempts) => return Ok(()),
                Err(error) if error.is_retryable() => return Err(error),
                Err(error) if attempts.len() == 1 => self.drop_report(&attempts[0], &error),
                Err(_) => {
                    batches.push(attempts.split_off(attempts.len() / 2));
                    batches.push(attempts);
                }
            }
        }
        Ok(())
    }

    /// Whether one of them is to be reported to another server by now.
    fn is_for_another(&self, client: &Arc<Client>, attempts: &[Attempt]) -> bool {
        let mut destinations = attempts.iter().filter_map(|attempt| self.ledger.destination(attempt));
        destinations.any(|destination| !Arc::ptr_eq(&destination, client))
    }

    /// Settles the successes that count, and returns the others.
    fn settle_accepted(
        &self,
        attempts: Vec<Attempt>,
        seen: Vec<Option<Delivery>>,
        not_found: &[JobId],
    ) -> Vec<(Attempt, Option<Delivery>)> {
        let not_found: HashSet<&JobId> = not_found.iter().collect();
        let (denied, accepted): (Vec<_>, Vec<_>) =
            attempts.into_iter().zip(seen).partition(|(attempt, _)| not_found.contains(&attempt.id));
        accepted.iter().for_each(|(attempt, _)| self.ledger.settle(attempt));
        denied
    }

    /// Looks into the successes whose jobs are not in flight. Returns the attempts whose reports are to be sent again.
    async fn look_into_all(
        &self,
        client: &Client,
        denied: Vec<(Attempt, Option<Delivery>)>,
    ) -> Result<Vec<Attempt>, ClientError> {
        if denied.is_empty() {
            return Ok(Vec::new());
        }
        let looks = stream::iter(denied).map(|(attempt, seen)| self.look_into(client, attempt, seen));
        let looked: Vec<Option<Attempt>> = looks.buffer_unordered(MAX_LOOKS_UNDER_WAY).try_collect().await?;
        Ok(looked.into_iter().flatten().collect())
    }

    /// Looks into a success whose job is not in flight. Returns the attempt if its report is to be sent again.
    async fn look_into(
        &self,
        client: &Client,
        attempt: Attempt,
        seen: Option<Delivery>,
    ) -> Result<Option<Attempt>, ClientError> {
        let (mut told, mut error) = (Told::NotAsked, None);
        loop {
            match fate(Kind::Success, Answer::Denied, told, self.ledger.hold(&attempt, seen)) {
                Step::Ask => (told, error) = self.ask(client, &attempt, Kind::Success).await,
                Step::Send => return Ok(Some(attempt)),
                Step::Settle => {
                    self.ledger.settle(&attempt);
                    return Ok(None);
                }
                Step::Park => {
                    let redelivered = self.ledger.park(&attempt, seen, Outcome::Success);
                    return Ok(redelivered.map(|_| attempt));
                }
                Step::Retry | Step::Drop => return error.map_or(Ok(None), Err),
            }
        }
    }

    /// Sends a success that is parked, because its job is in flight somewhere. Returns whether the success counts.
    pub(super) async fn report_parked(&self, client: &Client, attempt: &Attempt) -> bool {
        let accepted = client.success(std::slice::from_ref(&attempt.id)).await;
        let answer = match accepted {
            Ok(not_found) if not_found.is_empty() => Answer::Accepted,
            _ => Answer::Failed,
        };
        fate(Kind::Success, answer, Told::InFlight, Hold::Lost) == Step::Settle
    }
}

/// Lets the jobs end that end at the same moment: each task that is ready in this runtime has its turn. With nothing else to
/// do, that takes no time.
async fn await_the_simultaneous() {
    for _ in 0..TURNS {
        yield_now().await;
    }
}
