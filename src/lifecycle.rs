//! [`Lifecycle`]: the handle that stops a worker phase by phase. [`WorkerSignals`]: the signals that stop, reload, pause or query
//! a worker.

mod terminal;

use std::fmt;
use std::io;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use futures_util::StreamExt;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::iterator::exfiltrator::WithRawSiginfo;
use signal_hook::low_level::signal_name;
use signal_hook_tokio::{Signals, SignalsInfo};
use tokio::sync::mpsc;
use tracing::{debug, info, warn};

use crate::process::without_signals;
use crate::watch;
use terminal::{HangUp, Terminal};

/// A phase of a worker's run or stop. Later phases compare as greater. A worker never returns to an earlier phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// The worker takes and runs jobs.
    Running,
    /// The worker takes no more jobs, and finishes and reports the jobs that it has taken.
    Draining,
    /// Running jobs are terminated and not reported. The report of each finished job gets one last try.
    Killing,
    /// Jobs that are being terminated are killed without further grace.
    Forcing,
    /// Every job and report has ended, and the stream closes.
    Stopped,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Running => "running",
            Self::Draining => "draining",
            Self::Killing => "killing",
            Self::Forcing => "forcing",
            Self::Stopped => "stopped",
        })
    }
}

/// A handle that stops one run of a worker, and tells the worker's components about the stop.
///
/// Clones share one phase, which only ever advances. Any thread or task may use the handle.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    state: watch::Sender<LifecycleState>,
    reason: Arc<OnceLock<String>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LifecycleState {
    phase: Phase,
    /// Whether a stop was asked for. A drain has no deadline until a stop is asked for.
    awaited: bool,
}

impl Default for Lifecycle {
    fn default() -> Self {
        let state = LifecycleState { phase: Phase::Running, awaited: false };
        Self { state: watch::Sender::new(state), reason: Arc::default() }
    }
}

impl Lifecycle {
    /// Returns a lifecycle in the phase [`Phase::Running`].
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the current phase.
    pub fn phase(&self) -> Phase {
        self.state.borrow().phase
    }

    /// Asks for a drain: the worker finishes and reports the jobs that it has taken, within the shutdown deadline, and then
    /// stops.
    pub fn stop(&self) {
        self.rise(Phase::Draining, true, None);
    }

    /// Asks for a drain, and sets the reason unless the worker is already stopping.
    pub(crate) fn stop_because(&self, reason: impl Into<String>) {
        self.rise(Phase::Draining, true, Some(reason.into()));
    }

    /// Begins a drain that no signal or caller has requested, for example because `max_jobs` is reached. The drain has no
    /// deadline until a stop is requested.
    pub(crate) fn finish_because(&self, reason: impl Into<String>) {
        self.rise(Phase::Draining, false, Some(reason.into()));
    }

    /// Returns the reason that was given at the beginning of the stop, if any.
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// Asks for an immediate stop: running jobs are terminated, and the server requeues them.
    pub fn kill(&self) {
        self.rise(Phase::Killing, true, None);
    }

    /// Asks for a stop without grace: jobs that are being terminated are killed.
    pub fn force(&self) {
        self.rise(Phase::Forcing, true, None);
    }

    /// Records that every job and report has ended.
    pub(crate) fn stopped(&self) {
        self.rise(Phase::Stopped, true, None);
    }

    /// Advances to `phase`, unless that phase or a later one is already reached. Once true, the state's `awaited` stays true.
    /// `reason` is stored only if the phase was `Running`.
    fn rise(&self, phase: Phase, awaited: bool, reason: Option<String>) {
        self.state.send_if_modified(|state| {
            if let Some(reason) = reason.filter(|_| state.phase == Phase::Running) {
                // The reason is still unset: only this line sets it, and the phase leaves `Running` only once.
                let _ = self.reason.set(reason);
            }
            let before = *state;
            *state = LifecycleState { phase: phase.max(before.phase), awaited: awaited || before.awaited };
            *state != before
        });
    }

    /// Returns a receiver that is notified when the phase changes, and when a stop is first asked for.
    pub(crate) fn changes(&self) -> watch::Receiver<LifecycleState> {
        self.state.subscribe()
    }

