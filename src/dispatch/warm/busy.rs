//! [`Busy`]: a warm process that runs a job, until the outcome of the job is known.

use std::os::unix::process::ExitStatusExt;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use tokio::time::Instant;

use super::member::{Member, ProcessState, Stop};
use super::wire::{NoReply, Reply, Wire};
use super::{HANG_UP, Idle, Pool};
use crate::dispatch::deadline::time_is_up;
use crate::dispatch::outcome::{self, Cause};
use crate::dispatch::result_file::Verdict;
use crate::dispatch::{Ended, Took};
use crate::job::{Failure, Job, Outcome};
use crate::lifecycle::{Lifecycle, Phase};
use crate::places::Place;
use crate::process::{ResourceUsage, Signal, Tail, Termination};

/// The time limit for a process to exit after it has closed its connection during a job.
const EXIT_GRACE: Duration = Duration::from_secs(1);

/// The time after the start of an exchange during which `NoReply::Unread` means that the job has not begun. Later, the process
/// may have begun the job without having read its whole line.
const UNREAD_LIMIT: Duration = Duration::from_secs(1);

/// A warm process that has been given to a job, with the job's place in the pool.
pub(in crate::dispatch) struct Busy {
    pub(super) pool: Arc<Pool>,
    pub(super) member: Arc<Member>,
    pub(super) wire: Option<Wire>,
    pub(super) _place: Place,
}

/// The end of an exchange, which sends a job to a process and waits for the reply.
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

    /// Runs a job in the process. Also returns the job's evidence about the handler.
    pub(in crate::dispatch) async fn run(mut self, job: &Job, lifecycle: &Lifecycle) -> (Ended, HandlerHealth) {
        let since = Instant::now();
        let (was_stopping, cpu_before) = (lifecycle.is_awaited(), self.member.cpu_time_before_job());
        self.member.begin(&job.id);
        let Some(mut wire) = self.wire.take() else { return (Outcome::Interrupted.into(), HandlerHealth::Unknown) };
        let (end, sent) = self.exchange(&mut wire, job, lifecycle, since, was_stopping).await;
        if let ExchangeEnd::Replied(reply) = end {
            return (self.finish_with_reply(wire, reply, cpu_before), HandlerHealth::Works);
        }
        // After `UNREAD_LIMIT`, the process may have begun the job and have left only the newline unread.
        let is_unread = matches!(end, ExchangeEnd::NoReply(NoReply::Unread)) && since.elapsed() < UNREAD_LIMIT;
        let was_new = self.member.work().jobs == 0;
        let ended = self.finish_without_reply(wire, end, sent, cpu_before, lifecycle).await;
        if let Outcome::Failure(failure) = &ended.outcome
            && is_unread
        {
            let why = was_new.then(|| failure.message.clone());
            return (ended, HandlerHealth::JobUnread(why));
        }
        let is_crash = !self.pool.has_worked_since(&self.member) && matches!(ended.outcome, Outcome::Failure(_));
        let health = match &ended.outcome {
            Outcome::Failure(failure) if is_crash => HandlerHealth::Crashed(failure.message.clone()),
            _ => HandlerHealth::Unknown,
        };
        (ended, health)
    }

    async fn exchange(
        &self,
        wire: &mut Wire,
        job: &Job,
        lifecycle: &Lifecycle,
        since: Instant,
        was_stopping: bool,
    ) -> (ExchangeEnd, Option<Signal>) {
        let handler = &self.pool.handler;
        let mut exchange = pin!(wire.exchange(job));
        let mut to_send = handler.drain_signal.filter(|_| !was_stopping);
        let mut sent = None;
        let end = loop {
            let drain_requested = async {
                match to_send {
                    Some(_) => lifecycle.awaited().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                reply = &mut exchange => break reply.map_or_else(ExchangeEnd::NoReply, ExchangeEnd::Replied),
                () = lifecycle.reached(Phase::Killing) => break ExchangeEnd::Stopped(Cause::Killing),
                () = time_is_up(handler, since) => break ExchangeEnd::Stopped(Cause::Timeout),
                _ = self.member.ended() => {
                    // The reply may have arrived just before the exit.
                    let reply = exchange.as_mut().now_or_never().and_then(Result::ok);
                    break reply.map_or(ExchangeEnd::Exited, ExchangeEnd::Replied);
                }
                () = drain_requested => {
                    if let Some(signal) = to_send.take() {
                        self.member.send_drain_signal(signal);
                        sent = Some(signal);
                    }
                }
            }
        };
        (end, sent)
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
            Some(verdict) => Outcome::Failure(self.failure_of(verdict, &stderr)),
        };
        match self.pool.reason_to_recycle(&self.member, reply.is_last) {
            Some(reason) => self.pool.retire(&self.member, reason, Stop::Retire),
            None => {
                self.pool.give(Idle { member: Arc::clone(&self.member), wire, since: Instant::now() });
                // If the process has ended since its reply, its keeper may already have finished, and no longer removes the
                // process from the idle processes.
                if self.member.has_ended() {
                    self.pool.remove_idle(&self.member);
                }
            }
        }
        Ended { outcome, exit: None, usage, took: Took::Dispatch }
    }

    fn failure_of(&self, verdict: Verdict, stderr: &Tail) -> Failure {
        let message = format!("{} replied that the job has failed", self.pool.name);
        verdict.apply_to(Failure::new("HandlerError", message).with_backtrace(stderr.text()))
    }

    /// Waits until a process that has sent no reply has ended, and stops it if necessary. Returns the end of the job.
    async fn finish_without_reply(
        &mut self,
        wire: Wire,
        end: ExchangeEnd,
        sent: Option<Signal>,
        cpu_before: Option<Duration>,
        lifecycle: &Lifecycle,
    ) -> Ended {
        let (cause, violation) = match end {
            ExchangeEnd::Stopped(cause) => {
                self.pool.retire(
                    &self.member,
                    if cause == Cause::Timeout { "timeout" } else { "kill" },
                    Stop::Terminate,
                );
                (Some(cause), None)
            }
            ExchangeEnd::NoReply(NoReply::Invalid(what)) => {
                self.pool.retire(&self.member, "protocol", Stop::Kill);
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
                    self.pool.retire(&self.member, HANG_UP, Stop::Terminate);
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
        let failed = |error_type: &str, what: &str, kill: bool| {
            let message = outcome::message(&self.pool.name, what, &stderr);
            Outcome::Failure(Failure { kill, ..Failure::new(error_type, message).with_backtrace(stderr.text()) })
        };
        let is_given_up = end.termination == Some(Termination::GivenUp);
        let outcome = match (cause, violation, status) {
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
                // The process had no signal handler for the drain signal, and was killed by it.
                (None, signal) if sent.is_some() && signal == sent.map(Signal::as_raw) => Outcome::Interrupted,
                (None, _) => failed("Signal", &outcome::in_words(status), false),
            },
            (None, None, None) => failed("WaitError", "ended, but its exit status could not be read", false),
        };
        Ended { outcome, exit: status, usage, took: Took::Dispatch }
    }
}

/// Kills the process if dropped before its job has ended.
impl Drop for Busy {
    fn drop(&mut self) {
        if self.wire.is_some() || self.member.work().state == ProcessState::Busy {
            self.member.stop(Stop::Kill);
        }
    }
}
