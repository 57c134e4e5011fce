//! Reports successes in bulk requests. While a request to a server is in flight, further successes for that server gather.

use std::collections::HashSet;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::stream::{self, FuturesUnordered, StreamExt, TryStreamExt};
use tokio::sync::{Notify, mpsc};
use tokio::task::yield_now;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Reporter, SuccessReport, Urgency};
use crate::backoff::sleep_until_if;
use crate::client::{Client, ClientError};
use crate::fate::{Answer, Kind, Step, Told, fate};
use crate::job::{JobId, Report};
use crate::ledger::{Attempt, Delivery};
use crate::lock::lock;

/// The maximum number of ids in one bulk request, small enough for the size limits of servers and proxies.
const MAX_SUCCESSES_PER_REQUEST: usize = 1000;

/// The longest time that a success of `Urgency::Soon` waits for other successes to share its request. The wait saves requests, and
/// each request costs more than the successes in it.
const LONGEST_HOLD: Duration = Duration::from_millis(5);

/// The number of yields to the runtime before a bulk request is built, so that jobs that end at the same moment share the
/// request.
const TURNS: usize = 3;

/// The maximum number of parts into which a bulk request is split after server errors.
const MAX_PARTS: usize = 8;

/// The number of failed parts after which a try ends if no part was accepted. The server then seems to be down.
const MAX_FAILED_PARTS: usize = 2;

/// The maximum number of denied successes that are checked at once: enough to hide the round trip, few enough to spare the
/// server.
const MAX_LOOKS_IN_FLIGHT: usize = 8;

/// The successes that wait for a request, by server.
#[derive(Default)]
struct Gathered {
    by_server: Mutex<Vec<Bulk>>,
    /// The signal that a success was put back into `by_server`, to be sent in another request.
    rerouted: Notify,
}

struct Bulk {
    client: Arc<Client>,
    waiting: Vec<SuccessReport>,
    is_under_way: bool,
    /// The time at which the next request is due.
    due: Instant,
}

impl Bulk {
    fn add(&mut self, success: SuccessReport) {
        if success.urgency == Urgency::Now {
            self.due = Instant::now();
        } else if self.waiting.is_empty() {
            self.due = Instant::now() + LONGEST_HOLD;
        }
        self.waiting.push(success);
    }

    /// Reports whether successes are waiting to be sent while no request is in flight.
    fn is_held(&self) -> bool {
        !self.is_under_way && !self.waiting.is_empty()
    }
}

impl Gathered {
    fn add(&self, client: Arc<Client>, success: SuccessReport) {
        let mut bulks = lock(&self.by_server);
        let at = bulks.iter().position(|bulk| Arc::ptr_eq(&bulk.client, &client)).unwrap_or_else(|| {
            bulks.push(Bulk { client, waiting: Vec::new(), is_under_way: false, due: Instant::now() });
            bulks.len() - 1
        });
        bulks[at].add(success);
    }

    /// Returns the earliest due time of the servers that have waiting successes and no request in flight.
    fn next_due(&self) -> Option<Instant> {
        lock(&self.by_server).iter().filter(|bulk| bulk.is_held()).map(|bulk| bulk.due).min()
    }

    /// Returns the servers that have due successes and no request in flight, and marks each as having a request in flight.
    fn begin(&self) -> Vec<Arc<Client>> {
        let mut bulks = lock(&self.by_server);
        let now = Instant::now();
        let ready = bulks.iter_mut().filter(|bulk| bulk.is_held() && bulk.due <= now);
        ready
            .map(|bulk| {
                bulk.is_under_way = true;
                Arc::clone(&bulk.client)
            })
            .collect()
    }

    /// Moves waiting successes for a server into `batch`, up to the maximum size of a request.
    fn take(&self, client: &Arc<Client>, batch: &mut Vec<SuccessReport>) {
        let mut bulks = lock(&self.by_server);
        if let Some(bulk) = bulks.iter_mut().find(|bulk| Arc::ptr_eq(&bulk.client, client)) {
            let room = MAX_SUCCESSES_PER_REQUEST.saturating_sub(batch.len()).min(bulk.waiting.len());
            batch.extend(bulk.waiting.drain(..room));
        }
    }