    /// Waits until `phase` or a later one is reached.
    pub async fn reached(&self, phase: Phase) {
        // The wait fails only once every sender is dropped, and `self` holds a sender.
        let _ = self.state.subscribe().wait_for(|state| state.phase >= phase).await;
    }

    /// Reports whether a stop was asked for.
    pub fn is_awaited(&self) -> bool {
        self.state.borrow().awaited
    }

    /// Waits until a stop is asked for.
    pub async fn awaited(&self) {
        let _ = self.state.subscribe().wait_for(|state| state.awaited).await;
    }

    /// Waits until a stop is asked for, and then kills the worker if it has not stopped within `deadline`. Returns once the phase
    /// is `Killing` or later.
    pub(crate) async fn enforce(&self, deadline: Duration) {
        self.awaited().await;
        tokio::select! {
            biased;
            () = self.reached(Phase::Killing) => {}
            () = tokio::time::sleep(deadline) => {
                warn!(deadline = ?deadline, "shutdown deadline reached: killing what still runs");
                self.kill();
            }
        }
    }
}

/// A request that a signal makes, other than a request to stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// SIGHUP: reload the settings.
    Reload,
    /// SIGUSR1: log the status.
    Status,
    /// SIGUSR2: take no more jobs.
    Pause,
    /// SIGCONT: take jobs again.
    Resume,
}

/// The time that a shell may take to end after it has sent SIGHUP to its jobs.
const SHELL_END: Duration = Duration::from_secs(2);

/// The number of times that the terminal is checked during `SHELL_END`.
const SHELL_END_LOOKS: u32 = 20;

/// The signals that control a worker, received from the moment [`listen`](Self::listen) returns.
pub struct WorkerSignals {
    signals: Signals,
    /// The SIGHUPs, each with the `siginfo` that shows its sender.
    hang_ups: SignalsInfo<WithRawSiginfo>,
    terminal: Terminal,
}

impl fmt::Debug for WorkerSignals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WorkerSignals")
    }
}

impl WorkerSignals {
    /// Registers the signal handlers. Until then the signals have their default effect.
    ///
    /// # Errors
    /// When the operating system refuses the handlers.
    pub fn listen() -> io::Result<Self> {
        // Inspect the terminal first, because a registered handler for SIGHUP hides whether SIGHUP was ignored.
        let terminal = Terminal::of_this_process();
        // Block signals during the registration, because a signal that arrives before the registration is complete could be lost.
        without_signals(|| {
            let signals = Signals::new([SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGCONT])?;
            Ok(Self { signals, hang_ups: SignalsInfo::new([SIGHUP])?, terminal })
        })
    }

    /// Handles signals until the process ends. The first SIGTERM or SIGINT drains, the second kills, and the third kills without
    /// grace. A SIGHUP that means the end of the terminal begins a drain, but is ignored under nohup. Every other signal is sent to
    /// `requests` as a `Request`, because handling a request may take long and must not delay a stop.
    pub async fn obey(mut self, lifecycle: Lifecycle, requests: mpsc::UnboundedSender<Request>) {
        let mut count = 0;
        let ask = |request| {
            // Ignore an error: a send fails only after the worker has stopped.
            let _ = requests.send(request);
        };
        loop {
            tokio::select! {
                Some(signal) = self.signals.next() => match signal {
                    SIGUSR1 => ask(Request::Status),
                    SIGUSR2 => ask(Request::Pause),
                    SIGCONT => ask(Request::Resume),
                    _ => {
                        count += 1;
                        stop(&lifecycle, count, signal_name(signal).unwrap_or("signal"));
                    }
                },
                Some(hang_up) = self.hang_ups.next() => match self.terminal.meaning_of(hang_up.si_code) {
                    HangUp::Reload => {
                        ask(Request::Reload);
                        tokio::spawn(stop_with_shell(self.terminal, lifecycle.clone()));
                    }
                    HangUp::Gone => stop_without_terminal(&lifecycle),
                    HangUp::Outlived => debug!("the terminal is gone; the worker goes on, as nohup asked"),
                },
                else => return,
            }
        }
    }
}

