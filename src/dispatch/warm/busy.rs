//! [`Busy`]: a warm process that runs a job, until the outcome of the job is known.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;

use super::member::{Member, ProcessState, StopRequest};
use super::wire::{NoReply, Reply, Wire};
use super::{HANG_UP, Idle, Pool};
use crate::dispatch::deadline::cause_to_terminate;
use crate::dispatch::outcome::{self, Cause, Fate};
use crate::dispatch::{Ended, Took};
use crate::job::{Failure, Job, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use crate::places::Place;
use crate::process::{ResourceUsage, Termination};

/// The time limit for a process to exit after it has closed its connection during a job.
const EXIT_GRACE: Duration = Duration::from_secs(1);

/// The time limit, from the start of an exchange, within which `NoReply::Unread` means that the job has not begun. After this time,
/// the process may have begun the job without having read the job's whole line.
const UNREAD_LIMIT: Duration = Duration::from_secs(1);

/// A warm process that has been given to a job, with the job's place in the pool.
pub(in crate::dispatch) struct Busy {
    pub(super) pool: Arc<Pool>,
    pub(super) member: Arc<Member>,
    pub(super) wire: Option<Wire>,
    pub(super) _place: Place,
}

/// The end of an exchange. An exchange sends a job to a process, and waits for the reply.
enum ExchangeEnd {
    Replied(Reply),
    NoReply(NoReply),
    Stopped(Cause),
    Exited,
}

/// The evidence that one job gives about whether the handler works.
pub(in crate::dispatch) enum HandlerHealth {
    /// The handler works.
    Works,
    /// The job failed without a reply, and no job of the handler has succeeded since the process started.
    Crashed(String),
    /// The process ended, or closed its connection, before it had read the whole job, so the job has not begun. Holds the
    /// failure's message if this was the process's first job. The brake counts a crash only in that case.
    JobUnread(Option<String>),
    /// No evidence.
    Unknown,
}

impl Busy {
    pub(in crate::dispatch) fn pid(&self) -> u32 {
        self.member.pid
    }

    pub(in crate::dispatch) fn started(&self) -> Instant {
        self.member.started
    }

    /// Runs a job in the process. Returns the end of the job, and what the job shows about whether the handler works.
    pub(in crate::dispatch) async fn run(mut self, job: &Job, lifecycle: &Lifecycle) -> (Ended, HandlerHealth) {
        let since = Instant::now();
        let (was_stopping, cpu_before) = (lifecycle.is_awaited(), self.member.cpu_time_before_job());
        self.member.begin(&job.id);
        let Some(mut wire) = self.wire.take() else { return (Outcome::Interrupted.into(), HandlerHealth::Unknown) };
        let (end, notified) = self.exchange(&mut wire, job, lifecycle, since, was_stopping).await;
        if let ExchangeEnd::Replied(reply) = end {
            return (self.finish_with_reply(wire, reply, cpu_before), HandlerHealth::Works);
        }
        // After `UNREAD_LIMIT`, the process may have begun the job, with only the newline left unread.
        let is_unread = matches!(end, ExchangeEnd::NoReply(NoReply::Unread)) && since.elapsed() < UNREAD_LIMIT;
        let was_new = self.member.work().jobs == 0;
        let ended = self.finish_without_reply(wire, end, notified, cpu_before, lifecycle).await;
        let health = match &ended.outcome {
            Outcome::Failure(failure) if is_unread => {
                HandlerHealth::JobUnread(was_new.then(|| failure.message.clone()))
            }
            Outcome::Failure(failure) if !self.pool.has_worked_since(&self.member) => {
                HandlerHealth::Crashed(failure.message.clone())
            }
            _ => HandlerHealth::Unknown,
        };
        (ended, health)
    }

    /// Sends the job, and waits for the reply. Also returns whether the process got the drain signal.
    async fn exchange(
        &self,
        wire: &mut Wire,
        job: &Job,
        lifecycle: &Lifecycle,
        since: Instant,
        was_stopping: bool,
    ) -> (ExchangeEnd, bool) {
        let handler = &self.pool.handler;
        let mut exchange = pin!(wire.exchange(job));
        let mut to_send = handler.drain_signal.filter(|_| !was_stopping);
        let mut notified = false;
        let end = loop {
            tokio::select! {
                biased;
                reply = &mut exchange => break reply.map_or_else(ExchangeEnd::NoReply, ExchangeEnd::Replied),
                cause = cause_to_terminate(handler, lifecycle, since) => break ExchangeEnd::Stopped(cause),
                _ = self.member.ended() => {
                    // The reply may have arrived just before the exit.
                    let reply = exchange.as_mut().now_or_never().and_then(Result::ok);
                    break reply.map_or(ExchangeEnd::Exited, ExchangeEnd::Replied);
                }
                () = lifecycle.awaited(), if to_send.is_some() => {
                    if let Some(signal) = to_send.take() {
                        self.member.send_drain_signal(signal);
                        notified = true;
                    }
                }
            }
        };
        (end, notified)
    }

    /// Makes the process idle, or retires it, and returns the end of the job with the outcome given in the reply.
    fn finish_with_reply(&mut self, wire: Wire, reply: Reply, cpu_before: Option<Duration>) -> Ended {
        let stderr = self.member.finish();
        let used = self.member.cpu_time_after_job().zip(cpu_before).map(|(after, before)| after.saturating_sub(before));
        let usage = used.map(|cpu| ResourceUsage { cpu, max_rss: self.member.peak_memory().unwrap_or_default() });
        let outcome = match reply.failure {
            None => {
                *self.pool.last_success() = Some(Instant::now());
                Outcome::Success
            }
            Some(verdict) => {
                let message = format!("{} replied that the job has failed", self.pool.name);
                let failure = Failure::new("HandlerError", message).with_backtrace(stderr.text());
                Outcome::Failure(verdict.apply_to(failure))
            }
        };
        match self.pool.reason_to_recycle(&self.member, reply.is_last) {
            Some(reason) => self.pool.retire(&self.member, reason, StopRequest::Retire),
            None => {
                self.pool.waiting().give(Idle { member: Arc::clone(&self.member), wire, since: Instant::now() });
                // Remove the process if it has ended since its reply, because its keeper may have finished before the process was
                // added to the idle processes.
                if self.member.has_ended() {
                    self.pool.remove_idle(&self.member);
                }
            }
        }
        Ended { outcome, exit: None, usage, took: Took::Dispatch }
    }

    /// Waits for the end of a process that has sent no reply, and stops the process if necessary. Returns the end of the job.
    async fn finish_without_reply(
        &mut self,
        wire: Wire,
        end: ExchangeEnd,
        notified: bool,
        cpu_before: Option<Duration>,
        lifecycle: &Lifecycle,
    ) -> Ended {
        let (cause, violation) = match end {
            ExchangeEnd::Stopped(cause) => {
                let reason = if cause == Cause::Timeout { "timeout" } else { "kill" };
                self.pool.retire(&self.member, reason, StopRequest::Terminate);
                (Some(cause), None)
            }
            ExchangeEnd::NoReply(NoReply::Invalid(what)) => {
                self.pool.retire(&self.member, "protocol", StopRequest::Kill);
                (None, Some(what))
            }
            ExchangeEnd::NoReply(NoReply::Closed | NoReply::Unread) => {
                let exited = tokio::time::timeout(EXIT_GRACE, self.member.ended());
                let exited = tokio::select! {
                    biased;
                    exited = exited => exited.is_ok(),
                    () = lifecycle.reached(Phase::Killing) => false,
                };
                if !exited {
                    self.pool.retire(&self.member, HANG_UP, StopRequest::Terminate);
                }
                (None, (!exited).then(|| "it has closed its connection without a reply".to_owned()))
            }
            ExchangeEnd::Exited | ExchangeEnd::Replied(_) => (None, None),
        };
        let end = self.member.ended().await;
        drop(wire);
        let stderr = self.member.finish();
        let (status, used) = end.status.as_ref().ok().copied().unzip();
        let usage =
            used.map(|used| ResourceUsage { cpu: used.cpu.saturating_sub(cpu_before.unwrap_or_default()), ..used });
        let handler = &self.pool.handler;
        let fate = match (cause, violation, status) {
            (Some(Cause::Killing), ..) => Fate::CutShort,
            _ if end.termination == Some(Termination::GivenUp) => Fate::CutShort,
            (_, Some(_), _) if lifecycle.phase() >= Phase::Killing => Fate::CutShort,
            (Some(Cause::Timeout), ..) => Fate::failed("Timeout", format!("was stopped {}", outcome::after(handler))),
            (None, Some(what), _) => Fate::failed("ProtocolError", format!("broke the protocol: {what}")),
            (None, None, Some(status)) if status.success() => {
                Fate::failed("NoReply", "exited with status 0 without a reply")
            }
            (None, None, Some(status)) => outcome::fate_of_status(handler, status, notified),
            (None, None, None) => Fate::failed("WaitError", "ended, but its exit status could not be read"),
        };
        let outcome = fate.into_outcome(handler, &stderr);
        Ended { outcome, exit: status, usage, took: Took::Dispatch }
    }
}

/// Kills the process if dropped before its job has ended.
impl Drop for Busy {
    fn drop(&mut self) {
        if self.wire.is_some() || self.member.work().state == ProcessState::Busy {
            self.member.stop(StopRequest::Kill);
        }
    }
}