    /// Records that the request to a server has ended, and removes the server if no success waits for a request.
    fn end(&self, client: &Arc<Client>) {
        lock(&self.by_server).retain_mut(|bulk| {
            if Arc::ptr_eq(&bulk.client, client) {
                bulk.is_under_way = false;
            }
            bulk.is_under_way || !bulk.waiting.is_empty()
        });
    }
}

impl Reporter {
    /// Sends the queued successes in bulk requests. While a request to a server is in flight, further successes for that server
    /// gather for the next one. The failed parts of a request are retried separately.
    pub(super) async fn report_successes(
        self,
        mut queue: mpsc::UnboundedReceiver<SuccessReport>,
        closing: CancellationToken,
    ) {
        let (gathered, mut under_way) = (Gathered::default(), FuturesUnordered::new());
        let (mut arrived, mut is_open) = (Vec::new(), true);
        let mut is_closing = pin!(closing.cancelled());
        while is_open || !under_way.is_empty() || gathered.next_due().is_some() {
            let due = gathered.next_due();
            tokio::select! {
                biased;
                Some(apart) = under_way.next() => {
                    for (client, batch) in apart {
                        under_way.push(Box::pin(self.report_batch(client, batch, None, &gathered)));
                    }
                }
                () = &mut is_closing, if !queue.is_closed() => queue.close(),
                () = gathered.rerouted.notified() => {}
                count = queue.recv_many(&mut arrived, MAX_SUCCESSES_PER_REQUEST), if is_open => is_open = count > 0,
                () = sleep_until_if(due) => {}
            }
            for success in arrived.drain(..) {
                self.gather(&gathered, success);
            }
            for client in gathered.begin() {
                // Boxed, so that the push does not move the whole future.
                under_way.push(Box::pin(self.report_batch(client, Vec::new(), Some(&gathered), &gathered)));
            }
        }
    }

    /// Reports a batch of successes, with retries. Each try also takes the successes that have gathered in `joining`. Returns the
    /// parts of the batch that got server errors while other parts were accepted. The caller reports the returned parts separately.
    async fn report_batch(
        &self,
        client: Arc<Client>,
        mut batch: Vec<SuccessReport>,
        joining: Option<&Gathered>,
        gathered: &Gathered,
    ) -> Vec<(Arc<Client>, Vec<SuccessReport>)> {
        yield_to_ready_tasks().await;
        let mut parts = 1;
        let attempt = || {
            self.keep_own(&client, &mut batch, gathered);
            if let Some(joining) = joining {
                // Add the successes that have gathered since the last try.
                joining.take(&client, &mut batch);
            }
            let attempts = batch.iter().map(|success: &SuccessReport| success.attempt.clone()).collect();
            let count = parts;
            parts = (parts * 2).min(MAX_PARTS);
            self.try_parts(&client, attempts, count)
        };
        let mut apart = Vec::new();
        match self.retry_until_answered(&client, attempt).await {
            Ok(failed) => {
                for part in failed {
                    let part = batch.extract_if(.., |success| part.contains(&success.attempt)).collect();
                    apart.push((Arc::clone(&client), part));
                }
            }
            Err(error) => {
                let mut unsettled: Vec<&Attempt> = batch.iter().map(|success| &success.attempt).collect();
                unsettled.retain(|attempt| self.ledger.destination(attempt).is_some());
                unsettled.into_iter().for_each(|attempt| self.drop_report(attempt, &error));
            }
        }
        // Some successes may still need a report, for example because another server has redelivered the job. Put these successes
        // back into `gathered`.
        batch.into_iter().for_each(|success| self.reroute(gathered, success));
        if joining.is_some() {
            gathered.end(&client);
        }
        apart
    }

