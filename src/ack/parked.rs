//! Polls the server for the state of jobs whose outcomes are parked, because the server may have redelivered these jobs to other
//! workers.

use std::collections::BTreeSet;
use std::slice;

use tokio_util::sync::CancellationToken;

use super::{AckQueue, Reporter, Urgency};
use crate::backoff::{Retryable, Waits};
use crate::client::ClientError;
use crate::fate::{Answer, Kind, Step, Told, fate};
use crate::job::JobId;
use crate::ledger::Parked;
use crate::lifecycle::Phase;

impl Reporter {
    /// Checks the jobs of parked outcomes repeatedly, until `closing` is cancelled or the worker enters `Phase::Killing`.
    pub(super) async fn watch_parked(self, acks: AckQueue, closing: CancellationToken) {
        tokio::select! {
            biased;
            () = closing.cancelled() => {}
            () = self.lifecycle.reached(Phase::Killing) => {}
            () = self.look_repeatedly(&acks) => {}
            () = self.look_at_released(&acks) => {}
        }
    }

    async fn look_repeatedly(&self, acks: &AckQueue) {
        let mut parkings = self.ledger.parkings();
        loop {
            // The wait fails only after the ledger is dropped, and `self` keeps the ledger alive.
            let _ = parkings.changed().await;
            let (mut waits, mut elsewhere) = (self.backoff.waits(), BTreeSet::new());
            while !self.ledger.parked().is_empty() {
                self.wait_for_next_look(&mut waits).await;
                elsewhere = self.look_at_all(acks, &elsewhere).await;
            }
        }
    }

    /// Waits before the next round of checks. Before a drain, the wait is the maximum backoff, because most parked jobs are
    /// redelivered within that time. A drain ends this wait. From then on, the waits grow from the minimum backoff.
    async fn wait_for_next_look(&self, waits: &mut Waits) {
        if self.lifecycle.phase() < Phase::Draining {
            tokio::select! {
                biased;
                () = self.lifecycle.reached(Phase::Draining) => {}
                () = tokio::time::sleep(self.backoff.max_wait()) => return,
            }
        }
        tokio::time::sleep(waits.next_wait()).await;
    }

    /// Checks the released jobs in rounds. Released jobs are parked jobs that the server may still have in flight for this worker.
    /// If a check finds a job in flight, the job's report is sent. The wait before each round is the first wait of the backoff, or
    /// the server's `Retry-After` if that is longer. Without a `Retry-After`, a recovery of the server ends the wait. A check that
    /// is refused or gets no answer ends the round.
    async fn look_at_released(&self, acks: &AckQueue) {
        let (mut parkings, mut asked) = (self.ledger.parkings(), None);
        loop {
            let Some(Parked { client, .. }) = self.ledger.released().pop() else {
                let _ = parkings.changed().await;
                continue;
            };
            let pause = tokio::time::sleep(self.backoff.longest_first_wait().max(asked.unwrap_or_default()));
            tokio::select! {
                biased;
                () = client.health().recovered(), if asked.is_none() => {}
                () = pause => {}
            }
            let mut released = self.ledger.released();
            // Without the shuffle, a job whose check is always refused could come first in every round, and end the round
            // before the other jobs are checked.
            fastrand::shuffle(&mut released);
            asked = None;
            for parked in released {
                let (told, error) = self.look_at(acks, &parked, false).await;
                if matches!(told, Told::Withheld | Told::Unreachable) {
                    asked = error.and_then(|error| error.retry_after());
                    break;
                }
            }
        }
    }

    /// Checks the job of each parked outcome once. After a check fails because the server is unreachable, the remaining jobs of
    /// that server are skipped. `elsewhere` contains the jobs that the previous round found in flight. Returns the jobs that this
    /// round finds in flight.
    async fn look_at_all(&self, acks: &AckQueue, elsewhere: &BTreeSet<JobId>) -> BTreeSet<JobId> {
        let (mut in_flight, mut unreachable) = (BTreeSet::new(), Vec::new());
        for parked in self.ledger.parked() {
            let server = parked.client.url().to_string();
            if unreachable.contains(&server) {
                continue;
            }
            match self.look_at(acks, &parked, elsewhere.contains(&parked.attempt.id)).await.0 {
                Told::InFlight => drop(in_flight.insert(parked.attempt.id)),
                Told::Unreachable => unreachable.push(server),
                _ => {}
            }
        }
        in_flight
    }

    async fn look_at(&self, acks: &AckQueue, parked: &Parked, was_in_flight: bool) -> (Told, Option<ClientError>) {
        let Parked { attempt, kind, hold, client } = parked;
        let is_given_up = was_in_flight && self.lifecycle.phase() >= Phase::Draining;
        let answer = if is_given_up { Answer::KeptElsewhere } else { Answer::Kept };
        let (told, error) = self.ask(client, attempt, *kind).await;
        let is_settled = match fate(*kind, answer, told, *hold) {
            Step::Settle => true,
            Step::Send if *kind == Kind::Success => {
                let not_found = client.success(slice::from_ref(&attempt.id)).await;
                not_found.is_ok_and(|not_found| not_found.is_empty())
            }
            Step::Send => {
                if let Some(report) = self.ledger.reclaim(attempt) {
                    acks.report(attempt.clone(), report, Urgency::Now).await;
                }
                false
            }
            Step::Ask | Step::Retry | Step::Park | Step::Release | Step::Drop => false,
        };
        if is_settled {
            self.ledger.settle_parked(attempt);
        }
        (told, error)
    }
}
