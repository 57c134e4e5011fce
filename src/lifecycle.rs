//! [`Lifecycle`]: how far a worker has come on its way to a stop, and what moves it there. [`WorkerSignals`]: what it is told
//! from outside.

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

/// A step on the way to a stop. Later steps are greater, and nothing leads back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Jobs are taken and run.
    Running,
    /// Nothing more is taken; what was taken is finished and reported.
    Draining,
    /// Running jobs are stopped and not reported; results that are there get one last try.
    Killing,
    /// The time that they were given to end is over.
    Forcing,
    /// Every job and report has ended: the stream may close.
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

/// The handle by which one run of a worker is stopped, and by which its parts hear of it.
///
/// Clones share one phase. It may be used from any thread or task, and only ever rises.
#[derive(Debug, Clone)]
pub struct Lifecycle {
    state: watch::Sender<LifecycleState>,
    reason: Arc<OnceLock<String>>,
}

/// The phase, and whether its end is awaited.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LifecycleState {
    phase: Phase,
    /// Whether somebody waits for the stop. A worker that has come to its end by itself may take its time.
    awaited: bool,
}

impl Default for Lifecycle {
    fn default() -> Self {
        let state = LifecycleState { phase: Phase::Running, awaited: false };
        Self { state: watch::Sender::new(state), reason: Arc::default() }
    }
}

impl Lifecycle {
    /// A lifecycle that is running.
    pub fn new() -> Self {
        Self::default()
    }

    /// Where it is now.
    pub fn phase(&self) -> Phase {
        self.state.borrow().phase
    }

    /// Asks for a graceful stop: what was taken is finished and reported first, within the deadline.
    pub fn stop(&self) {
        self.rise(Phase::Draining, true, None);
    }

    /// The same, and says why, unless it stops already.
    pub(crate) fn stop_because(&self, reason: impl Into<String>) {
        self.rise(Phase::Draining, true, Some(reason.into()));
    }

    /// Begins a graceful stop that nobody has asked for, and for which there is no deadline until somebody does.
    pub(crate) fn finish_because(&self, reason: impl Into<String>) {
        self.rise(Phase::Draining, false, Some(reason.into()));
    }

    /// Why it first began to stop, if that was said.
    pub fn reason(&self) -> Option<&str> {
        self.reason.get().map(String::as_str)
    }

    /// Asks for a stop now: running jobs are terminated, and handed out again by the server.
    pub fn kill(&self) {
        self.rise(Phase::Killing, true, None);
    }

    /// Asks for a stop without grace: what is being terminated is killed.
    pub fn force(&self) {
        self.rise(Phase::Forcing, true, None);
    }

    /// Everything has ended.
    pub(crate) fn stopped(&self) {
        self.rise(Phase::Stopped, true, None);
    }

    /// Moves up to `phase`; a lesser phase than the present one changes nothing.
    fn rise(&self, phase: Phase, awaited: bool, reason: Option<String>) {
        self.state.send_if_modified(|state| {
            if let Some(reason) = reason.filter(|_| state.phase == Phase::Running) {
                // It is set here alone, and phases do not come again.
                let _ = self.reason.set(reason);
            }
            let before = *state;
            *state = LifecycleState { phase: phase.max(before.phase), awaited: awaited || before.awaited };
            *state != before
        });
    }

    /// Changes whenever the phase does, or the stop begins to be awaited.
    pub(crate) fn changes(&self) -> watch::Receiver<LifecycleState> {
        self.state.subscribe()
    }

    /// Waits until `phase`, or a later one, has been reached.
    pub async fn reached(&self, phase: Phase) {
        // It fails only once every sender is gone, and `self` is one.
        let _ = self.state.subscribe().wait_for(|state| state.phase >= phase).await;
    }

    /// Whether it stops, and somebody waits for that.
    pub fn is_awaited(&self) -> bool {
        self.state.borrow().awaited
    }

