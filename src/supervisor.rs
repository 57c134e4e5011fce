//! [`Supervisor`]: notifies systemd, or any service manager that sets `NOTIFY_SOCKET`, of the worker's state (sd_notify(3)).

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

use crate::worker::Status;

/// Interval between status messages, unless the watchdog needs a shorter one.
const PERIOD: Duration = Duration::from_secs(5);

/// The extension of the service manager's stop timeout that each `Message::Extend` asks for. The message is sent at least once per
/// `PERIOD`, so the loss of three messages in a row has no effect.
const EXTENSION: Duration = PERIOD.saturating_mul(4);

/// Maximum number of queued messages. If the service manager does not read them, further messages are dropped.
const MAX_WAITING: usize = 16;

/// The connection to a service manager.
#[derive(Debug)]
pub(crate) struct Supervisor {
    watchdog: Option<Duration>,
    told: String,
    messages: SyncSender<Message>,
}

#[derive(Debug)]
enum Message {
    Ready,
    Reloading,
    Stopping,
    Extend,
    Watchdog,
    Status(String),
}

impl Supervisor {
    /// Connects to the service manager that started this process. A separate thread sends the messages, because a send can block.
    ///
    /// # Errors
    /// If the thread cannot be started.
    pub(crate) fn of_this_process() -> io::Result<Self> {
        let (messages, queue) = sync_channel(MAX_WAITING);
        std::thread::Builder::new().name("notifier".to_owned()).spawn(move || tell_all(&queue))?;
        let watchdog = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        Ok(Self { watchdog, told: String::new(), messages })
    }

    /// Returns the interval at which to call `tell`, which is at most half the watchdog's limit.
    pub(crate) fn period(&self) -> Duration {
        self.watchdog.map_or(PERIOD, |limit| (limit / 2).min(PERIOD))
    }

    /// Reports that the worker is ready: the settings are valid, and signals are handled.
    pub(crate) fn ready(&self) {
        self.send(Message::Ready);
    }

    /// Reports that a reload has begun. [`ready`](Self::ready) reports its end.
    pub(crate) fn reloading(&self) {
        self.send(Message::Reloading);
    }

    /// Reports that the worker is stopping, and asks for an extension of the time limit of the stop.
    pub(crate) fn stopping(&mut self, status: &Status) {
        self.send(Message::Stopping);
        self.tell(status);
        self.extend();
    }

    /// Asks the service manager to extend the time limit of the stop by `EXTENSION`.
    pub(crate) fn extend(&self) {
        self.send(Message::Extend);
    }

    /// Notifies the watchdog, if there is one, and sends the status if its text has changed.
    pub(crate) fn tell(&mut self, status: &Status) {
        if self.watchdog.is_some() {
            self.send(Message::Watchdog);
        }
        let text = summary(status);
        if text != self.told {
            self.told.clone_from(&text);
            self.send(Message::Status(text));
        }
    }

    fn send(&self, message: Message) {
        // Drop the message if the queue is full. Waiting would hold up all jobs if the service manager does not read.
        let _ = self.messages.try_send(message);
    }
}

/// Sends messages until the [`Supervisor`] is dropped.
fn tell_all(queue: &Receiver<Message>) {
    let mut failed = false;
    for message in queue {
        match message.tell() {
            Ok(()) => failed = false,
            // Warn only about the first of several errors in a row.
            Err(error) => {
                if !std::mem::replace(&mut failed, true) {
                    warn!(%error, "the service manager cannot be told");
                }
            }
        }
    }
}

impl Message {
    fn tell(&self) -> io::Result<()> {
        match self {
            Self::Ready => sd_notify::notify(&[NotifyState::Ready]),
            Self::Reloading => sd_notify::notify(&[NotifyState::Reloading, NotifyState::monotonic_usec_now()?]),
            Self::Stopping => sd_notify::notify(&[NotifyState::Stopping]),
            Self::Extend => {
                let micros = u32::try_from(EXTENSION.as_micros()).unwrap_or(u32::MAX);
                sd_notify::notify(&[NotifyState::ExtendTimeoutUsec(micros)])
            }
            Self::Watchdog => sd_notify::notify(&[NotifyState::Watchdog]),
            Self::Status(text) => sd_notify::notify(&[NotifyState::Status(text)]),
        }
    }
}

/// Returns the status as text: `4 running, 12,345 done, 2 failed`, and a note if the worker is not in its normal state.
fn summary(status: &Status) -> String {
    let counts = format!(
        "{} running, {} done, {} failed",
        grouped(status.running as u64),
        grouped(status.succeeded),
        grouped(status.failed)
    );
    match (status.state, status.connected) {
        ("running", true) if status.finishing_streams > 0 => {
            format!("{counts}; reloaded, the old stream finishes its jobs")
        }
        ("running", true) => counts,
        ("running", false) => format!("{counts}; not connected to the server"),
        (state, _) => format!("{counts}; {state}"),
    }
}

/// Formats a number with commas between thousands.
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