    /// Sends all successes in one request. If the request causes a server error and `count` is greater than 1, sends the successes
    /// again in up to `count` parts, so that one success that always causes a server error does not block the others forever.
    /// Returns the failed parts, or the error if the whole try failed.
    async fn try_parts(
        &self,
        client: &Arc<Client>,
        mut attempts: Vec<Attempt>,
        count: usize,
    ) -> Result<Vec<Vec<Attempt>>, ClientError> {
        if count == 1 || attempts.len() <= 1 {
            return self.try_successes(client, attempts).await.map(|()| Vec::new());
        }
        match self.try_successes(client, attempts.clone()).await {
            Err(error) if error.is_server_error() => {}
            ended => return ended.map(|()| Vec::new()),
        }
        // Without the shuffle, the same successes could fail first in every try, and end the try before the other parts are sent.
        fastrand::shuffle(&mut attempts);
        let (mut failed, mut is_any_accepted) = (Vec::new(), false);
        for part in attempts.chunks(attempts.len().div_ceil(count)) {
            match self.try_successes(client, part.to_vec()).await {
                Ok(()) => is_any_accepted = true,
                Err(error) if !error.is_server_error() => return Err(error),
                Err(error) if failed.len() + 1 >= MAX_FAILED_PARTS && !is_any_accepted => return Err(error),
                Err(_) => failed.push(part.to_vec()),
            }
        }
        Ok(failed)
    }

    /// Queues a success for the next request to its server. Returns false if the success no longer needs a report.
    fn gather(&self, gathered: &Gathered, success: SuccessReport) -> bool {
        let Some(client) = self.ledger.destination(&success.attempt) else { return false };
        gathered.add(client, success);
        true
    }

    fn reroute(&self, gathered: &Gathered, success: SuccessReport) {
        if self.gather(gathered, success) {
            gathered.rerouted.notify_one();
        }
    }

    /// Keeps the successes whose destination is the server of `client`, and reroutes the others.
    fn keep_own(&self, client: &Arc<Client>, batch: &mut Vec<SuccessReport>, gathered: &Gathered) {
        for success in std::mem::take(batch) {
            if self.ledger.destination(&success.attempt).is_some_and(|server| Arc::ptr_eq(&server, client)) {
                batch.push(success);
            } else {
                self.reroute(gathered, success);
            }
        }
    }

    /// Sends one bulk request, and another one for jobs that were redelivered during the first. If the server refuses a batch,
    /// each half of the batch is sent separately, so that one bad id does not block the reports of the other jobs.
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

    /// Reports whether the destination of any attempt is now another server.
    fn is_for_another(&self, client: &Arc<Client>, attempts: &[Attempt]) -> bool {
        let mut destinations = attempts.iter().filter_map(|attempt| self.ledger.destination(attempt));
        destinations.any(|destination| !Arc::ptr_eq(&destination, client))
    }

    /// Settles the attempts that the server has accepted. Returns the denied attempts, whose jobs were not in flight.
    fn settle_accepted(
        &self,
        attempts: Vec<Attempt>,
        seen: Vec<Option<Delivery>>,
        not_found: &[JobId],
    ) -> Vec<(Attempt, Option<Delivery>)> {
        let not_found: HashSet<&JobId> = not_found.iter().collect();
        let (denied, accepted): (Vec<_>, Vec<_>) =
            attempts.into_iter().zip(seen).partition(|(attempt, _)| not_found.contains(&attempt.id));
        for (attempt, seen) in accepted {
            self.ledger.settle(&attempt, seen);
        }
        denied
    }

    /// Checks the jobs of denied successes. Returns the attempts whose reports must be sent again.
    async fn look_into_all(
        &self,
        client: &Client,
        denied: Vec<(Attempt, Option<Delivery>)>,
    ) -> Result<Vec<Attempt>, ClientError> {
        if denied.is_empty() {
            return Ok(Vec::new());
        }
        let looks = stream::iter(denied).map(|(attempt, seen)| self.look_into(client, attempt, seen));
        let looked: Vec<Option<Attempt>> = looks.buffer_unordered(MAX_LOOKS_IN_FLIGHT).try_collect().await?;
        Ok(looked.into_iter().flatten().collect())
    }

    /// Checks the job of a denied success. Returns the attempt if its report must be sent again.
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
                    self.ledger.settle(&attempt, seen);
                    return Ok(None);
                }
                Step::Park | Step::Release => {
                    let redelivered = self.ledger.park(&attempt, seen, Report::Success, false);
                    return Ok(redelivered.map(|_| attempt));
                }
                Step::Retry | Step::Drop => return error.map_or(Ok(None), Err),
            }
        }
    }
}

/// Lets the other ready tasks of the runtime run, so that jobs that end at the same moment share a request. Returns almost at
/// once if the runtime is idle.
async fn yield_to_ready_tasks() {
    for _ in 0..TURNS {
        yield_now().await;
    }
}
