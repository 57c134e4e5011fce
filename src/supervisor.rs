//! [`Supervisor`]: tells systemd, or whoever else has set `NOTIFY_SOCKET`, how the worker does. sd_notify(3) has the protocol.

use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

use crate::worker::Status;

/// How often the status is told, where nothing asks for more.
const PERIOD: Duration = Duration::from_secs(5);

/// How much longer a stop may take, told again in each period: three may be missed.
const EXTENSION: Duration = PERIOD.saturating_mul(4);

/// A service manager that wants to be told.
#[derive(Debug)]
pub(crate) struct Supervisor {
    watchdog: Option<Duration>,
    told: String,
}

impl Supervisor {
    /// The one that has started this process.
    pub(crate) fn of_this_process() -> Self {
        Self { watchdog: sd_notify::watchdog_enabled(), told: String::new() }
    }

    /// How often it wants to be told: twice in the time after which it takes silence for death.
    pub(crate) fn period(&self) -> Duration {
        self.watchdog.map_or(PERIOD, |limit| (limit / 2).min(PERIOD))
    }

    /// The settings have been checked, and signals are heard.
    pub(crate) fn ready(&self) {
        notify(&[NotifyState::Ready]);
    }

    /// The settings are read again; [`ready`](Self::ready) when that is done.
    pub(crate) fn reloading(&self) {
        let now = NotifyState::monotonic_usec_now();
        notify(&[Some(NotifyState::Reloading), now.ok()].into_iter().flatten().collect::<Vec<_>>());
    }

    /// The worker stops. That it takes its time is as it should be.
    pub(crate) fn stopping(&mut self, status: &Status) {
        notify(&[NotifyState::Stopping]);
        self.tell(status);
        self.extend();
    }

    /// The worker still stops, and is not stuck.
    pub(crate) fn extend(&self) {
        notify(&[NotifyState::ExtendTimeoutUsec(u32::try_from(EXTENSION.as_micros()).unwrap_or(u32::MAX))]);
    }

    /// The worker is alive, and this is what it does.
    pub(crate) fn tell(&mut self, status: &Status) {
        if self.watchdog.is_some() {
            notify(&[NotifyState::Watchdog]);
        }
        let text = summary(status);
        if text != self.told {
            notify(&[NotifyState::Status(&text)]);
            self.told = text;
        }
    }
}

/// `4 running, 12,345 done, 2 failed`, and what else is worth knowing.
fn summary(status: &Status) -> String {
    let counts = format!(
        "{} running, {} done, {} failed",
        grouped(status.running as u64),
        grouped(status.succeeded),
        grouped(status.failed)
    );
    match (status.state, status.connected) {
        ("running", true) => counts,
        ("running", false) => format!("{counts}; not connected to the server"),
        (state, _) => format!("{counts}; {state}"),
    }
}

/// A number with a comma between thousands.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

fn notify(state: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(state) {
        warn!(%error, "the service manager cannot be told");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_are_grouped() {
        for (number, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (12_345, "12,345"), (1_234_567, "1,234,567")] {
            assert_eq!(grouped(number), text);
        }
    }
}