    /// Waits until somebody waits for the stop.
    pub async fn awaited(&self) {
        let _ = self.state.subscribe().wait_for(|state| state.awaited).await;
    }

    /// Kills a drain that takes longer than `deadline` after somebody has asked for it. Ends when the worker has stopped.
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

/// What a signal asks for that is no stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// SIGHUP: read the settings again.
    Reload,
    /// SIGUSR1: say what is going on.
    Status,
    /// SIGUSR2: take nothing more.
    Pause,
    /// SIGCONT: take again.
    Resume,
}

impl Request {
    fn of(signal: i32) -> Option<Self> {
        match signal {
            SIGUSR1 => Some(Self::Status),
            SIGUSR2 => Some(Self::Pause),
            SIGCONT => Some(Self::Resume),
            _ => None,
        }
    }
}

/// How long a shell may take to end after it has sent SIGHUP to its jobs.
const SHELL_END: Duration = Duration::from_secs(2);

/// How often the worker looks for the terminal in that time.
const SHELL_END_LOOKS: u32 = 20;

/// The signals of a worker, heard from the moment [`listen`](Self::listen) returns.
pub struct WorkerSignals {
    signals: Signals,
    /// Each SIGHUP, with its sender.
    hang_ups: SignalsInfo<WithRawSiginfo>,
    terminal: Terminal,
}

impl fmt::Debug for WorkerSignals {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("WorkerSignals")
    }
}

impl WorkerSignals {
    /// Starts to hear the signals; until then they do what they do to any process.
    ///
    /// # Errors
    /// When the operating system refuses the handlers.
    pub fn listen() -> io::Result<Self> {
        // First, because a handler for SIGHUP hides whether SIGHUP was ignored.
        let terminal = Terminal::of_this_process();
        // A signal between the registration of its handler and the end of that would be lost.
        without_signals(|| {
            let signals = Signals::new([SIGTERM, SIGINT, SIGUSR1, SIGUSR2, SIGCONT])?;
            Ok(Self { signals, hang_ups: SignalsInfo::new([SIGHUP])?, terminal })
        })
    }

    /// The first SIGTERM or SIGINT drains, the second kills, the third does so without grace. A SIGHUP drains if the
    /// terminal is gone. All other signals are passed on: what they ask for may take its time, and no stop waits for that.
    /// Ends only when the process does.
    pub async fn obey(mut self, lifecycle: Lifecycle, requests: mpsc::UnboundedSender<Request>) {
        let mut count = 0;
        let ask = |request| {
            // A send fails only when the worker has stopped.
            let _ = requests.send(request);
        };
        loop {
            tokio::select! {
                Some(signal) = self.signals.next() => match Request::of(signal) {
                    Some(request) => ask(request),
                    None => {
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

/// Drains if the terminal goes soon after a SIGHUP of a process: a shell that ends sends one to its jobs first, as zsh does,
/// and bash with `huponexit`.
async fn stop_with_shell(terminal: Terminal, lifecycle: Lifecycle) {
    let mut looks = tokio::time::interval(SHELL_END / SHELL_END_LOOKS);
    for _ in 0..SHELL_END_LOOKS {
        looks.tick().await;
        if terminal.is_gone() {
            return stop_without_terminal(&lifecycle);
        }
    }
}

/// Drains because the terminal is gone. A shell passes the kernel's SIGHUP on, so that two of them ask for one drain.
fn stop_without_terminal(lifecycle: &Lifecycle) {
    let was_running = lifecycle.phase() == Phase::Running;
    lifecycle.stop_because("the terminal is gone");
    if was_running {
        info!(signal = "SIGHUP", "draining: the terminal is gone; finishing what was taken");
    }
}

/// One step further on the way to a stop. The step comes before the word about it: the log may be slow.
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
    async fn a_drain_that_nobody_has_asked_for_has_no_deadline_until_somebody_does() {
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