/// Drains if the terminal closes within `SHELL_END` after a process has sent SIGHUP. Some shells (zsh, and bash with `huponexit`)
/// send SIGHUP to their jobs shortly before they end.
async fn stop_with_shell(terminal: Terminal, lifecycle: Lifecycle) {
    let mut looks = tokio::time::interval(SHELL_END / SHELL_END_LOOKS);
    for _ in 0..SHELL_END_LOOKS {
        looks.tick().await;
        if terminal.is_gone() {
            return stop_without_terminal(&lifecycle);
        }
    }
}

/// Drains because the terminal is closed. A second call has no further effect: one closed terminal can cause two SIGHUPs, one from
/// the kernel and one that the shell forwards.
fn stop_without_terminal(lifecycle: &Lifecycle) {
    let was_running = lifecycle.phase() == Phase::Running;
    lifecycle.stop_because("the terminal is gone");
    if was_running {
        info!(signal = "SIGHUP", "draining: the terminal is gone; finishing what was taken");
    }
}

/// Advances the phase at the `count`th SIGTERM or SIGINT. The message is logged only afterwards, because the log may be slow.
fn stop(lifecycle: &Lifecycle, count: usize, signal: &'static str) {
    match lifecycle.phase() {
        Phase::Running | Phase::Draining if count == 1 => {
            lifecycle.stop_because(signal);
            info!(signal, "draining: finishing what was taken; once more stops running jobs");
        }
        Phase::Running | Phase::Draining => {
            lifecycle.kill();
            warn!(signal, "killing: stopping running jobs, which go back to the server; once more skips their grace");
        }
        Phase::Killing | Phase::Forcing | Phase::Stopped => {
            lifecycle.force();
            warn!(signal, "killing running jobs without grace");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lesser_phase_never_overrides_a_greater() {
        let lifecycle = Lifecycle::new();
        lifecycle.kill();
        lifecycle.stop();
        assert_eq!(lifecycle.phase(), Phase::Killing);
    }

    #[test]
    fn the_first_signal_drains_even_if_a_drain_is_under_way() {
        let lifecycle = Lifecycle::new();
        lifecycle.stop();
        let phases = [1, 2, 3].map(|count| {
            stop(&lifecycle, count, "SIGTERM");
            lifecycle.phase()
        });
        assert_eq!(phases, [Phase::Draining, Phase::Killing, Phase::Forcing]);
    }

    #[test]
    fn a_terminal_that_is_gone_drains_once_and_never_kills() {
        let lifecycle = Lifecycle::new();
        stop_without_terminal(&lifecycle);
        stop_without_terminal(&lifecycle);
        assert_eq!((lifecycle.phase(), lifecycle.is_awaited()), (Phase::Draining, true));
        stop(&lifecycle, 1, "SIGTERM");
        assert_eq!(lifecycle.phase(), Phase::Draining);
        stop(&lifecycle, 2, "SIGTERM");
        stop_without_terminal(&lifecycle);
        assert_eq!((lifecycle.phase(), lifecycle.reason()), (Phase::Killing, Some("the terminal is gone")));
    }

    #[tokio::test]
    async fn a_phase_is_reached_when_a_later_one_is() {
        let lifecycle = Lifecycle::new();
        let waiting = tokio::spawn({
            let lifecycle = lifecycle.clone();
            async move { lifecycle.reached(Phase::Draining).await }
        });
        lifecycle.stopped();
        waiting.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_has_no_deadline_until_a_stop_is_asked_for() {
        let lifecycle = Lifecycle::new();
        lifecycle.finish_because("enough");
        let enforced = lifecycle.clone();
        let enforcing = tokio::spawn(async move { enforced.enforce(Duration::from_secs(30)).await });
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!((lifecycle.phase(), lifecycle.is_awaited()), (Phase::Draining, false));
        stop(&lifecycle, 1, "SIGTERM");
        let asked = tokio::time::Instant::now();
        enforcing.await.unwrap();
        assert_eq!((lifecycle.phase(), asked.elapsed()), (Phase::Killing, Duration::from_secs(30)));
        assert_eq!(lifecycle.reason(), Some("enough"));
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_that_outlasts_its_deadline_is_killed() {
        let lifecycle = Lifecycle::new();
        lifecycle.stop();
        let asked = tokio::time::Instant::now();
        lifecycle.enforce(Duration::from_secs(30)).await;
        assert_eq!(lifecycle.phase(), Phase::Killing);
        assert_eq!(asked.elapsed(), Duration::from_secs(30));
    }
}
