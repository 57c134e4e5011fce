//! [`of`], which decides a job's outcome from the exit of its process, the handler's settings and the result file.

use std::collections::BTreeSet;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use signal_hook::low_level::signal_name;

use super::result_file::Verdict;
use super::{Ended, Took};
use crate::handler::Handler;
use crate::job::{Failure, Outcome};
use crate::process::{Exit, Signal, Tail, Termination};

/// The reason why the worker terminated a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cause {
    /// The worker is being killed.
    Killing,
    /// The job reached its timeout.
    Timeout,
}

/// The preliminary outcome of a job, before the result file is read.
pub(super) enum Fate {
    Done,
    CutShort,
    Failed { error_type: &'static str, what: String, kill: bool },
}

impl Fate {
    pub(super) fn failed(error_type: &'static str, what: impl Into<String>) -> Self {
        Self::Failed { error_type, what: what.into(), kill: false }
    }

    pub(super) fn into_outcome(self, handler: &Handler, stderr: &Tail) -> Outcome {
        match self {
            Self::Done => Outcome::Success,
            Self::CutShort => Outcome::Interrupted,
            Self::Failed { error_type, what, kill } => {
                let name = handler.program.file_name();
                let message = match stderr.last_line() {
                    Some(line) => format!("{name} {what}: {line}"),
                    None => format!("{name} {what}"),
                };
                Outcome::Failure(Failure { kill, ..Failure::new(error_type, message).with_backtrace(stderr.text()) })
            }
        }
    }
}

/// Decides a job's outcome. Awaits `verdict`, which reads the result file, only if the job failed.
pub(super) async fn of(handler: &Handler, exit: Exit<Cause>, verdict: impl Future<Output = Option<Verdict>>) -> Ended {
    let outcome = match fate(handler, &exit).into_outcome(handler, &exit.stderr) {
        Outcome::Failure(failure) => Outcome::Failure(match verdict.await {
            Some(verdict) => verdict.apply_to(failure),
            None => failure,
        }),
        other => other,
    };
    let (exit, usage) = exit.ended.ok().unzip();
    Ended { outcome, exit, usage, took: Took::Dispatch }
}

/// Derives a job's fate from the exit of its process. If the worker terminated the process, the exit status has no effect,
/// because the job was cut short or timed out.
fn fate(handler: &Handler, exit: &Exit<Cause>) -> Fate {
    match (&exit.ended, exit.terminated) {
        // A process that outlived SIGKILL may still run its job, so the job has not failed.
        (_, Some((Cause::Killing, _) | (_, Termination::GivenUp))) => Fate::CutShort,
        (_, Some((Cause::Timeout, Termination::Stopped))) => {
            Fate::failed("Timeout", format!("was stopped {}", after(handler)))
        }
        (_, Some((Cause::Timeout, Termination::Denied))) => {
            let what = format!("could not be stopped {}, because it is another user's", after(handler));
            Fate::failed("Timeout", what)
        }
        (Err(error), None) => {
            Fate::failed("WaitError", format!("ended, but its exit status could not be read: {error}"))
        }
        (Ok((status, _)), None) if status.success() || is_listed(&handler.success_exit_codes, *status) => Fate::Done,
        (Ok((status, _)), None) => fate_of_status(handler, *status, exit.notified),
    }
}

/// Derives the fate of a job whose process has failed by itself. `notified` tells whether the process got the drain signal.
pub(super) fn fate_of_status(handler: &Handler, status: ExitStatus, notified: bool) -> Fate {
    match status.signal() {
        None => {
            let kill = is_listed(&handler.kill_exit_codes, status);
            Fate::Failed { error_type: "ExitStatus", what: in_words(status), kill }
        }
        // The drain signal killed the process, because the process had no signal handler for that signal.
        signal if notified && signal == handler.drain_signal.map(Signal::as_raw) => Fate::CutShort,
        Some(_) => Fate::failed("Signal", in_words(status)),
    }
}

fn is_listed(codes: &BTreeSet<u8>, status: ExitStatus) -> bool {
    status.code().and_then(|code| u8::try_from(code).ok()).is_some_and(|code| codes.contains(&code))
}

pub(super) fn after(handler: &Handler) -> String {
    let limit = handler.timeout.map(|limit| humantime::format_duration(limit).to_string()).unwrap_or_default();
    format!("after its timeout of {limit}")
}

/// Describes how a process ended.
pub(super) fn in_words(status: ExitStatus) -> String {
    if let Some(code) = status.code() {
        return format!("exited with status {code}");
    }
    let number = status.signal().unwrap_or_default();
    let name = signal_name(number).map(|name| format!(" ({name})")).unwrap_or_default();
    // The kernel's out-of-memory killer sends SIGKILL.
    let guess = if number == Signal::KILL.as_raw() { ", possibly out of memory" } else { "" };
    format!("was killed by signal {number}{name}{guess}")
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::time::Duration;

    use futures_util::FutureExt;

    use super::*;
    use crate::process::{Program, ResourceUsage};

    fn handler() -> Handler {
        let program = Program::find(OsString::from("/bin/sh"), Vec::new(), None).unwrap();
        Handler {
            success_exit_codes: [99].into(),
            kill_exit_codes: [100].into(),
            timeout: Some(Duration::from_secs(90)),
            drain_signal: Some(Signal::USR1),
            ..Handler::new(program)
        }
    }

    fn exit(raw_status: i32) -> Exit<Cause> {
        let usage = ResourceUsage { cpu: Duration::ZERO, max_rss: 0 };
        let ended = Ok((ExitStatus::from_raw(raw_status), usage));
        Exit { ended, terminated: None, notified: false, stderr: Tail::default() }
    }

    /// Returns the output of a future that is ready at once.
    fn wait_for<T>(future: impl Future<Output = T>) -> T {
        future.now_or_never().unwrap()
    }

    fn outcome(exit: Exit<Cause>) -> Outcome {
        wait_for(of(&handler(), exit, std::future::ready(None))).outcome
    }

    fn failure(error_type: &str, message: &str, kill: bool) -> Outcome {
        Outcome::Failure(Failure { kill, ..Failure::new(error_type, message) })
    }

    #[test]
    fn status_0_and_the_listed_ones_are_a_success() {
        assert_eq!(outcome(exit(0)), Outcome::Success);
        assert_eq!(outcome(exit(99 << 8)), Outcome::Success);
        assert_eq!(outcome(exit(3 << 8)), failure("ExitStatus", "sh exited with status 3", false));
        assert_eq!(outcome(exit(100 << 8)), failure("ExitStatus", "sh exited with status 100", true));
    }

    #[test]
    fn only_sigkill_is_reported_as_possibly_out_of_memory() {
        let killed = "sh was killed by signal 9 (SIGKILL), possibly out of memory";
        assert_eq!(outcome(exit(9)), failure("Signal", killed, false));
        assert_eq!(outcome(exit(11)), failure("Signal", "sh was killed by signal 11 (SIGSEGV)", false));
    }

    #[test]
    fn a_stopped_process_is_interrupted_or_timed_out() {
        for status in [0, 15, 9, 1 << 8, 100 << 8] {
            let stopped = |cause| Exit { terminated: Some((cause, Termination::Stopped)), ..exit(status) };
            assert_eq!(outcome(stopped(Cause::Killing)), Outcome::Interrupted);
            let timeout = failure("Timeout", "sh was stopped after its timeout of 1m 30s", false);
            assert_eq!(outcome(stopped(Cause::Timeout)), timeout);
        }
    }

    #[test]
    fn a_process_that_could_not_be_stopped_is_not_said_to_be() {
        let terminated = |cause, how| outcome(Exit { terminated: Some((cause, how)), ..exit(0) });
        let message = "sh could not be stopped after its timeout of 1m 30s, because it is another user's";
        assert_eq!(terminated(Cause::Timeout, Termination::Denied), failure("Timeout", message, false));
        assert_eq!(terminated(Cause::Timeout, Termination::GivenUp), Outcome::Interrupted);
        assert_eq!(terminated(Cause::Killing, Termination::Denied), Outcome::Interrupted);
    }

    #[test]
    fn death_by_the_drain_signal_is_no_failure_if_we_sent_it() {
        let usr1 = Signal::USR1.as_raw();
        assert_eq!(outcome(Exit { notified: true, ..exit(usr1) }), Outcome::Interrupted);
        assert!(matches!(outcome(exit(usr1)), Outcome::Failure(_)));
        assert!(matches!(outcome(Exit { notified: true, ..exit(1 << 8) }), Outcome::Failure(_)));
        assert_eq!(outcome(Exit { notified: true, ..exit(0) }), Outcome::Success);
    }

    #[test]
    fn a_status_that_is_lost_is_no_success() {
        let lost = Exit { ended: Err(std::io::ErrorKind::NotFound.into()), ..exit(0) };
        assert!(
            matches!(outcome(lost), Outcome::Failure(Failure { error_type: Some(kind), .. }) if kind == "WaitError")
        );
    }

    #[test]
    fn the_handler_is_asked_only_when_it_failed() {
        let asked = std::cell::Cell::new(0);
        let verdict = || async {
            asked.set(asked.get() + 1);
            None
        };
        wait_for(of(&handler(), exit(0), verdict()));
        let killed = Exit { terminated: Some((Cause::Killing, Termination::Stopped)), ..exit(9) };
        wait_for(of(&handler(), killed, verdict()));
        assert_eq!(asked.get(), 0);
        wait_for(of(&handler(), exit(1 << 8), verdict()));
        assert_eq!(asked.get(), 1);
    }
}
