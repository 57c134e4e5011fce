//! [`Busy`]: a process that has a job, and what comes of the job.

use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;

use super::member::{Doing, Member, Stop};
use super::wire::{NoReply, Reply, Wire};
use super::{HANG_UP, Idle, Pool};
use crate::dispatch::outcome::{self, Cause};
use crate::dispatch::result_file::Verdict;
use crate::dispatch::{Ended, Took, time_is_up};
use crate::job::{Failure, Job, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use crate::places::Place;
use crate::process::{ResourceUsage, Signal, Tail, Termination};

/// How long a process may take to exit after it has closed its connection in the middle of a job.
const EXIT_GRACE: Duration = Duration::from_secs(1);

/// A process that has a job.
pub(in crate::dispatch) struct Busy {
    pub(super) pool: Arc<Pool>,
    pub(super) member: Arc<Member>,
    pub(super) wire: Option<Wire>,
    pub(super) _place: Place,
}

/// How an exchange with a process has ended.
enum Came {
    Replied(Reply),
    Broke(NoReply),
    Stopped(Cause),
    Ended,
}

/// Whether a job has shown that the handler works.
pub(in crate::dispatch) enum Proof {
    /// The handler works.
    Works,
    /// It has ended without having done any job.
    Crashed(String),
    /// A process that was idle has ended before it has read the job, which has not begun.
    Unread,
    None,
}

impl Busy {
    pub(in crate::dispatch) fn pid(&self) -> u32 {
        self.member.pid
    }

    pub(in crate::dispatch) fn started(&self) -> Instant {
        self.member.started
    }

    /// Has the process do a job.
    pub(in crate::dispatch) async fn run(mut self, job: &Job, lifecycle: &Lifecycle) -> (Ended, Proof) {
        let since = Instant::now();
        let (was_stopping, cpu_before) = (lifecycle.is_awaited(), self.member.cpu_time_before_job());
        self.member.begin(&job.id);
        let Some(mut wire) = self.wire.take() else { return (Outcome::Interrupted.into(), Proof::None) };
        let (came, notified) = self.exchange(&mut wire, job, lifecycle, since, was_stopping).await;
        if let Came::Replied(reply) = came {
            return (self.replied(wire, reply, cpu_before), Proof::Works);
        }
        let is_unread = matches!(came, Came::Broke(NoReply::Unread)) && self.member.work().jobs > 0;
        let ended = self.failed(wire, came, notified, cpu_before, lifecycle).await;
        if is_unread && ended.outcome != Outcome::Interrupted {
            return (ended, Proof::Unread);
        }
        let is_crash = !self.pool.has_worked_since(&self.member) && matches!(ended.outcome, Outcome::Failure(_));
        let proof = match &ended.outcome {
            Outcome::Failure(failure) if is_crash => Proof::Crashed(failure.message.clone()),
            _ => Proof::None,
        };
        (ended, proof)
    }

    async fn exchange(
        &self,
        wire: &mut Wire,
        job: &Job,
        lifecycle: &Lifecycle,
        since: Instant,
        was_stopping: bool,
    ) -> (Came, Option<Signal>) {
        let handler = &self.pool.handler;
        let mut exchange = pin!(wire.exchange(job));
        let mut to_tell = handler.drain_signal.filter(|_| !was_stopping);
        let mut told = None;
        let came = loop {
            let telling = async {
                match to_tell {
                    Some(_) => lifecycle.awaited().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                reply = &mut exchange => break reply.map_or_else(Came::Broke, Came::Replied),
                () = lifecycle.reached(Phase::Killing) => break Came::Stopped(Cause::Killing),
                () = time_is_up(handler, since) => break Came::Stopped(Cause::Timeout),
                _ = self.member.ended() => {
                    // Its reply may have come just before.
                    let reply = exchange.as_mut().now_or_never().and_then(Result::ok);
                    break reply.map_or(Came::Ended, Came::Replied);
                }
                () = telling => {
                    if let Some(signal) = to_tell.take() {
                        self.member.tell(signal);
                        told = Some(signal);
                    }
                }
            }
        };
        (came, told)
    }

    /// Ends a job with a reply, and keeps the process for the next one.
    fn replied(&mut self, wire: Wire, reply: Reply, cpu_before: Option<Duration>) -> Ended {
        let stderr = self.member.finish();
        let used = self.member.cpu_time_after_job().zip(cpu_before).map(|(after, before)| after.saturating_sub(before));
        let usage = used.map(|cpu| ResourceUsage { cpu, max_rss: self.member.peak_memory().unwrap_or_default() });
        let outcome = match reply.failure {
            None => {
                *self.pool.last_success() = Some(Instant::now());
                Outcome::Success
            }
            Some(verdict) => Outcome::Failure(self.failure_of(verdict, &stderr)),
        };
        match self.pool.reason_to_recycle(&self.member, reply.is_last) {
            Some(reason) => self.pool.retire(&self.member, reason, Stop::Retire),
            None => {
                self.pool.idle().push(Idle { member: Arc::clone(&self.member), wire, since: Instant::now() });
                // It may have ended since its reply, and then no keeper takes it from there.
                if self.member.has_ended() {
                    self.pool.forget_idle(&self.member);
                }
                self.pool.returned.notify_one();
            }
        }
        Ended { outcome, exit: None, usage, took: Took::Dispatch }
    }

    fn failure_of(&self, verdict: Verdict, stderr: &Tail) -> Failure {
        let message = format!("{} replied that the job has failed", self.pool.name);
        verdict.apply_to(Failure::new("HandlerError", message).with_backtrace(stderr.text()))
    }

    /// Ends a job without a reply, and the process with it.
    async fn failed(
        &mut self,
        wire: Wire,
        came: Came,
        told: Option<Signal>,
        cpu_before: Option<Duration>,
        lifecycle: &Lifecycle,
    ) -> Ended {
        let (cause, nonsense) = match came {
            Came::Stopped(cause) => {
                self.pool.retire(
                    &self.member,
                    if cause == Cause::Timeout { "timeout" } else { "kill" },
                    Stop::Terminate,
                );
                (Some(cause), None)
            }
            Came::Broke(NoReply::Nonsense(what)) => {
                self.pool.retire(&self.member, "protocol", Stop::Kill);
                (None, Some(what))
            }
            Came::Broke(NoReply::Closed | NoReply::Unread) => {
                let exited = tokio::time::timeout(EXIT_GRACE, self.member.ended());
                let exited = tokio::select! {
                    biased;
                    exited = exited => exited.is_ok(),
                    () = lifecycle.reached(Phase::Killing) => false,
                };
                if !exited {
                    self.pool.retire(&self.member, HANG_UP, Stop::Terminate);
                }
                (None, (!exited).then(|| "it has closed its connection without a reply".to_owned()))
            }
            Came::Ended | Came::Replied(_) => (None, None),
        };
        let end = self.member.ended().await;
        drop(wire);
        let stderr = self.member.finish();
        let (status, used) = end.status.as_ref().ok().copied().unzip();
        let usage =
            used.map(|used| ResourceUsage { cpu: used.cpu.saturating_sub(cpu_before.unwrap_or_default()), ..used });
        let failed = |error_type: &str, what: &str, kill: bool| {
            let message = outcome::message(&self.pool.name, what, &stderr);
            Outcome::Failure(Failure { kill, ..Failure::new(error_type, message).with_backtrace(stderr.text()) })
        };
        let is_given_up = end.termination == Some(Termination::GivenUp);
        let outcome = match (cause, nonsense, status) {
            (Some(Cause::Killing), ..) => Outcome::Interrupted,
            _ if is_given_up => Outcome::Interrupted,
            (_, Some(_), _) if lifecycle.phase() >= Phase::Killing => Outcome::Interrupted,
            (Some(Cause::Timeout), ..) => {
                failed("Timeout", &format!("was stopped {}", outcome::after(&self.pool.handler)), false)
            }
            (None, Some(what), _) => failed("ProtocolError", &format!("broke the protocol: {what}"), false),
            (None, None, Some(status)) => match (status.code(), status.signal()) {
                (Some(0), _) => failed("NoReply", "exited with status 0 without a reply", false),
                (Some(code), _) => {
                    let kill = u8::try_from(code).is_ok_and(|code| self.pool.handler.kill_exit_codes.contains(&code));
                    failed("ExitStatus", &outcome::in_words(status), kill)
                }
                // It did not know the signal that was to tell it of the drain, and died of it.
                (None, signal) if told.is_some() && signal == told.map(Signal::as_raw) => Outcome::Interrupted,
                (None, _) => failed("Signal", &outcome::in_words(status), false),
            },
            (None, None, None) => failed("WaitError", "ended, but its exit status could not be read", false),
        };
        Ended { outcome, exit: status, usage, took: Took::Dispatch }
    }
}

/// Dropped in the middle of a job, it is killed.
impl Drop for Busy {
    fn drop(&mut self) {
        if self.wire.is_some() || self.member.work().doing == Doing::Busy {
            self.member.stop(Stop::Kill);
        }
    }
}
