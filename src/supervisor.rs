//! [`Supervisor`]: tells systemd, or whoever else has set `NOTIFY_SOCKET`, how the worker does. sd_notify(3) has the protocol.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

use crate::worker::Status;

/// How often the status is told, where nothing asks for more.
const PERIOD: Duration = Duration::from_secs(5);

/// How much longer a stop may take, told again in each period: three may be missed.
const EXTENSION: Duration = PERIOD.saturating_mul(4);

/// How many messages may wait. A service manager that does not read is told nothing more; it has more to catch up with
/// than us.
const MAX_WAITING: usize = 16;

/// A service manager that wants to be told.
#[derive(Debug)]
pub(crate) struct Supervisor {
    watchdog: Option<Duration>,
    told: String,
    messages: SyncSender<Message>,
}

/// What it is told.
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
    /// The one that has started this process. It is told from a thread of its own, which waits for it if need be.
    ///
    /// # Errors
    /// When there cannot be such a thread.
    pub(crate) fn of_this_process() -> io::Result<Self> {
        let (messages, queue) = sync_channel(MAX_WAITING);
        std::thread::Builder::new().name("notifier".to_owned()).spawn(move || tell_all(&queue))?;
        let watchdog = sd_notify::watchdog_enabled().filter(|limit| !limit.is_zero());
        Ok(Self { watchdog, told: String::new(), messages })
    }

    /// How often it wants to be told: twice in the time after which it takes silence for death.
    pub(crate) fn period(&self) -> Duration {
        self.watchdog.map_or(PERIOD, |limit| (limit / 2).min(PERIOD))
    }

    /// The settings have been checked, and signals are heard.
    pub(crate) fn ready(&self) {
        self.send(Message::Ready);
    }

    /// The settings are read again; [`ready`](Self::ready) when that is done.
    pub(crate) fn reloading(&self) {
        self.send(Message::Reloading);
    }

    /// The worker stops. That it takes its time is as it should be.
    pub(crate) fn stopping(&mut self, status: &Status) {
        self.send(Message::Stopping);
        self.tell(status);
        self.extend();
    }

    /// The worker still stops, and is not stuck.
    pub(crate) fn extend(&self) {
        self.send(Message::Extend);
    }

    /// The worker is alive, and this is what it does.
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
        // Not waited for: whoever manages this process may be stopped, and jobs should not be.
        let _ = self.messages.try_send(message);
    }
}

/// Tells everything until nobody has anything to tell.
fn tell_all(queue: &Receiver<Message>) {
    let mut failed = false;
    for message in queue {
        match message.tell() {
            Ok(()) => failed = false,
            // Once is enough for a socket that is gone.
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

/// `4 running, 12,345 done, 2 failed`, and what else is worth knowing.
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
